"""razor-local serve: an HTTP server with OpenAI's API."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ProfileError
from .generation import ENVVARS, MAX_DEFAULT_CTX, find_profile, local_types
from .interrupt import stop_on_interrupt
from .params import (
    CACHE_TYPE_K,
    CACHE_TYPE_LOCAL_K,
    CACHE_TYPE_LOCAL_V,
    CACHE_TYPE_V,
    CALIBRATE,
    DEFAULT_MODEL,
    FLASH_ATTN,
    N_GPU_LAYERS,
    REWIND,
    REWIND_LIMIT,
    RPC,
    RPC_SERVERS,
    THREADS,
    TYPED_MODEL,
    UBATCH_SIZE,
    ContextSize,
    Number,
    Whole,
    count_text,
    flash_attention,
    model_argument,
    say_tuned,
)
from .parser import Command
from .terminal import ProgressBar, say

if TYPE_CHECKING:
    from ..fit import ContextOptions
    from ..plan import Plan
    from ..rewind_log import RewindLog
    from ..server.slots import Slots

EXTRA = "razor_local.extra"  # key of click's context

EPILOG = """
\b
Examples:
  razor-local serve smollm2:135m
  razor-local serve model-razor.gguf -c 32k --parallel 2 -ctk q8_0 -ctv q8_0
  razor-local serve model-razor.gguf --host 0.0.0.0 --api-key SECRET
  razor-local serve model-razor.gguf -- --lora adapter.gguf --slot-save-path slots

\b
  curl http://127.0.0.1:8080/v1/chat/completions -H "Content-Type: application/json" \\
      -d '{"messages": [{"role": "user", "content": "Hello"}]}'

The first start builds llama-server, which takes some minutes and needs a C++ compiler. Ctrl-C and
SIGTERM end the server with exit code 0.
"""


class _ServeCommand(Command):
    """A command that passes the arguments after -- on to llama-server."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        n = args.index("--") if "--" in args else len(args)
        ctx.meta[EXTRA] = args[n + 1 :]
        return super().parse_args(ctx, args[:n])

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- LLAMA-SERVER OPTIONS]"]


