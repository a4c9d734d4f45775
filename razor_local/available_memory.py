"""Memory that is free now: of the machine, and of the devices that ggml knows."""

from __future__ import annotations

import ctypes
import os
from ctypes import c_char_p, c_size_t, c_void_p
from pathlib import Path

import psutil

from .common.machine import free_memory, n_cores
from .native import load
from .native.rpc import find_device

_PROC = Path("/proc/self")
# limit and usage of a control group, in versions 2 and 1
_CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)
_ARENA = 64 << 20  # bytes of address space that glibc reserves for a thread that allocates memory
_PROGRAM = 128 << 20  # bytes of address space for what Python and the library still load


def available_ram(n_unused: int = 0) -> int:
    """Return the bytes of memory that this process can still allocate without swapping.

    This is the memory that the system calls available (free memory and caches that can be dropped),
    or the rest of the limit of the process (ulimit -v), of its control group (a container) or of a
    group above it, if that is less.

    Args:
        n_unused: bytes of address space that the process will reserve without using the memory.
            They count only for ulimit -v.
    """
    space = _process_left()
    left = [_cgroup_left(folder) for folder in _cgroup_folders()]
    left.append(None if space is None else max(space - n_unused, 0))
    return min([free_memory(), *(n for n in left if n is not None)])


def space_of_program() -> int:
    """Return the bytes of address space that a computation takes besides models and contexts.

    These are the stacks and arenas of the threads, and what Python and the library load later.
    """
    stack = psutil.Process().rlimit(psutil.RLIMIT_STACK)[0] if hasattr(psutil, "RLIMIT_AS") else 0
    stack = 0 if stack == psutil.RLIM_INFINITY else stack
    return _PROGRAM + (n_cores() - 1) * (stack + _ARENA)


def _process_left() -> int | None:
    """Return the bytes left of the limit of this process's address space, None without a limit."""
    if not hasattr(psutil, "RLIMIT_AS"):  # only on Linux
        return None
    process = psutil.Process()
    limit = process.rlimit(psutil.RLIMIT_AS)[0]
    return None if limit == psutil.RLIM_INFINITY else max(limit - process.memory_info().vms, 0)


def _cgroup_folders() -> list[Path]:
    """Return the folders of this process's memory control groups, and of the groups above them."""
    folders = []
    try:
        groups = [line.split(":", 2) for line in (_PROC / "cgroup").read_text().splitlines()]
        for line in (_PROC / "mountinfo").read_text().splitlines():
            _, _, _, root, mount, *rest = line.split()
            kind, _, controllers = rest[rest.index("-") + 1 :]
            for _, names, path in groups:
                is_memory = "memory" in names.split(",") and "memory" in controllers.split(",")
                if not (kind == "cgroup2" and not names) and not (kind == "cgroup" and is_memory):
                    continue
                inside = os.path.relpath(path, root)  # a container may see only a subtree
                inner = Path() if inside.startswith("..") else Path(inside)
                folders += [Path(mount) / group for group in (inner, *inner.parents)]
    except (OSError, ValueError):  # not on Linux
        return []
    return folders


def _cgroup_left(folder: Path) -> int | None:
    """Return the bytes left of a control group's limit, None without one."""
    for limit, used in _CGROUP_FILES:
        try:
            lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
            stat = dict(line.split() for line in lines)
            # cached parts of files are freed when memory is short
            cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            n_max, n_used = (int((folder / name).read_text()) for name in (limit, used))
            return max(n_max - n_used + cached, 0)
        except (OSError, ValueError):  # "max": no limit
            continue
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
    return find_device(name) or find(name.encode())
