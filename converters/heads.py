"""Read published head lists, which name the retrieval heads of a model.

The content determines which of three kinds a file is:

heads   text, a row per layer and a column per KV head, 1 = retrieval head, 0 = local head: the
        published RazorAttention lists
gates   the same with numbers between 0 and 1: DuoAttention's full_attention_heads.tsv
scores  JSON, {"layer-head": score or list of scores} over query heads: Retrieval_Head and HeadKV

Gates and scores only rank the heads. The user decides which share of them is kept.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..common.inputs import open_input
from ..errors import ProfileError
from ..model_shape import MAX_HEADS, MAX_LAYERS, ModelShape, describe_heads
from ..profile import (
    DEFAULT_COMPENSATION,
    DEFAULT_SINKS,
    DEFAULT_WINDOW_DIVISOR,
    DEFAULT_WINDOW_MIN,
    MAX_WINDOW,
    Profile,
    split_heads,
)
from ..scores import FORMAT

MAX_BYTES = 8 << 20  # the published JSON files have up to 3 MB: hundreds of scores per head
MAX_ENTRIES = 65_536  # of a JSON file; the largest models have 16,000 query heads
GATE_SLACK = 0.01  # gates are trained and clipped afterwards: files hold values like -0.0014
KIND_NAMES = {"heads": "head list", "gates": "gates", "scores": "head scores"}


@dataclass(frozen=True, eq=False)
class HeadList:
    """The content of a head list, before it is matched with a model.

    Attributes:
        kind: "heads", "gates" or "scores".
        layers: one array per layer: uint8 0/1 per KV head, f64 0..1 per KV head, or f64 per query
            head.
    """

    path: Path
    kind: str
    layers: tuple[np.ndarray, ...]

    @property
    def n_heads(self) -> tuple[int, ...]:
        """Number of heads per layer: query heads for the kind "scores", KV heads otherwise."""
        return tuple(map(len, self.layers))

    def check_shape(self, shape: ModelShape) -> None:
        """Raise ProfileError, naming both shapes, if the list is for another model."""
        heads, unit = (shape.n_head, "query") if self.kind == "scores" else (shape.n_head_kv, "KV")
        if self.n_heads != heads:
            swapped = len(set(heads)) == 1 and self.n_heads == (len(heads),) * heads[0]
            raise ProfileError(
                f"{self.path} lists {describe_heads(self.n_heads, unit)},"
                f" the model has {describe_heads(heads, unit)};"
                + (" its rows and columns are swapped" if swapped else " it is for another model")
            )

    def values(self, shape: ModelShape) -> np.ndarray:
        """Return the value of each KV head of the model: f64 [sum of n_head_kv], layer-major.

        The score of a KV head is the highest of its group of query heads. Raises ProfileError.
        """
        self.check_shape(shape)
        layers = self.layers
        if self.kind == "scores":
            layers = tuple(
                layer.reshape(n, -1).max(axis=1)
                for layer, n in zip(layers, shape.n_head_kv, strict=True)
                if n
            )
        return np.concatenate([np.zeros(0), *layers])


def profile_from_heads(
    path: str | os.PathLike[str],
    shape: ModelShape,
    *,
    budget: float | None = None,
    sink_tokens: int = DEFAULT_SINKS,
    window_min: int = DEFAULT_WINDOW_MIN,
    window_divisor: int = DEFAULT_WINDOW_DIVISOR,
    compensation: bool = DEFAULT_COMPENSATION,
) -> Profile:
    """Make a profile from a head list, with a record of its source.

    Args:
        path: the head list.
        shape: the shape of the model.
        budget: the share of KV heads to take from gates or scores, rounded up to whole heads.
        sink_tokens, window_min, window_divisor, compensation: fields of the profile.

    Raises:
        ProfileError: the file is not a head list, has another shape, or does not match the budget.
        OSError: the file cannot be read.
    """
    heads = parse_heads(path)
    values = heads.values(shape)
    name = heads.path.name.encode(errors="replace").decode()
    record: dict[str, str | int] = {
        "source": f"{KIND_NAMES[heads.kind]} {name}"[:1000],
        "tool_version": f"razor-local {version('razor-local')}",
        "model_fingerprint": shape.fingerprint,
    }
    if heads.kind == "heads":
        if budget is not None:
            raise ProfileError(
                f"{path} says itself which heads are retrieval heads; leave --budget out"
            )
        chosen = values.astype(np.uint8)
    else:
        if budget is None:
            raise ProfileError(
                f"{path} holds {KIND_NAMES[heads.kind]}, which only order the heads; say which"
                " share of the KV heads keeps every token, for example --budget 0.25"
            )
        if not 0 <= budget <= 1:
            raise ProfileError(
                f"budget is {budget:g}, expected a share of the KV heads from 0 to 1"
            )
        n = math.ceil(budget * len(values) - 1e-9)  # 0.14 * 50 is a little more than 7
        chosen, taken, tied = choose_by_rank(values, n)
        record["budget"] = f"{budget:g}"
        if taken < tied:
            lowest = values[chosen == 1].min()
            record["ties"] = f"{taken} of {tied} heads with the value {lowest:g}"
    return Profile(
        retrieval=split_heads(chosen, shape.n_head_kv),
        sink_tokens=sink_tokens,
        window_min=window_min,
        window_divisor=window_divisor,
        compensation=compensation,
        calibration=record,
    )


def profile_from_scopes(
    path: str | os.PathLike[str],
    shape: ModelShape,
    *,
    sink_tokens: int = DEFAULT_SINKS,
    compensation: bool = DEFAULT_COMPENSATION,
) -> Profile:
    """Make a profile from a table of the tokens that each KV head keeps, 0 for retrieval heads.

    The file has a row per layer and a column per KV head, whole numbers separated by tabs or
    spaces.

    Raises:
        ProfileError: the file has another form or shape.
        OSError: the file cannot be read.
    """
    path = Path(path)
    layers = []
    for il, cells in enumerate(_rows(path, _read_text(path, "a table of scopes"))):
        if not cells and any(shape.n_head_kv[il : il + 1]):
            raise ProfileError(f"{path}: row {il + 1} is empty, expected a number per KV head")
        for ih, cell in enumerate(cells):
            if not re.fullmatch("[0-9]{1,10}", cell) or int(cell) > MAX_WINDOW:
                raise ProfileError(
                    f"{path}: row {il + 1}, column {ih + 1} is {cell[:40]!r}, expected a number of"
                    f" tokens from 0 to {MAX_WINDOW}"
                )
        layers.append(np.array([int(cell) for cell in cells], np.uint32))
    HeadList(path, "heads", tuple(layers)).check_shape(shape)
    name = path.name.encode(errors="replace").decode()
    return Profile(
        retrieval=tuple((layer == 0).astype(np.uint8) for layer in layers),
        scope=tuple(layers),
        sink_tokens=sink_tokens,
        compensation=compensation,
        calibration={
            "source": f"scopes {name}"[:1000],
            "tool_version": f"razor-local {version('razor-local')}",
            "model_fingerprint": shape.fingerprint,
        },
    )


def choose_by_rank(values: np.ndarray, n: int) -> tuple[np.ndarray, int, int]:
    """Choose the n highest values of heads.

    Heads tied for the last places are chosen so that they spread evenly over the layers. Saturated
    gates are equal in every layer, and taking them in order would choose the first layers alone.
    The i-th tied head has the rank of i * (golden ratio) modulo 1, which needs no random numbers,
    and a larger n always includes the choice of a smaller one.

    Returns:
        uint8 0/1 [heads], the number of tied heads that were taken, and the number of tied heads.
    """
    chosen = np.zeros(len(values), np.uint8)
    if n == 0:
        return chosen, 0, 0
    lowest = np.sort(values)[len(values) - n]
    chosen[values > lowest] = 1
    tied = np.flatnonzero(values == lowest)
    order = np.argsort(np.arange(len(tied), dtype=np.uint64) * 2654435769 % 2**32)
    taken = n - int(chosen.sum())
    chosen[tied[order[:taken]]] = 1
    return chosen, taken, len(tied)


def parse_heads(path: str | os.PathLike[str]) -> HeadList:
    """Read a head list of any kind. Raises ProfileError, OSError."""
    path = Path(path)
    text = _read_text(path, "a head list")
    if text.lstrip()[:1] in ("{", "["):
        return HeadList(path, "scores", _parse_json(path, text))
    return _parse_table(path, text)


def _read_text(path: Path, what: str) -> str:
    """Read a text file of at most MAX_BYTES. what: its name in errors, such as "a head list"."""
    with open_input(path, what, ProfileError) as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ProfileError(
            f"{path} is larger than {MAX_BYTES >> 20} MiB, which is too large for {what}"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ProfileError(f"{path} is not a text file, expected {what}") from None


def _rows(path: Path, text: str) -> list[list[str]]:
    """Split a table into its cells, a row per layer. Raises ProfileError."""
    text = text.rstrip()
    if not text:
        raise ProfileError(f"{path} is empty, expected a row of numbers per layer")
    lines = text.split("\n", MAX_LAYERS)
    if len(lines) > MAX_LAYERS:
        raise ProfileError(f"{path} has more than {MAX_LAYERS} rows, expected one per layer")
    rows = [line.split(None, MAX_HEADS) for line in lines]
    for il, cells in enumerate(rows):
        if len(cells) > MAX_HEADS:
            raise ProfileError(f"{path}: row {il + 1} has more than {MAX_HEADS} columns")
    return rows


def _parse_table(path: Path, text: str) -> HeadList:
    layers = [
        np.array([_cell(path, il, ih, c) for ih, c in enumerate(cells)])
        for il, cells in enumerate(_rows(path, text))
    ]
    if all(np.isin(layer, (0, 1)).all() for layer in layers):
        return HeadList(path, "heads", tuple(layer.astype(np.uint8) for layer in layers))
    return HeadList(path, "gates", tuple(layer.clip(0, 1) for layer in layers))


def _cell(path: Path, il: int, ih: int, text: str) -> float:
    try:
        value = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        value = math.nan
    if not -GATE_SLACK <= value <= 1 + GATE_SLACK:
        raise ProfileError(
            f"{path}: row {il + 1}, column {ih + 1} is {text[:40]!r}, expected 0 or 1 (or a gate"
            " value between them)"
        )
    return value


def _parse_json(path: Path, text: str) -> tuple[np.ndarray, ...]:
    """Parse the scores of query heads: f64 [n_head] per layer, the mean of a list of scores."""

    def bad(what: str) -> ProfileError:
        return ProfileError(f'{path} {what}; expected {{"layer-head": score or [scores], ...}}')

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise bad("names a head twice")
        return dict(pairs)

    try:
        entries = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ProfileError):
            raise
        raise bad("is not valid JSON") from None
    if not isinstance(entries, dict) or not entries:
        raise bad("is not a JSON object of heads")
    if entries.get("format") == FORMAT:
        raise ProfileError(f"{path} was written by --save-scores; pass it with --scores")
    if len(entries) > MAX_ENTRIES:
        raise bad(f"has {len(entries)} entries, more than any model has heads")
    scores: dict[tuple[int, int], float] = {}
    for key, value in entries.items():
        match = re.fullmatch(r"([0-9]{1,4})-([0-9]{1,4})", key)
        if match is None:
            raise bad(f"has the entry {key[:40]!r}")
        il, ih = int(match[1]), int(match[2])
        if il >= MAX_LAYERS or ih >= MAX_HEADS:
            raise bad(f"has the entry {key!r}, more than {MAX_LAYERS} layers of {MAX_HEADS} heads")
        if (il, ih) in scores:
            raise bad(f"names head '{il}-{ih}' twice")
        scores[il, ih] = _mean(value)
        if not math.isfinite(scores[il, ih]):
            raise bad(f"has no finite number for head '{il}-{ih}'")
    n_layer = 1 + max(il for il, _ in scores)
    n_head = [0] * n_layer
    for il, ih in scores:
        n_head[il] = max(n_head[il], ih + 1)
    for il, n in enumerate(n_head):
        for ih in range(n):
            if (il, ih) not in scores:
                raise bad(f"has no head '{il}-{ih}' among its {n_layer} layers")
    return tuple(np.array([scores[il, ih] for ih in range(n)]) for il, n in enumerate(n_head))


def _mean(value: Any) -> float:
    """Return the mean of a number or a list of numbers, NaN for anything else."""
    numbers = value if isinstance(value, list) else [value]
    if not numbers or not all(type(n) in (int, float) and abs(n) < 1e30 for n in numbers):
        return math.nan
    return math.fsum(numbers) / len(numbers)
