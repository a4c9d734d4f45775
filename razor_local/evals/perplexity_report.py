"""Report a perplexity run: tables and pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.compact_json import compact_json
from ..common.figure import make_figure, save_figure
from ..common.markdown import markdown_table
from .intervals import block_bootstrap
from .perplexity import BLOCK
from .report import IDLE, INSTEAD, draw_curves, draw_legend, head_lines, share


@dataclass(frozen=True)
class PerplexityReport:
    """A run: its head (model, policies, settings) and the records of run_perplexity()."""

    head: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row per policy over all positions, with intervals by a bootstrap over blocks.

        ratio is the perplexity over that of the full f16 cache, kl the mean KL divergence in nats,
        and same_top the share of tokens where both predict the same one. facts_found of facts_asked
        planted facts were found; both are None if none were planted.
        """
        return list(self._rows([(0, 1 << 62)]))

    @property
    def by_position(self) -> list[dict[str, Any]]:
        """Return the rows of each policy by position, [from_position, to_position)."""
        return list(self._rows(position_buckets(self.head["settings"]["n_ctx"])))

    @property
    def missing(self) -> int:
        """The number of windows that were not read yet, if the run was interrupted."""
        wanted: int = self.head["settings"]["n_windows"] * len(self.head["policies"])
        return wanted - [r["kind"] for r in self.records].count("window")

    def _rows(self, buckets: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        caches = {r["policy"]: r for r in self.records if r["kind"] == "cache"}
        facts = {r["policy"]: r for r in self.records if r["kind"] == "facts"}
        for policy in self.head["policies"]:
            windows = [
                r for r in self.records if r["kind"] == "window" and r["policy"] == policy["name"]
            ]
            windows.sort(key=lambda r: r["window"])
            for low, high in buckets if windows else ():
                found = _figures(windows, low, high, self.head["settings"]["seed"])
                if found is not None:
                    cache = caches[policy["name"]]
                    full = cache["kv_bytes_full_f16"]
                    yield {
                        "policy": policy["name"],
                        "from_position": low,
                        "to_position": min(high, self.head["settings"]["n_ctx"]),
                        "active": cache["active"],
                        "kv_bytes": cache["kv_bytes"],
                        "share": cache["kv_bytes"] / full if full else None,
                        "facts_found": facts.get(policy["name"], {}).get("found"),
                        "facts_asked": facts.get(policy["name"], {}).get("asked"),
                    } | found

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": "razor-local eval perplexity",
            "head": self.head,
            "missing": self.missing,
            "rows": self.rows,
            "by_position": self.by_position,
            "records": sorted(
                (r for r in self.records if r["kind"] in ("window", "facts")),
                key=lambda r: (r["kind"], r["policy"], r.get("window", 0)),
            ),
        }


def position_buckets(n_ctx: int) -> list[tuple[int, int]]:
    """Return [0, 256), [256, 512), [512, 1024) and so on up to n_ctx."""
    edges = [0, 2 * BLOCK]
    while edges[-1] < n_ctx:
        edges.append(2 * edges[-1])
    edges[-1] = n_ctx
    return list(zip(edges, edges[1:], strict=False))


