"""Keep the error lines of the native log for exceptions, and print the whole log on request.

This replaces the log callback of the bindings, which prints warnings as errors.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading

from ..printable import printable


def show(lib: ctypes.CDLL, shown: bool) -> None:
    """Let the library print its log to stderr from now on, or keep it quiet."""
    lib.llama_razor_log_keep(shown)


def clear(lib: ctypes.CDLL) -> None:
    """Forget the error lines."""
    lib.llama_razor_log_clear()


def error_lines(lib: ctypes.CDLL) -> list[str]:
    """Return the error lines since clear(), oldest first, at most 8."""
    buffer = ctypes.create_string_buffer(1 << 14)
    lib.llama_razor_log_get(buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace").splitlines()


_ended = threading.Lock()


def _on_end(sentence: bytes) -> None:
    """Print a sentence before a failed assertion or an uncaught exception ends the process."""
    if not _ended.acquire(blocking=False):  # several threads may fail at once
        return
    said = " ".join(sentence.decode("utf-8", "replace").split())
    line = f"Error: {printable(said)}; the model file is malformed, or this is a bug\n"
    with contextlib.suppress(OSError):  # stderr may be closed
        os.write(2, line.encode())


on_end = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(_on_end)
