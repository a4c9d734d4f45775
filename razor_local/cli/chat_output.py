"""Writes an answer to stdout while it is generated."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable

import click

from ..printable import printable
from ..prompt.reasoning import Thought
from .terminal import echo, say

MIN_COLUMNS = 20  # narrower terminals break lines themselves
FENCE = "```"


class AnswerWriter:
    """Writes the pieces of an answer: to a pipe or a file as they are, to a terminal printable.

    On a terminal lines are broken between words, and what the model thinks is dim. Use it in a with
    statement, whose end writes the last word.

    Args:
        hide_thinking: leave out what the model thinks
    """

    def __init__(self, hide_thinking: bool) -> None:
        self._hide_thinking = hide_thinking
        self._is_thinking = False
        self._wrap = WordWrap() if sys.stdout.isatty() else None

    def __enter__(self) -> AnswerWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._wrap is not None:
            self._put(self._wrap.rest(), self._is_thinking)

    def write(self, piece: str) -> None:
        was_thinking, self._is_thinking = self._is_thinking, isinstance(piece, Thought)
        if self._is_thinking and self._hide_thinking:
            if not was_thinking and sys.stderr.isatty():
                say("(thinking)")
        elif self._wrap is None:
            click.echo(piece, nl=False, color=True)  # without it click takes escape sequences out
        else:
            if was_thinking != self._is_thinking:
                self._put(self._wrap.rest(), was_thinking)
            self._put(self._wrap.add(printable(piece)), self._is_thinking)

    def _put(self, text: str, is_thought: bool) -> None:
        if text:
            echo(text, nl=False, dim=is_thought)


def _columns() -> int:
    return shutil.get_terminal_size().columns


class WordWrap:
    """Breaks lines between words while text comes in, and holds back words that are not complete.

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
        self._line = ""  # the beginning of the line
        self._is_code = False

    def add(self, text: str) -> str:
        """Add some text; return what can be written."""
        columns = self._columns()
        if columns < MIN_COLUMNS:
            return self.rest() + text
        out = []
        for char in text:
            if char == "\n":
                out.append(self.rest() + char)
                self._is_code ^= self._line.startswith(FENCE)
                self._column, self._line = 0, ""
                continue
            if len(self._line) < len(FENCE) and not (char == " " and not self._line):
                self._line += char
            if self._is_code:
                out.append(char)
            elif char in " \t":
                out.append(self._take_word(columns))
                self._space += char
                self._is_long = False
            else:
                is_wide = _width(char) > 1
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
        width = sum(map(_width, word))
        if self._column and not self._is_long and self._column + len(space) + width > columns:
            self._column = width
            return f"\n{word}"
        self._column += len(space) + width
        return space + word


def _width(char: str) -> int:
    """Columns that a character takes."""
    if char.isascii():
        return 1
    from prompt_toolkit.utils import get_cwidth

    return get_cwidth(char)
