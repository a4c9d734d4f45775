"""RazorAttention for GGUF models: llama.cpp with a smaller KV cache for local heads.

`from razor_local import Llama` loads the native library. Everything else works without it, so
plans, profiles and the command line's help stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import hooks as _hooks
from .bindings import install as _install

_EXPORTS = {
    "Llama": "llama",
    "Memory": "memory",
    "SequenceStats": "memory",
    "Chat": "chat",
    "Sampling": "chat",
    "Turn": "chat",
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

if TYPE_CHECKING:  # the same names, for type checkers
    from .chat import Chat as Chat
    from .chat import Sampling as Sampling
    from .chat import Turn as Turn
    from .converters.calibrate import calibrate as calibrate
    from .errors import ContextFullError as ContextFullError
    from .errors import GGUFError as GGUFError
    from .errors import LibraryError as LibraryError
    from .errors import MemoryFullError as MemoryFullError
    from .errors import ProfileError as ProfileError
    from .errors import RazorError as RazorError
    from .errors import StateError as StateError
    from .errors import Stopped as Stopped
    from .errors import UnsupportedError as UnsupportedError
    from .llama import Llama as Llama
    from .memory import Memory as Memory
    from .memory import SequenceStats as SequenceStats
    from .model_file import read_model_shape as read_model_shape
    from .model_file import read_profile as read_profile
    from .model_shape import ModelShape as ModelShape
    from .plan import Plan as Plan
    from .plan import make_plan as make_plan
    from .profile import Profile as Profile
    from .profile import read_sidecar as read_sidecar
    from .scores import Scores as Scores
    from .scores import choose_heads as choose_heads
    from .scores import profile_from_scores as profile_from_scores

    __version__: str

__all__ = list(_EXPORTS)

_install()


def _auto_profile(*args: Any, **options: Any) -> Any:
    from .auto_profile import auto_profile

    return auto_profile(*args, **options)


_hooks.auto_profile = _auto_profile


if not TYPE_CHECKING:  # with __getattr__(), a type checker would accept any name

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("razor-local")
        if name not in _EXPORTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
