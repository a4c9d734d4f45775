"""Write an answer to stdout while it is generated."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable

import click

from ..printable import printable
from ..prompt.reasoning import Thought
from .markdown_output import BlockRenderer, Fence
from .terminal import echo, is_dumb, say, width

MIN_COLUMNS = 20  # narrower terminals break lines themselves


class AnswerWriter:
    """Write the pieces of an answer.

    A pipe or a file gets the pieces unchanged. On a terminal they are made printable, lines wrap
    between words, Markdown is rendered, and reasoning is dimmed. Use it in a with statement, whose
    end writes the last word.

    Args:
        hide_thinking: whether to leave out the reasoning
    """

    def __init__(self, hide_thinking: bool) -> None:
        self._hide_thinking = hide_thinking
        self._is_thinking = False
        self._is_line_open = False
        self._held = ""  # a carriage return, until it is known whether a line feed follows
        self._wrap = WordWrap() if sys.stdout.isatty() else None
        self._blocks = BlockRenderer() if self._wrap is not None and not is_dumb() else None

    def __enter__(self) -> AnswerWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._wrap is not None:
            held = printable(self._held)
            self._put(held, self._wrap.add(held) + self._wrap.rest(), self._is_thinking)
            if self._blocks is not None:
                self._put_drawn(self._blocks.finish())

    def write(self, piece: str) -> None:
        was_thinking, self._is_thinking = self._is_thinking, isinstance(piece, Thought)
        if self._is_thinking and self._hide_thinking:
            if not was_thinking and sys.stderr.isatty():
                say("(thinking)")
        elif self._wrap is None:
            click.echo(piece, nl=False, color=True)  # otherwise click removes escape sequences
        else:
            piece = self._held + piece
            self._held = "\r" if piece.endswith("\r") else ""
            text = printable(piece.removesuffix("\r"))
            if was_thinking != self._is_thinking:
                self._put("", self._wrap.rest(), was_thinking)
                if was_thinking and self._is_line_open and not text.startswith("\n"):
                    self._put("", self._wrap.add("\n"), True)
            for part in text.splitlines(keepends=True):
                self._put(part, self._wrap.add(part), self._is_thinking)

    def _put(self, text: str, written: str, is_thought: bool) -> None:
        """Write the terminal output of a piece of text."""
        if written:
            echo(written, nl=False, dim=is_thought)
            self._is_line_open = not written.endswith("\n")
        if self._blocks is not None and not is_thought:
            self._put_drawn(self._blocks.add(text, written))

    def _put_drawn(self, text: str) -> None:
        if text:
            click.echo(text, nl=False, color=True)


def _columns() -> int:
    return shutil.get_terminal_size().columns


class WordWrap:
    """Wrap lines between words while text comes in, and hold back incomplete words.

    Words longer than a line, and code between two lines of three backquotes, are left to the
    terminal. A line may be broken beside any wide character, such as those of Chinese.

    Args:
        columns: returns the width of a line, which may change
    """

    def __init__(self, columns: Callable[[], int] = _columns) -> None:
        self._columns = columns
        self._column = 0
        self._space = ""  # before the word
        self._word = ""
        self._is_long = False  # the word is longer than a line, its beginning was given out
        self._line = ""
        self._fence = Fence()

    def add(self, text: str) -> str:
        """Add some text; return what can be written."""
        columns = self._columns()
        if columns < MIN_COLUMNS:
            return self.rest() + text
        out = []
        for char in text:
            if char == "\n":
                out.append(self.rest() + char)
                self._fence.read(self._line)
                self._column, self._line = 0, ""
                continue
            self._line += char
            if self._fence.is_open:
                out.append(char)
            elif char in " \t":
                out.append(self._take_word(columns))
                self._space += char
                self._is_long = False
            else:
                is_wide = width(char) > 1
                if is_wide:
                    out.append(self._take_word(columns))
                self._word += char
                if is_wide:
                    out.append(self._take_word(columns))
                elif len(self._word) >= columns:
                    out.append(self._take_word(columns))
                    self._is_long = True
        return "".join(out)

    def rest(self) -> str:
        """Return what is held back."""
        columns = self._columns()
        rest = self._take_word(columns) + self._space
        self._column += len(self._space)
        self._space, self._is_long = "", False
        return rest

    def _take_word(self, columns: int) -> str:
        space, word = self._space, self._word
        if not word:
            return ""
        self._space = self._word = ""
        n_columns = sum(map(width, word))
        if self._column and not self._is_long and self._column + len(space) + n_columns > columns:
            self._column = n_columns
            return f"\n{word}"
        self._column += len(space) + n_columns
        return space + word
