"""Find the reason why a native call failed.

If razor refuses something on a thread, the reason is that thread's last error. All other reasons
are error lines of the log. Call clear() before a native call and reason() after it.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

from ..errors import RazorError
from . import log

# functions of the bindings that llama_razor_try_... functions replace: the result that means
# failure, and the message to complete with llama_razor_last_error() (None: the caller does that)
_TRIED: dict[str, tuple[int | None, str | None]] = {
    "llama_model_load_from_file": (None, None),
    "llama_init_from_model": (None, None),
    "llama_tokenize": (
        -(2**31),
        "the text cannot be split into tokens, the vocabulary in the model file is malformed or"
        " has no tokens for single bytes",
    ),
    "llama_sampler_sample": (-1, "the next token cannot be chosen"),
}
TRIED_FUNCTIONS = {name: name.replace("llama_", "llama_razor_try_", 1) for name in _TRIED}

# functions whose NULL result the bindings do not check, and what it means
_GRAMMAR = "the grammar is malformed: a rule has bad syntax, is not defined or begins with itself"
_NOT_NULL = {
    "llama_sampler_init_grammar": _GRAMMAR,
    "llama_sampler_init_grammar_lazy_patterns": _GRAMMAR,
    "llama_adapter_lora_init": "lora_path is not a LoRA adapter for this model",
}

_OUT_OF_MEMORY = re.compile(
    r"(failed|unable) to allocate|cannot allocate|insufficient memory|out of memory|bad_alloc",
    re.IGNORECASE,
)


def clear(lib: ctypes.CDLL) -> None:
    """Forget why earlier calls of this thread failed. This also ends an override."""
    log.clear(lib)
    lib.llama_razor_set_override(None)  # resets the last error


def last_error(lib: ctypes.CDLL) -> str:
    """Return why razor refused the last call of this thread, or ""."""
    return (lib.llama_razor_last_error() or b"").decode("utf-8", "replace")


def reason(lib: ctypes.CDLL, otherwise: str) -> str:
    """Return why the last call of this thread failed.

    Args:
        otherwise: what to return where the library gives no reason.
    """
    return last_error(lib) or "; ".join(log.error_lines(lib)[-2:]) or otherwise


def is_out_of_memory(lib: ctypes.CDLL) -> bool:
    """Return True if the last call of this thread failed because memory ran out."""
    return any(map(_OUT_OF_MEMORY.search, [last_error(lib), *log.error_lines(lib)]))


def raise_in_bindings(bindings: Any, lib: ctypes.CDLL) -> None:
    """Make functions of the bindings raise RazorError instead of ending the process."""
    for name, (failure, what) in _TRIED.items():
        function = getattr(lib, TRIED_FUNCTIONS[name])
        plain = getattr(bindings.llama_cpp, name)
        function.argtypes, function.restype = plain.argtypes, plain.restype
        if what is not None:
            function.errcheck = _raise_on(failure, what, lambda: last_error(lib))
        for module in (bindings, bindings.llama_cpp):
            setattr(module, name, function)

    def last_line() -> str:
        return "".join(log.error_lines(lib)[-1:])

    for name, what in _NOT_NULL.items():
        getattr(bindings.llama_cpp, name).errcheck = _raise_on(None, what, last_line)


def _raise_on(failure: int | None, what: str, why: Callable[[], str]) -> Callable[..., Any]:
    """Return an errcheck function that raises RazorError on failure (None means NULL)."""

    def check(result: Any, _function: Any, _arguments: Any) -> Any:
        if result == failure if failure is not None else not result:
            reason = why()
            raise RazorError(f"{what}: {reason}" if reason else what)
        return result

    return check
