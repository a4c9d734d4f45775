"""razor-local convert: a razor profile into a copy of a model, or into a sidecar."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .params import THREADS, Number, Size

if TYPE_CHECKING:
    from ..converters.scores import Scores
    from ..profile import ModelShape, Profile

PATH = click.Path(path_type=Path)

EPILOG = """
\b
Examples:
  razor-local convert model.gguf -o model-razor.gguf
  razor-local convert model.gguf -o model-razor.gguf --retrieval 0.25 --save-scores scores.json
  razor-local convert model.gguf -o model.razor.gguf --scores scores.json --sidecar
  razor-local convert model.gguf -o model-razor.gguf --heads heads.tsv
  razor-local convert model.gguf -o model-razor.gguf --heads gates.tsv --retrieval 0.25
  razor-local convert bloom.gguf -o bloom-razor.gguf --epsilon 0.01
"""

# all that says how heads are measured or chosen, or what is kept beside their scopes
NOT_FOR_ALIBI = (
    "heads", "induction", "echo", "retrieval", "scores", "save_scores", "tokens", "repeats",
    "seed", "max_memory", "threads", "n_gpu_layers", "sinks", "window_min", "window_divisor",
    "no_compensation",
)  # fmt: skip


@click.command(epilog=EPILOG)
@click.argument("model", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="File to write.")
@click.option(
    "--heads",
    type=PATH,
    help="Head list of others instead of measuring: 0/1 table, DuoAttention gates, Retrieval_Head"
    " JSON.",
)
@click.option(
    "--induction",
    type=Number(0, 1),
    metavar="SHARE",
    help="KV heads taken by induction score.  [default: 0.14]",
)
@click.option(
    "--echo",
    type=Number(0, 1),
    metavar="SHARE",
    help="KV heads taken by echo score.  [default: 0.01]",
)
@click.option(
    "--retrieval",
    type=Number(0, 1),
    metavar="SHARE",
    help="One budget instead: the share of retrieval heads.",
)
@click.option(
    "--scores", type=PATH, help="Head scores of an earlier --save-scores, instead of measuring."
)
@click.option(
    "--save-scores", type=PATH, help="Keep the measured scores in this file (.json or .npz)."
)
@click.option(
    "--tokens",
    type=int,
    help="Random tokens to measure with.  [default: 2500, or what the trained context holds]",
)
@click.option("--repeats", type=int, help="How often they are repeated.  [default: 4]")
@click.option("--seed", type=int, help="Of the random tokens.  [default: 0]")
@click.option("--max-memory", type=Size(), help="For measuring, beside the model.  [default: 3G]")
@click.option("-t", "--threads", type=THREADS, metavar="N", help="CPU threads for measuring.")
@click.option(
    "-ngl",
    "--n-gpu-layers",
    type=click.IntRange(-1),
    metavar="N",
    help="Layers on the GPU for measuring.  [default: -1, all]",
)
@click.option(
    "--epsilon",
    type=Number(0, 1, min_open=True, max_open=True),
    help="ALiBi models: attention beyond a head's scope is at most this.  [default: 0.001]",
)
@click.option("--sidecar", is_flag=True, help="Write the profile alone, without the model.")
@click.option("--sinks", type=int, default=4, show_default=True, help="Sink tokens.")
@click.option(
    "--window-min", type=int, default=4000, show_default=True, help="Smallest window, in tokens."
)
@click.option(
    "--window-divisor",
    type=int,
    default=5,
    show_default=True,
    help="The window is at least the context divided by this; 0: --window-min alone decides.",
)
@click.option("--no-compensation", is_flag=True, help="Drop tokens instead of averaging them.")
@click.option("--force", is_flag=True, help="Overwrite the output.")
def convert(
    model: Path,
    output: Path,
    heads: Path | None,
    epsilon: float | None,
    sidecar: bool,
    sinks: int,
    window_min: int,
    window_divisor: int,
    no_compensation: bool,
    force: bool,
    **measuring: Any,
) -> None:
    """Add a razor profile to a copy of MODEL (a GGUF file), or write it as a sidecar.

    Without a head list or scores the heads are measured first: the model reads random tokens
    several times over, and the heads that look for the repetition become retrieval heads.

    Of ALiBi models nothing is measured: how far back each head can look follows from the weights.

    The tensors of the copy are byte-identical to the model's.
    """
    _check_options(heads, measuring)
    from ..converters.heads import profile_from_heads
    from ..converters.write import check_output, write_copy, write_sidecar
    from ..gguf_header import read_header
    from ..profile import (
        MAX_WINDOW,
        Profile,
        alibi_max_bias,
        shape_from_header,
        unsupported_feature,
    )
    from ..safe_write import check_outputs

    options = {
        "sink_tokens": sinks,
        "window_min": window_min,
        "window_divisor": window_divisor,
        "compensation": not no_compensation,
    }
    # all that can be refused is refused before anything is measured
    Profile(retrieval=(), **options)
    header = read_header(model)
    shape = shape_from_header(header)
    alibi = alibi_max_bias(header, shape) > 0
    _check_method(shape, alibi, epsilon)
    check_outputs([output, measuring["save_scores"]], [heads, measuring["scores"]])
    check_output(model, output, force, sidecar)
    feature = unsupported_feature(header, shape)
    if feature:
        click.echo(f"Note: the model has {feature}; razor may be refused when it is run.", err=True)
    if alibi:
        profile = _profile_from_weights(model, epsilon)
    elif heads is not None:
        profile = profile_from_heads(heads, shape, retrieval=measuring["retrieval"], **options)
        if "ties" in profile.calibration:
            click.echo(
                f"Note: {profile.calibration['ties']} were taken, spread over the layers.", err=True
            )
    else:
        kept = measuring["save_scores"]
        if kept is not None:
            check_output(model, kept, force, sidecar=True)
        profile = _profile_from_scores(model, shape, measuring, options)
    if sidecar:
        write_sidecar(model, output, profile, force)
    else:
        with _Bar(f"Writing {output.name}") as bar:
            output = write_copy(model, output, profile, force, bar)
    if profile.scope is not None:
        from ..head_map import scope_line

        return click.echo(f"{output}: {scope_line(profile, shape.n_ctx_train or MAX_WINDOW)}")
    n_retrieval, n_heads = int(profile.flat().sum()), sum(shape.n_head_kv)
    if n_retrieval == 0 and heads is None:
        click.echo(
            "Note: no head looks for repetitions, so all are local; --retrieval SHARE takes the"
            " best ones all the same.",
            err=True,
        )
    click.echo(
        f"{output}: {n_retrieval} of {n_heads} KV heads are retrieval heads"
        f" ({n_retrieval / max(n_heads, 1):.1%})"
    )


def _check_options(heads: Path | None, given: dict[str, Any]) -> None:
    """Refuses options that would be ignored."""
    measure = ("tokens", "repeats", "seed", "max_memory", "threads", "n_gpu_layers", "save_scores")
    for source, name, excluded in (
        (heads, "heads", (*measure, "induction", "echo", "scores")),
        (given["scores"], "scores", measure),
        (given["retrieval"], "retrieval", ("induction", "echo")),
    ):
        for other in excluded if source is not None else ():
            if given[other] is not None:
                raise click.UsageError(
                    f"--{name} and --{other.replace('_', '-')} exclude each other"
                )


def _check_method(shape: ModelShape, alibi: bool, epsilon: float | None) -> None:
    """Refuses options that mean nothing for the model."""
    if not alibi:
        if epsilon is not None:
            raise click.UsageError(
                f"--epsilon is for ALiBi models, and this one ({shape.arch}) is none"
            )
        return
    ctx = click.get_current_context()
    for name in NOT_FOR_ALIBI:
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(
                f"--{name.replace('_', '-')} means nothing for an ALiBi model ({shape.arch}): what"
                " its heads keep follows from the weights and --epsilon"
            )


def _profile_from_weights(model: Path, epsilon: float | None) -> Profile:
    from ..converters.alibi import DEFAULT_EPSILON, profile_from_weights
    from ..terminal import TimeLeft

    with TimeLeft() as show:
        return profile_from_weights(
            model,
            epsilon=DEFAULT_EPSILON if epsilon is None else epsilon,
            progress=partial(show, "computing the scopes"),
        )


def _profile_from_scores(
    model: Path, shape: ModelShape, given: dict[str, Any], options: dict[str, Any]
) -> Profile:
    from ..converters.scores import load_scores, profile_from_scores, save_scores

    chosen = ("induction", "echo", "retrieval")
    shares = {name: given[name] for name in chosen if given[name] is not None}
    if given["scores"] is not None:
        scores = load_scores(given["scores"])
        scores.check_model(shape)
    else:
        scores = _measure(model, given)
        if given["save_scores"] is not None:
            save_scores(scores, given["save_scores"])
    return profile_from_scores(scores, **shares, **options)


def _measure(model: Path, given: dict[str, Any]) -> Scores:
    from ..converters.calibrate import calibrate
    from ..terminal import TimeLeft

    names = {"threads": "n_threads"} | {
        name: name for name in ("tokens", "repeats", "seed", "max_memory", "n_gpu_layers")
    }
    options = {to: given[name] for name, to in names.items() if given[name] is not None}
    with TimeLeft() as show:
        return calibrate(model, progress=partial(show, "measuring the heads"), **options)


class _Bar:
    """A progress bar on a terminal's stderr, shown only when the work takes more than 2 seconds."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.started = time.monotonic()
        self.bar = None

    def __enter__(self) -> _Bar:
        return self

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            if time.monotonic() - self.started < 2:
                return
            from rich.console import Console
            from rich.markup import escape
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

            self.bar = Progress(
                escape(self.text),
                BarColumn(),
                DownloadColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self.task = self.bar.add_task(self.text, total=total)
            self.bar.start()
        self.bar.update(self.task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
