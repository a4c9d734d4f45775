"""Plot a benchmark."""

from __future__ import annotations

import os
from pathlib import Path

from ..common.figure import make_figure, save_figure
from ..common.markdown import one_line, short_tokens
from .cells import kv
from .figures import Report, types_of


def plot_report(report: Report, path: str | os.PathLike[str]) -> Path:
    """Plot KV memory, decode speed and time to the first token over the context.

    Raises UnsupportedError if matplotlib is missing or path does not name a picture, OSError.
    """
    figure = make_figure(path, (15.0, 4.5), "read the tables in the Markdown report")
    from matplotlib.ticker import NullLocator

    axes = figure.subplots(1, 3)
    name = report.head["model"]["name"] or report.head["model"]["file"]
    figure.suptitle(f"{one_line(name)}, {one_line(report.head['machine']['cpu'])}")
    rows = report.rows
    kinds = list(dict.fromkeys(map(types_of, rows)))
    for i, types in enumerate(kinds):
        some = [row for row in rows if types_of(row) == types]
        for side, style in (("razor", "o-"), ("full", "x--")):
            for ax, x, y, scale in (
                (axes[0], "n_ctx", f"{side}_kv_bytes", 2**-20),
                (axes[1], "depth", f"{side}_tok_s", 1),
                (axes[2], "depth", f"{side}_first_token_s", 1),
            ):
                known = {row[x]: row[y] * scale for row in some if row[y] is not None}
                ax.plot(
                    list(known),
                    list(known.values()),
                    style,
                    color=f"C{i}",
                    label=f"{side} {kv(some[0])}",
                )
    for ax, x, title, label in zip(
        axes,
        ("n_ctx", "depth", "depth"),
        ("KV cache", "decoding", "time to the first token"),
        ("MiB", "tokens/s", "s"),
        strict=True,
    ):
        ticks = sorted({row[x] for row in rows})
        ax.set(title=title, xlabel="context" if x == "n_ctx" else "tokens", ylabel=label)
        ax.set(yscale="log")
        ax.set_xscale("symlog", linthresh=512, base=2)  # linear from 0 to 512
        ax.set_xticks(ticks, [short_tokens(tick) for tick in ticks], rotation=45)
        ax.xaxis.set_minor_locator(NullLocator())
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    figure.tight_layout()
    return save_figure(figure, path)
