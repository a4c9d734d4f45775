"""razor-local chat: a conversation in the terminal, or one answer for a text on stdin."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import MemoryFullError, ProfileError, RazorError
from .chat_loop import Display, converse
from .chat_status import describe
from .interrupt import stop_on_interrupt
from .params import (
    BATCH_SIZE,
    CACHE_TYPE_K,
    CACHE_TYPE_V,
    DEFAULT_MODEL,
    FLASH_ATTN,
    N_GPU_LAYERS,
    THREADS,
    UBATCH_SIZE,
    ContextSize,
    Number,
    flash_attention,
    model_argument,
)
from .terminal import ProgressBar, say

if TYPE_CHECKING:
    from ..fit import AutoContext
    from ..llama import Llama
    from ..model_file import ModelFile
    from ..profile import Profile

MAX_DEFAULT_CTX = 32768  # where --ctx-size is not given

MAX_STDIN = 256 << 20  # bytes; a context of ten million tokens is about 40 MiB of text
DEFAULT_MODEL_HINT = """\
This is the small built-in model. It only answers questions about facts in a text, such as: paste
a text with "The secret code of Marlow is 48213." somewhere in it, then ask
"What is the secret code of Marlow?". Start with 'razor-local chat MODEL' for a real model."""


@click.command(
    "chat",
    epilog="With a pipe on stdin, the whole input is one message, and the answer goes to stdout. "
    "Example: cat text.txt question.txt | razor-local chat",
)
@model_argument()
@click.option(
    "-c",
    "--ctx-size",
    type=ContextSize(),
    metavar="N",
    help="Context size in tokens (0: trained length, auto: largest that fits the free memory)."
    "  [default: the largest up to 32768 and the trained length that fits]",
)
@N_GPU_LAYERS
@click.option(
    "-t", "--threads", type=THREADS, metavar="N",
    help="Number of CPU threads.  [default: physical cores]",
)  # fmt: skip
@BATCH_SIZE
@UBATCH_SIZE
@CACHE_TYPE_K
@CACHE_TYPE_V
@FLASH_ATTN
@click.option("-s", "--seed", type=int, default=-1, metavar="N", help="Sampling seed (-1: random).")
@click.option(
    "--temp",
    type=Number(0),
    metavar="T",
    help="Sampling temperature (0: greedy).  [default: 0.8; 0 for the built-in model]",
)
@click.option(
    "--top-p", type=Number(0, 1), default=0.95, show_default=True, help="Top-p threshold (1: off)."
)
@click.option(
    "--min-p", type=Number(0, 1), default=0.05, show_default=True, help="Min-p threshold (0: off)."
)
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option(
    "--sidecar",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Sidecar with the profile of the model.",
)
@click.option(
    "--budget",
    "--retrieval",
    "budget",
    type=Number(0, 1),
    metavar="SHARE",
    help="Share of retrieval heads, chosen by the scores in the profile.",
)
@click.option(
    "--razor/--no-razor",
    default=True,
    help="Use RazorAttention, or a full cache.  [default: --razor]",
)
@click.option(
    "-n",
    "--predict",
    type=int,
    default=-1,
    metavar="N",
    show_default=True,
    help="Maximum tokens to generate (-1: unlimited).",
)  # fmt: skip
@click.option(
    "--on-full", type=click.Choice(["stop", "drop-oldest"]), default="stop", show_default=True,
    help="Refuse a message that does not fit into the context, or drop the oldest messages and"
    " their answers.",
)  # fmt: skip
@click.option("--hide-thinking", is_flag=True, help="Hide the reasoning of the model.")
@click.option("--session", metavar="NAME", help="Continue the conversation that /save NAME saved.")
@click.option(
    "--no-history", is_flag=True,
    help="Do not read or write the input history.",
)  # fmt: skip
def chat(model: Path | None, **options: Any) -> None:
    """Chat with MODEL, or with the small built-in model.

    MODEL is a GGUF file, or a name such as llama3.2:1b ('razor-local models search' shows them).
    """
    if options["sidecar"] and not options["razor"]:
        raise click.UsageError("--sidecar and --no-razor exclude each other")
    if options["budget"] is not None and not options["razor"]:
        raise click.UsageError("--budget and --no-razor exclude each other")
    if options["system"] is not None and options["session"] is not None:
        raise click.UsageError("--system and --session exclude each other; use /system")
    if options["predict"] == 0 or options["predict"] < -1:
        raise click.UsageError("--predict is a number of tokens, or -1")
    if sys.stdin is None or sys.stdout is None:
        raise click.UsageError(
            "stdin or stdout is closed; chat reads from one and writes to the other"
        )
    piped = None if sys.stdin.isatty() else _read_stdin()
    # a locale may not have every character; sys.stdout has more methods than any TextIO
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]

    llama, chosen = _load(model or DEFAULT_MODEL, options)

    from ..chat import Chat, Sampling, chat_template

    temp = options["temp"]
    conversation = Chat(
        llama,
        chat_template(llama),
        system=options["system"],
        max_tokens=options["predict"] if options["predict"] > 0 else None,
        drop_oldest=options["on_full"] == "drop-oldest",
        sampling=Sampling(
            temp=temp if temp is not None else (0.8 if model else 0.0),
            top_p=options["top_p"],
            min_p=options["min_p"],
            seed=options["seed"] if options["seed"] >= 0 else None,
        ),
    )
    loaded = None
    if options["session"] is not None:
        from .chat_commands import load_session

        loaded = load_session(options["session"], llama, conversation)
    display = Display(llama, conversation, options["hide_thinking"])
    if piped is not None:
        display.show(partial(conversation.say, piped))
        if conversation.last is not None and conversation.last.ended == "stopped":
            sys.exit(130)
        return
    say(describe(llama, chosen))
    if options["n_gpu_layers"] != 0:
        from ..native import load
        from .doctor import unused_gpu

        unused = unused_gpu(load().build.options)
        if unused is not None:
            say(f"note: {unused}")
    from ..profile import facts_line

    profile = llama.profile if llama.memory().active else None
    facts = None if profile is None else facts_line(profile)
    if facts is not None:
        say(facts)
    if model is None:
        say(DEFAULT_MODEL_HINT)
    if loaded is not None:
        say(loaded)
    say("/help for help, /exit to leave")
    converse(display, options["session"], keep_history=not options["no_history"])


def _read_stdin() -> str:
    data = sys.stdin.buffer.read(MAX_STDIN + 1)
    if len(data) > MAX_STDIN:
        raise RazorError(
            f"stdin has more than {MAX_STDIN >> 20} MiB, more than any context holds; pipe in less"
        )
    try:
        text = data.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError as error:
        raise RazorError(f"stdin is not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise RazorError("stdin is empty: pipe a message into it, or start from a terminal")
    return text


def _load(path: Path, options: dict[str, Any]) -> tuple[Llama, AutoContext | None]:
    """Return the model, and how its context was chosen if --ctx-size is not a number."""
    from ..common.progress import check_stop
    from ..llama_options import choose_profile
    from ..model_file import ModelFile

    n_ctx, chosen, model = options["ctx_size"], None, ModelFile(path)
    try:
        trained = model.shape.n_ctx_train
    except ProfileError:  # not a shape that a plan describes; llama.cpp may know better
        trained = 0
    profile = choose_profile(model, options["sidecar"] or options["razor"], options["budget"])[1]
    use_flash_attn = flash_attention(
        options["flash_attn"],
        path,
        options["cache_type_k"],
        options["cache_type_v"],
        options["n_gpu_layers"],
    )
    if n_ctx is None or n_ctx == "auto":
        chosen = _choose_context(model, profile, options, use_flash_attn)
        n_ctx = chosen.n_ctx if chosen else min(trained, MAX_DEFAULT_CTX)
    elif trained and n_ctx > trained:
        say(f"note: the model was trained for {trained} tokens, -c {n_ctx} goes beyond that")
    from ..llama import Llama

    with ProgressBar() as bar, stop_on_interrupt() as stop:

        def progress(part: float) -> None:
            bar(part, 1.0, "loading the model")
            check_stop(stop)

        progress(0.0)
        llama = Llama(
            model,
            razor=options["razor"] if profile is None else profile,
            progress=progress,
            n_ctx=n_ctx,
            n_gpu_layers=options["n_gpu_layers"],
            n_threads=options["threads"],
            n_threads_batch=options["threads"],
            n_batch=options["batch_size"],
            n_ubatch=options["ubatch_size"],
            type_k=options["cache_type_k"],
            type_v=options["cache_type_v"],
            flash_attn=use_flash_attn,
        )
    return llama, chosen


def _choose_context(
    model: ModelFile, profile: Profile | None, options: dict[str, Any], use_flash_attn: bool
) -> AutoContext | None:
    """Return the context for the free memory; None for a model that loading will refuse.

    Raises MemoryFullError.
    """
    from ..fit import ContextOptions, auto_context

    context = ContextOptions(
        profile=profile,
        type_k=options["cache_type_k"],
        type_v=options["cache_type_v"],
        flash_attn=use_flash_attn,
        n_batch=options["batch_size"],
        n_ubatch=options["ubatch_size"],
    )
    n_max = MAX_DEFAULT_CTX if options["ctx_size"] is None else 0
    try:
        return auto_context(model, context, n_max, n_gpu_layers=options["n_gpu_layers"])
    except MemoryFullError:
        raise
    except RazorError:
        return None
