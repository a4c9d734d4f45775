"""Report the answers that run.py collected: tables, heat maps and curves."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.compact_json import compact_json
from ..common.figure import make_figure, save_figure
from ..common.markdown import markdown_table, one_line, short_tokens
from .intervals import paired_difference, score_interval

ALL = "all"  # the mean over all tasks
PURPOSE = {  # the first paragraph of a report
    "needle": "This report shows how many of the facts hidden in long texts the model finds with"
    " each cache policy.",
    "ruler": "This report shows the model's scores on the synthetic tasks of RULER with each cache"
    " policy.",
    "longbench": "This report shows the model's scores on data sets of LongBench with each cache"
    " policy.",
    "perplexity": "This report shows how much each cache policy changes the model's predictions of"
    " a plain text.",
}
IDLE = "\\* razor would save nothing in this context, so a full cache runs."
INSTEAD = "leave out --plot and read the tables"


@dataclass(frozen=True)
class Report:
    """A run: its head (model, policies, settings) and the records of run_questions()."""

    head: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def answers(self) -> list[dict[str, Any]]:
        """The answers in the order of the run, even if it was resumed."""
        found = [r for r in self.records if r["kind"] == "answer"]
        order = {name: i for i, name in enumerate(self.policies)}
        return sorted(
            found,
            key=lambda r: (
                r["length"],
                self.tasks.index(r["task"]),
                order[r["policy"]],
                -1 if r["depth"] is None else r["depth"],
                r["index"],
            ),
        )

    @property
    def policies(self) -> list[str]:
        return [policy["name"] for policy in self.head["policies"]]

    @property
    def tasks(self) -> list[str]:
        return list(self.head["settings"]["tasks"])

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row per task, length and policy, and for all tasks together if there are several.

        score is the mean of the answered samples, with its 95 % interval. difference is the
        difference from the first policy on the samples that both have answered, or None.
        """
        answers = self.answers
        scores: dict[tuple[Any, ...], dict[tuple[Any, ...], float]] = {}
        for r in answers:
            key = (r["task"], r["depth"], r["index"])
            for task in (r["task"], ALL)[: 1 + (len(self.tasks) > 1)]:
                scores.setdefault((task, r["length"], r["policy"]), {})[key] = r["score"]
        caches = {(r["policy"], r["length"]): r for r in self.records if r["kind"] == "cache"}
        rows = []
        for task in (*self.tasks, ALL):
            for length in dict.fromkeys(r["length"] for r in answers):
                for policy in self.policies:
                    found = scores.get((task, length, policy))
                    if found:
                        base = scores.get((task, length, self.policies[0]), {})
                        rows.append(
                            {"task": task, "length": length, "policy": policy}
                            | _score(found, base if policy != self.policies[0] else {})
                            | _cache(caches[policy, length])
                        )
        return rows

    @property
    def cells(self) -> list[dict[str, Any]]:
        """A cell per task, length, policy and depth: number, mean and interval of the scores."""
        groups: dict[tuple[Any, ...], list[float]] = {}
        for r in self.answers:
            key = (r["task"], r["length"], r["policy"], r["depth"])
            groups.setdefault(key, []).append(r["score"])
        return [
            dict(zip(("task", "length", "policy", "depth"), key, strict=True)) | _mean(scores)
            for key, scores in groups.items()
        ]

    @property
    def missing(self) -> int:
        """The number of samples without an answer, if the run was interrupted."""
        wanted: int = self.head["settings"]["n_samples"] * len(self.policies)
        return wanted - len(self.answers)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": f"razor-local eval {self.head['eval']}",
            "head": self.head,
            "missing": self.missing,
            "rows": self.rows,
            "cells": self.cells,
            "answers": self.answers,
        }


def _mean(scores: Sequence[float]) -> dict[str, Any]:
    low, high = score_interval(scores)
    return {"n": len(scores), "score": float(np.mean(scores)), "low": low, "high": high}


def _score(found: dict[Any, float], base: dict[Any, float]) -> dict[str, Any]:
    both = [key for key in found if key in base]
    difference: tuple[float | None, ...] = (None, None, None)
    if both:
        difference = paired_difference([found[k] for k in both], [base[k] for k in both])
    names = ("difference", "difference_low", "difference_high")
    return _mean(list(found.values())) | dict(zip(names, difference, strict=True))


def _cache(record: dict[str, Any]) -> dict[str, Any]:
    full = record["kv_bytes_full_f16"]
    return {
        "n_ctx": record["n_ctx"],
        "active": record["active"],
        "kv_bytes": record["kv_bytes"],
        "share": record["kv_bytes"] / full if full else None,
    }


def format_report(report: Report, kind: str) -> str:
    """Format the report as "json" or "md", with a final newline."""
    if kind == "json":
        return compact_json(report.to_dict())
    return "\n".join(_markdown(report)) + "\n"


