"""Texts to hide facts in: generated plain English, or a folder of the user's texts."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from random import Random
from typing import Protocol

from ..common.inputs import open_input
from ..errors import RazorError

# Sentences made of these contain no names and no numbers, so they cannot be mistaken for a fact.
PEOPLE = (
    "the miller", "an old sailor", "the baker's daughter", "a tired traveller", "the gardener",
    "two brothers", "the captain", "a quiet woman", "the schoolmaster", "a young painter",
    "the shepherd", "my neighbour", "the clockmaker", "a stranger", "the doctor's wife",
    "three fishermen", "the librarian", "a boy with a lantern", "the carpenter", "her uncle",
)  # fmt: skip
DEEDS = (
    "walked down to the river", "waited for the ferry", "closed the shutters",
    "told a long story about the war", "carried wood into the kitchen", "looked for the lost key",
    "wrote a letter to an old friend", "sat by the fire without a word", "mended the broken fence",
    "watched the ships come in", "bought bread and a little cheese", "fed the hens",
    "sang the songs of the harvest", "counted the stars over the barn", "opened the garden gate",
    "lost the way in the fog", "swept the narrow stairs", "asked for a cup of tea",
    "painted the door green", "listened to the rain", "put the books back on the shelf",
    "took the road to the village", "dreamed of a house by the sea", "laughed at the weather",
)  # fmt: skip
TIMES = (
    "In the evening", "Before sunrise", "On the day of the fair", "When the snow had melted",
    "After the storm", "Late in the autumn", "Once again", "A week later", "Toward noon",
    "As the bells began to ring", "While the others slept", "In those days", "Sooner or later",
)  # fmt: skip
PLACES = (
    "behind the church", "near the old mill", "at the edge of the wood", "by the harbour",
    "in the market square", "under the lime trees", "on the other side of the hill",
    "beside the well", "along the canal", "at the end of the lane", "in the upper room",
)  # fmt: skip
ENDINGS = (
    "and nobody asked why", "as if nothing had happened", "for the wind was cold",
    "though it was already late", "and the dog came along", "because there was time enough",
    "and then it began to rain", "which was not unusual there", "until the lamps were lit",
    "and the whole street knew of it", "but the house stayed dark", "and all was still again",
)  # fmt: skip
ASIDES = (
    "The air smelled of apples and smoke.", "No one in the village remembered a warmer spring.",
    "The road was longer than it looked on the map.", "It had been a good year for the orchards.",
    "A cart went slowly over the bridge.", "The letters lay unopened on the table.",
    "There was a light in one of the windows.", "The tide was out and the sand was wet.",
    "Everything in the room had its place.", "The kettle stood on the stove as always.",
    "Far away a dog barked at the moon.", "The leaves were turning yellow by the wall.",
)  # fmt: skip


class Haystack(Protocol):
    """A text to hide facts in.

    Attributes:
        name: its name in reports.
        digest: a hash of the text, which identifies it when a run is resumed.
    """

    name: str
    digest: str

    def pieces(self, rng: Random) -> Iterator[str]:
        """Yield sentences with the white space after them, from anywhere in the text."""

    def __contains__(self, text: str) -> bool:
        """Return True if the haystack contains a text, ignoring case."""


class MadeText:
    """Endless random English sentences, about 2 million different ones."""

    name = "built in"

    def __init__(self) -> None:
        parts = (PEOPLE, DEEDS, TIMES, PLACES, ENDINGS, ASIDES)
        self._words = "\n".join(chain(*parts)).lower()
        self.digest = hashlib.sha256(self._words.encode()).hexdigest()[:16]

    def pieces(self, rng: Random) -> Iterator[str]:
        while True:
            for _ in range(rng.randint(3, 7)):
                yield _sentence(rng) + " "
            yield _sentence(rng) + "\n\n"

    def __contains__(self, text: str) -> bool:
        return text.lower() in self._words


class FolderText:
    """The .txt files of a folder, one after the other in the order of their names.

    Files that are not UTF-8 are read as Latin-1, like many old electronic texts. Lines within a
    paragraph are joined. Raises RazorError for a folder without texts, OSError.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise RazorError(f"{folder} is not a folder, expected one with .txt files")
        files = sorted(folder.glob("*.txt"))
        texts = []
        for file in files:
            with open_input(file, "a text file") as opened:
                raw = opened.read()
            try:
                text = raw.decode("utf-8-sig")
            except UnicodeDecodeError:
                text = raw.decode("latin-1")
            texts.append(text.replace("\r\n", "\n").strip())
        text = "\n\n".join(filter(None, texts))
        if not text:
            raise RazorError(f"{folder} has no .txt files with text in them")
        text = _without_blanks(text)
        text = re.sub(r"(?<!\n)\n(?!\n)", " ", text)
        self._pieces = _split(re.sub(r"\n{2,}", "\n\n", text))
        self._text = text.lower()
        self.name = folder.name or str(folder)
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:16]

    def pieces(self, rng: Random) -> Iterator[str]:
        """Yield every sentence once, from a random one to the end and then from the beginning."""
        start = rng.randrange(len(self._pieces))
        yield from self._pieces[start:]
        yield from self._pieces[:start]

    def __contains__(self, text: str) -> bool:
        return text.lower() in self._text


def _without_blanks(text: str) -> str:
    """Empty the blank lines, and strip the ends of the lines before them."""
    lines = [line if line.strip(" \t") else "" for line in text.split("\n")]
    followed = zip(lines, lines[1:], strict=False)
    return "\n".join([a if b else a.rstrip(" \t") for a, b in followed] + lines[-1:])


def _sentence(rng: Random) -> str:
    if rng.random() < 0.15:
        return rng.choice(ASIDES)
    person, deed = rng.choice(PEOPLE), rng.choice(DEEDS)
    place = f" {rng.choice(PLACES)}" if rng.random() < 0.6 else ""
    ending = f", {rng.choice(ENDINGS)}" if rng.random() < 0.6 else ""
    if rng.random() < 0.5:
        return f"{rng.choice(TIMES)} {person} {deed}{place}{ending}."
    return f"{person[0].upper()}{person[1:]} {deed}{place}{ending}."


def _split(text: str) -> list[str]:
    """Split a text into sentences with the white space after them."""
    pieces = re.findall(r"\S.*?(?:[.!?][\"'”’)\]]*\s+|\n\n|\Z)", text + "\n", re.S)
    return [piece if piece[-1].isspace() else piece + " " for piece in pieces]
