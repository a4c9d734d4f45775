"""razor-local chat: a conversation in the terminal, or one answer for a text on stdin."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ProfileError, RazorError
from ..printable import printable
from .interrupt import stop_on_interrupt
from .params import DEFAULT_MODEL, KV_TYPE, THREADS, ContextSize, Number
from .terminal import ProgressBar, echo

if TYPE_CHECKING:
    from ..chat import Chat, Turn
    from ..llama import Llama

MAX_DEFAULT_CTX = 32768  # where --ctx-size is not given; a model's own length can fill the memory

HELP = '''\
/help          this text
/clear         forget the conversation, keep the system prompt
/system TEXT   set the system prompt (without TEXT: show it)
/stats         KV heads, window and bytes of the cache, speed of the last turn
/context       tokens used and left
/exit          leave (also Ctrl-D)

Paste a text of several lines and type a question behind it; Enter sends both, with an empty line
between them. If your terminal does not mark what is pasted, put the message between two lines
of """. Alt-Enter begins another line. Ctrl-C stops an answer and keeps what was said.
Other lines that begin with a slash are messages.'''

MAX_STDIN = 256 << 20  # bytes; a context of ten million tokens is about 40 MiB of text
DEFAULT_MODEL_HINT = """\
This is the small built-in model. It only answers questions about facts in a text, such as: paste
a text with "The secret code of Marlow is 48213." somewhere in it, then ask
"What is the secret code of Marlow?". Start with 'razor-local chat MODEL.gguf' for a real model."""


@click.command(
    "chat",
    epilog="With a pipe on stdin the whole of it is one message: the answer goes to stdout. "
    "Example: cat text.txt question.txt | razor-local chat",
)
@click.argument("model", required=False, type=click.Path(path_type=Path), metavar="[MODEL.gguf]")
@click.option(
    "-c", "--ctx-size", type=ContextSize(), metavar="N",
    help="Context size in tokens, 0: as trained, auto: the largest for the memory that is free."
    "  [default: as trained, at most 32768]",
)  # fmt: skip
@click.option(
    "-ngl", "--n-gpu-layers", type=click.IntRange(-1), default=-1, metavar="N", show_default=True,
    help="Layers on the GPU, -1: all. Without a GPU in the build it does nothing.",
)  # fmt: skip
@click.option("-t", "--threads", type=THREADS, metavar="N", help="CPU threads.")
@click.option(
    "-b", "--batch-size", type=click.IntRange(1), default=512, metavar="N", show_default=True,
    help="Prompt tokens per step.",
)  # fmt: skip
@click.option(
    "-ub", "--ubatch-size", type=click.IntRange(1), default=512, metavar="N", show_default=True,
    help="Prompt tokens per computation.",
)  # fmt: skip
@click.option("-ctk", "--cache-type-k", type=KV_TYPE, default="f16", show_default=True)
@click.option("-ctv", "--cache-type-v", type=KV_TYPE, default="f16", show_default=True)
@click.option(
    "-fa", "--flash-attn", type=click.Choice(["on", "off"]), default="on", show_default=True
)
@click.option("-s", "--seed", type=int, default=-1, metavar="N", help="-1: random.")
@click.option(
    "--temp", type=Number(0), metavar="T",
    help="Temperature, 0: always the most likely token.  [default: 0.8, built-in model 0]",
)  # fmt: skip
@click.option("--top-p", type=Number(0, 1), default=0.95, show_default=True)
@click.option("--min-p", type=Number(0, 1), default=0.05, show_default=True)
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option(
    "--sidecar", type=click.Path(path_type=Path), metavar="FILE",
    help="Razor profile of the model, if it is not in the model file.",
)  # fmt: skip
@click.option(
    "--budget", "--retrieval", "budget", type=Number(0, 1), metavar="SHARE",
    help="KV heads that keep every token, chosen again by the scores in the profile.",
)  # fmt: skip
@click.option("--razor/--no-razor", default=True, help="RazorAttention.  [default: on]")
@click.option(
    "-n", "--predict", type=int, default=-1, metavar="N", show_default=True,
    help="Tokens of an answer at most, -1: until it ends.",
)  # fmt: skip
def chat(model: Path | None, **options: Any) -> None:
    """Chat with MODEL.gguf, or with the small built-in model."""
    if options["sidecar"] and not options["razor"]:
        raise click.UsageError("--sidecar and --no-razor exclude each other")
    if options["budget"] is not None and not options["razor"]:
        raise click.UsageError("--budget and --no-razor exclude each other")
    if options["predict"] == 0 or options["predict"] < -1:
        raise click.UsageError("--predict is a number of tokens, or -1")
    if sys.stdin is None or sys.stdout is None:
        raise click.UsageError(
            "stdin or stdout is closed; chat reads from one and writes to the other"
        )
    piped = None if sys.stdin.isatty() else _read_stdin()
    # a locale may not have every character; sys.stdout has more methods than any TextIO
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]

    llama = _load(model or DEFAULT_MODEL, options)

    from ..chat import Chat, Sampling, chat_template

    temp = options["temp"]
    conversation = Chat(
        llama,
        chat_template(llama),
        system=options["system"],
        max_tokens=options["predict"] if options["predict"] > 0 else None,
        sampling=Sampling(
            temp=temp if temp is not None else (0.8 if model else 0.0),
            top_p=options["top_p"],
            min_p=options["min_p"],
            seed=options["seed"] if options["seed"] >= 0 else None,
        ),
    )
    if piped is not None:
        _answer(llama, conversation, piped)
        if conversation.last is not None and conversation.last.ended == "stopped":
            sys.exit(130)
        return
    _say(_describe(llama))
    from ..profile import facts_line

    profile = llama.profile if llama.memory().active else None
    facts = None if profile is None else facts_line(profile)
    if facts is not None:
        _say(facts)
    if model is None:
        _say(DEFAULT_MODEL_HINT)
    _say("/help for help, /exit to leave")
    _converse(llama, conversation)


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


def _load(path: Path, options: dict[str, Any]) -> Llama:
    from ..common.progress import check_stop
    from ..profile import read_model_shape

    n_ctx = options["ctx_size"]
    try:
        trained = read_model_shape(path).n_ctx_train
    except ProfileError:  # not a shape that a plan describes; llama.cpp may know better
        trained = 0
    if n_ctx is None:
        n_ctx = min(trained, MAX_DEFAULT_CTX)
    elif trained and n_ctx != "auto" and n_ctx > trained:
        _say(f"note: the model was trained for {trained} tokens, -c {n_ctx} goes beyond that")
    from ..llama import Llama

    with ProgressBar() as bar, stop_on_interrupt() as stop:

        def progress(part: float) -> None:
            bar(part, 1.0, "loading the model")
            check_stop(stop)

        progress(0.0)
        return Llama(
            path,
            razor=options["sidecar"] or options["razor"],
            budget=options["budget"],
            progress=progress,
            n_ctx=n_ctx,
            n_gpu_layers=options["n_gpu_layers"],
            n_threads=options["threads"],
            n_threads_batch=options["threads"],
            n_batch=options["batch_size"],
            n_ubatch=options["ubatch_size"],
            type_k=options["cache_type_k"],
            type_v=options["cache_type_v"],
            flash_attn=options["flash_attn"] == "on",
        )


def _converse(llama: Llama, conversation: Chat) -> None:
    from .terminal import MessageReader

    with MessageReader() as reader:
        while True:
            try:
                text = reader.read()
            except KeyboardInterrupt:
                _say("/exit or Ctrl-D to leave")
                continue
            if text is None:
                return
            try:
                if _is_command(text):
                    if not _command(llama, conversation, text):
                        return
                elif text.strip():
                    with reader.hold_input():
                        _answer(llama, conversation, text)
            except RazorError as error:
                _say(f"Error: {error}")


def _is_command(text: str) -> bool:
    """Return True if a message is a command: a slash and one word; only /system takes a text.

    Anything else is sent: "/usr/bin/ls is a path" and "/exit code 3" are messages.
    """
    return re.fullmatch(r"/(system( .*)?|[A-Za-z?]+ *)", text) is not None


def _answer(llama: Llama, conversation: Chat, text: str) -> None:
    """Streams one answer to stdout, then one line of numbers to stderr."""
    with ProgressBar() as bar, stop_on_interrupt() as stop:
        for piece in conversation.say(text, bar, stop):
            bar.close()
            _write(piece)
    turn = conversation.last
    assert turn is not None  # say() has answered
    if turn.n_answer:
        echo()
    if turn.ended == "stopped":
        kept = "what was answered is kept" if turn.n_answer else "the message is not kept"
        _say(f"(stopped; {kept})")
    elif turn.ended == "context":
        _say(f"(the context of {llama.n_ctx()} tokens is full: /clear, or start with a larger -c)")
    elif turn.ended == "loop":
        _say("(the answer was ended because it repeated itself without end)")
    elif turn.ended == "length":
        _say(f"(the answer was ended after {turn.n_answer} tokens by --predict)")
    _say(_numbers(llama, conversation, turn))


def _write(piece: str) -> None:
    """Write a piece of an answer: printable on a terminal, as it is to a pipe or a file."""
    if sys.stdout.isatty():
        echo(piece, nl=False)
    else:
        click.echo(piece, nl=False, color=True)  # without it click takes escape sequences out


def _command(llama: Llama, conversation: Chat, line: str) -> bool:
    """Runs a slash command; False to leave."""
    name, _, argument = line[1:].partition(" ")
    argument = argument.strip()
    if name in ("exit", "quit", "bye"):
        return False
    if name in ("help", "?"):
        _say(HELP)
    elif name == "clear":
        conversation.clear()
        _say("the conversation is empty")
    elif name == "system":
        if argument:
            conversation.set_system(argument)
        _say(f"system prompt: {conversation.system or 'none'}")
    elif name == "stats":
        _say(_stats(llama, conversation))
    elif name == "context":
        used, n_ctx = conversation.n_used, llama.n_ctx()
        _say(
            f"{used} of {n_ctx} tokens used by {len(conversation.messages)} messages;"
            f" {max(n_ctx - used - conversation.reserve, 0)} left for the next message,"
            f" {conversation.reserve} kept for its answer"
        )
    else:
        _say(
            f"Error: there is no /{name}; /help shows the commands, and a space in front of it"
            " makes it a message"
        )
    return True


def _describe(llama: Llama) -> str:
    memory, plan = llama.memory(), llama.plan
    name = llama.metadata.get("general.name") or Path(llama.model_path).name
    name = printable(name[:300], one_line=True)
    if not memory.active or plan is None:
        return f"{name}, {memory.n_ctx} tokens; razor is off ({memory.why}); {_kv(memory)}"
    return (
        f"{name}, {memory.n_ctx} tokens; {plan.retrieval_kv_heads} of {plan.kv_heads} KV heads keep"
        f" every token, the others {plan.sink_tokens} and the last {plan.window}; {_kv(memory)}"
    )


def _stats(llama: Llama, conversation: Chat) -> str:
    memory, plan = llama.memory(), llama.plan
    lines = [_describe(llama)]
    if memory.active and plan is not None:
        seq = llama.stats()
        lines.append(
            f"cache: {seq.n_tokens} tokens, {seq.n_folded} of them folded in local heads"
            f" (frontier {seq.frontier}), types {plan.type_k}/{plan.type_v}"
        )
    if plan is not None:
        sizes = ", ".join(f"{t} {_mib(plan.kv_bytes_full_as(t))}" for t in _full_types(plan))
        lines.append(f"full cache of {memory.n_ctx} tokens: {sizes}")
    if conversation.last is not None:
        lines.append(_numbers(llama, conversation, conversation.last))
    return "\n".join(lines)


def _full_types(plan: Any) -> list[str]:
    quantized = [t for t in ("q8_0", "q4_0") if plan.shape.head_dim_k % 32 == 0]
    return ["f16", *(quantized if plan.shape.head_dim_v % 32 == 0 else [])]


def _numbers(llama: Llama, conversation: Chat, turn: Turn) -> str:
    memory = llama.memory()
    prompt = f"{turn.n_evaluated} new tokens, {turn.prompt_per_second:.1f} tok/s"
    return (
        f"prompt {prompt} | answer {turn.n_answer} tokens, {turn.answer_per_second:.1f} tok/s"
        f" | context {conversation.n_used}/{memory.n_ctx} | {_kv(memory)}"
    )


def _kv(memory: Any) -> str:
    if not memory.active:
        return f"KV {_mib(memory.kv_bytes)} (full cache)"
    full = _mib(memory.kv_bytes_full)
    return f"KV {_mib(memory.kv_bytes)} of {full} full ({memory.share:.0%})"


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"


def _say(text: str) -> None:
    echo(text, err=True, dim=True)
