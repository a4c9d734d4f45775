"""Describe the machine, its graphics cards and the code, and measure free memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil


def describe_machine() -> dict[str, Any]:
    """Describe the CPU, the cores of this process, the memory in bytes, the system and its load."""
    return {
        "cpu": _cpu_name(),
        "cores": n_cores(),
        "memory_total": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "load_average": psutil.getloadavg()[0],
    }


def n_cores() -> int:
    """Return the number of physical cores that this process may use.

    A second thread on the same core does not speed up memory-bound work.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(psutil.cpu_count(logical=False) or usable or 1, usable or 1)


def free_memory() -> int:
    """Return the bytes that can be allocated without swapping."""
    return int(psutil.virtual_memory().available)


def describe_code() -> dict[str, Any]:
    """Return the installed version and the commit of the checkout, with "-dirty" if modified."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("razor-local")
    except PackageNotFoundError:
        installed = None
    return {"version": installed, "commit": _commit()}


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None  # an installed package, even inside another repository
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty"]
    command += ["--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip() or None
    return None


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        with suppress(OSError, subprocess.SubprocessError):
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
            return done.stdout.strip()
    return platform.processor() or platform.machine()


def nvidia_gpus() -> dict[int, Any]:
    """Return NVML's handles of NVIDIA GPUs by index, {} without its library or driver."""
    import pynvml

    found = {}
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            with suppress(pynvml.NVMLError):
                found[index] = pynvml.nvmlDeviceGetHandleByIndex(index)
    return found


def describe_gpus() -> list[dict[str, Any]]:
    """Describe the NVIDIA GPUs: name, memory in bytes, driver version, newest supported CUDA.

    Fields that the driver does not report are None.
    """
    import pynvml

    def ask(function: Callable[..., Any], *args: Any) -> Any:
        with suppress(pynvml.NVMLError):
            return function(*args)
        return None

    found = []
    for gpu in nvidia_gpus().values():
        memory = ask(pynvml.nvmlDeviceGetMemoryInfo, gpu)
        cuda = ask(pynvml.nvmlSystemGetCudaDriverVersion_v2)
        found.append(
            {
                "name": ask(pynvml.nvmlDeviceGetName, gpu),
                "memory_total": memory and int(memory.total),
                "driver": ask(pynvml.nvmlSystemGetDriverVersion),
                "cuda": cuda and f"{cuda // 1000}.{cuda % 1000 // 10}",
            }
        )
    return found


_CARDS = Path("/sys/class/drm")  # on Linux
_MIN_MEMORY = 2**30  # bytes; a GPU with less is part of a processor


def find_gpus() -> list[tuple[str, str]]:
    """Return the GPUs of this machine that llama.cpp can use: name and backend of each.

    The backend is "cuda", "metal" or "vulkan". NVIDIA's GPUs are found through their driver, and
    others on Linux through the kernel. GPUs that are part of a processor are left out, except
    Apple's.
    """
    found = [(gpu["name"] or "NVIDIA GPU", "cuda") for gpu in describe_gpus()]
    if sys.platform == "darwin" and platform.machine() == "arm64":
        found.append((f"{_cpu_name()} GPU", "metal"))
    for device in sorted(_CARDS.glob("card*/device")):
        vendor = _read(device / "vendor")
        memory = _read(device / "mem_info_vram_total")  # only AMD's driver has this file
        if vendor == "0x1002" and memory.isdigit() and int(memory) > _MIN_MEMORY:
            found.append((f"AMD GPU with {int(memory) / 2**30:.0f} GiB", "vulkan"))
        if vendor == "0x8086" and not device.resolve().name.startswith("0000:00:"):
            found.append(("Intel GPU", "vulkan"))  # those on the first bus are part of a processor
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
