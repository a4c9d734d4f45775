"""Find the patched llama.cpp library, bind its C API, and explain why its calls fail.

Importing this loads nothing; load() does.
"""

from __future__ import annotations

from .cpu import best_backend, use_best_backend
from .fork import computed, is_forked, refuse_after_fork
from .library import (
    API_VERSION,
    DISABLE_ENV,
    LIB_ENV,
    REINSTALL,
    Build,
    Native,
    file_of,
    is_disabled,
    library_folder,
    load,
    make_params,
)
from .structs import BufferStats, LayerStats, Memory, Params, SeqStats, Stats

__all__ = [
    "API_VERSION",
    "DISABLE_ENV",
    "LIB_ENV",
    "REINSTALL",
    "BufferStats",
    "Build",
    "LayerStats",
    "Memory",
    "Native",
    "Params",
    "SeqStats",
    "Stats",
    "best_backend",
    "computed",
    "file_of",
    "is_disabled",
    "is_forked",
    "library_folder",
    "load",
    "make_params",
    "refuse_after_fork",
    "use_best_backend",
]
