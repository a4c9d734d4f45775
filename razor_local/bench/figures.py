"""Compute the figures of tables and plots from the records of a benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

VERSION = 1  # of the records
SIDES = ("razor", "full", "full_f16")


@dataclass(frozen=True)
class Report:
    """A run and the figures computed from it.

    Attributes:
        head: the model, the machine and the settings.
        records: the raw measurements.
        rows: a dict per pair of KV types and depth; fields that were not measured are None.
        folds, checks, energy: dicts in the order of the records.
    """

    head: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def rows(self) -> list[dict[str, Any]]:
        found = [r for r in self.records if r["kind"] == "decode"]
        order = [tuple(types) for types in self.head["settings"]["types"]]
        found.sort(key=lambda r: (order.index((r["type_k"], r["type_v"])), r["depth"]))
        return [self._row(record) for record in found]

    def _row(self, decode: dict[str, Any]) -> dict[str, Any]:
        same = [r for r in self.records if types_of(r) == types_of(decode)]
        ms = decode["ms"]
        row: dict[str, Any] = {
            name: decode[name] for name in ("type_k", "type_v", "depth", "n_ctx")
        }
        row["pairs"] = len(ms["razor"])
        for side in SIDES:
            row[f"{side}_ms"] = statistics.median(ms[side]) if side in ms else None
            row[f"{side}_tok_s"] = 1e3 / row[f"{side}_ms"] if side in ms else None
        for side in SIDES[1:]:
            ratio = median_ratio(ms[side], ms["razor"]) if side in ms else (None,) * 3
            for name, value in zip(("", "_q1", "_q3"), ratio, strict=True):
                row[f"decode_ratio_{side}{name}"] = value
        for side in SIDES:
            read = decode["read_ms"].get(side)
            row[f"{side}_over_read"] = row[f"{side}_ms"] / read if read else None
        row |= self._prompt(decode, same)
        for side in SIDES:
            memory = _find(same, kind="memory", n_ctx=decode["n_ctx"], side=side) or {}
            for name in ("kv_bytes", "peak_rss", "device"):
                row[f"{side}_{name}"] = memory.get(name)
        return row

    def _prompt(self, decode: dict[str, Any], same: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the prefill at a depth, and the time to the first token of such a prompt."""
        depth, n_ctx = decode["depth"], decode["n_ctx"]
        row: dict[str, Any] = {"prefill_at": None, "prefill_batch": None}
        points = _points(same, n_ctx)
        # 1. Choose the nearest batch before the depth, or the prompt that was really prefilled.
        near = [r for r in points if r["depth"] <= depth]
        batch = max(near, key=lambda r: r["depth"], default=None)
        prompt, real = (
            _find(same, kind=kind, n_ctx=n_ctx, depth=depth) for kind in ("prompt", "real_prefill")
        )
        if prompt is not None:
            batch = prompt
        if batch is not None:
            row["prefill_at"] = 0 if batch is prompt else batch["depth"]
            row["prefill_batch"] = batch["tokens"]
        # 2. Compute the prefill speed of both sides and their ratio.
        for side in SIDES[:2]:
            row[f"{side}_prefill_tok_s"] = (
                None
                if batch is None
                else batch["tokens"] / statistics.median(batch["ms"][side]) * 1e3
            )
        ratio: tuple[float | None, ...] = (None,) * 3
        if batch is not None:
            ratio = median_ratio(batch["ms"]["full"], batch["ms"]["razor"])
        for name, value in zip(("", "_q1", "_q3"), ratio, strict=True):
            row[f"prefill_ratio{name}"] = value
        # 3. Find the time to the first token, measured or integrated.
        how: str | None = None
        seconds: dict[str, Any] = dict.fromkeys(SIDES[:2])
        if depth == 0:
            how = "measured"  # a prompt of one token
            seconds = {side: row_ms / 1e3 for side, row_ms in _medians(decode["ms"]).items()}
        elif prompt is not None:
            how = "measured"
            seconds = {side: row_ms / 1e3 for side, row_ms in _medians(prompt["ms"]).items()}
        elif real is not None:
            how, seconds = "measured", real["seconds"]
        elif len(points) > 1:
            how = "integrated"
            seconds = {side: prompt_seconds(points, side, depth) for side in SIDES[:2]}
        row["first_token"] = how
        for side in SIDES[:2]:
            row[f"{side}_first_token_s"] = seconds[side]
        row["first_token_ratio"] = seconds["full"] / seconds["razor"] if how else None
        return row

    @property
    def folds(self) -> list[dict[str, Any]]:
        """Return the longest and the median step of razor's decodes across folds."""
        found = []
        for record in self.records:
            if record["kind"] != "fold":
                continue
            ms = record["ms"]["razor"]
            median, longest = statistics.median(ms), max(ms)
            at_folds = [ms[i] for i in record["folds_at"]]
            found.append(
                {name: record[name] for name in ("type_k", "type_v", "n_ctx")}
                | {
                    "tokens": len(ms),
                    "folds": len(at_folds),
                    "median_ms": median,
                    "longest_ms": longest,
                    "longest_ratio": longest / median,
                    "longest_fold_ms": max(at_folds),
                    "longest_fold_ratio": max(at_folds) / median,
                }
            )
        return found

    @property
    def checks(self) -> list[dict[str, Any]]:
        """Return how real prefills compare with the estimates, for each side.

        The fields are the full cache's time over the side's, the integrated time over the real
        one, and the median decode time on a random cache over that on a real one.
        """
        found = []
        for record in self.records:
            if record["kind"] != "real_prefill":
                continue
            same = [r for r in self.records if types_of(r) == types_of(record)]
            points = _points(same, record["n_ctx"])
            for side in SIDES[:2]:
                integrated = prompt_seconds(points, side, record["depth"]) if points else None
                real, random = _medians(record["ms"])[side], _medians(record["random_ms"])[side]
                found.append(
                    {name: record[name] for name in ("type_k", "type_v", "n_ctx")}
                    | {
                        "side": side,
                        "tokens": record["depth"],
                        "real_s": record["seconds"][side],
                        "full_over_real": record["seconds"]["full"] / record["seconds"][side],
                        "integrated_s": integrated,
                        "integrated_over_real": integrated and integrated / record["seconds"][side],
                        "real_cache_ms": real,
                        "random_cache_ms": random,
                        "random_over_real": random / real,
                    }
                )
        return found

    @property
    def energy(self) -> list[dict[str, Any]]:
        """Return the joules per decoded token and the watts that the meters counted."""
        return [
            {name: record[name] for name in ("type_k", "type_v", "n_ctx", "depth")}
            | {
                "side": side,
                "joules_per_token": e["joules"] / e["tokens"],
                "watts": e["joules"] / e["seconds"],
            }
            for record in self.records
            if record["kind"] == "energy"
            for side, e in record["energy"].items()
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": "razor-local bench",
            "head": self.head,
            "rows": self.rows,
            "folds": self.folds,
            "checks": self.checks,
            "energy": self.energy,
            "records": self.records,
        }


