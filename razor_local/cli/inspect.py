"""razor-local inspect: the plan of a model and its bytes, without loading the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..plan import Plan
    from ..profile import ModelShape, Profile

PATH = click.Path(path_type=Path)
TYPES = "f32 f16 bf16 q8_0 q5_1 q5_0 q4_1 q4_0".split()  # plan.KV_TYPES, which imports numpy
COMPARED = ("f16", "q8_0", "q4_0")

EPILOG = """
\b
Examples:
  razor-local inspect model-razor.gguf -c 32768
  razor-local inspect model.gguf --sidecar model.razor.gguf -ctk q8_0 -ctv q8_0
  razor-local inspect model-razor.gguf -c 131072 --json
"""


@click.command(epilog=EPILOG)
@click.argument("file", type=PATH)
@click.option(
    "-c", "--ctx-size", type=int, default=0, help="Context in tokens. [default: the model's own]"
)
@click.option(
    "-ctk", "--cache-type-k", type=click.Choice(TYPES), default="f16", show_default=True,
    help="Type of the K cache.",
)  # fmt: skip
@click.option(
    "-ctv", "--cache-type-v", type=click.Choice(TYPES), default="f16", show_default=True,
    help="Type of the V cache.",
)  # fmt: skip
@click.option("--sidecar", type=PATH, help="Profile of the model in a file of its own.")
@click.option(
    "--retrieval", type=click.FloatRange(0, 1), metavar="SHARE",
    help="Plan for another budget: KV heads that keep every token, by the scores in the profile.",
)  # fmt: skip
@click.option("--no-flash-attn", is_flag=True, help="Plan for a context without flash attention.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(
    file: Path,
    ctx_size: int,
    cache_type_k: str,
    cache_type_v: str,
    sidecar: Path | None,
    retrieval: float | None,
    no_flash_attn: bool,
    as_json: bool,
) -> None:
    """Show which KV heads of FILE (a GGUF) keep everything, and the bytes of its KV cache."""
    from ..gguf_header import read_header
    from ..plan import make_plan
    from ..profile import (
        profile_from_header,
        read_sidecar,
        shape_from_header,
        unsupported_feature,
    )

    header = read_header(file)
    shape = shape_from_header(header)
    profile = (
        profile_from_header(header, shape) if sidecar is None else read_sidecar(sidecar, shape)
    )
    if retrieval is not None:
        from ..converters.scores import with_retrieval
        from ..errors import ProfileError

        if profile is None:
            raise ProfileError(
                f"{file} has no razor profile; make one with 'razor-local convert MODEL.gguf -o"
                " OUT.gguf', or name one with --sidecar"
            )
        profile = with_retrieval(profile, shape, retrieval)
    plan = make_plan(shape, profile, ctx_size, cache_type_k, cache_type_v, not no_flash_attn)
    feature = unsupported_feature(header, shape.arch)
    if feature:
        click.echo(
            f"Note: the model has {feature}; razor may be refused when it is run, and the bytes"
            " below are those of plain full attention in every layer.",
            err=True,
        )
    if as_json:
        click.echo(json.dumps(describe(shape, profile, plan), indent=2))
    else:
        _print(shape, profile, plan)


def describe(shape: ModelShape, profile: Profile | None, plan: Plan) -> dict[str, Any]:
    """What --json prints: the plan's own keys, and the model and its profile beside them."""
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
        if profile is None
        else {
            "method": profile.method,
            "retrieval": [layer.tolist() for layer in profile.retrieval],
            "sink_tokens": profile.sink_tokens,
            "window_min": profile.window_min,
            "window_divisor": profile.window_divisor,
            "compensation": profile.compensation,
            "calibration": profile.calibration,
        },
    }


def _full_bytes(plan: Plan, kv_type: str) -> int | None:
    from ..errors import UnsupportedError

    try:
        return plan.kv_bytes_full_as(kv_type)
    except UnsupportedError:  # the type's blocks do not divide the head size
        return None


def _print(shape: ModelShape, profile: Profile | None, plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, soft_wrap=True)
    heads = " ".join(
        sorted({f"{q}/{kv}" for q, kv in zip(shape.n_head, shape.n_head_kv, strict=True)})
    )
    console.print(
        f"model    {_printable(shape.name) or 'without a name'}: {shape.arch},"
        f" {shape.n_layer} layers, {heads} query/KV heads of size {shape.head_dim_k},"
        f" trained for {shape.n_ctx_train:,} tokens"
    )
    if profile is None:
        console.print(
            "profile  none: every KV head keeps every token (razor-local convert adds one)"
        )
    else:
        n, total = int(profile.flat().sum()), len(profile.flat())
        divisor = f", context/{profile.window_divisor}" if profile.window_divisor else ""
        console.print(
            f"profile  {n} of {total} KV heads are retrieval heads ({n / max(total, 1):.1%}),"
            f" {profile.sink_tokens} sinks, window max({profile.window_min:,}{divisor}),"
            f" compensation {'on' if profile.compensation else 'off'}"
        )
    console.print(
        f"context  {plan.n_ctx:,} tokens, K {plan.type_k}, V {plan.type_v},"
        f" flash attention {'on' if plan.flash_attn else 'off'}"
    )
    if plan.active:
        console.print(
            f"plan     {plan.retrieval_kv_heads} KV heads keep {plan.n_ctx:,} tokens,"
            f" {plan.kv_heads - plan.retrieval_kv_heads} keep {plan.sink_tokens} sinks and the last"
            f" {plan.window:,} ({plan.cells:,} cells each, folded by {plan.block})"
        )
    else:
        console.print(f"plan     full cache: {plan.why_inactive}")

    layers = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    layers.add_column("layer", justify="right")
    layers.add_column("KV heads (# retrieval, . local)" if plan.active else "KV heads")
    layers.add_column("retrieval", justify="right")
    layers.add_column("MiB", justify="right")
    for layer in plan.layers:
        row = profile.retrieval[layer.il] if plan.active else [1] * layer.n_head_kv
        layers.add_row(
            str(layer.il),
            "".join("#" if head else "." for head in row),
            f"{layer.n_retrieval}/{layer.n_head_kv}",
            _mib(layer.kv_bytes),
        )
    console.print()
    console.print(layers)

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("KV cache")
    table.add_column("MiB", justify="right")
    table.add_column("this plan takes", justify="right")
    table.add_row("this plan", _mib(plan.kv_bytes), "")
    for kv_type in COMPARED:
        full = _full_bytes(plan, kv_type)
        if full is None:
            table.add_row(f"full {kv_type}", "head size does not fit", "")
        else:
            table.add_row(f"full {kv_type}", _mib(full), f"{plan.kv_bytes / max(full, 1):.1%}")
    if (plan.type_k, plan.type_v) not in {(t, t) for t in COMPARED} or not plan.flash_attn:
        table.add_row("full, same types", _mib(plan.kv_bytes_full), f"{plan.share:.1%}")
    console.print()
    console.print(table)


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.2f}"


def _printable(text: str) -> str:
    """A model's name may hold anything, a terminal's control codes too."""
    return "".join(c if c.isprintable() else "?" for c in text[:100])
