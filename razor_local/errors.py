"""Exceptions of razor_local.

Each message says what was expected, what was found, and what to do.
"""

from .printable import printable


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


class UnsupportedError(RazorError):
    """An architecture, feature or combination of options that razor refuses by name."""


class LibraryError(RazorError, ImportError):
    """The native library is missing, of another version, or another one was loaded before."""


class ContextFullError(RazorError):
    """A prompt or an answer does not fit the context; nothing was cut."""


class Stopped(Exception):
    """An operation ended because its stop() returned True. Nothing went wrong."""


class StateError(RazorError):
    """A saved state belongs to another plan, or the cache must be cleared first."""
