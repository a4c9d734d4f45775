"""Markdown in answers: the screen of a terminal after text that arrives in pieces."""

from __future__ import annotations

import io
import os
import random
import re
import shutil

import pyte
import pytest

from razor_local.cli.chat_output import AnswerWriter
from razor_local.prompt.reasoning import Thought

COLUMNS, LINES = 40, 24


class TerminalFile(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def write(monkeypatch):
    """Return a function that writes pieces of an answer and returns the terminal output."""
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_: os.terminal_size((COLUMNS, LINES)))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def write(pieces: list[str]) -> str:
        out = TerminalFile()
        monkeypatch.setattr("sys.stdout", out)
        with AnswerWriter(hide_thinking=False) as writer:
            for piece in pieces:
                writer.write(piece)
        return out.getvalue()

    return write


def screen_of(output: str) -> pyte.Screen:
    screen = pyte.Screen(COLUMNS, LINES)
    pyte.Stream(screen).feed(output.replace("\n", "\r\n"))
    return screen


def rows(output: str) -> list[str]:
    return [row.rstrip() for row in screen_of(output).display if row.strip()]


def pieces_of(text: str, seed: int) -> list[str]:
    rng, at, pieces = random.Random(seed), 0, []
    while at < len(text):
        n = rng.randint(1, 9)
        pieces.append(text[at : at + n])
        at += n
    return pieces


ANSWER = """\
Here is **what** you need, in `three` steps that are longer than a line:

# Steps

1. First *one*
2. Second

3. Third, after a blank line

| name | value |
|------|-------|
| a    | 1     |

The code:
```python
x = "**not bold**"

y = x
```
That is **all**
and a second line."""

SCREEN = """\
Here is what you need, in three steps
that are longer than a line:
Steps
 1 First one
 2 Second
 3 Third, after a blank line
 name  value
 ───────────
 a     1
The code:
```python
x = "**not bold**"
y = x
```
That is all
and a second line."""


@pytest.mark.parametrize("seed", range(8))
def test_blocks_are_rendered_whatever_the_pieces(write, seed):
    assert rows(write(pieces_of(ANSWER, seed))) == SCREEN.split("\n")


def test_markup_becomes_style(write):
    screen = screen_of(write(["a **b** *c*"]))
    assert screen.display[0].rstrip() == "a b c"
    cells = screen.buffer[0]
    assert (cells[0].bold, cells[2].bold, cells[4].italics) == (False, True, True)


@pytest.mark.parametrize(
    "text",
    [
        "no markup at all, 2 * 3 * 4 = 24, snake_case_names",
        "raw <b>HTML</b> is **kept**",
        "an image ![alt](url) is **kept**",
        "    indented **code**\n",
        "```\n**code**\n```\n",
        "```\n**code that never ends**\n\n# really\n",
        "two\nlines &lt;\n\nand a paragraph",
    ],
)
def test_what_has_no_markup_or_would_lose_some_is_not_drawn_again(write, text):
    output = write(pieces_of(text, 1))
    assert "\x1b" not in output
    assert output.split() == text.split()


def test_blocks_higher_than_the_screen_are_left_as_they_are(write):
    text = "".join(f"- item **{i}**\n" for i in range(LINES + 5))
    assert write([text]) == text


def test_a_terminal_that_changes_its_width_keeps_the_block(write, monkeypatch):
    sizes = iter([(40, 24)] * 3)

    def size(*_):
        return os.terminal_size(next(sizes, (60, 24)))

    monkeypatch.setattr(shutil, "get_terminal_size", size)
    assert "\x1b" not in write(["**bold** words", " and more words", " and an end"])


@pytest.mark.parametrize("gap", ["", "\n", "\n\n"])
def test_thoughts_stay_above_the_answer(write, gap):
    output = write([Thought("I think **so**."), f"{gap}**Yes**, it is."])
    assert rows(output) == ["I think **so**.", "Yes, it is."]


def test_no_markdown_without_escape_sequences(write, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert write(["**bold**"]) == "**bold**"


def test_wide_characters_take_two_columns(write):
    text = "漢字" * 15 + " **fett**\nx y **z**"
    shown = rows(write(pieces_of(text, 3)))
    assert "".join("".join(shown).split()) == "漢字" * 15 + "fettxyz"
    assert "**" not in "".join(shown)


LOSSES = [
    "| name | link |\n|--|--|\n| **a** | https://example.com/a/very/long/path/file.html |",
    "|" + " a |" * 9 + "\n|" + "-|" * 9 + "\n|" + " **lengthy** |" * 9,
    "| **a** | b |\n|-|-|\n| 1 | 2 | 3 lost |",
    "**Sources**\n\n[1]: https://a.b/c\n# Notes",
    '[link](https://a.b "title") **x**',
    "> " * 25 + "**deep**",
    "**b** &#x202e;abc",
    "**b**\ttab",
]


@pytest.mark.parametrize("text", LOSSES)
def test_no_word_is_lost(write, text):
    shown = "".join("".join(screen_of(write([text + "\n"])).display).split())
    assert [word for word in re.findall(r"\w+", text) if word not in shown] == []


@pytest.mark.parametrize(
    "code",
    [
        "```python\nTitle\n~~~~~\nreturn __init__  # **x**\n```",
        "````\n```\n**x**\n```\n````",
        "~~~md\n```\n**x**\n```\n~~~",
        "```\n``` not the end\n**x**\n```",
    ],
)
def test_code_ends_with_marks_as_those_it_began_with(write, code):
    assert write(pieces_of(code + "\n\n", 2)) == code + "\n\n"
    assert rows(write(pieces_of(code + "\n\n**bold**", 2)))[-1] == "bold"


def test_backquotes_within_a_line_begin_no_code(write):
    assert rows(write(["```x``` is code\n\n**bold**"])) == ["x is code", "bold"]


def test_carriage_returns_before_line_feeds_are_not_shown(write):
    assert write(["one\r", "\ntwo\r\n", "three\r"]) == "one\ntwo\nthree\\r"


@pytest.mark.parametrize("seed", range(40))
def test_random_markdown_keeps_its_words(write, seed):
    rng = random.Random(seed)
    marks = ["**", "*", "`", "# ", "- ", "1. ", "> ", "| ", "\n", "\n\n", "```\n", "~~", "[", "](",
             ")", "<b>", "&amp;", "\\", "---\n", " ", " ", " ", "\n    "]  # fmt: skip
    parts = []
    for i in range(60):
        parts += [rng.choice(marks), f"w{i} "]
    text = "".join(parts)
    screen = pyte.Screen(COLUMNS, 400)
    pyte.Stream(screen).feed(write(pieces_of(text, seed)).replace("\n", "\r\n"))
    shown = "".join("".join(screen.display).split())
    assert [i for i in range(60) if f"w{i}" not in shown] == []
