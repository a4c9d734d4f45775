"""razor-local bench: decode speed against a full cache, paired token by token."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..bench import DecodeResult

PATH = click.Path(path_type=Path)
TYPES = "f32 f16 bf16 q8_0 q5_1 q5_0 q4_1 q4_0".split()  # plan.KV_TYPES, which imports numpy

EPILOG = """
\b
Examples:
  razor-local bench model-razor.gguf
  razor-local bench model-razor.gguf -d 512 -d 32768 -t 1
  razor-local bench model-razor.gguf -d 32768 -ctk q8_0 -ctv q8_0 --json
"""


@click.command(epilog=EPILOG)
@click.argument("model", type=PATH)
@click.option(
    "-d", "--depth", "depths", type=click.IntRange(min=0), multiple=True,
    help="Tokens in the cache, can be repeated. [default: 512, and 3/4 of the context]",
)  # fmt: skip
@click.option(
    "-c", "--ctx-size", type=click.IntRange(min=0), default=0,
    help="Context in tokens. [default: the deepest depth + 256, at least 32768]",
)  # fmt: skip
@click.option(
    "-r", "--pairs", type=click.IntRange(min=1), default=40, show_default=True,
    help="Pairs of tokens per depth.",
)  # fmt: skip
@click.option("-t", "--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("-ngl", "--n-gpu-layers", type=int, default=0, show_default=True)
@click.option(
    "-ctk", "--cache-type-k", type=click.Choice(TYPES), default="f16", show_default=True,
    help="Type of razor's K cache.",
)  # fmt: skip
@click.option(
    "-ctv", "--cache-type-v", type=click.Choice(TYPES), default="f16", show_default=True,
    help="Type of razor's V cache.",
)  # fmt: skip
@click.option(
    "--full-type", type=click.Choice(TYPES), default="f16", show_default=True,
    help="Type of the full cache it is compared with.",
)  # fmt: skip
@click.option("--sidecar", type=PATH, help="Profile of the model in a file of its own.")
@click.option(
    "--stock-lib", type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with the libllama of a stock build for the full cache. [default: the package's]",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench(
    model: Path,
    depths: tuple[int, ...],
    ctx_size: int,
    pairs: int,
    threads: int,
    n_gpu_layers: int,
    cache_type_k: str,
    cache_type_v: str,
    full_type: str,
    sidecar: Path | None,
    stock_lib: Path | None,
    as_json: bool,
) -> None:
    """Time single-token decodes of MODEL with razor against a full cache.

    Both contexts decode in turn, and the ratios of neighbours are what counts; flash attention is
    on for both. Deep caches are filled with random rows.
    """
    from rich.console import Console

    from ..bench import bench_decode

    ctx_size = ctx_size or max(32768, max(depths, default=0) + 256)
    depths = depths or (512, ctx_size // 4 * 3)
    console = Console(stderr=True)
    with console.status("starting") as status:
        results = bench_decode(
            model,
            depths,
            n_ctx=ctx_size,
            pairs=pairs,
            n_threads=threads,
            n_gpu_layers=n_gpu_layers,
            type_k=cache_type_k,
            type_v=cache_type_v,
            full_type_k=full_type,
            full_type_v=full_type,
            sidecar=sidecar,
            stock_lib=stock_lib,
            progress=status.update,
        )
    if as_json:
        click.echo(json.dumps([asdict(result) for result in results], indent=2))
    else:
        _print(results, f"{cache_type_k}/{cache_type_v}", full_type)


def _print(results: list[DecodeResult], razor_types: str, full_type: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in (
        "depth",
        f"razor {razor_types} ms",
        f"full {full_type} ms",
        "faster by",
        "quartiles",
        "razor KV MiB",
        "full KV MiB",
    ):
        table.add_column(name, justify="right")
    for r in results:
        table.add_row(
            f"{r.depth:,}",
            f"{r.razor_ms:.2f}",
            f"{r.full_ms:.2f}",
            f"{r.ratio:.3f}x",
            f"{r.ratio_low:.3f}-{r.ratio_high:.3f}",
            f"{r.razor_kv_bytes / 2**20:,.1f}",
            "?" if r.full_kv_bytes is None else f"{r.full_kv_bytes / 2**20:,.1f}",
        )
    Console(highlight=False, markup=False, soft_wrap=True).print(table)
