"""Render the Markdown of an answer, block by block, on a terminal that can move its cursor.

A block is written as it is generated, and drawn again when it is complete: headings and emphasis in
bold and italic, lists with bullets, tables with lines. Fenced code stays as it is, so that it can
be copied. So does a block without markup, and one of which rich.markdown would drop a word.
"""

from __future__ import annotations

import io
import re
import shutil
from collections import Counter
from typing import Any

from .terminal import width

# of a line that begins a block of code: the marks, and what stands behind them
FENCE = re.compile(r" *(?P<marks>`{3,}(?=[^`]*$)|~{3,})(?P<info>.*)", re.DOTALL)
# a word, or a character of a writing without spaces
WORD = re.compile(r"[\u2e80-\U0003ffff]|[^\W_\u2e80-\U0003ffff]+")
PLAIN = frozenset({"paragraph_open", "paragraph_close", "inline", "text", "softbreak", "hardbreak"})
RENDERED = PLAIN | {
    "heading_open", "heading_close", "strong_open", "strong_close", "em_open", "em_close",
    "s_open", "s_close", "code_inline", "hr", "bullet_list_open", "bullet_list_close",
    "ordered_list_open", "ordered_list_close", "list_item_open", "list_item_close",
    "blockquote_open", "blockquote_close", "link_open", "link_close",
    "table_open", "table_close", "thead_open", "thead_close", "tbody_open", "tbody_close",
    "tr_open", "tr_close", "th_open", "th_close", "td_open", "td_close",
}  # fmt: skip


class Fence:
    """Follows lines of Markdown into and out of fenced code."""

    def __init__(self) -> None:
        self._marks = ""

    @property
    def is_open(self) -> bool:
        return bool(self._marks)

    def read(self, line: str) -> bool:
        """Read a line; return whether it begins or ends a block of code."""
        match = FENCE.match(line)
        if match is None:
            return False
        if not self._marks:
            self._marks = match["marks"]
            return True
        ends = match["marks"].startswith(self._marks) and not match["info"].strip()
        if ends:
            self._marks = ""
        return ends


class BlockRenderer:
    """Track the output to a terminal, and replace complete blocks by their rendered form."""

    def __init__(self) -> None:
        self._source = ""
        self._line = ""
        self._screen = Screen()
        self._fence = Fence()

    def add(self, text: str, written: str) -> str:
        """Return the text to write to the terminal after a piece of the answer.

        Args:
            text: a piece of the answer; only its last character may be a line break
            written: the output to the terminal for this piece, broken into lines
        """
        self._line += text
        self._screen.write(written)
        if not text.endswith("\n"):
            return ""
        line, self._line = self._line, ""
        if self._fence.read(line):
            drawn = self._draw(line) if self._fence.is_open else ""
            self._begin_block()
            return drawn
        if self._fence.is_open:
            self._begin_block()
            return ""
        if line.strip():
            self._source += line
            return ""
        drawn = self._draw(line)
        self._begin_block()
        return drawn

    def finish(self) -> str:
        """Return the text to write after the last piece of the answer."""
        source, self._source = self._source + self._line, ""
        if self._fence.is_open or not source.strip():
            return ""
        self._source = source.rstrip("\n") + "\n"
        drawn = self._draw("")
        return drawn if source.endswith("\n") else drawn.removesuffix("\n")

    def _begin_block(self) -> None:
        self._source, self._screen = "", Screen()

    def _draw(self, after: str) -> str:
        """Return the text that erases the block and writes it rendered, followed by `after`."""
        if not self._source.strip() or not self._screen.can_erase():
            return ""
        text = render(self._source, self._screen.columns)
        return "" if text is None else self._screen.erase() + text + after


class Screen:
    """The rows and columns that a text takes on a terminal."""

    def __init__(self) -> None:
        self.columns, self._lines = shutil.get_terminal_size()
        self._row = self._column = 0

    def write(self, text: str) -> None:
        for char in text:
            if char == "\n":
                self._row, self._column = self._row + 1, 0
                continue
            n = width(char)
            if self._column + n > self.columns:
                self._row, self._column = self._row + 1, 0
            self._column += n

    def can_erase(self) -> bool:
        """Return True if all rows are still on the screen and its width has not changed."""
        columns, lines = shutil.get_terminal_size()
        return columns == self.columns and self._row < min(lines, self._lines) - 1

    def erase(self) -> str:
        """Return the escape sequences that erase the text."""
        return "\r" + (f"\x1b[{self._row}A" if self._row else "") + "\x1b[J"


def render(source: str, columns: int) -> str | None:
    """Return a block of Markdown as text for a terminal, None if it is to be left as it is."""
    if "\t" in source:  # terminals differ in where a tab ends
        return None
    from markdown_it import MarkdownIt
    from rich.console import Console
    from rich.theme import Theme

    tokens = MarkdownIt().enable(["strikethrough", "table"]).parse(source)  # as rich.markdown does
    types = {inner.type for token in tokens for inner in [token, *(token.children or ())]}
    if not types <= RENDERED or types <= PLAIN:
        return None
    out = io.StringIO()
    console = Console(
        file=out, width=columns, force_terminal=True, highlight=False, emoji=False,
        theme=Theme({"markdown.code": "cyan"}),
    )  # fmt: skip
    lines = source.rstrip("\n").split("\n")
    console.print(_markdown("  \n".join(lines)))  # two spaces keep a line break
    rows = [row.rstrip(" ") for row in out.getvalue().strip("\n").split("\n")]
    text = "".join(f"{row}\n" for row in rows)
    return text if words(source) <= words(re.sub(r"\x1b\[[\d;]*m", "", text)) else None


def words(text: str) -> Counter[str]:
    """Return how often each word occurs in a text."""
    return Counter(WORD.findall(text))


def _markdown(source: str) -> Any:
    from rich.markdown import Heading, Markdown

    class LeftHeading(Heading):
        """A left-aligned heading; rich's own is centered or boxed."""

        def __rich_console__(self, console: Any, options: Any) -> Any:
            self.text.justify = "left"
            yield self.text

    class ChatMarkdown(Markdown):
        elements = {**Markdown.elements, "heading_open": LeftHeading}

    return ChatMarkdown(source, hyperlinks=False)
