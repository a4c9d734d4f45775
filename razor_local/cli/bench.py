"""razor-local bench: measure memory and speed against full caches, with plots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..bench.batches import KINDS
from ..bench.shapes import SHAPES
from .params import (
    CACHE_TYPE_LOCAL_K,
    CACHE_TYPE_LOCAL_V,
    DEFAULT_MODEL,
    KV_TYPE,
    N_GPU_LAYERS,
    THREADS,
    ListOf,
    Number,
    Tokens,
    model_argument,
    model_setup,
    report_kind,
    write_report,
)
from .parser import Command
from .terminal import ProgressBar, echo, progress_of_run

if TYPE_CHECKING:
    from ..bench.batches import Settings
    from ..bench.figures import Report
    from ..model_setup import ModelSetup

PATH = click.Path(path_type=Path)

EPILOG = """
\b
Examples:
  razor-local bench model-razor.gguf
  razor-local bench model-razor.gguf -d 0,8k,32k,128k --types f16,q8_0 --plot speed.svg
  razor-local bench model-razor.gguf -c 32k -d 0,4k,16k,30k -ctk q8_0 -ctv q8_0 --json
  razor-local bench --shape llama-3.2-1b -d 0,512,8k,32k,128k -o run.json --resume run.jsonl
  razor-local bench --report run.json --plot run.png
  razor-local bench --compare before.json after.json
