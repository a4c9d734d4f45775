"""razor-local models: list, find, download and remove models."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..printable import printable
from .params import DEFAULT_MODEL, ModelFile, download_model, size_text
from .parser import Group
from .terminal import echo

if TYPE_CHECKING:
    from ..models.names import ModelName

EPILOG = """
\b
Examples:
  razor-local models
  razor-local models search qwen
  razor-local models pull hf:bartowski/Llama-3.2-1B-Instruct-GGUF:Q8_0
  razor-local models rm llama3.2:1b
"""


def _examples(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  razor-local models {line}" for line in lines)


_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(cls=Group, invoke_without_command=True, epilog=EPILOG)
@_JSON
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """List the models on this machine, find and download others, and remove them.

    A NAME is a name of the catalog (see search), hf:OWNER/REPO, hf:OWNER/REPO:QUANT or a Hugging
    Face URL. All commands that take a MODEL accept a NAME, and download the model if needed.
    """
    if ctx.invoked_subcommand is not None:
        return
    from ..models.local import list_models, unfinished

    found = list_models()
    if as_json:
        items = [
            {
                "name": model.name or None,
                "path": str(model.path),
                "bytes": model.n_bytes,
                "razor_profile": None if model.profile is None else bool(model.profile),
                "razor_profile_source": model.profile or None,
                "license": model.license or None,
            }
            for model in found
        ]
        return echo(json.dumps(items, indent=2))
    rows = []
    for model in found:
        shown = model.name or ("(built in)" if model.path == DEFAULT_MODEL else "-")
        profile = "damaged" if model.profile is None else model.profile or "no"
        license_name = printable(model.license[:40], one_line=True)
        rows.append((shown, size_text(model.n_bytes), profile, license_name, str(model.path)))
    _print_table(("name", "size", "razor", "license", "path"), rows)
    for name, n_bytes in unfinished():
        echo(
            f"unfinished: {name}, {size_text(n_bytes)} so far; the same command goes on with it,"
            f" 'razor-local models rm {name}' removes it",
            err=True,
        )


@models.command(epilog=_examples("search", "search qwen --json"))
@click.argument("text", nargs=-1)
@_JSON
def search(text: tuple[str, ...], as_json: bool) -> None:
    """Show the names of the catalog that contain TEXT, or all."""
    from dataclasses import asdict

    from ..models.catalog import search as find

    found = find(" ".join(text))
    if as_json:
        return echo(json.dumps([asdict(entry) for entry in found], indent=2))
    if not found:
        raise click.ClickException(
            f"no name of the catalog contains '{' '.join(text)}'; any repository of Hugging Face"
            " with GGUF files can be named as hf:OWNER/REPO"
        )
    rows = [
        (entry.name, size_text(entry.bytes) if entry.bytes else "-", entry.license, entry.repo)
        for entry in found
    ]
    _print_table(("name", "size", "license", "repository"), rows)


@models.command(
    epilog=_examples("pull llama3.2:1b", "pull hf:bartowski/Llama-3.2-1B-Instruct-GGUF:Q8_0")
)
@click.argument("name", type=ModelFile())
def pull(name: Path | ModelName) -> None:
    """Download NAME, or what has changed of it, and print its path."""
    echo(str(download_model(_named(name))))


@models.command(epilog=_examples("path llama3.2:1b"))
@click.argument("name", type=ModelFile())
def path(name: Path | ModelName) -> None:
    """Print the path of NAME, which must be on this machine."""
    from ..models.local import find

    found = find(_named(name))
    if found is None:
        raise click.ClickException(
            f"{name} is not on this machine; 'razor-local models pull {name}' downloads it"
        )
    echo(str(found))


@models.command(epilog=_examples("rm llama3.2:1b --yes"))
@click.argument("name", type=ModelFile())
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def rm(name: Path | ModelName, yes: bool) -> None:
    """Remove the files of NAME, which other programs may use too, and its measured profile."""
    from ..models.local import find, remove

    named = _named(name)
    found = find(named)
    if found is not None and not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("there is no terminal to ask on; pass --yes")
        click.confirm(f"Remove {printable(str(found))}?", abort=True, err=True)
    echo(f"{named}: {size_text(remove(named))} freed", err=True)


def _named(name: Path | ModelName) -> ModelName:
    if isinstance(name, Path):
        raise click.UsageError(f"{name} is a path; expected the name of a model")
    return name


def _print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows of text, whatever the width of the terminal; names and paths are not cut."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
