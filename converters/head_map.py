"""Show the heads of a profile: a map in text, a picture, and a comparison with other heads."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.figure import make_figure, save_figure
from ..common.inputs import open_input
from ..errors import ProfileError
from ..gguf.header import MAGIC
from ..model_file import ModelFile
from ..model_shape import ModelShape, describe_heads
from ..printable import printable
from ..profile import Profile

if TYPE_CHECKING:
    from ..scores import Cut

SHADES = "·░▒▓█"
ASCII_SHADES = ".-+*#"  # for terminals without the blocks


def query_head_scores(profile: Profile, shape: ModelShape) -> dict[str, tuple[np.ndarray, ...]]:
    """Return the induction and echo scores that the profile has: one f32 [n_head] per layer."""
    found = {"induction": profile.induction_score, "echo": profile.echo_score}
    ends = np.cumsum(shape.n_head)[:-1]
    return {
        name: tuple(np.split(score, ends)) for name, score in found.items() if score is not None
    }


def map_lines(profile: Profile, shape: ModelShape, shades: str = SHADES) -> Iterator[str]:
    """Yield the map of a profile: a line per layer, a character per KV head, shades for scores.

    The score of a KV head is the highest of its group of query heads.
    """
    columns = {"retrieval": ["".join(".#"[head] for head in layer) for layer in profile.retrieval]}
    legend = ["# retrieval head, . local head"]
    if profile.scope is not None:
        columns["scope"] = [" ".join(map(str, layer)) for layer in profile.scope]
        legend.append("scope in tokens, 0: the whole context")
    for name, layers in query_head_scores(profile, shape).items():
        groups = [
            layer.reshape(n, -1).max(axis=1) if n else layer[:0]
            for layer, n in zip(layers, shape.n_head_kv, strict=True)
        ]
        top = max((float(group.max()) for group in groups if len(group)), default=0.0)
        columns[name] = ["".join(_shade(v, top, shades) for v in group) for group in groups]
        legend.append(f"{name} {shades} from 0 to {top:.3g}")
    yield from _table({"layer": [str(il) for il in range(shape.n_layer)]} | columns, "layer")
    yield ""
    yield "; ".join(legend)
    yield from gap_lines(profile, shape)


def profile_cuts(profile: Profile, shape: ModelShape) -> dict[str, Cut]:
    """Return the cut of each score, {} for a profile without scores."""
    from ..scores import find_cuts, profile_scores

    if profile.echo_score is None or profile.induction_score is None:
        return {}
    return find_cuts(profile_scores(profile, shape))


def gap_lines(profile: Profile, shape: ModelShape) -> Iterator[str]:
    """Yield a line for each score: how far the heads that stand out are above the others."""
    for name, cut in profile_cuts(profile, shape).items():
        if not cut.n_above:
            yield f"{name}: no KV head stands out, the highest score is {cut.below:.3g}"
            continue
        heads = "head stands" if cut.n_above == 1 else "heads stand"
        ratio = f", ratio {cut.ratio:.1f}" if math.isfinite(cut.ratio) else ""
        yield (
            f"{name}: {cut.n_above} KV {heads} out (lowest score {cut.above:.3g}, next"
            f" {cut.below:.3g}{ratio})"
        )


def _shade(value: float, top: float, shades: str) -> str:
    share = value / top if top > 0 else 0.0
    return shades[min(max(int(share * len(shades)), 0), len(shades) - 1)]


def scope_line(profile: Profile, n_ctx: int) -> str:
    """Describe the effect of an ALiBi profile in a context of n_ctx tokens."""
    assert profile.scope is not None  # the method is "alibi"
    scopes = np.concatenate(profile.scope)
    local = scopes[(scopes > 0) & (scopes < n_ctx)]
    if not len(local):
        return f"none of {len(scopes)} KV heads keeps less than {n_ctx:,} tokens"
    kept = int(local.sum()) + n_ctx * (len(scopes) - len(local))
    return (
        f"{len(local)} of {len(scopes)} KV heads keep less than {n_ctx:,} tokens: {local.min():,}"
        f" to {local.max():,} each; all scopes together are {kept / (n_ctx * len(scopes)):.1%} of a"
        " full cache"
    )


# -- comparison


@dataclass(frozen=True)
class Overlap:
    """Number of retrieval heads here, there and in both. jaccard is both / either, None for 0/0."""

    here: int
    there: int
    both: int
    jaccard: float | None


@dataclass(frozen=True)
class Comparison:
    """The overlap of two profiles of one shape, per layer and in total."""

    total: Overlap
    layers: tuple[Overlap, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of the total, and the same fields per layer, for JSON."""
        return asdict(self.total) | {"layers": [asdict(layer) for layer in self.layers]}


def compare_heads(here: tuple[np.ndarray, ...], there: tuple[np.ndarray, ...]) -> Comparison:
    """Compare two sets of retrieval heads: one uint8 array [n_head_kv] of 0/1 per layer."""
    layers = tuple(_overlap(a, b) for a, b in zip(here, there, strict=True))
    return Comparison(_overlap(np.concatenate(here), np.concatenate(there)), layers)


def _overlap(here: np.ndarray, there: np.ndarray) -> Overlap:
    both, either = int((here & there).sum()), int((here | there).sum())
    return Overlap(int(here.sum()), int(there.sum()), both, both / either if either else None)


