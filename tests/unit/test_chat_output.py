"""Answers on a terminal: lines broken between words while the text comes in."""

from __future__ import annotations

import os
import random
import re
import shutil
import textwrap

import pytest

from razor_local.cli import terminal
from razor_local.cli.chat_output import WordWrap

WORDS = (
    "a an the word words wordy sentence, (parenthesis) www.example.org/a/long/path?x=1 é.".split()
)


def wrapped(text, columns, seed=0):
    """Text added in random pieces."""
    rng, wrap, at, out = random.Random(seed), WordWrap(lambda: columns), 0, ""
    while at < len(text):
        n = rng.choice([1, 2, 3, 7, 30])
        out += wrap.add(text[at : at + n])
        at += n
    return out + wrap.rest()


@pytest.mark.parametrize("columns", [20, 33, 40, 79])
def test_lines_are_broken_as_textwrap_does_it(columns):
    for seed in range(50):
        rng = random.Random(seed)
        words = [w for w in WORDS if len(w) < columns]
        paragraphs = [" ".join(rng.choices(words, k=rng.randint(0, 60))) for _ in range(4)]
        options = {"break_long_words": False, "break_on_hyphens": False}
        expected = "\n".join(textwrap.fill(p, columns, **options) for p in paragraphs)
        assert wrapped("\n".join(paragraphs), columns, seed) == expected


def test_only_line_breaks_in_place_of_spaces_are_new():
    for seed in range(300):
        rng = random.Random(seed)
        text = "".join(rng.choices("ab   \n\t-漢é🙂`x" + "word", k=rng.randint(0, 300)))
        found = wrapped(text, rng.randint(20, 40), seed)
        assert re.sub(r"[ \t\n]", "", found) == re.sub(r"[ \t\n]", "", text)
        assert found.count("\n") >= text.count("\n")
        assert wrapped(text, 30, 1) == wrapped(text, 30, 2)


def test_white_space_is_kept_where_no_line_is_broken():
    text = "  indented\n\n    more  of it\n- a list \n\tand a tab\n"
    assert wrapped(text, 79) == text
    assert wrapped("a  b" + " " * 20 + "c", 20) == "a  b\nc"


def test_long_words_are_left_to_the_terminal():
    url = "https://example.org/" + "x" * 100
    for seed in range(20):
        assert wrapped(f"See {url} for more.", 30, seed) == f"See\n{url}\nfor more."
        assert wrapped(f"{url}\n{url}", 30, seed) == f"{url}\n{url}"


def test_wide_characters_need_no_spaces():
    assert wrapped("漢字" * 11, 20) == "\n".join(["漢字漢字漢字漢字漢字"] * 2 + ["漢字"])
    assert WordWrap(lambda: 20).add("漢字") == "漢字"  # at once
    assert wrapped("abc漢字 def", 20) == "abc漢字 def"


def test_code_is_left_as_it_is():
    code = "```python\n" + "print('a b c d e f g h i j k l m n o p') # long\n" * 2 + "```\n"
    text = "Some words before the code\n" + code + "and after it there are words"
    expected = "Some words before\nthe code\n" + code + "and after it there\nare words"
    for seed in range(20):
        assert wrapped(text, 20, seed) == expected
    assert wrapped(f"  {code}a b", 20).startswith("  ```python\nprint('a b c d e f")


def test_words_come_as_soon_as_they_are_complete():
    wrap = WordWrap(lambda: 20)
    assert wrap.add("Hel") == "" and wrap.add("lo") == "" and wrap.add(" wor") == "Hello"
    assert wrap.add("ld.\n") == " world.\n" and wrap.add("x") == "" and wrap.rest() == "x"


def test_narrow_terminals_break_lines_themselves():
    assert (
        wrapped("some words that are longer than this", 10)
        == "some words that are longer than this"
    )


def test_messages_are_folded_between_words(monkeypatch):
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_: os.terminal_size((24, 20)))
    text = "KV cache 15.5 MiB instead of 48.0 MiB (−68 %)\n\nheads   4 of 24"
    text += "\na/path/longer/than/a/line"
    assert terminal.fold(text).split("\n") == [
        "KV cache 15.5 MiB", "instead of 48.0 MiB", "(−68 %)", "", "heads   4 of 24",
        "a/path/longer/than/a/line",
    ]  # fmt: skip