def head_lines(head: dict[str, Any]) -> Iterator[str]:
    """Yield the first lines of a Markdown report."""
    model = head["model"]
    yield f"# razor-local eval {head['eval']}: {one_line(model['name'] or model['file'])}"
    yield ""
    yield PURPOSE[head["eval"]]
    yield ""
    yield f"- CPU: {one_line(head['machine']['cpu'])}; seed {head['settings']['seed']}"
    counts = {p["retrieval_kv_heads"] for p in head["policies"] if p["series"].startswith("razor")}
    heads = sorted(n for n in counts if n is not None)
    if heads:
        numbers = ", ".join(map(str, heads))
        profile = f"; profile: {one_line(head['profile'])}" if head.get("profile") else ""
        yield f"- retrieval heads with razor: {numbers} of {model['kv_heads']} KV heads{profile}"


def _markdown(report: Report) -> Iterator[str]:
    head, settings = report.head, report.head["settings"]
    yield from head_lines(head)
    prefill = head.get("setup", {}).get("prefill", "auto")
    if prefill != "auto":
        yield f"- prompts read with --prefill {prefill}"
    if "haystack" in settings:
        yield f"- haystack: {one_line(settings['haystack'])}"
    yield (
        "- scores in percent with 95 % confidence intervals; differences in percentage points on"
        " the same questions"
    )
    if report.missing:
        yield f"- **unfinished: {report.missing:,} samples have no answer yet**"
    for line in settings.get("notes", ()):
        yield f"- {one_line(line)}"
    rows = report.rows
    by_key = {(r["length"], r["policy"], r["task"]): r for r in rows}
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    full = {p["name"] for p in head["policies"] if p["retrieval_kv_heads"] is None}
    idle = {(r["length"], r["policy"]) for r in rows if not r["active"] and r["policy"] not in full}
    for length in dict.fromkeys(r["length"] for r in rows):
        policies = [p for p in report.policies if any((length, p, t) in by_key for t in tasks)]
        lines, differences = [], []
        for policy in policies:
            found = [by_key.get((length, policy, task)) for task in tasks]
            one = next(r for r in found if r is not None)
            star = "\\*" if (length, policy) in idle else ""
            lines.append(
                [f"{policy}{star}", f"{one['kv_bytes']:,}", share(one["share"])]
                + ["" if r is None else _score_text(r) for r in found]
            )
            if policy != report.policies[0]:
                differences.append(
                    [policy] + ["" if r is None else _difference_text(r) for r in found]
                )
        counts: dict[str, int] = {}
        for task in tasks:
            n_each = [by_key[length, p, task]["n"] for p in policies if (length, p, task) in by_key]
            counts[task] = max(n_each, default=0)
        same = len({n for task, n in counts.items() if task != ALL}) == 1
        titles = tasks if same else [f"{task}, n = {n}" for task, n in counts.items()]
        yield ""
        yield f"## {length:,} tokens"
        yield ""
        if same:
            each = "" if len(tasks) == 1 else f" per task, {counts[ALL]:,} in total"
            yield f"{counts[tasks[0]]:,} samples{each}"
            yield ""
        yield from markdown_table(["policy", "KV bytes", "share of full f16", *titles], lines)
        if differences:
            yield ""
            yield from markdown_table(
                [f"difference from {report.policies[0]}", *tasks], differences
            )
    if idle:
        yield ""
        yield IDLE
    yield ""
    yield f"Measured {head['date']}."


def _score_text(row: dict[str, Any]) -> str:
    return f"{100 * row['score']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"


def _difference_text(row: dict[str, Any]) -> str:
    if row["difference"] is None:
        return ""
    low, high = 100 * row["difference_low"], 100 * row["difference_high"]
    return f"{100 * row['difference']:+.1f} ({low:+.1f} to {high:+.1f})".replace("-0.0", "+0.0")


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


# -- pictures


