"""Choose the CPU backend that uses the instructions of this CPU.

A build for one machine has one CPU backend. A wheel has several (.ci/wheels): lib/libggml-cpu.so
runs on any CPU, and cpu/NAME/libggml-cpu.so uses the instructions of newer ones. Nothing is
searched outside the package: ggml's own loader would also look in the folder of the executable and
in the current folder.
"""

from __future__ import annotations

import _ctypes
import ctypes
import os
from ctypes import c_char_p, c_int, c_void_p
from pathlib import Path

from ..errors import LibraryError

LIBRARY = "libggml-cpu.so"
_ignore = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)  # a log


def best_backend(folder: Path) -> Path | None:
    """Return the best CPU backend for this CPU, None if it is the one in folder.

    Args:
        folder: the folder of libllama.

    Raises LibraryError.
    """
    scores = {path: _score(path) for path in sorted(folder.parent.glob(f"cpu/*/{LIBRARY}"))}
    best = max(scores, key=lambda path: scores[path], default=None)
    return best if best is not None and scores[best] > 0 else None


def use_best_backend(lib: ctypes.CDLL, folder: Path) -> None:
    """Replace the CPU backend that libllama is linked to with the best one. Raises LibraryError."""
    path = best_backend(folder)
    if path is None:
        return
    find = ctypes.CFUNCTYPE(c_void_p, c_char_p)(("ggml_backend_reg_by_name", lib))
    load = ctypes.CFUNCTYPE(c_void_p, c_char_p)(("ggml_backend_load", lib))
    unload = ctypes.CFUNCTYPE(None, c_void_p)(("ggml_backend_unload", lib))
    linked = find(b"CPU")
    callback, data = c_void_p(), c_void_p()
    lib.ggml_log_get(ctypes.byref(callback), ctypes.byref(data))
    lib.ggml_log_set(_ignore, None)
    best = load(os.fsencode(path))  # logs the path
    lib.ggml_log_set(callback, data)
    if not best:
        raise LibraryError(f"{path} cannot be loaded; reinstall razor-local")
    if best != linked:  # equal if it was loaded before
        unload(linked)


def _score(path: Path) -> int:
    """Return ggml's score of a CPU backend: 0 if this CPU lacks some of its instructions."""
    try:
        backend = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryError(f"{path} cannot be loaded ({error}); reinstall razor-local") from error
    score: int = backend.ggml_backend_score()
    _ctypes.dlclose(backend._handle)
    return score
