"""RazorAttention for GGUF models: llama.cpp with a smaller KV cache for local heads.

`from razor_local import Llama` loads the native library. Everything else works without it, so
plans, profiles and the command line's help stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from . import hooks as _hooks
from .bindings import install as _install

_EXPORTS = {
    "Llama": "llama",
    "Memory": "memory",
    "SequenceStats": "memory",
    "Chat": "chat",
    "Profile": "profile",
    "ModelShape": "model_shape",
    "read_model_shape": "model_file",
    "read_profile": "model_file",
    "read_sidecar": "profile",
    "Plan": "plan",
    "make_plan": "plan",
    "Scores": "scores",
    "calibrate": "converters.calibrate",
    "choose_heads": "scores",
    "profile_from_scores": "scores",
    "RazorError": "errors",
    "GGUFError": "errors",
    "ProfileError": "errors",
    "UnsupportedError": "errors",
    "LibraryError": "errors",
    "ContextFullError": "errors",
    "MemoryFullError": "errors",
    "StateError": "errors",
    "Stopped": "errors",
}

__all__ = list(_EXPORTS)

_install()


def _auto_profile(*args: Any, **options: Any) -> Any:
    from .auto_profile import auto_profile

    return auto_profile(*args, **options)


_hooks.auto_profile = _auto_profile


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("razor-local")
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