def plot_heat(report: Report, path: str | os.PathLike[str]) -> Path:
    """Plot the scores as colors over the length.

    Tasks with depths have a row of panels per policy, a panel per task and a line per depth. Other
    tasks have a panel per policy and a line per task.

    Raises UnsupportedError if matplotlib is missing or path does not name a picture, OSError.
    """
    cells = report.cells
    lengths = sorted({c["length"] for c in cells})
    depths = sorted({c["depth"] for c in cells if c["depth"] is not None})
    policies = [p for p in report.policies if any(c["policy"] == p for c in cells)]
    found = {(c["policy"], c["task"], c["length"], c["depth"]): c["score"] for c in cells}
    if depths:
        names = [f"{depth:g} %" for depth in depths]
        panels = [
            [[(p, task, depth) for depth in depths] for task in report.tasks] for p in policies
        ]
        titles, labels = report.tasks, policies
    else:
        names = report.tasks
        panels = [[[(p, task, None) for task in report.tasks] for p in policies]]
        titles, labels = policies, [""]
    n_rows, n_columns = max(len(panels), 1), max(len(panels[0]) if panels else 0, 1)
    size = (
        2.6 + n_columns * (0.8 + 0.42 * len(lengths)),
        1.0 + n_rows * (0.75 + 0.22 * len(names)),
    )
    figure = make_figure(path, size, INSTEAD)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    image = None
    for i, row in enumerate(panels):
        for j, lines in enumerate(row):
            grid = np.array(
                [
                    [found.get((policy, task, length, depth), np.nan) for length in lengths]
                    for policy, task, depth in lines
                ]
            )
            ax = axes[i][j]
            image = ax.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            ax.set_xticks(range(len(lengths)), map(short_tokens, lengths), fontsize=7)
            ax.set_yticks(range(len(names)), names if j == 0 else [], fontsize=7)
            for (y, x), value in np.ndenumerate(grid):
                if not np.isnan(value):
                    ax.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=6)
            if i == 0:
                ax.set_title(titles[j], fontsize=8)
        axes[i][0].set_ylabel(labels[i], fontsize=8)
    model = report.head["model"]
    figure.suptitle(
        f"{report.head['eval']}: {one_line(model['name'] or model['file'])}", fontsize=9
    )
    if image is not None:
        figure.colorbar(image, ax=axes.ravel().tolist(), shrink=0.5, label="score")
    return save_figure(figure, path)


def plot_curve(report: Report, path: str | os.PathLike[str]) -> Path:
    """Plot the score over the bytes of the KV cache, with a panel per length.

    Raises what plot_heat() raises.
    """
    tasks = [r["task"] for r in report.rows]
    task = ALL if ALL in tasks else report.tasks[0]
    rows = [r for r in report.rows if r["task"] == task]
    panels = {
        f"{length:,} tokens": [
            (r["policy"], r["kv_bytes"], 100 * r["score"], 100 * r["low"], 100 * r["high"])
            for r in rows
            if r["length"] == length
        ]
        for length in dict.fromkeys(r["length"] for r in rows)
    }
    return draw_curves(report.head, panels, "score, %", path)


def draw_legend(figure: Any, ax: Any) -> None:
    """Draw the legend of some axes beside the plot, in columns of 20 entries."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            labels,
            fontsize="x-small",
            loc="outside right upper",
            ncols=-(-len(labels) // 20),
        )


def draw_curves(
    head: dict[str, Any],
    panels: Mapping[str, Iterable[tuple[str, int, float, float, float]]],
    label: str,
    path: str | os.PathLike[str],
    log: bool = False,
) -> Path:
    """Plot quality over bytes, with a line through the budgets of each policy.

    Raises what plot_heat() raises.

    Args:
        head: the head of the run.
        panels: by title, points of (policy, bytes, value, low, high).
        label: the label of the values.
        path: the picture.
        log: whether both axes are logarithmic.
    """
    series = {p["name"]: p["series"] for p in head["policies"]}
    names = list(dict.fromkeys(series.values()))
    width = 0.8 + 4.6 * max(len(panels), 1) + (1.6 * -(-len(names) // 20) if len(names) > 8 else 0)
    figure = make_figure(path, (width, 4.4), INSTEAD)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    for ax, (title, points) in zip(axes, panels.items(), strict=False):
        for name in names:
            some = sorted((p for p in points if series[p[0]] == name), key=lambda p: p[1])
            if not some:
                continue
            x, y = [p[1] / 2**20 for p in some], [p[2] for p in some]
            errors = [
                [max(p[2] - p[3], 0) for p in some],
                [max(p[4] - p[2], 0) for p in some],
            ]
            ax.errorbar(
                x,
                y,
                errors,
                fmt="oDv^"[names.index(name) // 10 % 4] + ("-" if len(some) > 1 else ""),
                capsize=2,
                label=name,
                color=f"C{names.index(name) % 10}",
                markersize=4,
                linewidth=1,
            )
        ax.set(title=title, xlabel="KV cache, MiB", ylabel=label)
        if log:
            ax.set(xscale="log", yscale="log")
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter("{x:g}")
            ax.tick_params(axis="x", which="both", labelsize="x-small")
        else:
            ax.set_xlim(left=0)
        ax.grid(alpha=0.3, which="both" if log else "major")
        if len(names) <= 8 and ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize="x-small")
    if len(names) > 8:
        draw_legend(figure, axes[0])
    model = head["model"]
    figure.suptitle(f"{head['eval']}: {one_line(model['name'] or model['file'])}", fontsize=9)
    return save_figure(figure, path)