def types_of(record: dict[str, Any]) -> tuple[str, str]:
    return record["type_k"], record["type_v"]


def _find(records: Iterable[dict[str, Any]], **fields: Any) -> dict[str, Any] | None:
    return next((r for r in records if all(r[k] == v for k, v in fields.items())), None)


def _medians(ms: dict[str, list[float]]) -> dict[str, float]:
    return {side: statistics.median(values) for side, values in ms.items()}


def _points(records: list[dict[str, Any]], n_ctx: int) -> list[dict[str, Any]]:
    """Return the prefill batches in a context of n_ctx, by depth.

    A batch at depth 0 costs the same in any context and may come from another one.
    """
    found = [r for r in records if r["kind"] == "prefill" and n_ctx == r["n_ctx"]]
    if not any(r["depth"] == 0 for r in found):
        found += [r for r in records if r["kind"] == "prefill" and r["depth"] == 0][:1]
    return sorted(found, key=lambda r: r["depth"])


def prompt_seconds(points: Sequence[dict[str, Any]], side: str, n_tokens: int) -> float:
    """Integrate the seconds of a prefill of n_tokens over batches at some depths.

    The seconds per token are interpolated linearly between the middles of the batches. This is
    exact as long as each earlier token adds the same work per token.
    """
    known: list[tuple[float, float]] = [
        (r["depth"] + r["tokens"] / 2, statistics.median(r["ms"][side]) / 1e3 / r["tokens"])
        for r in points
    ]

    def at(depth: float) -> float:
        if len(known) == 1:
            return known[0][1]
        # Extrapolate before the first and after the last middle.
        pairs = list(pairwise(known))
        (x, y), (x2, y2) = next((p for p in pairs if depth <= p[1][0]), pairs[-1])
        return y + (y2 - y) * (depth - x) / (x2 - x)

    corners = sorted({0.0, float(n_tokens), *(x for x, _ in known if x < n_tokens)})
    return sum((b - a) * (at(a) + at(b)) / 2 for a, b in pairwise(corners))


def median_ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, lower and upper quartile of the paired ratios."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    if len(ratios) == 1:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high
