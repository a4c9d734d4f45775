"""razor-local tune: search for the smallest KV cache that predicts like the full one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ProfileError, RazorError
from .interrupt import stop_on_interrupt
from .params import (
    DEFAULT_MODEL,
    N_GPU_LAYERS,
    PREFILL,
    TEXT,
    THREADS,
    Number,
    Size,
    Tokens,
    command_word,
    model_argument,
    model_setup,
    report_kind,
    size_text,
    write_report,
)
from .parser import Command
from .terminal import echo, progress_of_run, table_console

if TYPE_CHECKING:
    from ..common.journal import Journal
    from ..common.progress import Progress, Stop
    from ..evals.tune import Tuned, Tuner
    from ..model_file import ModelFile
    from ..model_setup import ModelSetup
    from ..model_shape import ModelShape
    from ..profile import Profile

PATH = click.Path(path_type=Path)
MAX_KL = 0.01  # nats

EPILOG = """
\b
Examples:
  razor-local tune model.gguf --text book.txt
  razor-local tune model.gguf --text book.txt --max-kl 0.005 -c 16k --plot front.png
  razor-local tune model.gguf --text book.txt --memory 64MiB --resume tune.jsonl
  razor-local tune model.gguf --text book.txt --vram 8GiB -c 32k -o model.razor.gguf
