"""razor-local inspect: show the plan of a model and its bytes, without loading the model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..printable import printable
from .params import (
    CACHE_TYPE_K,
    CACHE_TYPE_LOCAL_K,
    CACHE_TYPE_LOCAL_V,
    CACHE_TYPE_V,
    DEFAULT_MODEL,
    FLASH_ATTN,
    Number,
    Tokens,
    flash_attention,
    model_argument,
    note_damaged_profile,
)
from .parser import Command
from .terminal import echo, table_console

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from ..model_file import FoundProfile
    from ..model_shape import ModelShape
    from ..plan import Plan
    from ..profile import Profile

PATH = click.Path(path_type=Path)
COMPARED = ("f16", "q8_0", "q4_0")

EPILOG = """
\b
Examples:
  razor-local inspect model-razor.gguf -c 32768
  razor-local inspect model.gguf --sidecar model.razor.gguf -ctk q8_0 -ctv q8_0
  razor-local inspect model-razor.gguf -c 131072 --json
  razor-local inspect model-razor.gguf --heads --compare heads.tsv --plot heads.png
"""


@click.command(cls=Command, epilog=EPILOG)
@model_argument(DEFAULT_MODEL)
@click.option(
    "-c",
    "--ctx-size",
    type=Tokens(),
    default=0,
    metavar="N",
    help="Context size in tokens, such as 8192 or 32k.  [default: trained length]",
)
@CACHE_TYPE_K
@CACHE_TYPE_V
@CACHE_TYPE_LOCAL_K
@CACHE_TYPE_LOCAL_V
@click.option("--sidecar", type=PATH, help="Sidecar with the profile of the model.")
@click.option(
    "--budget",
    "--retrieval",
    "budget",
    type=Number(0, 1),
    metavar="SHARE",
    help="Share of retrieval heads to plan with, chosen by the scores in the profile.",
)
@FLASH_ATTN
@click.option("--heads", is_flag=True, help="Show a map of the heads and their scores instead.")
@click.option(
    "--compare",
    type=PATH,
    metavar="OTHER",
    help="Compare the heads with those of another profile, sidecar or head list.",
)
@click.option("--plot", type=PATH, metavar="PICTURE", help="Draw the heads (.png, .svg, .pdf).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(
    model: Path,
    ctx_size: int,
    cache_type_k: str,
    cache_type_v: str,
    cache_type_local_k: str | None,
    cache_type_local_v: str | None,
    sidecar: Path | None,
    budget: float | None,
    flash_attn: str,
    heads: bool,
    compare: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Show the retrieval heads of MODEL and the size of its KV cache.

    For an ALiBi model, show the scopes: how many tokens each KV head keeps.
    """
    from ..common.files import check_outputs
    from ..model_file import ModelFile
    from ..model_shape import unsupported_feature, why_not_converted
    from ..plan import make_plan

    check_outputs([plot], [model, sidecar, compare])
    opened = ModelFile(model)
    shape, found = opened.shape, opened.find_profile(sidecar, budget)
    if sidecar is None:
        note_damaged_profile(opened, found)
    profile = None if found is None else found.profile
    looking = heads or compare is not None or plot is not None
    if profile is None and (budget is not None or looking):
        raise opened.no_profile()
    feature = unsupported_feature(opened.header, shape)
    if feature:
        echo(
            f"Note: the model has {feature}, which razor does not support. The sizes below assume"
            " plain full attention in every layer.",
            err=True,
        )
    there = None
    if compare is not None and profile is not None:
        from ..converters.head_map import read_other_heads

        there = read_other_heads(compare, shape, int(profile.flat().sum()))
    if plot is not None and profile is not None:
        from ..converters.head_map import plot_heads

        plot_heads(profile, shape, plot)
    no_convert = why_not_converted(opened.header, shape)
    if looking and profile is not None and not as_json:
        return _print_heads(shape, found, heads, there, compare, plot)
    use_flash_attn = flash_attention(
        flash_attn, model, cache_type_k, cache_type_v, cache_type_local_v
    )
    plan = make_plan(
        shape, profile, ctx_size, cache_type_k, cache_type_v, use_flash_attn,
        type_k_local=cache_type_local_k, type_v_local=cache_type_local_v,
    )  # fmt: skip
    if as_json:
        described = describe(shape, found, plan)
        if heads and profile is not None:
            described["scores"] = _scores(shape, profile)
            described["cuts"] = _cuts(shape, profile)
        if there is not None and profile is not None:
            from ..converters.head_map import compare_heads

            compared = compare_heads(profile.retrieval, there).to_dict()
            described["comparison"] = {"with": str(compare)} | compared
        echo(json.dumps(described, indent=2))
    else:
        _print_profile(table_console(), shape, found, no_convert)
        _print_plan(shape, profile, plan)


