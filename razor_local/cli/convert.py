"""razor-local convert: a razor profile into a copy of a model, or into a sidecar."""

from __future__ import annotations

import time
from pathlib import Path

import click

PATH = click.Path(path_type=Path)

EPILOG = """
\b
Examples:
  razor-local convert model.gguf -o model-razor.gguf --heads heads.tsv
  razor-local convert model.gguf -o model.razor.gguf --heads heads.tsv --sidecar
"""


@click.command(epilog=EPILOG)
@click.argument("model", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="File to write.")
@click.option(
    "--heads",
    type=PATH,
    help="Head list: a row per layer, a column per KV head, tab-separated, 1 = retrieval head.",
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
    sidecar: bool,
    sinks: int,
    window_min: int,
    window_divisor: int,
    no_compensation: bool,
    force: bool,
) -> None:
    """Add a razor profile to a copy of MODEL (a GGUF file), or write it as a sidecar.

    The tensors of the copy are byte-identical to the model's.
    """
    if heads is None:
        raise click.UsageError(
            "scoring the heads of a model is not there yet; pass a head list with --heads FILE.tsv"
            " (a row per layer, a column per KV head, 1 = retrieval head)"
        )
    from ..converters.heads import profile_from_heads
    from ..converters.write import write_copy, write_sidecar
    from ..gguf_header import read_header
    from ..profile import shape_from_header, unsupported_feature

    header = read_header(model)
    shape = shape_from_header(header)
    profile = profile_from_heads(
        heads,
        shape,
        sink_tokens=sinks,
        window_min=window_min,
        window_divisor=window_divisor,
        compensation=not no_compensation,
    )
    feature = unsupported_feature(header, shape.arch)
    if feature:
        click.echo(f"Note: the model has {feature}; razor may be refused when it is run.", err=True)
    if sidecar:
        write_sidecar(model, output, profile, force)
    else:
        with _Bar(f"Writing {output.name}") as bar:
            write_copy(model, output, profile, force, bar)
    n_retrieval, n_heads = int(profile.flat().sum()), sum(shape.n_head_kv)
    click.echo(
        f"{output}: {n_retrieval} of {n_heads} KV heads are retrieval heads"
        f" ({n_retrieval / max(n_heads, 1):.1%})"
    )


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