@click.command(
    "serve",
    cls=_ServeCommand,
    epilog=EPILOG,
    envvars=ENVVARS
    | {
        "host": "LLAMA_ARG_HOST",
        "port": "LLAMA_ARG_PORT",
        "parallel": "LLAMA_ARG_N_PARALLEL",
        "api_key": "LLAMA_API_KEY",
    },
)
@model_argument(DEFAULT_MODEL)
@click.option(
    "--host", default="127.0.0.1", show_default=True, metavar="ADDRESS",
    help="Address to listen on, or the path of a Unix socket (NAME.sock).",
)  # fmt: skip
@click.option(
    "--port", type=Whole(0, 65535), default=8080, show_default=True, metavar="N",
    help="Port to listen on (0: any free one).",
)  # fmt: skip
@click.option(
    "--api-key", metavar="KEY", help="Key that clients must send; several are separated by commas."
)
@click.option(
    "--insecure", is_flag=True,
    help="Listen on an address that other machines can reach although there is no API key.",
)  # fmt: skip
@click.option(
    "-c", "--ctx-size", type=ContextSize(), metavar="N",
    help="Context size of each slot in tokens, such as 8192 or 32k (0: trained length, auto:"
    " largest that fits the free memory).  [default: the largest up to 32768 and the trained"
    " length that fits]",
)  # fmt: skip
@click.option(
    "-np", "--parallel", type=Whole(1, 256), metavar="N",
    help="Number of slots: requests that are computed at the same time.  [default: 4, or fewer if"
    " they do not fit or razor would save nothing in their contexts]",
)  # fmt: skip
@N_GPU_LAYERS
@RPC
@click.option(
    "-t", "--threads", type=THREADS, metavar="N",
    help="Number of CPU threads.  [default: physical cores]",
)  # fmt: skip
@click.option(
    "-b", "--batch-size", type=Whole(1), default=2048, show_default=True, metavar="N",
    help="Logical batch size: prompt tokens per call.",
)  # fmt: skip
@UBATCH_SIZE
@CACHE_TYPE_K
@CACHE_TYPE_V
@CACHE_TYPE_LOCAL_K
@CACHE_TYPE_LOCAL_V
@REWIND
@REWIND_LIMIT
@FLASH_ATTN
@click.option(
    "--sidecar", type=click.Path(path_type=Path), metavar="FILE",
    help="Sidecar with the profile of the model.",
)  # fmt: skip
@click.option(
    "--budget", type=Number(0, 1), metavar="SHARE",
    help="Share of retrieval heads, chosen by the scores in the profile.",
)  # fmt: skip
@click.option(
    "--razor/--no-razor", default=True,
    help="Use RazorAttention, or a full cache.  [default: --razor]",
)  # fmt: skip
@CALIBRATE
@click.option("-v", "--verbose", is_flag=True, help="Show the log of llama.cpp on stderr.")
def serve(model: Path, **options: Any) -> None:
    """Serve MODEL, or the small built-in model, over HTTP.

    The server is llama-server of llama.cpp, with OpenAI's API at /v1, a chat page at /, and
    llama.cpp's own API (/completion, /props, /metrics, ...). It computes several requests at the
    same time, one in each slot. All slots have a context of the same size.

    Options after -- are passed to llama-server.
    """
    from ..server.build import build_server, find_server
    from ..server.command import check_port, library_environment, razor_environment

    _check_options(options)
    check_port(options["host"], options["port"])
    context = _context(model, options)
    slots = _choose_slots(model, context, options)
    plan = _plan(model, context, slots)
    say_tuned(context.profile, plan)
    if slots.need.why_inactive is not None:
        say(f"the full cache runs: {slots.need.why_inactive}")
    if slots.why_fewer is not None:
        say(f"note: {count_text(slots.n_slots, 'slot')} instead of 4: {slots.why_fewer}")

    server = find_server()
    if server is None:
        say("llama-server is built once, which takes some minutes")
        with ProgressBar() as bar, stop_on_interrupt() as stop:
            server = build_server(bar, stop)

    arguments = _arguments(server, model, context, slots, options)
    read = {param.envvar for param in click.get_current_context().command.params}
    environment = {name: value for name, value in os.environ.items() if name not in read}
    environment |= library_environment()
    environment |= razor_environment(
        context.profile,
        plan,
        slots.n_slots,
        razor=options["razor"],
        **local_types(options),
        **asdict(_rewind_log(options)),
    )
    if options["api_key"] is not None:
        environment["LLAMA_API_KEY"] = options["api_key"]  # others can read a command line
    run(arguments, environment)