"""


@click.command(cls=Command, epilog=EPILOG)
@model_argument(DEFAULT_MODEL)
@TEXT
@click.option(
    "--max-kl",
    type=Number(0, 100, min_open=True),
    metavar="NATS",
    help="Maximum mean KL divergence from the full f16 cache.  [default: 0.01]",
)
@click.option(
    "--memory",
    type=Size(),
    metavar="SIZE",
    help="Find the smallest divergence with a KV cache of at most this size instead.",
)
@click.option(
    "--vram",
    type=Size(),
    metavar="SIZE",
    help="Like --memory, for weights, buffers and KV cache together, such as 8GiB.",
)
@click.option(
    "-c",
    "--ctx-size",
    type=Tokens(),
    default=0,
    metavar="TOKENS",
    help="Context size in tokens.  [default: trained length, up to 8k]",
)
@click.option(
    "--tokens",
    type=Tokens(),
    default=512,
    show_default=True,
    metavar="TOKENS",
    help="Number of tokens to compare after the prompt of each window.",
)
@click.option(
    "--windows",
    type=click.IntRange(1),
    metavar="N",
    help="Number of parts of the text to read, each as long as the context.  [default: 1, or 1 of"
    " each file of a folder]",
)
@click.option(
    "--plans",
    type=click.IntRange(1),
    default=24,
    show_default=True,
    metavar="N",
    help="Maximum number of plans to measure with the same window in all layers.",
)
@click.option(
    "--same-window",
    is_flag=True,
    help="Use the same window in all layers; do not search for a window for each layer.",
)
@PREFILL
@click.option("--sidecar", type=PATH, help="Sidecar with the profile to start from.")
@click.option(
    "--sink-tokens",
    "--sinks",
    "sinks",
    type=int,
    metavar="N",
    help="Number of sink tokens.  [default: the profile's]",
)
@N_GPU_LAYERS
@click.option(
    "-t",
    "--threads",
    type=THREADS,
    metavar="N",
    help="Number of CPU threads.  [default: physical cores]",
)
@click.option(
    "--resume",
    type=PATH,
    metavar="JOURNAL",
    help="Journal of measured plans; plans already in it are not measured again.",
)
@click.option(
    "-o",
    "--output",
    type=PATH,
    help="Sidecar to write.  [default: one in the profile cache, which all commands use]",
)
@click.option("--force", is_flag=True, help="Overwrite the output.")
@click.option(
    "--plot",
    type=PATH,
    metavar="PICTURE",
    help="Plot the divergence of all measured plans over their KV bytes (.png, .svg, .pdf).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--report",
    type=PATH,
    metavar="FILE",
    help="Write the report to this file, not to stdout; as JSON if its name ends in .json.",
)
def tune(model: Path, text: Path, **options: Any) -> None:
    """Search for the smallest KV cache that predicts like the full one.

    A plan sets which KV heads keep every token, how large the windows of the others are, and the KV
    types of both. Each plan reads the beginning of the text as a prompt. Its predictions of the
    tokens after the prompt are compared with those of the full f16 cache. A plan that loses planted
    facts is not chosen.

    At first all layers of a plan have the same window. Then tune measures what a narrow window
    costs in each layer, and narrows the layers where it costs least (--same-window skips this).

    The best plan is written as a profile into the profile cache, or with -o into a sidecar. A
    profile does not set KV types, so tune prints the options to use. If no plan reaches the goal,
    nothing is written, and the exit code is 1.
    """
    from ..common.figure import make_figure
    from ..common.files import check_outputs
    from ..converters.write import check_output, write_sidecar
    from ..evals.perplexity import context_size, describe_text, read_text, text_files
    from ..evals.run import describe_run
    from ..evals.tune import Goal, Tuner, tuned_profile
    from ..evals.tune import tune as search

    # 1. Check everything before anything is measured.
    bounds = [name for name in ("max_kl", "memory", "vram") if options[name] is not None]
    if len(bounds) > 1:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in bounds)
        raise click.UsageError(f"{names} exclude each other")
    output, plot, journal_path = options["output"], options["plot"], options["resume"]
    report_file = options["report"]
    changes = {"budget": None, "window_min": None, "window_divisor": None}
    read = [model, text, *text_files(text), options["sidecar"]]
    check_outputs([journal_path, output, plot, report_file], read)
    if plot is not None:
        make_figure(plot, (1, 1), "leave out the plot")
    setup = model_setup(model, options | changes)
    file = setup.file
    if output is None:
        from .convert import cache_path

        output, force = cache_path(file), True
    else:
        force = options["force"]
    check_output(file, output, force, True)
    n_ctx = context_size(file.shape, options["ctx_size"])
    if not 2 <= options["tokens"] < n_ctx - 1:
        raise click.UsageError(
            f"--tokens is {options['tokens']:,}, expected 2 to {n_ctx - 2:,}, so that a prompt"
            " comes before them"
        )
    prompt = n_ctx - options["tokens"]
    max_kl = MAX_KL if not bounds else options["max_kl"]
    max_bytes = options["memory"]
    if options["vram"] is not None:
        max_bytes = _cache_room(file, n_ctx, options)
    goal = Goal(max_kl, max_bytes)
    # 2. Measure.
    with progress_of_run(journal_path) as bar, stop_on_interrupt() as stop:
        bar(0, 1, "reading the text")
        content = read_text(setup, text)
        for name, n_tokens in content.files or ((str(text), len(content.tokens)),):
            if n_tokens < n_ctx:
                raise RazorError(
                    f"{name} has {n_tokens:,} tokens, expected at least the context ({n_ctx:,});"
                    " use a longer text or a smaller -c"
                )
        n_windows = options["windows"] or max(len(content.files), 1)
        windows = content.windows(n_ctx, n_ctx, n_windows, prompt)
        if len(windows) < n_windows:
            raise RazorError(
                f"--windows is {n_windows:,}, but {text} has only {len(content.tokens):,}"
                f" tokens, enough for {len(windows):,} of {n_ctx:,} tokens each"
                f"{', each in one file' if content.files else ''}; use fewer"
            )
        head = describe_run(
            "tune",
            setup,
            file.shape,
            (),
            **describe_text(content, text),
            n_ctx=n_ctx,
            prompt=prompt,
            n_windows=len(windows),
            plans=options["plans"],
            max_kl=max_kl,
            max_bytes=max_bytes,
        )
        from ..common.journal import Journal

        with Journal(journal_path, head, "a plan search", _identity, _check) as journal:
            if journal.head is None:
                journal.begin(head)
            base = _base(setup, options, journal, bar, stop)
            with Tuner(
                setup, file.shape, base, content, windows, n_ctx, options["plans"], journal, bar,
                stop, not options["same_window"],
            ) as tuner:  # fmt: skip
                tuned = search(tuner, goal)
                profile = (
                    None
                    if tuned.best is None
                    else tuned_profile(tuner, tuned, goal, head["settings"]["text"])
                )
    # 3. Report.
    if profile is not None:
        write_sidecar(file, output, profile, force, private=options["output"] is None)
    _report(tuner, tuned, head, options, report_file)
    if plot is not None:
        _plot(tuner, tuned, plot)
    if tuner.why_no_facts is not None:
        echo(f"Note: no facts were planted: {tuner.why_no_facts}.", err=True)
    if tuned.best is None:
        raise RazorError(f"{tuned.why}; no profile was written")
    from ..evals.tune import options_of

    words = ["razor-local chat", command_word(file.path), "-c", str(n_ctx), options_of(tuned.best)]
    if options["output"] is not None and output != file.sidecar_path:
        words.append(f"--sidecar {shlex.quote(str(output))}")
    echo(f"{output}: the profile of the chosen plan", err=True)
    echo(f"Next: {' '.join(filter(None, words))}", err=True)


def _cache_room(file: ModelFile, n_ctx: int, options: dict[str, Any]) -> int:
    """Return the bytes of --vram that are left for the KV cache. Raises RazorError."""
    from ..fit import ContextOptions, DryModel

    with DryModel(file, n_gpu_layers=options["n_gpu_layers"]) as dry:
        need = dry.need(n_ctx, ContextOptions())
    room: int = options["vram"] - need.weights - need.compute
    if room <= 0:
        raise RazorError(
            f"weights and buffers take {size_text(need.weights + need.compute)}, but --vram is"
            f" {size_text(options['vram'])}; use a smaller model or quantization"
        )
    return room


def _base(
    setup: ModelSetup, options: dict[str, Any], journal: Journal, bar: Progress, stop: Stop
) -> Profile:
    """Return the profile whose scores order the heads. Measure them if there are none."""
    from dataclasses import replace

    from ..auto_profile import prove_profile
    from ..converters.calibrate import calibrate
    from ..errors import NoProfileError
    from ..profile import check_parameters
    from ..scores import profile_from_scores

    changes = {} if options["sinks"] is None else {"sink_tokens": options["sinks"]}
    check_parameters(**changes)
    if setup.file.shape.max_alibi_bias:
        raise ProfileError(
            "the scopes of ALiBi heads follow from the weights, so there is nothing to tune"
        )
    found = setup.found
    if found is not None and found.profile.induction_score is not None:
        return replace(found.profile, **changes)
    kept = next((r for r in journal.records if r["kind"] == "heads"), None)
    if kept is not None:
        return replace(_profile_of(kept, setup.file.shape), **changes)
    run: dict[str, Any] = {"n_threads": setup.n_threads, "n_gpu_layers": setup.n_gpu_layers}
    profile = profile_from_scores(calibrate(setup.file, progress=bar, stop=stop, **run))
    try:
        profile = prove_profile(setup.file, profile, progress=bar, stop=stop, **run)
    except NoProfileError:
        pass  # the heads are ordered by their scores alone
    assert profile.echo_score is not None and profile.induction_score is not None
    journal.add(
        {
            "kind": "heads",
            "retrieval": profile.flat().tolist(),
            "echo": profile.echo_score.tolist(),
            "induction": profile.induction_score.tolist(),
            "calibration": profile.calibration,
        }
    )
    return replace(profile, **changes)


def _profile_of(record: dict[str, Any], shape: ModelShape) -> Profile:
    import numpy as np

    from ..profile import Profile, split_heads

    profile = Profile(
        split_heads(np.array(record["retrieval"], np.uint8), shape.n_head_kv),
        echo_score=np.array(record["echo"], np.float32),
        induction_score=np.array(record["induction"], np.float32),
        calibration=record["calibration"],
    )
    profile.check_shape(shape)
    return profile


def _identity(head: dict[str, Any]) -> dict[str, Any]:
    """Return what must be equal for a search to be resumed. Its goal and its length may differ."""
    from ..evals.run import run_identity

    found = run_identity(head)
    free = ("plans", "max_kl", "max_bytes")
    settings = {name: v for name, v in found["settings"].items() if name not in free}
    return found | {"settings": settings}


def _check(head: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Raise an error if a field of the journal is missing or malformed."""
    from ..evals.tune import Figures

    for record in records:
        if record["kind"] == "plan":
            figures = [record[name] for name in Figures.__dataclass_fields__]
            if not all(0 <= value < float("inf") for value in figures[:4]):
                raise ValueError("a figure is negative or not a number")
        elif record["kind"] == "facts":
            if len(record["found"]) != len(record["logprob"]) or not record["found"]:
                raise ValueError("facts")
        elif record["kind"] != "heads":
            raise ValueError(record["kind"])


