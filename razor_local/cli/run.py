"""razor-local run: answer one prompt."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import generation
from .chat_loop import Display
from .interrupt import stop_on_interrupt
from .params import DEFAULT_MODEL
from .parser import Command
from .terminal import ProgressBar, echo, say

if TYPE_CHECKING:
    from ..chat import Chat, Turn
    from ..llama import Llama

FINISH_REASONS = {"end": "stop", "stopped": "interrupted"}  # the others are those of Turn.ended

EPILOG = """
\b
Examples:
  razor-local run smollm2:135m "Why is the sky blue?"
  razor-local run model-razor.gguf -f text.txt -p "What is the secret code?" --json
  cat text.txt | razor-local run -p "What is the secret code of Marlow?"
  razor-local run -p "Who are you?" -j '{"type": "object"}' -n 64
  razor-local run base.gguf -n 64 -p "Once upon a time"

The text of stdin comes first, then that of -f, then PROMPT, with empty lines between them. A
model without a chat template continues the text. Only the answer goes to stdout.

\b
The exit code is 0, 1 after an error, 2 for wrong options, or 130 if Ctrl-C stopped the answer.
"""


@click.command("run", cls=Command, envvars=generation.ENVVARS, epilog=EPILOG)
@generation.generation_options
@click.option(
    "-no-cnv", "--no-conversation", "plain", is_flag=True,
    help="Continue the text as it is, without the chat template.",
)  # fmt: skip
@click.option(
    "-st", "--single-turn", is_flag=True, expose_value=False,
    help="No effect: run always answers one prompt.",
)  # fmt: skip
@click.option(
    "-j", "--json-schema", metavar="SCHEMA", help="JSON schema that the answer follows.",
)  # fmt: skip
@click.option(
    "-jf", "--json-schema-file", type=click.Path(path_type=Path), metavar="FILE",
    help="File with a JSON schema that the answer follows.",
)  # fmt: skip
@click.option(
    "--json", "as_json", is_flag=True,
    help="Print one JSON object: the answer, its finish reason, tokens, timings and memory.",
)  # fmt: skip
def run(model: Path | None, plain: bool, as_json: bool, **options: Any) -> None:
    """Answer one prompt with MODEL, or with the small built-in model.

    MODEL is a GGUF file, or a name such as llama3.2:1b ('razor-local models search' shows them).
    Without MODEL, pass the prompt with -p.
    """
    from ..chat import Chat, has_chat_template

    generation.check_options(options)
    grammar = generation.grammar(options)
    text = generation.read_text(options)
    if text is None:
        raise click.UsageError(
            "there is no prompt: pass -p TEXT or -f FILE, or pipe a text into stdin;"
            " 'razor-local chat' reads messages from the terminal"
        )
    try:
        began = time.perf_counter()
        llama, _ = generation.load(model or DEFAULT_MODEL, options)
        load_seconds = time.perf_counter() - began
        plain = plain or not has_chat_template(llama)
        if plain and options["system"] is not None:
            raise click.UsageError(
                "--system-prompt needs a chat template: leave out -no-cnv, or use an instruct model"
            )
        memory = llama.memory()
        if not memory.active and any(generation.local_types(options).values()):
            say(f"note: the full cache runs: {memory.why}")
        chat = Chat(
            llama,
            None if plain else "auto",
            system=options["system"],
            max_tokens=options["predict"],
            sampling=generation.sampling(options, generation.default_temp(model)),
            ignore_end=options["ignore_eos"],
        )
        chat.grammar = grammar
        if as_json:
            with ProgressBar() as bar, stop_on_interrupt() as stop:
                for _ in chat.say(text, bar, stop):
                    bar.close()
        else:
            display = Display(llama, chat, options["hide_thinking"], once=True)
            display.show(partial(chat.say, text))
    except KeyboardInterrupt:  # before the first token
        echo("Aborted!", err=True)
        sys.exit(130)
    turn = chat.last
    assert turn is not None  # say() has answered
    if as_json:
        report = _report(llama, chat, turn, load_seconds)
        if options["hide_thinking"]:
            del report["reasoning"]
        click.echo(json.dumps(report, indent=2))
    if turn.ended == "stopped":
        sys.exit(130)


def _report(llama: Llama, chat: Chat, turn: Turn, load_seconds: float) -> dict[str, Any]:
    """Return the report that --json prints."""
    answer = chat.messages[-1] if chat.last_message is not None else {"content": ""}
    memory = llama.memory()
    return {
        "model": llama.model_path,
        "answer": answer["content"],
        "reasoning": answer.get("reasoning_content"),
        "finish_reason": FINISH_REASONS.get(turn.ended, turn.ended),
        "tokens": {"prompt": turn.n_prompt, "answer": turn.n_answer},
        "timings": {
            "load_ms": round(load_seconds * 1000, 3),
            "prompt_ms": round(turn.prompt_seconds * 1000, 3),
            "prompt_tokens_per_second": round(turn.prompt_per_second, 3),
            "answer_ms": round(turn.answer_seconds * 1000, 3),
            "answer_tokens_per_second": round(turn.answer_per_second, 3),
        },
        "memory": {
            "n_ctx": memory.n_ctx,
            "razor": memory.active,
            "why_inactive": memory.why,
            "weights_bytes": memory.weights_bytes,
            "kv_bytes": memory.kv_bytes,
            "kv_bytes_full": memory.kv_bytes_full,
            "compute_bytes": memory.compute_bytes,
        },
    }