def read_other_heads(
    path: str | os.PathLike[str], shape: ModelShape, n_retrieval: int
) -> tuple[np.ndarray, ...]:
    """Read the retrieval heads of another file to compare with.

    The file may belong to another model of the same shape, such as a quantization or a fine-tune.

    Args:
        path: a model with a profile, a sidecar, a head list, or a file of scores written by
            'convert --save-scores'.
        shape: the shape of this model.
        n_retrieval: number of highest heads to take from gates or scores.

    Raises:
        ProfileError: the shapes differ, or the file has no heads.
        GGUFError, OSError: the file cannot be read.
    """
    path = Path(path)
    with open_input(path, "a profile, a sidecar or a head list", ProfileError) as file:
        start = file.read(4096)
    if not start.startswith(MAGIC):
        from ..scores import FORMAT, choose_heads, load_scores
        from .heads import parse_heads, profile_from_heads

        share: float | None = n_retrieval / max(sum(shape.n_head_kv), 1)
        if f'"{FORMAT}"'.encode() in start:
            scores = load_scores(path)
            _check_heads(path, scores.n_head_kv, shape)
            return choose_heads(scores, budget=share)
        if parse_heads(path).kind == "heads":
            share = None
        return profile_from_heads(path, shape, budget=share).retrieval
    other = ModelFile(path)
    _check_heads(path, other.shape.n_head_kv, shape)
    if other.profile is None:
        raise ProfileError(f"{path} has no razor profile to compare with")
    return other.profile.retrieval


def _check_heads(path: Path, n_head_kv: tuple[int, ...], shape: ModelShape) -> None:
    if n_head_kv != shape.n_head_kv:
        raise ProfileError(
            f"{path} has {describe_heads(n_head_kv)}, the model has"
            f" {describe_heads(shape.n_head_kv)}; only heads of one shape can be compared"
        )


def comparison_lines(here: tuple[np.ndarray, ...], there: tuple[np.ndarray, ...]) -> Iterator[str]:
    """Yield a comparison as a table with a line per layer and a character per KV head."""
    compared = compare_heads(here, there)
    rows = [*compared.layers, compared.total]
    yield from _table(
        {
            "layer": [*map(str, range(len(here))), "all"],
            "# both, < here, > there": [
                *(
                    "".join(".<>#"[a + 2 * b] for a, b in zip(*x, strict=True))
                    for x in zip(here, there, strict=True)
                ),
                "",
            ],
            "here": [str(row.here) for row in rows],
            "there": [str(row.there) for row in rows],
            "both": [str(row.both) for row in rows],
            "Jaccard": ["-" if row.jaccard is None else f"{row.jaccard:.2f}" for row in rows],
        },
        "layer",
        "here",
        "there",
        "both",
        "Jaccard",
    )


def _table(columns: dict[str, list[str]], *right: str) -> Iterator[str]:
    """Yield the lines of a table with a header; the columns in right are right-aligned."""
    for cells in zip(*([name, *values] for name, values in columns.items()), strict=True):
        parts = []
        for cell, (name, values) in zip(cells, columns.items(), strict=True):
            width = max(map(len, [name, *values]))
            parts.append(cell.rjust(width) if name in right else cell.ljust(width))
        yield "  ".join(parts).rstrip()


# -- picture


def plot_heads(profile: Profile, shape: ModelShape, path: str | os.PathLike[str]) -> Path:
    """Draw the retrieval heads, and the scopes or the scores per query head if there are any.

    A file at path, which ends in .png, .svg or .pdf, is replaced. Raises UnsupportedError for
    another ending or if matplotlib is missing, OSError.
    """
    panels = {"retrieval heads": (profile.retrieval, "KV head")}
    if profile.scope is not None:
        panels["scope in tokens"] = (profile.scope, "KV head")
    panels |= {
        f"{name} score": (layers, "query head")
        for name, layers in query_head_scores(profile, shape).items()
    }
    cuts = profile_cuts(profile, shape)
    n_panels = len(panels) + bool(cuts)
    size = (1.5 + 4.5 * n_panels, 2 + 0.12 * shape.n_layer)
    figure = make_figure(path, size, "look at the map in the terminal with --heads")
    figure.suptitle(printable(shape.name[:100], one_line=True))
    all_axes = np.atleast_1d(figure.subplots(1, n_panels))
    for axes, (title, (layers, unit)) in zip(all_axes, panels.items(), strict=False):
        grid = np.full((len(layers), max(map(len, layers))), np.nan)
        for il, layer in enumerate(layers):
            grid[il, : len(layer)] = layer
        chosen = layers is profile.retrieval
        image = axes.imshow(
            grid,
            aspect="auto",
            interpolation="nearest",
            vmin=0,
            vmax=1 if chosen else None,
            cmap="Greys" if chosen else "viridis",
        )
        axes.set(title=title, xlabel=unit, ylabel="layer")
        axes.locator_params(integer=True)
        if not chosen:
            figure.colorbar(image, ax=axes)
    if cuts:
        _plot_gaps(all_axes[-1], profile, shape, cuts)
    figure.tight_layout()
    return save_figure(figure, path)


def _plot_gaps(axes: Any, profile: Profile, shape: ModelShape, cuts: dict[str, Cut]) -> None:
    """Plot the scores of the KV heads by rank, and mark the cut below those that stand out."""
    from ..scores import group_max

    for name, layers in query_head_scores(profile, shape).items():
        values = group_max(np.concatenate(layers), shape.n_head, shape.n_head_kv)
        ranks = np.arange(1, len(values) + 1)
        (line,) = axes.plot(ranks, np.sort(values)[::-1], marker=".", label=name)
        axes.axhline(cuts[name].value, color=line.get_color(), linestyle="--", linewidth=1)
    axes.set(title="scores by rank, and the cuts", xlabel="KV head by rank", ylabel="score")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.set_ylim(0, 1)
    axes.legend()