def describe(shape: ModelShape, found: FoundProfile | None, plan: Plan) -> dict[str, Any]:
    """Return the report for --json: the keys of the plan, the model and its profile."""
    profile = None if found is None else found.profile
    return plan.to_dict() | {
        "kv_bytes_full_as": {kv_type: _full_bytes(plan, kv_type) for kv_type in COMPARED},
        "model": {
            "name": shape.name,
            "arch": shape.arch,
            "n_layer": shape.n_layer,
            "n_head": list(shape.n_head),
            "n_head_kv": list(shape.n_head_kv),
            "head_dim_k": shape.head_dim_k,
            "head_dim_v": shape.head_dim_v,
            "n_ctx_train": shape.n_ctx_train,
            "fingerprint": shape.fingerprint,
        },
        "profile": None
        if found is None or profile is None
        else {
            "source": found.source,
            "where": found.where,
            "method": profile.method,
            "retrieval": [layer.tolist() for layer in profile.retrieval],
            "scope": None if profile.scope is None else [layer.tolist() for layer in profile.scope],
            "sink_tokens": profile.sink_tokens,
            "window_min": profile.window_min,
            "window_divisor": profile.window_divisor,
            "compensation": profile.compensation,
            "calibration": profile.calibration,
        },
    }


def _scores(shape: ModelShape, profile: Profile) -> dict[str, list[list[float]]]:
    """Return each score by layer and query head."""
    from ..converters.head_map import query_head_scores

    found = query_head_scores(profile, shape)
    return {name: [layer.tolist() for layer in layers] for name, layers in found.items()}


def _cuts(shape: ModelShape, profile: Profile) -> dict[str, dict[str, float]]:
    """Return the cut of each score."""
    from ..converters.head_map import profile_cuts

    return {name: asdict(cut) for name, cut in profile_cuts(profile, shape).items()}


def _full_bytes(plan: Plan, kv_type: str) -> int | None:
    from ..errors import UnsupportedError

    try:
        return plan.kv_bytes_full_as(kv_type)
    except UnsupportedError:  # the type's blocks do not divide the head size
        return None


def _print_heads(
    shape: ModelShape,
    found: FoundProfile | None,
    heads: bool,
    there: tuple[np.ndarray, ...] | None,
    compare: Path | None,
    plot: Path | None,
) -> None:
    from ..converters.head_map import ASCII_SHADES, SHADES, comparison_lines, map_lines

    assert found is not None  # the caller has checked that there is a profile
    console, profile = table_console(), found.profile
    _print_profile(console, shape, found)
    if heads:
        console.print()
        try:
            SHADES.encode(console.encoding)
            shades = SHADES
        except UnicodeEncodeError:
            shades = ASCII_SHADES
        for line in map_lines(profile, shape, shades):
            console.print(line)
    if there is not None:
        console.print(f"\nhere     {printable(str(shape.path), one_line=True)}")
        console.print(f"there    {printable(str(compare), one_line=True)}\n")
        for line in comparison_lines(profile.retrieval, there):
            console.print(line)
    if plot is not None:
        console.print(f"\nplot     {printable(str(plot), one_line=True)}")


def _print_plan(shape: ModelShape, profile: Profile | None, plan: Plan) -> None:
    """Print what the plan does and its bytes."""
    from rich.table import Table

    console = table_console()
    local = f" (local heads K {plan.type_k_local}, V {plan.type_v_local})"
    console.print(
        f"context  {plan.n_ctx:,} tokens, K {plan.type_k}, V {plan.type_v}"
        f"{local if plan.has_local_types else ''},"
        f" flash attention {'on' if plan.flash_attn else 'off'}"
    )
    if profile is not None and profile.method == "alibi":
        from ..converters.head_map import scope_line

        console.print(f"scopes   {scope_line(profile, plan.n_ctx)}")
    if plan.active:
        kept = f"plan     {plan.retrieval_kv_heads} KV heads keep {plan.n_ctx:,} tokens;"
        folded = "folded" if plan.compensation else "dropped"
        for group in plan.groups:
            console.print(
                f"{kept} {group.n_heads} keep {plan.sink_tokens} sinks and the last"
                f" {group.window:,} ({group.cells:,} cells each, {folded} in blocks of"
                f" {plan.block})"
            )
            kept = " " * 8
    else:
        console.print(f"plan     full cache: {plan.why_inactive}")

    layers = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    layers.add_column("layer", justify="right")
    layers.add_column("KV heads (# retrieval, . local)" if plan.active else "KV heads")
    layers.add_column("retrieval", justify="right")
    layers.add_column("MiB", justify="right")
    for layer in plan.layers:
        if not layer.n_head_kv and (plan.sliding_bytes or plan.recurrent_bytes):
            continue  # it has a sliding window, or is recurrent
        layers.add_row(
            str(layer.il),
            "".join("." if window else "#" for window in layer.windows),
            f"{layer.n_retrieval}/{layer.n_head_kv}",
            _mib(layer.kv_bytes),
        )
    console.print()
    console.print(layers)
    for line in _other_parts(shape, plan):
        console.print(line)

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("KV cache")
    table.add_column("full MiB", justify="right")
    if plan.active:
        table.add_column("razor MiB", justify="right")
        table.add_column("razor / full", justify="right")
    compared = [(t, t) for t in COMPARED]
    if plan.has_local_types:
        _add_plan(table, "this plan", plan)
    else:
        compared.insert(0, (plan.type_k, plan.type_v))
    for type_k, type_v in dict.fromkeys(compared):
        name = type_k if type_k == type_v else f"{type_k}/{type_v}"
        same = not plan.has_local_types and (type_k, type_v) == (plan.type_k, plan.type_v)
        name += " (this plan)" if same else ""
        other = plan if same else _with_types(shape, profile, plan, type_k, type_v)
        if isinstance(other, str):
            table.add_row(name, other)
        else:
            _add_plan(table, name, other)
    console.print()
    console.print(table)


