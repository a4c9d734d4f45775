"""Make `import llama_cpp` after `import razor_local` load the patched library."""

from __future__ import annotations

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

VARIABLE = "LLAMA_CPP_LIB_PATH"  # the bindings read it once, when they are imported


class Finder(MetaPathFinder):
    """Set VARIABLE while llama_cpp is imported, unless somebody else has."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "llama_cpp" or VARIABLE in os.environ:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            from .errors import LibraryError
            from .native import library_folder, use_best_backend

            try:
                folder = library_folder()
            except LibraryError:
                run(module)  # the bindings may have a library of their own
                return
            os.environ[VARIABLE] = str(folder)
            try:
                run(module)
            finally:
                os.environ.pop(VARIABLE, None)
            use_best_backend(module.llama_cpp._lib, folder)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Make `import llama_cpp` find our library, without loading anything now."""
    if "llama_cpp" not in sys.modules and not any(isinstance(f, Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, Finder())
