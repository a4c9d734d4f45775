"""Choose where the rewind log of a context is, and how large it may become.

The log holds what folds drop, so that a sequence can go back to any position without evaluating
again (docs/architecture.md, "The rewind log").
"""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass

from .available_memory import available_ram
from .common.files import cache_folder
from .errors import UnsupportedError, option, options

MODES = ("off", "ram", "disk", "auto")
MAX_BYTES = 4 << 30  # of a log without a limit
MAX_SHARE = 0.1  # likewise, of what is free


@dataclass(frozen=True)
class RewindLog:
    """The log that a context will have; the names are those of native.make_params().

    Attributes:
        rewind: "off", "ram" or "disk".
        rewind_limit: bytes.
        rewind_folder: the folder of the file, "" if the log is not on disk.
    """

    rewind: str = "off"
    rewind_limit: int = 0
    rewind_folder: str = ""


def choose_rewind_log(rewind: str, limit: int | None, on_device: bool) -> tuple[RewindLog, str]:
    """Return the log for arguments of Llama(), and why there is none ("" if there is one).

    Args:
        rewind: one of MODES. "auto" is "disk" if the cache is in host memory. It is "off" if the
            cache is on a device, where the cost of the log has not been measured, or if nothing can
            be written to the user's cache folder.
        limit: bytes; None: up to MAX_BYTES, and to MAX_SHARE of what is free.
        on_device: whether the cache is on a device.

    Raises:
        UnsupportedError: an argument is out of range, or the folder cannot be used.
    """
    if rewind not in MODES:
        raise UnsupportedError(
            f"{option('rewind')} is {rewind!r}, expected 'auto', 'disk', 'ram' or 'off'"
        )
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise UnsupportedError(
            f"{option('rewind_limit')} is {limit!r}, expected a number of bytes from 1; for no log"
            f" pass {options(rewind='off')}"
        )
    if rewind == "off":
        return RewindLog(), options(rewind="off")
    if rewind == "auto" and on_device:
        return RewindLog(), f"the cache is on a device; {options(rewind='ram')} switches it on"
    if rewind == "ram":
        return RewindLog("ram", limit or limit_in_ram()), ""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        free = shutil.disk_usage(folder).free
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        why = f"the user's cache folder cannot be used ({error})"
        if rewind == "auto":
            return RewindLog(), why
        raise UnsupportedError(
            f"{why}; set XDG_CACHE_HOME to another one, or pass {options(rewind='ram')}"
        ) from error
    return RewindLog("disk", limit or _limit(free), str(folder)), ""


def limit_in_ram() -> int:
    """Return the default limit in bytes of what is kept in main memory."""
    return _limit(available_ram())


def _limit(free: int) -> int:
    return max(1, min(MAX_BYTES, int(MAX_SHARE * free)))
