"""Record the screen of a chat that uses every command and key of docs/chat.md.

`python -m tests.support.chat_screen` writes tests/native/chat_screen.txt, which tests compare with
chats. Answers are left out, and so are numbers that depend on the model or the machine.
"""

from __future__ import annotations

import os
import re
import tempfile
from itertools import islice
from pathlib import Path
from random import Random

import pyte

from razor_local.evals.haystack import MadeText
from tests.support.native_build import ROOT
from tests.support.terminal import UP, Terminal, paste, terminal
from tests.support.texts import FACT, QUESTION

EXPECTED = ROOT / "tests/native/chat_screen.txt"
COLUMNS, LINES = 160, 400  # large enough that nothing scrolls away
ENTER, TAB, CTRL_C, CTRL_U = "\r", "\t", "\x03", "\x15"

SCHEMA = '{"type": "object", "properties": {"code": {"type": "integer"}}, "required": ["code"]}'
# the input, step by step; {folder} is a folder with the file facts.txt
STEPS = (
    f"/system Answer briefly.{ENTER}",
    "{paste}" + f"{QUESTION}{ENTER}",
    f"And what is the code of Marlow?{ENTER}",
    f"/regen{ENTER}",
    f"/edit {QUESTION}{ENTER}",
    f"/edit{ENTER}",
    f"{CTRL_U}{QUESTION}{ENTER}",
    f"/undo{ENTER}",
    f"{UP}{UP}{CTRL_U}/cont{TAB}{ENTER}",
    f"/save first{ENTER}",
    f"/clear{ENTER}",
    f"/context{ENTER}",
    f"/file {{folder}}/facts.txt{ENTER}",
    f"{QUESTION}{ENTER}",
    f"/load first{ENTER}",
    f"{QUESTION}{ENTER}",
    f"/sessions{ENTER}",
    f"/sessions rm first{ENTER}",
    f"/load first{ENTER}",
    f"/set{ENTER}",
    f"/set temp 0.5{ENTER}",
    f"/set temp hot{ENTER}",
    f"/set predict 12{ENTER}",
    f"{QUESTION}{ENTER}",
    f"/set predict -1{ENTER}",
    f"/json {SCHEMA}{ENTER}",
    f"{QUESTION}{ENTER}",
    f"/json off{ENTER}",
    f"//help{ENTER}",
    f"/usr/bin/ls is a path{ENTER}",
    f"/nonsense{ENTER}",
    f'"""{ENTER}',
    f"A message of{ENTER}",
    f'several lines."""{ENTER}',
    f"an unfinished message{CTRL_C}",
    f"/stats{ENTER}",
    f"/help{ENTER}",
    f"exit{ENTER}",
)

MASKS = (
    (r"\d{4}-\d\d-\d\d \d\d:\d\d", "<time>"),
    (r"^\[[█▒░]+\]", "[<bar>]"),
    (r"KV cache .*", "KV cache <bytes>"),
    (r"^(device|weights|heads|rewind|compute|session first:|first  ).*", r"\1 <values>"),
    (r"[\d.,]*\d (MiB|of|tokens|left|are left|new tokens|per second|tok/s)", r"<n> \1"),
    (r"<n> new tokens, <n> (tok/s|per second)", "<n> new tokens"),  # short prompts have no rate
    (r"context \d+/\d+", "context <n>/<n>"),
    (r"<n> of \d+ tokens", "<n> of <n> tokens"),
)
WORDS = "<the words of the model>"


class Screen:
    """A terminal in memory that returns its new rows after each input."""

    def __init__(self, t: Terminal) -> None:
        self._terminal = t
        self._screen = pyte.Screen(COLUMNS, LINES)
        self._stream = pyte.Stream(self._screen)
        self._fed = self._row = 0

    def type(self, text: str) -> list[str]:
        """Type a text. Return the new rows once the chat waits for input again, or has ended."""
        self._terminal.send(text)
        while not self._waits():
            pass
        rows = self._new_rows()
        self._row = self._screen.cursor.y
        return rows

    def _waits(self) -> bool:
        if not self._terminal.settle(0.1):
            return True
        rows = self._new_rows()
        if len(rows) > 1 and rows[-1] in (">>>", "..."):  # below what was typed
            return True
        if not self._terminal.settle(1.0):
            return True
        rows = self._new_rows()
        return bool(rows and re.match(r"(>>>|\.\.\.)( |$)", rows[-1]))

    def _new_rows(self) -> list[str]:
        self._stream.feed(self._terminal.raw[self._fed :])
        self._fed = len(self._terminal.raw)
        rows = [row.rstrip() for row in self._screen.display[self._row :]]
        return rows[: max((i + 1 for i, row in enumerate(rows) if row), default=0)]


def transcript(model: str | None = None) -> str:
    """Return the rows of a chat with the built-in or another model, without the answers."""
    rows: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        pieces = list(islice(MadeText().pieces(Random(1)), 30))
        text = "".join([*pieces[:10], FACT + " ", *pieces[10:]]).strip()
        Path(folder, "facts.txt").write_text(text)
        args = ["--temp", "0", "-c", "8192", *([model] if model else [])]
        env = {"XDG_DATA_HOME": folder, "LINES": str(LINES), "COLUMNS": str(COLUMNS)}
        env |= {"XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", folder)}
        with terminal(*args, **env) as t:
            screen = Screen(t)
            for step in ("", *STEPS):
                typed = step.replace("{paste}", paste(text)).replace("{folder}", folder)
                rows = rows[:-1] + screen.type(typed)
            code, _ = t.wait()
        rows = [row.replace(folder, "<folder>") for row in rows]
    for pattern, instead in MASKS:
        rows = [re.sub(pattern, instead, row) for row in rows]
    first = next(i for i, row in enumerate(rows) if row.startswith(">>>"))  # below the header
    return "\n".join([*_without_words(rows[first:]), f"exit code {code}", ""])


def _without_words(rows: list[str]) -> list[str]:
    """Replace each answer, the rows between a message and the line of numbers."""
    kept: list[str] = []
    for row in rows:
        if row.startswith("prompt ") and " | answer " in row:
            start = max(i for i, one in enumerate(kept) if one.startswith((">>> ", "... ")))
            notes = [one for one in kept[start + 1 :] if "limit of --predict" in one]
            kept[start + 1 :] = [WORDS, *notes]
        kept.append(row)
    return kept


if __name__ == "__main__":
    EXPECTED.write_text(transcript(), encoding="utf-8")
    print(EXPECTED)