def run(arguments: list[str], environment: dict[str, str]) -> None:
    """Become llama-server: signals reach it, and no process remains if it ends."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os.execve(arguments[0], arguments, environment)


def _check_options(options: dict[str, Any]) -> None:
    from ..server.command import is_loopback

    for name in ("sidecar", "budget", "cache_type_local_k", "cache_type_local_v"):
        if options[name] is not None and not options["razor"]:
            raise click.UsageError(f"--{name.replace('_', '-')} and --no-razor exclude each other")
    extra = click.get_current_context().meta[EXTRA]
    if options["api_key"] == "":
        raise click.UsageError("--api-key is empty")
    has_key = options["api_key"] is not None or any(arg.startswith("--api-key") for arg in extra)
    host = options["host"]
    for name, value in pairwise(extra):  # the last one wins
        host = value if name == "--host" else host
    if not (is_loopback(host) or has_key or options["insecure"]):
        raise click.UsageError(
            f"other machines can reach {host}: set a key with --api-key (or in LLAMA_API_KEY), or"
            " pass --insecure before -- to serve everyone"
        )
    if "--swa-full" in extra or "LLAMA_ARG_SWA_FULL" in os.environ:
        raise click.UsageError(
            "--swa-full (LLAMA_ARG_SWA_FULL) is not supported: llama-server gives wrong answers"
            " with it after a prompt was restored from main memory or a file"
        )


def _context(model: Path, options: dict[str, Any]) -> ContextOptions:
    """Return the context of the model, with the profile that was found or measured."""
    from ..fit import ContextOptions
    from ..llama_options import choose_profile
    from ..model_file import ModelFile

    file = ModelFile(model)
    use_flash_attn = flash_attention(
        options["flash_attn"],
        model,
        options["cache_type_k"],
        options["cache_type_v"],
        options["cache_type_local_v"],
        options["n_gpu_layers"],
    )
    razor = options["sidecar"] or options["razor"]
    if razor is True:
        n_ctx = MAX_DEFAULT_CTX if options["ctx_size"] is None else options["ctx_size"]
        razor = find_profile(file, n_ctx, use_flash_attn, options)
    profile = choose_profile(file, razor, options["budget"])[1]
    return ContextOptions(
        profile=profile,
        type_k=options["cache_type_k"],
        type_v=options["cache_type_v"],
        **local_types(options),
        flash_attn=use_flash_attn,
        n_batch=options["batch_size"],
        n_ubatch=min(options["ubatch_size"], options["batch_size"]),
        swa_full=False,  # as llama-server
    )


def _choose_slots(model: Path, context: ContextOptions, options: dict[str, Any]) -> Slots:
    from ..server.slots import choose_slots

    n_ctx = options["ctx_size"]
    with ProgressBar() as bar:
        bar(0.0, 1.0, "estimating the memory")
        return choose_slots(
            model,
            context,
            n_slots=options["parallel"],
            n_ctx=n_ctx if isinstance(n_ctx, int) else None,
            n_max=MAX_DEFAULT_CTX if n_ctx is None else 0,
            n_gpu_layers=options["n_gpu_layers"],
        )


def _plan(model: Path, context: ContextOptions, slots: Slots) -> Plan | None:
    """Return the plan of one slot, None for a model that no plan describes."""
    from ..model_file import ModelFile
    from ..plan import make_plan

    try:
        shape = ModelFile(model).shape
    except ProfileError:
        return None
    return make_plan(
        shape, context.profile, slots.n_ctx, context.type_k, context.type_v, context.flash_attn,
        n_ubatch=min(context.n_ubatch, slots.n_ctx), swa_full=context.swa_full,
        type_k_local=context.type_k_local, type_v_local=context.type_v_local,
    )  # fmt: skip


def _rewind_log(options: dict[str, Any]) -> RewindLog:
    from ..native.loaded import C
    from ..rewind_log import choose_rewind_log

    on_device = C.llama_supports_gpu_offload() and options["n_gpu_layers"] != 0
    return choose_rewind_log(options["rewind"], options["rewind_limit"], on_device)[0]


def _arguments(
    server: Path, model: Path, context: ContextOptions, slots: Slots, options: dict[str, Any]
) -> list[str]:
    from ..common.machine import n_cores
    from ..native.loaded import C
    from ..server.build import has_web_ui
    from ..server.command import PAGE

    typed = click.get_current_context().meta.get(TYPED_MODEL)
    given = {
        "-m": model,
        "--alias": model.stem if typed is None or Path(typed).exists() else typed,
        "--host": options["host"],
        "--port": options["port"],
        "-c": slots.n_ctx * slots.n_slots,
        "-np": slots.n_slots,
        "-t": options["threads"] or n_cores(),
        "-b": context.n_batch,
        "-ub": context.n_ubatch,
        "-ctk": context.type_k,
        "-ctv": context.type_v,
        "-fa": "on" if context.flash_attn else "off",
        "-fit": "off",  # the slots were chosen above
        "--cache-ram": slots.prompt_cache,
        "--cors-origins": "localhost",
        "--timeout": 600,  # seconds; connections that send nothing would be kept for an hour
        "-lv": 3 if options["verbose"] else 1,
    }
    if not has_web_ui():
        given["--path"] = PAGE
    if C.llama_supports_gpu_offload():
        given["-ngl"] = "all" if options["n_gpu_layers"] < 0 else options["n_gpu_layers"]
    servers = click.get_current_context().meta.get(RPC_SERVERS)
    if servers is not None:
        given["--rpc"] = ",".join(servers)
    words = [word for item in given.items() for word in map(str, item)]
    extra = click.get_current_context().meta[EXTRA]
    return [str(server), *words, "--no-kv-unified", "--metrics", *extra]