def _rows(tuner: Tuner, tuned: Tuned) -> list[dict[str, Any]]:
    """Return a row for each plan, the smallest first."""
    from ..evals.tune import options_of, window_of

    front, rows = set(tuned.front()), []
    full = tuned.measured[tuner.full("f16")].kv_bytes
    for candidate, figures in sorted(tuned.measured.items(), key=lambda item: item[1].kv_bytes):
        is_full = candidate.n_heads == len(tuner.base.flat())
        rows.append(
            {
                "plan": "full" if is_full else "razor",
                "retrieval_kv_heads": candidate.n_heads,
                "window": None if is_full else window_of(candidate.cells, tuner.base) or None,
                "windows": list(candidate.windows) or None,
                "options": options_of(candidate),
                "share": figures.kv_bytes / full,
                "front": candidate in front,
                "lost_facts": candidate in tuned.lost_facts,
                "chosen": candidate == tuned.best,
            }
            | vars(figures)
        )
    return rows


COLUMNS = (
    "plan", "heads", "window", "options", "KV bytes", "share", "KL", "worst tenth", "same top, %",
    "",
)  # fmt: skip


def _window_text(row: dict[str, Any]) -> str:
    if row["windows"] is not None:
        low, high = min(row["windows"]), max(row["windows"])
        return f"{low:,} to {high:,}" if low < high else f"{low:,}"
    return "" if row["window"] is None else f"{row['window']:,}"


