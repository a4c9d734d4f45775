"""How an answer is written to stdout while it is generated."""

from __future__ import annotations

import sys

import click

from ..prompt.reasoning import Thought
from .terminal import echo, say


class AnswerWriter:
    """Writes the pieces of an answer: printable on a terminal, as they are to a pipe or a file.

    What the model thinks is dim on a terminal.

    Args:
        hide_thinking: leave it out
    """

    def __init__(self, hide_thinking: bool) -> None:
        self._hide_thinking = hide_thinking
        self._is_terminal = sys.stdout.isatty()
        self._is_thinking = False

    def write(self, piece: str) -> None:
        is_thought = isinstance(piece, Thought)
        if is_thought and self._hide_thinking:
            if not self._is_thinking and sys.stderr.isatty():
                say("(thinking)")
            self._is_thinking = True
        elif self._is_terminal:
            echo(piece, nl=False, dim=is_thought)
        else:
            click.echo(piece, nl=False, color=True)  # without it click takes escape sequences out
