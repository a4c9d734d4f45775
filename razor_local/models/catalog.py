"""The catalog: short names of well-known models, and the published file of each one."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .quants import split_parts

CATALOG = Path(__file__).parents[1] / "data" / "catalog.json"


@dataclass(frozen=True)
class Wheel:
    """A wheel of the Python package registry that holds the model file.

    bytes, sha256: of the wheel. member: the model file in it.
    """

    package: str
    version: str
    bytes: int
    sha256: str
    member: str


@dataclass(frozen=True)
class Entry:
    """A name of the catalog: a file in a Hugging Face repository.

    bytes and sha256 of the file: None where they are not known. wheel: another place that has it.
    latest: whether the name without its tag means this entry, as in ollama.
    """

    name: str
    repo: str
    file: str
    license: str
    bytes: int | None = None
    sha256: str | None = None
    wheel: Wheel | None = None
    latest: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def family(self) -> str:
        """The name without its tag."""
        return self.name.partition(":")[0]

    def choose(self, paths: list[str]) -> list[str]:
        """The entry's file among the paths of its repository, with all its parts; [] without it."""
        return split_parts(self.file, paths) if self.file in paths else []


@cache
def entries() -> dict[str, Entry]:
    """All entries by name."""
    found = {}
    for item in json.loads(CATALOG.read_text(encoding="utf-8")):
        wheel = Wheel(**item.pop("wheel")) if "wheel" in item else None
        found[item["name"]] = Entry(**item, wheel=wheel)
    return found


def find(name: str) -> Entry | None:
    """Return the entry of a name, or None.

    Upper and lower case do not matter. A name without a tag or with :latest means the entry that is
    marked as latest.
    """
    name = name.lower()
    entry = entries().get(name)
    if entry is not None:
        return entry
    family = name.removesuffix(":latest")
    return next((e for e in entries().values() if e.latest and e.family == family), None)


def search(text: str) -> list[Entry]:
    """The entries whose name, repository or license contains each word of text."""
    words = text.lower().split()
    return [
        entry
        for entry in entries().values()
        if all(word in f"{entry.name} {entry.repo} {entry.license}".lower() for word in words)
    ]


def nearest(name: str) -> list[str]:
    """Up to three names that begin with this one or are spelled like it."""
    name = name.lower()
    same_family = [known for known in entries() if known.startswith(name)]
    similar = difflib.get_close_matches(name, entries(), n=3, cutoff=0.5)
    return list(dict.fromkeys(same_family + similar))[:3]
