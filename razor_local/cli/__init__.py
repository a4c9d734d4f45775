"""The `razor-local` command. Each subcommand has one file, which is loaded when it is called."""

from __future__ import annotations

import errno
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ..errors import RazorError, command_line
from ..printable import printable
from .parser import Group
from .terminal import echo

# command: what it is for; the code is in the file of the same name (with _ for -), as a click
# command of that name
COMMANDS = {
    "bench": "Measure memory and speed against full caches.",
    "chat": "Chat with a model.",
    "convert": "Measure the retrieval heads of a model and save them as its razor profile.",
    "doctor": "Show the loaded library, its backends and devices, and any problems.",
    "eval": "Measure how much quality each KV cache policy costs.",
    "fit": "Estimate the memory of a context, or the context that fits a memory.",
    "inspect": "Show the retrieval heads and the KV cache size of a GGUF model.",
    "rpc-server": "Compute layers of models for other machines.",
    "run": "Answer one prompt, or continue a text.",
    "serve": "Serve a model over HTTP, with OpenAI's API.",
    "tune": "Find the smallest KV cache that predicts like the full one.",
    "models": "List, find, download and remove models.",
    "verify": "Check RazorAttention on this machine against a reference.",
}

# the options that messages name instead of arguments of Llama
OPTIONS = {
    "n_ctx": "-c",
    "n_batch": "-b",
    "n_ubatch": "-ub",
    "n_threads": "-t",
    "n_threads_batch": "-t",
    "n_gpu_layers": "-ngl",
    "type_k": "-ctk",
    "type_v": "-ctv",
    "type_k_local": "-ctlk",
    "type_v_local": "-ctlv",
    "budget": "--budget",
    "sink_tokens": "--sink-tokens",
    "window_min": "--window-min",
    "window_divisor": "--window-divisor",
    "flash_attn=True": "-fa on",
    "prefill": "--prefill",
    "prefill='auto'": "--prefill auto",
    "prefill='full'": "--prefill full",
    "prefill='razor'": "--prefill razor",
    "rewind": "--rewind",
    "rewind='off'": "--rewind off",
    "rewind='ram'": "--rewind ram",
    "rewind_limit": "--rewind-limit",
    "razor=False": "--no-razor",
    "razor=SIDECAR": "--sidecar FILE",
}

EPILOG = """
\b
Examples:
  razor-local chat
  razor-local run -p "Hello"
  razor-local convert smollm2:135m -o smollm2-razor.gguf
  razor-local chat smollm2-razor.gguf

Without a MODEL, commands use a small built-in model. 'razor-local COMMAND --help' shows the options
of a command.
"""


class _Group(Group):
    """The group of all commands, which are imported on use. It prints errors as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        name = name.replace("-", "_")
        command: click.Command = getattr(importlib.import_module(f"{__name__}.{name}"), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _one_line():  # --help and --version write to stdout in here
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> object:
        from ..common import files
        from .interrupt import removed_if_terminated

        files.guard = removed_if_terminated
        with _one_line(), command_line(OPTIONS):
            return super().invoke(ctx)


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except RazorError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise  # click ends quietly when the reader of stdout has gone
        name = f"{error.filename}: " if error.filename else ""
        message = printable(f"{name}{error.strerror or error}", one_line=True)
        raise click.ClickException(message) from error
    except click.ClickException as error:  # quotes arguments, names of files among them
        # click's types call it final, its code does not
        error.message = printable(error.message)  # type: ignore[misc]
        raise


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        echo(f"razor-local {version('razor-local')}")
        ctx.exit()


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
def main() -> None:
    """Run GGUF models with a smaller KV cache (RazorAttention).

    Retrieval heads keep every token. All other KV heads keep the first tokens, a recent window and
    one compensation token.
    """
    # huggingface_hub would send the names of installed libraries and tools
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
