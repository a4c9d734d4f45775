"""Find the retrieval heads of well-known models in data/profiles.json (see docs/format.md).

A list belongs to a model, not to a file. It applies to every quantization with the name,
architecture and attention shape of its model.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from .model_shape import ModelShape
from .profile import Profile

PATH = Path(__file__).parent / "data" / "profiles.json"


@dataclass(frozen=True)
class KnownProfile:
    """A list of retrieval heads that the package ships.

    Attributes:
        model: the name of the model.
        names: accepted values of general.name.
        arch, n_layer, n_head, n_head_kv, head_dim: the shape of the model, the same in every layer.
        heads: a string of 0 and 1 per layer, 1 for a retrieval head.
        source: who measured the heads, and how.
        license: the license of the list.
        record: further keys of razor.calibration.*, such as the outcome of planted facts.
    """

    model: str
    names: tuple[str, ...]
    arch: str
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    heads: tuple[str, ...]
    source: str
    license: str
    record: dict[str, str | int]

    def fits(self, shape: ModelShape) -> bool:
        """Return True if a model has this name, architecture and shape."""
        here = (shape.arch, shape.n_head, shape.n_head_kv, shape.head_dim_k, shape.head_dim_v)
        n_head, n_head_kv = ((n,) * self.n_layer for n in (self.n_head, self.n_head_kv))
        return here == (self.arch, n_head, n_head_kv, self.head_dim, self.head_dim) and any(
            _plain(name) == _plain(shape.name) for name in self.names
        )

    def profile(self) -> Profile:
        """Return the profile, with the default window and sinks."""
        record: dict[str, str | int] = {"source": self.source, "license": self.license}
        return Profile(
            retrieval=tuple(np.array([int(c) for c in layer], np.uint8) for layer in self.heads),
            calibration=record | self.record,
        )


@cache
def lists() -> tuple[KnownProfile, ...]:
    """Return all lists of the package."""
    entries = json.loads(PATH.read_text(encoding="utf-8"))["profiles"]
    for entry in entries:
        entry["names"], entry["heads"] = tuple(entry["names"]), tuple(entry["heads"])
    return tuple(KnownProfile(**entry) for entry in entries)


def find(shape: ModelShape) -> KnownProfile | None:
    """Return the list for a model, None if there is none."""
    return next((known for known in lists() if known.fits(shape)), None)


def _plain(name: str) -> str:
    """Normalize a name, so that "Meta-Llama-3.1-8B" and "Meta Llama 3.1 8B" are equal."""
    return " ".join(re.findall("[a-z0-9]+", name.lower()))
