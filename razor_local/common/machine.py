"""What a benchmark records of the machine and the code, and the energy meters it can read."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    """CPU, cores this process may use, memory in bytes, system, load average (None: not told)."""
    return {
        "cpu": _cpu_name(),
        "cores": n_cores(),
        "memory_total": _meminfo("MemTotal"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def n_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory() -> int | None:
    """Bytes that can be allocated without swapping; None where the system does not tell."""
    return _meminfo("MemAvailable")


def describe_code() -> dict[str, Any]:
    """Version, and the commit of the checkout this code runs from; "-dirty" if it was changed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("razor-local")
    except PackageNotFoundError:
        installed = None
    return {"version": installed, "commit": _commit()}


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None  # an installed package, even if it lies in someone else's repository
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


def _meminfo(name: str) -> int | None:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def describe_gpus(nvml: Any = None) -> list[dict[str, Any]]:
    """NVIDIA's GPUs by NVML: name, memory in bytes, version of the driver, the latest CUDA that it
    can run; None for what is not told. Empty without NVML."""
    lib = nvml or load_nvml()
    count, found = ctypes.c_uint(), []
    if lib is None or lib.nvmlInit_v2() or lib.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return []
    text, cuda = ctypes.create_string_buffer(96), ctypes.c_int()
    driver = None if lib.nvmlSystemGetDriverVersion(text, len(text)) else _decoded(text)
    untold = lib.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
    for index in range(count.value):
        device, memory = ctypes.c_void_p(), _NvmlMemory()
        if lib.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)):
            continue
        unnamed = lib.nvmlDeviceGetName(device, text, len(text))
        name = None if unnamed else _decoded(text)
        unknown = lib.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
        found.append(
            {
                "name": name,
                "memory_total": None if unknown else int(memory.total),
                "driver": driver,
                "cuda": None if untold else f"{cuda.value // 1000}.{cuda.value % 1000 // 10}",
            }
        )
    return found


def _decoded(text: Any) -> str:
    return text.value.decode("utf-8", "replace")


class _NvmlMemory(ctypes.Structure):
    """nvmlMemory_t"""

    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


# -- energy


def load_nvml() -> Any:
    name = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
    with suppress(OSError):
        return ctypes.CDLL(name)
    return None