"""


@click.command(cls=Command, epilog=EPILOG)
@model_argument()
@click.option(
    "-d",
    "--depth",
    "depths",
    type=ListOf(Tokens(), "tokens,..."),
    multiple=True,
    help="Depths: tokens in the cache, for example 0,8k,32k. Repeatable.  [default: 0,8k,32k]",
)
@click.option(
    "-c",
    "--ctx-size",
    type=Tokens(),
    default=0,
    help="Context size for all depths.  [default: as large as each depth needs, at least 8.5k]",
)
@click.option(
    "--types",
    type=ListOf(KV_TYPE, "type,..."),
    help="Types of the KV cache, each for K and V.  [default: f16,q8_0,q4_0]",
)
@click.option(
    "-ctk", "--cache-type-k", type=KV_TYPE, help="Type of the K cache, instead of --types."
)
@click.option(
    "-ctv", "--cache-type-v", type=KV_TYPE, help="Type of the V cache, instead of --types."
)
@CACHE_TYPE_LOCAL_K
@CACHE_TYPE_LOCAL_V
@click.option(
    "-r",
    "--pairs",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Maximum decode turns per cache and depth (one token each, or several if they are fast).",
)
@click.option(
    "--seconds",
    type=Number(min=0, min_open=True),
    default=15.0,
    show_default=True,
    help="Time limit of one measurement in seconds; slow caches get fewer turns, but at least 5.",
)
@click.option(
    "-t", "--threads", type=THREADS, help="Number of CPU threads.  [default: physical cores]"
)
@N_GPU_LAYERS
@click.option(
    "--rpc",
    metavar="HOST:PORT,...",
    help="RPC servers that compute layers on other machines.",
)
@click.option("--sidecar", type=PATH, help="Sidecar with the profile of the model.")
@click.option(
    "--budget",
    "--retrieval",
    "budget",
    type=Number(0, 1),
    metavar="SHARE",
    help="Share of retrieval heads, chosen by the scores in the profile.  [default: the profile's;"
    " 0.15 with --shape]",
)
@click.option(
    "--window-min",
    type=int,
    metavar="N",
    help="Minimum window in tokens.  [default: the profile's]",
)
@click.option(
    "--window-divisor", type=int, metavar="N", help="Window divisor.  [default: the profile's]"
)
@click.option(
    "--sink-tokens",
    "--sinks",
    "sinks",
    type=int,
    metavar="N",
    help="Number of sink tokens.  [default: the profile's]",
)
@click.option(
    "--shape",
    metavar="NAME",
    help="Use random weights of this shape instead of MODEL (kept in the user's cache folder): "
    f"{', '.join(SHAPES)}.",
)
@click.option(
    "--quant",
    type=click.Choice(["q4_0", "q8_0", "f16"]),
    help="Weight type for --shape.  [default: q4_0]",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    help="Seed for the weights and heads of --shape.  [default: 0]",
)
@click.option(
    "--real-prefill",
    type=Tokens(),
    is_flag=False,
    flag_value="0",
    metavar="[TOKENS]",
    help="Also prefill this many tokens for real, with the first type, in every context that holds"
    " them, to check the random caches.  [default: enough for a fold, in the smallest context]",
)
@click.option(
    "--only",
    type=ListOf(click.Choice(KINDS), "kind,..."),
    metavar="KIND,...",
    help=f"Make only these measurements: {', '.join(KINDS)}. A later --resume without this option"
    " adds the rest.",
)
@click.option(
    "--stock-lib",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with a stock libllama to run the full caches.  [default: the packaged library]",
)
@click.option(
    "--resume",
    type=PATH,
    metavar="JOURNAL",
    help="Journal of finished measurements; measurements already in it are not repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "-o",
    "--output",
    type=PATH,
    help="Write the report to this file, not to stdout; as JSON if its name ends in .json.",
)
@click.option(
    "--plot",
    "plots",
    type=PATH,
    multiple=True,
    metavar="PICTURE",
    help="Draw memory and speed over context (.png, .svg, .pdf). Repeatable.",
)
@click.option("--report", type=PATH, metavar="RUN.json", help="Show a saved run without measuring.")
@click.option(
    "--compare",
    type=PATH,
    nargs=2,
    metavar="A.json B.json",
    help="Compare two saved runs without measuring.",
)
def bench(
    model: Path | None,
    as_json: bool,
    output: Path | None,
    plots: tuple[Path, ...],
    report: Path | None,
    compare: tuple[Path, Path] | None,
    **options: Any,
) -> None:
    """Compare MODEL with razor and with full caches: memory, prefill, first token, decoding.

    All caches take turns decoding, in one process (two with --stock-lib), with flash attention; the
    result is the median ratio of neighboring measurements. Deep caches are filled with random rows
    (--real-prefill checks this), each in a context of its own size.
    """
    from ..bench.compare import differences, format_comparison
    from ..bench.plot import plot_report
    from ..bench.report import format_report
    from ..bench.saved import load_report
    from ..common.files import check_outputs

    kind = report_kind(as_json, output)
    sources = [model, options["shape"], report, compare or None]
    given = sum(source is not None for source in sources)
    if given > 1:
        raise click.UsageError("expected one of MODEL, --shape, --report and --compare")
    model = model if given else DEFAULT_MODEL
    check_outputs(
        [options["resume"], output, *plots], [model, options["sidecar"], report, *(compare or ())]
    )
    if plots:
        _check_pictures(plots)
    if compare:
        if plots:
            raise click.UsageError("--compare draws nothing; --plot is for one run")
        here, there = (load_report(path) for path in compare)
        for line in differences(here, there):
            echo(f"Note: the runs differ in {line}", err=True)
        text = format_comparison(here, there, kind)
    else:
        run = load_report(report) if report is not None else _measure(model, options)
        text = format_report(run, kind)
    write_report(text, output)
    for path in plots:
        plot_report(run, path)


def _check_pictures(paths: tuple[Path, ...]) -> None:
    """Refuse pictures that could not be drawn, before anything is measured."""
    from ..common.figure import make_figure

    for path in paths:
        make_figure(path, (1, 1), "leave out --plot")


def _measure(model: Path | None, options: dict[str, Any]) -> Report:
    from ..bench.figures import Report
    from ..bench.run import run_bench

    if options["rpc"] is not None and options["stock_lib"] is not None:
        raise click.UsageError("--rpc and --stock-lib exclude each other")
    settings = _settings(options)
    setup = _setup(model, options)
    if setup.rpc is None:
        setup = replace(setup, n_gpu_layers=_gpu_layers(setup.n_gpu_layers))
    with progress_of_run(options["resume"]) as bar:
        head, records = run_bench(
            setup,
            settings,
            stock_lib=options["stock_lib"],
            resume=options["resume"],
            only=options["only"] or KINDS,
            progress=bar,
        )
    return Report(head, records)


def _settings(options: dict[str, Any]) -> Settings:
    from ..bench.batches import Settings

    k, v, types = options["cache_type_k"], options["cache_type_v"], options["types"]
    if (k or v) and types:
        raise click.UsageError("--types and -ctk, -ctv exclude each other")
    changes: dict[str, Any] = {}
    if k or v:
        changes["types"] = ((k or "f16", v or "f16"),)
    elif types:
        changes["types"] = tuple((name, name) for name in dict.fromkeys(types))
    if options["depths"]:
        changes["depths"] = tuple(sorted({n for some in options["depths"] for n in some}))
    return Settings(
        n_ctx=options["ctx_size"],
        type_k_local=options["cache_type_local_k"],
        type_v_local=options["cache_type_local_v"],
        max_pairs=options["pairs"],
        seconds=options["seconds"],
        real_prefill=options["real_prefill"],
        **changes,
    )


def _setup(model: Path | None, options: dict[str, Any]) -> ModelSetup:
    if model is None:
        if options["sidecar"]:
            raise click.UsageError("--sidecar belongs to MODEL, not to --shape")
        # its retrieval heads are in the file
        return model_setup(_make_shape(options), options | {"budget": None})
    if options["quant"] or options["seed"] is not None:
        raise click.UsageError("--quant and --seed belong to --shape")
    return model_setup(model, options)


def _gpu_layers(wanted: int) -> int:
    """Return the number of layers, or 0 without a device, so that reports name the CPU."""
    from ..native import load

    load()
    from llama_cpp import llama_cpp as C

    return wanted if C.llama_supports_gpu_offload() else 0


def _make_shape(options: dict[str, Any]) -> Path:
    from ..bench.shape_file import cached_shape_model

    share = options["budget"]
    with ProgressBar() as bar:
        path = cached_shape_model(
            options["shape"],
            quant=options["quant"] or "q4_0",
            retrieval=0.15 if share is None else share,
            seed=options["seed"] or 0,
            progress=bar,
        )
    echo(f"{path}: random weights; only the speed is meaningful", err=True)
    return path
