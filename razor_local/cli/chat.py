"""razor-local chat: a conversation in the terminal, or one answer for a text on stdin."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from . import generation
from .chat_loop import Display, converse
from .chat_status import describe
from .params import DEFAULT_MODEL, say_tuned
from .parser import Command
from .terminal import say

DEFAULT_MODEL_HINT = """\
This is the small built-in model. It only answers questions about facts in a text, such as: paste
a text with "The secret code of Marlow is 48213." somewhere in it, then ask
"What is the secret code of Marlow?". Start with 'razor-local chat MODEL' for a real model."""


EPILOG = """
\b
Examples:
  razor-local chat
  razor-local chat model-razor.gguf -c 32k -ctk q8_0 -ctv q8_0
  razor-local chat smollm2:135m -sys "You answer in one sentence."
  razor-local chat model-razor.gguf -f text.txt -p "What is the secret code?"
  cat text.txt question.txt | razor-local chat

With a pipe on stdin, the whole input is one message, and the answer goes to stdout.
"""


@click.command("chat", cls=Command, envvars=generation.ENVVARS, epilog=EPILOG)
@generation.generation_options
@click.option(
    "--on-full", type=click.Choice(["stop", "drop-oldest"]), default="stop", show_default=True,
    help="Refuse a message that does not fit into the context, or drop the oldest messages and"
    " their answers.",
)  # fmt: skip
@click.option("--session", metavar="NAME", help="Continue the conversation that /save NAME saved.")
@click.option("-st", "--single-turn", is_flag=True, help="Exit after the first answer.")
@click.option(
    "--no-history", is_flag=True,
    help="Do not read or write the input history.",
)  # fmt: skip
def chat(model: Path | None, **options: Any) -> None:
    """Chat with MODEL, or with the small built-in model.

    MODEL is a GGUF file, or a name such as llama3.2:1b ('razor-local models search' shows them).
    PROMPT is the first message.
    """
    if options["system"] is not None and options["session"] is not None:
        raise click.UsageError("--system and --session exclude each other; use /system")
    generation.check_options(options)
    grammar = generation.grammar(options)
    text = generation.read_text(options)

    llama, chosen = generation.load(model or DEFAULT_MODEL, options)

    from ..chat import Chat

    conversation = Chat(
        llama,
        system=options["system"],
        max_tokens=options["predict"],
        drop_oldest=options["on_full"] == "drop-oldest",
        sampling=generation.sampling(options, generation.default_temp(model)),
        ignore_end=options["ignore_eos"],
    )
    conversation.grammar = grammar
    loaded = None
    if options["session"] is not None:
        from .chat_commands import load_session

        loaded = load_session(options["session"], llama, conversation)
    once = not sys.stdin.isatty()
    display = Display(llama, conversation, options["hide_thinking"], once)
    if once and text is not None:
        display.show(partial(conversation.say, text))
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
    say_tuned(profile, llama.plan)
    if model is None:
        say(DEFAULT_MODEL_HINT)
    if loaded is not None:
        say(loaded)
    say("/help for help, /exit to leave")
    converse(
        display,
        options["session"],
        keep_history=not options["no_history"],
        first=text,
        single_turn=options["single_turn"],
    )