def _cells(row: dict[str, Any]) -> list[str]:
    notes = ["chosen"] * row["chosen"] + ["loses facts"] * row["lost_facts"]
    return [
        row["plan"],
        str(row["retrieval_kv_heads"]),
        _window_text(row),
        row["options"] or "f16",
        f"{row['kv_bytes']:,}",
        f"{row['share']:.1%}",
        f"{row['kl']:.5f}",
        f"{row['kl_worst']:.5f}",
        f"{100 * row['same_top']:.1f}",
        ", ".join(notes),
    ]


def _report(
    tuner: Tuner, tuned: Tuned, head: dict[str, Any], options: dict[str, Any], file: Path | None
) -> None:
    """Print the Pareto front and the full caches, or write a report of all plans."""
    from ..common.compact_json import compact_json
    from ..common.markdown import markdown_table

    rows = _rows(tuner, tuned)
    shown = [r for r in rows if r["front"] or r["plan"] == "full" or r["lost_facts"]]
    if report_kind(options["as_json"], file) == "json":
        report = {
            "format": "razor-local tune",
            "head": head,
            "why_none": tuned.why or None,
            "rows": rows,
        }
        return write_report(compact_json(report), file)
    if file is not None:
        lines = ["# razor-local tune", "", *markdown_table(list(COLUMNS), [*map(_cells, rows)])]
        return write_report("\n".join(lines) + "\n", file)
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in COLUMNS:
        left = name in ("plan", "options", "")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for row in shown:
        table.add_row(*_cells(row))
    console = table_console()
    console.width = max(console.width, 160)
    n_ctx, prompt, n_windows = (head["settings"][k] for k in ("n_ctx", "prompt", "n_windows"))
    console.print(
        f"KL divergence from the full f16 cache, in nats, over {n_windows * (n_ctx - prompt):,}"
        f" tokens, each after at least {prompt:,} tokens\n"
    )
    console.print(table)


def _plot(tuner: Tuner, tuned: Tuned, path: Path) -> None:
    """Plot the divergence over the bytes, on logarithmic axes."""
    from ..common.figure import make_figure, save_figure

    figure = make_figure(path, (6.4, 4.4), "leave out the plot")
    figure.set_layout_engine("constrained")
    ax = figure.subplots()
    rows = [row for row in _rows(tuner, tuned) if row["kl"] > 0]
    groups = {
        "full cache": [r for r in rows if r["plan"] == "full"],
        "razor": [r for r in rows if r["plan"] == "razor"],
    }
    for i, (label, some) in enumerate(groups.items()):
        x, y = [r["kv_bytes"] / 2**20 for r in some], [r["kl"] for r in some]
        ax.plot(x, y, "s" if i == 0 else "o", color=f"C{i}", label=label, markersize=4)
        for row, at_x, at_y in zip(some, x, y, strict=True):
            if row["plan"] == "full":
                name = row["options"].split(" ")[1] if row["options"] else "f16"
                ax.annotate(f" {name}", (at_x, at_y), fontsize="x-small")
    front = [r for r in rows if r["front"]]
    x, y = [r["kv_bytes"] / 2**20 for r in front], [r["kl"] for r in front]
    ax.plot(x, y, "-", color="C1", linewidth=1, label="Pareto front")
    for row in rows:
        if row["chosen"]:
            at = row["kv_bytes"] / 2**20, row["kl"]
            ax.plot(*at, "*", color="C3", markersize=11, label="chosen")
    ax.set(xscale="log", yscale="log", xlabel="KV cache, MiB", ylabel="KL divergence, nats")
    for kind in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
        kind(lambda x, _: f"{x:g}")
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize="x-small")
    save_figure(figure, path)
