"""Make `import llama_cpp` load the patched library.

This works after `import razor_local`. With the wheel of the bindings that .ci/wheels builds, it
works without that import, too: the package llama_cpp in that wheel calls use_library().
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

VARIABLE = "LLAMA_CPP_LIB_PATH"  # the bindings read it once, when they are imported


@contextmanager
def use_library() -> Iterator[None]:
    """Set VARIABLE while the block imports llama_cpp, unless it is already set."""
    from .errors import LibraryError
    from .native import library_folder, use_best_backend

    try:
        folder = None if VARIABLE in os.environ else library_folder()
    except LibraryError:  # the bindings may have their own library
        folder = None
    if folder is None:
        yield
        return
    os.environ[VARIABLE] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
    use_best_backend(sys.modules["llama_cpp.llama_cpp"]._lib, folder)


class Finder(MetaPathFinder):
    """Import llama_cpp with use_library(), unless VARIABLE is set."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "llama_cpp" or VARIABLE in os.environ:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            with use_library():
                run(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Make `import llama_cpp` find our library, without loading anything now."""
    if "llama_cpp" not in sys.modules and not any(isinstance(f, Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, Finder())
