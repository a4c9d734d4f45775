"""Exceptions of razor_local.

Each message says what was expected, what was found, and what to do. It names arguments of Llama
with option() and options(), so that the command line can name its own options instead.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from .printable import printable

# options of the command line, by argument or argument=value of Llama
_options: Mapping[str, str] = {}


@contextmanager
def command_line(options: Mapping[str, str]) -> Iterator[None]:
    """Make messages that are created inside the block name options of the command line.

    Args:
        options: options by argument of Llama ("n_ctx": "-c"), with or without a value
            ("razor=False": "--no-razor").
    """
    global _options
    before, _options = _options, options
    try:
        yield
    finally:
        _options = before


def option(argument: str) -> str:
    """Return the name of an argument of Llama for a message, such as "n_ctx" or "-c"."""
    return _options.get(argument, argument)


def options(**arguments: object) -> str:
    """Return arguments of Llama with values for a message.

    For example "n_ctx=4096, type_k='q8_0'", or "-c 4096 -ctk q8_0".
    """
    written = {f"{name}={value!r}": (name, value) for name, value in arguments.items()}
    if not _options:
        return ", ".join(written)
    return " ".join(
        _options.get(whole) or f"{option(name)} {value}" for whole, (name, value) in written.items()
    )


class RazorError(Exception):
    """Base of every error that razor_local raises on purpose; the CLI prints it as one line.

    Messages quote files, templates and llama.cpp's log; what a terminal would obey is escaped.
    """

    def __str__(self) -> str:
        return printable(super().__str__(), one_line=True)


class GGUFError(RazorError, ValueError):
    """A file that is not a GGUF, is damaged, or is larger in some count than any real model."""


class ProfileError(RazorError, ValueError):
    """Bad razor metadata, sidecar, head list, or a profile that does not fit the model."""


class ConvertError(RazorError):
    """An output file that convert does not write: it exists, is the model itself, does not fit."""


class NoProfileError(RazorError):
    """Measuring a model gave no profile, for example because no head stands out."""


class UnsupportedError(RazorError):
    """An architecture, feature or combination of options that razor refuses by name."""


class LibraryError(RazorError, ImportError):
    """The native library is missing, of another version, or another one was loaded before."""


class ContextFullError(RazorError):
    """A prompt or an answer does not fit the context; nothing was cut."""


class MemoryFullError(RazorError):
    """A model or its context does not fit into the free memory."""


class Stopped(Exception):
    """An operation ended because its stop() returned True. Nothing went wrong."""


class StateError(RazorError):
    """A saved state belongs to another plan, or the cache must be cleared first."""
