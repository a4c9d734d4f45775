"""Refuse native calls in forked processes.

A forked process does not have the threads of the library and would wait for them forever.
"""

from __future__ import annotations

import os

from ..errors import RazorError

_has_computed = False
_is_forked = False


def computed() -> None:
    """Remember that the library has started threads, or a GPU, in this process."""
    global _has_computed
    _has_computed = True


def is_forked() -> bool:
    """Return True in a process that was forked after computed()."""
    return _is_forked


def refuse_after_fork() -> None:
    """Raise RazorError in a process that was forked after computed()."""
    if _is_forked:
        raise RazorError(
            "this process was forked from one in which razor_local had computed, and does not have"
            " its threads; start processes with multiprocessing's 'spawn' instead of 'fork'"
        )


def _after_fork() -> None:
    global _is_forked
    _is_forked = _has_computed


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
