"""The loaded library, and the bindings (llama_cpp) that use it.

Importing this module loads them.
"""

from __future__ import annotations

from .library import load

library = load()  # before llama_cpp, which would load another library

import llama_cpp  # noqa: E402
import llama_cpp._internals  # noqa: E402
from llama_cpp import llama_cpp as C  # noqa: E402

__all__ = ["C", "library", "llama_cpp"]