def _add_plan(table: Table, name: str, plan: Plan) -> None:
    sizes = _mib(plan.kv_bytes_full), _mib(plan.kv_bytes), f"{plan.share:.1%}"
    table.add_row(name, *sizes[: len(table.columns) - 1])


def _other_parts(shape: ModelShape, plan: Plan) -> list[str]:
    """A line for each part of the cache that razor leaves alone."""
    lines = []
    if shape.sliding is not None:
        lines.append(
            f"sliding  {len(shape.sliding.n_head_kv)} layers with a window of"
            f" {shape.sliding.window:,} tokens, {plan.sliding_cells:,} cells each:"
            f" {_mib(plan.sliding_bytes)} MiB"
        )
    if plan.recurrent_bytes:
        lines.append(f"states   of recurrent layers: {_mib(plan.recurrent_bytes)} MiB")
    if shape.shared:
        lines.append(f"shared   {len(shape.shared)} layers read the cache of an earlier one")
    return lines


def _with_types(
    shape: ModelShape, profile: Profile | None, plan: Plan, type_k: str, type_v: str
) -> Plan | str:
    """Return the plan with these types for all heads, or the reason if there is none."""
    from ..errors import UnsupportedError
    from ..plan import make_plan

    try:
        return make_plan(shape, profile, plan.n_ctx, type_k, type_v, plan.flash_attn)
    except UnsupportedError:
        return "needs flash attention" if _full_bytes(plan, type_v) else "head size does not fit"


def _print_profile(
    console: Console, shape: ModelShape, found: FoundProfile | None, no_convert: str | None = None
) -> None:
    from ..profile import facts_line, scopes_text, tune_line

    profile = None if found is None else found.profile
    heads = " ".join(
        sorted({f"{q}/{kv}" for q, kv in zip(shape.n_head, shape.n_head_kv, strict=True) if q})
    )
    console.print(
        f"model    {printable(shape.name[:300], one_line=True) or 'without a name'}: {shape.arch},"
        f" {shape.n_layer} layers, {heads} query/KV heads of size {shape.head_dim_k},"
        f" trained for {shape.n_ctx_train:,} tokens"
    )
    if profile is None:
        adds = "adds one" if no_convert is None else f"refuses to add one ({no_convert})"
        console.print(
            f"profile  none: every KV head keeps every token; 'razor-local convert' {adds}"
        )
    elif profile.method == "alibi":
        epsilon = str(profile.calibration.get("epsilon", "an unknown epsilon"))[:300]
        epsilon = printable(epsilon, one_line=True)
        console.print(
            f"profile  ALiBi: attention beyond the scope of a KV head is at most {epsilon}"
        )
    else:
        n, total = int(profile.flat().sum()), len(profile.flat())
        divisor = f", context/{profile.window_divisor}" if profile.window_divisor else ""
        window = f"window max({profile.window_min:,}{divisor})"
        if profile.scope is not None:
            window = scopes_text(profile)
        console.print(
            f"profile  {n} of {total} KV heads are retrieval heads ({n / max(total, 1):.1%}),"
            f" {profile.sink_tokens} sinks, {window},"
            f" compensation {'on' if profile.compensation else 'off'}"
        )
        facts = facts_line(profile)
        if facts is not None:
            console.print(f"proof    {facts}")
        tuned = tune_line(profile)
        if tuned is not None:
            console.print(f"tuned    {tuned}")
    if found is not None:
        console.print(f"source   {printable(str(found), one_line=True)}")


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.2f}"