def _figures(
    windows: Sequence[dict[str, Any]], low: int, high: int, seed: int
) -> dict[str, Any] | None:
    chosen: dict[str, list[float]] = {name: [] for name in ("n", "nll", "full_nll", "kl", "same")}
    for window in windows:
        for name, values in chosen.items():
            values += window[name][low // BLOCK : -(-high // BLOCK)]
    arrays = {name: np.array(values) for name, values in chosen.items()}
    some = arrays["n"] > 0
    if not some.any():
        return None
    n = arrays["n"][some]
    excess = arrays["nll"] - arrays["full_nll"]
    sums = np.stack([a[some] for a in (arrays["nll"], excess, arrays["kl"], arrays["same"])], 1)
    means = sums.sum(axis=0) / n.sum()
    bounds = block_bootstrap(n, sums, seed)
    figures: dict[str, Any] = {"n": int(n.sum())}
    for i, (name, convert) in enumerate(
        (("perplexity", math.exp), ("ratio", math.exp), ("kl", float), ("same_top", float))
    ):
        figures[name] = convert(means[i])
        figures[f"{name}_low"], figures[f"{name}_high"] = (convert(b[i]) for b in bounds)
    return figures


def format_report(report: PerplexityReport, kind: str) -> str:
    """Format the report as "json" or "md", with a final newline."""
    if kind == "json":
        return compact_json(report.to_dict())
    return "\n".join(_markdown(report)) + "\n"


def _markdown(report: PerplexityReport) -> Iterator[str]:
    settings = report.head["settings"]
    yield from head_lines(report.head)
    yield (
        f"- {settings['text']}: {settings['n_windows']:,} windows of {settings['n_ctx']:,} tokens,"
        f" one every {settings['stride']:,} tokens, from a text of {settings['n_tokens']:,} tokens"
    )
    prompt = settings.get("prompt", 0)
    if prompt:
        yield (
            f"- the first {prompt:,} tokens of each window are a prompt, and those after it count;"
            f" {_prompts_line(report)}"
        )
    yield "- compared with a full f16 cache; 95 % confidence intervals; KL divergence in nats"
    if any(r["kind"] == "facts" for r in report.records):
        yield (
            "- planted facts: 20 questions about a second text that fills the context, every fact"
            " outside the local windows; perplexity and KL divergence on plain text do not show"
            " whether facts are lost"
        )
    if report.missing:
        yield f"- **unfinished: {report.missing:,} windows were not read yet**"
    yield ""
    rows = report.rows
    full = {p["name"] for p in report.head["policies"] if p["retrieval_kv_heads"] is None}
    idle = {r["policy"] for r in rows if not r["active"]} - full
    yield from markdown_table(
        ["policy", "KV bytes", "share of full f16", "planted facts found", "perplexity",
         "ratio to full", "KL divergence", "same top token, %", "tokens"],
        [
            [
                r["policy"] + ("\\*" if r["policy"] in idle else ""),
                f"{r['kv_bytes']:,}", share(r["share"]),
                "" if r["facts_found"] is None else f"{r['facts_found']} of {r['facts_asked']}",
                f"{r['perplexity']:.3f}",
                f"{r['ratio']:.4f} ({r['ratio_low']:.4f} to {r['ratio_high']:.4f})",
                f"{r['kl']:.5f} ({r['kl_low']:.5f} to {r['kl_high']:.5f})",
                f"{100 * r['same_top']:.2f} ({100 * r['same_top_low']:.2f} to"
                f" {100 * r['same_top_high']:.2f})",
                f"{r['n']:,}",
            ]
            for r in rows
        ],
    )  # fmt: skip
    if idle:
        yield ""
        yield IDLE
    found = {(r["policy"], r["from_position"]): r for r in report.by_position}
    buckets = position_buckets(settings["n_ctx"])
    yield ""
    yield "## KL divergence by position in the context"
    yield ""
    yield from markdown_table(
        ["policy", *(f"{low:,} to {high - 1:,}" for low, high in buckets)],
        [
            [r["policy"]]
            + [
                f"{found[r['policy'], low]['kl']:.5f}" if (r["policy"], low) in found else ""
                for low, _ in buckets
            ]
            for r in rows
        ],
    )
    yield ""
    yield f"Measured {report.head['date']}."


def _prompts_line(report: PerplexityReport) -> str:
    """Say how razor read the prompts."""
    active = {r["policy"] for r in report.records if r["kind"] == "cache" and r["active"]}
    windows = [r for r in report.records if r["kind"] == "window" and r["policy"] in active]
    named = {
        way: ", ".join(dict.fromkeys(r["policy"] for r in windows if r["prefill"] == way))
        for way in ("full", "razor")
    }
    if not named["razor"]:
        return "all policies read it with full attention"
    return f"read with the compressed cache: {named['razor']}"


def plot_positions(report: PerplexityReport, path: str | os.PathLike[str]) -> Path:
    """Plot the KL divergence over the position in the context, with a line per policy.

    Raises UnsupportedError if matplotlib is missing or path does not name a picture, OSError.
    """
    figure = make_figure(path, (8.5, 4.5), INSTEAD)
    figure.set_layout_engine("constrained")
    ax = figure.subplots()
    rows = report.by_position
    for i, policy in enumerate(dict.fromkeys(r["policy"] for r in rows)):
        some = [r for r in rows if r["policy"] == policy and r["kl"] > 0]
        x = [(r["from_position"] + r["to_position"]) / 2 for r in some]
        y = [r["kl"] for r in some]
        errors = [[r["kl"] - r["kl_low"] for r in some], [r["kl_high"] - r["kl"] for r in some]]
        if some:
            line = ("o-", "s--", "^:")[i // 10 % 3]  # there are ten colors
            ax.errorbar(x, y, np.maximum(errors, 0), fmt=line, color=f"C{i % 10}", label=policy,
                        capsize=2, markersize=3, linewidth=1)  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    ax.set(yscale="log", xlabel="position, tokens", ylabel="KL divergence, nats")
    ax.grid(alpha=0.3)
    draw_legend(figure, ax)
    return save_figure(figure, path)


def plot_curve(report: PerplexityReport, path: str | os.PathLike[str]) -> Path:
    """Plot the KL divergence over the bytes of the KV cache. Raises as plot_positions() does."""
    points = [
        (r["policy"], r["kv_bytes"], r["kl"], r["kl_low"], r["kl_high"])
        for r in report.rows
        if r["kl"] > 0
    ]
    title = f"{report.head['settings']['n_ctx']:,} tokens"
    return draw_curves(report.head, {title: points}, "KL divergence, nats", path, log=True)
