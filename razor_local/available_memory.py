"""Memory that is free now: of the machine, and of the devices that ggml knows."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_size_t, c_void_p
from pathlib import Path

import psutil

from .common.machine import free_memory
from .native import load

# of versions 2 and 1: limit, usage, statistics
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def available_ram() -> int:
    """Return the bytes of memory that this process can still allocate without swapping.

    This is the memory that the system calls available (free memory and caches that can be dropped),
    or the rest of the limit of a control group (a container) or of the process (ulimit -v) if that
    is less.
    """
    left = [*(_cgroup_left(*files) for files in _CGROUP_FILES), _process_left()]
    return min([free_memory(), *(n for n in left if n is not None)])


def _process_left() -> int | None:
    """Return the bytes left of the limit of this process's address space, None without a limit."""
    if not hasattr(psutil, "RLIMIT_AS"):  # only on Linux
        return None
    process = psutil.Process()
    limit = process.rlimit(psutil.RLIMIT_AS)[0]
    return None if limit == psutil.RLIM_INFINITY else max(limit - process.memory_info().vms, 0)


def _cgroup_left(limit: str, used: str, statistics: str) -> int | None:
    """Bytes left of a control group's limit, by its files; None without one."""
    try:
        lines = Path(statistics).read_text(encoding="ascii").splitlines()
        stat = dict(line.split() for line in lines)
        # parts of files that were read are let go of when memory is short
        cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
        return max(int(Path(limit).read_text()) - int(Path(used).read_text()) + cached, 0)
    except (OSError, ValueError):  # "max": no limit
        return None


def device_memory(name: str) -> tuple[int, int]:
    """Return free and total bytes of a ggml device such as "CUDA0"; (0, 0) if unknown."""
    device, ask = _device(name), load().lib.ggml_backend_dev_memory
    ask.argtypes = [c_void_p, ctypes.POINTER(c_size_t), ctypes.POINTER(c_size_t)]
    ask.restype = None
    if not device:
        return 0, 0
    free, total = c_size_t(), c_size_t()
    ask(device, ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


def device_description(name: str) -> str:
    """Return the description of a ggml device, such as "NVIDIA H100"; its name if unknown."""
    device, ask = _device(name), load().lib.ggml_backend_dev_description
    ask.argtypes, ask.restype = [c_void_p], c_char_p
    return ((ask(device) if device else None) or name.encode()).decode("utf-8", "replace")


def _device(name: str) -> int | None:
    find = load().lib.ggml_backend_dev_by_name
    find.argtypes, find.restype = [c_char_p], c_void_p
    return find(name.encode())
