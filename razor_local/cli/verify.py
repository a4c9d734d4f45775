"""razor-local verify: compare the attention of every layer with the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .interrupt import stop_on_interrupt
from .params import (
    BATCH_SIZE,
    CACHE_TYPE_K,
    CACHE_TYPE_LOCAL_K,
    CACHE_TYPE_LOCAL_V,
    CACHE_TYPE_V,
    DEFAULT_MODEL,
    FLASH_ATTN,
    RPC,
    THREADS,
    UBATCH_SIZE,
    GpuLayers,
    Tokens,
    flash_attention,
    model_argument,
)
from .parser import Command
from .terminal import ProgressBar, echo

if TYPE_CHECKING:
    from ..verify.result import Verification

PATH = click.Path(path_type=Path)

EPILOG = """
\b
Examples:
  razor-local verify model-razor.gguf
  razor-local verify model-razor.gguf -c 32768 -ctk q8_0 -ctv q8_0
  razor-local verify model-razor.gguf --text book.txt -n 12000 --json
  razor-local verify model.gguf --sidecar model.razor.gguf -fa off

\b
Exit code: 0 if the model passes, 1 if it does not or cannot be verified.
"""


@click.command(cls=Command, epilog=EPILOG)
@model_argument(DEFAULT_MODEL)
@click.option(
    "-c",
    "--ctx-size",
    type=Tokens(),
    default=0,
    metavar="N",
    help="Context size in tokens.  [default: 8192, or the trained length if that is less]",
)
@click.option(
    "-n",
    "--tokens",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Tokens to run.  [default: enough for four folds, or the whole text]",
)
@click.option("--text", type=PATH, help="Run this text file instead of random tokens.")
@click.option(
    "-s",
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed for the random tokens and the sampled rows.",
)
@click.option(
    "--rows",
    type=click.IntRange(min=0),
    default=1024,
    show_default=True,
    metavar="N",
    help="Rows (tokens) to compare in each layer, spread over the text (0: all).",
)
@click.option(
    "-ngl",
    "--n-gpu-layers",
    "--gpu-layers",
    type=GpuLayers(-1),
    default=-1,
    show_default=True,
    metavar="N",
    help="Layers to offload to the GPU (-1 or all: all, as in chat; 0: verify the CPU).",
)
@RPC
@click.option("-t", "--threads", type=THREADS, metavar="N", help="Number of CPU threads.")
@BATCH_SIZE
@UBATCH_SIZE
@CACHE_TYPE_K
@CACHE_TYPE_V
@CACHE_TYPE_LOCAL_K
@CACHE_TYPE_LOCAL_V
@FLASH_ATTN
@click.option("--sidecar", type=PATH, help="Sidecar with the profile of the model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(
    model: Path,
    ctx_size: int,
    tokens: int,
    text: Path | None,
    seed: int,
    rows: int,
    n_gpu_layers: int,
    threads: int | None,
    batch_size: int,
    ubatch_size: int,
    cache_type_k: str,
    cache_type_v: str,
    cache_type_local_k: str | None,
    cache_type_local_v: str | None,
    flash_attn: str,
    sidecar: Path | None,
    as_json: bool,
) -> None:
    """Check that MODEL, as it runs here, computes RazorAttention.

    Run the model with the native cache and compare the attention of every layer with an independent
    implementation of the paper. A full cache reads the same tokens for comparison: its error and
    the difference of the predictions are shown.

    Errors are relative to each head's output. Columns: KV heads in the group; rms error of the
    group; rms error of the worst head, its limit, and that of the full cache; largest error of any
    number, and its limit.
    """
    from ..common.inputs import read_text_file
    from ..verify.run import verify as run

    content = None if text is None else read_text_file(text)
    with ProgressBar() as bar, stop_on_interrupt() as stop:
        result = run(
            model,
            n_ctx=ctx_size,
            n_tokens=tokens,
            text=content,
            seed=seed,
            rows=rows,
            sidecar=sidecar,
            type_k=cache_type_k,
            type_v=cache_type_v,
            type_k_local=cache_type_local_k,
            type_v_local=cache_type_local_v,
            flash_attn=flash_attention(
                flash_attn, model, cache_type_k, cache_type_v, cache_type_local_v, n_gpu_layers
            ),
            n_batch=batch_size,
            n_ubatch=min(ubatch_size, batch_size),
            n_threads=threads,
            n_gpu_layers=n_gpu_layers,
            progress=bar,
            stop=stop,
        )
    if as_json:
        echo(json.dumps(result.to_dict(), indent=2))
    else:
        _print(result)
    if not result.passed:
        raise click.ClickException(result.verdict.removeprefix("FAIL: "))
    if not as_json:
        echo(result.verdict)


def _print(result: Verification) -> None:
    from rich.table import Table

    from .terminal import table_console

    plan = result.plan
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("layer", justify="right")
    table.add_column("heads", no_wrap=True)
    for name in ("KV", "rms", "worst", "limit", "full", "max", "limit"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for group in result.groups:
        table.add_row(
            str(group.il),
            group.group,
            str(group.kv_heads),
            f"{group.errors.rms:.1e}",
            f"{group.errors.worst_rms:.1e}",
            f"{group.limit_rms:.1e}",
            f"{group.full.worst_rms:.1e}",
            f"{group.errors.largest:.1e}",
            f"{group.limit_largest:.1e}",
            "pass" if group.passed else "FAIL",
        )
    table_console().print(table)
    kl = result.kl
    if result.n_text > result.n_tokens:
        left_out = result.n_text - result.n_tokens
        echo(f"\nThe last {left_out:,} tokens of the text were left out.", err=True)
    echo(
        f"\n{result.n_tokens:,} tokens, {result.n_folded:,} of them"
        f" {'folded' if plan.compensation else 'dropped'} at the end (sinks"
        f" {plan.sink_tokens}, window {plan.windows_text}, blocks of {plan.block}), flash attention"
        f" {'on' if plan.flash_attn else 'off'}, cache on {', '.join(result.buffers)};"
        f" {result.n_rows:,} rows compared in each layer"
    )
    echo(f"profile: {result.profile}")
    echo(
        f"KL divergence from the full cache: mean {kl.mean:.2e}, last eighth {kl.end:.2e}, largest"
        f" {kl.largest:.2e} nats; same top token in {kl.same_top:.1%}"
    )
