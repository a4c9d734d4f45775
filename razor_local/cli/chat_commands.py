"""The slash commands of a chat: a table, and the function of each command."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import RazorError
from ..printable import printable
from .chat_status import stats
from .terminal import say

if TYPE_CHECKING:
    from ..chat import Chat
    from ..llama import Llama
    from .terminal import MessageReader


@dataclass
class Talk:
    """A conversation in a terminal: what commands work on.

    answer: called with a function such as chat.regenerate, shows what it streams.
    line: what the next line begins with. is_edit: the next message replaces the last one.
    """

    llama: Llama
    chat: Chat
    reader: MessageReader
    answer: Callable[[Callable[..., Any]], None]
    line: str = ""
    is_edit: bool = False
    is_over: bool = False


class Command(NamedTuple):
    """A command: how it is written, what it does, and the function, called with its argument."""

    usage: str
    help: str
    run: Callable[[Talk, str], None]

    @property
    def takes_argument(self) -> bool:
        return " " in self.usage


def parse(text: str) -> tuple[str, str] | None:
    """Return the name and the argument of a command, None for a message.

    A command that takes no argument is one word: "/exit code 3" and "/usr/bin/ls is a path" are
    messages. Any other word behind a slash is taken for a misspelled command.
    """
    match = re.fullmatch(r"/([A-Za-z?]+)(?:\s+(.*))?", text, re.DOTALL)
    if match is None:
        return None
    name, argument = ALIASES.get(match[1], match[1]), (match[2] or "").strip()
    if argument and not (name in COMMANDS and COMMANDS[name].takes_argument):
        return None
    return name, argument


def run(talk: Talk, name: str, argument: str) -> None:
    """Run a command. Raises RazorError."""
    if name in COMMANDS:
        COMMANDS[name].run(talk, argument)
    else:
        say(
            f"Error: there is no /{name}; /help shows the commands, and a space in front of it"
            " makes it a message"
        )


def _help(talk: Talk, argument: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"{command.usage:{width}}  {command.help}" for command in COMMANDS.values()]
    say("\n".join([*lines, "", ABOUT_INPUT]))


def _undo(talk: Talk, argument: str) -> None:
    text = talk.chat.undo()
    say("there is no message to take back" if text is None else f"taken back: {_short(text)}")


def _regen(talk: Talk, argument: str) -> None:
    if talk.chat.sampling.temp == 0:
        say("(at temperature 0 the answer is the same again; start with --temp 0.8 for others)")
    talk.answer(talk.chat.regenerate)


def _edit(talk: Talk, argument: str) -> None:
    last = talk.chat.last_message
    if argument or last is None:
        talk.answer(partial(talk.chat.edit, argument))
        return
    if not talk.reader.can_edit:
        raise RazorError("this terminal cannot show a line to be changed; use /edit NEW TEXT")
    talk.line, talk.is_edit = talk.reader.line_of(last), True
    say("Enter sends the changed message in place of the last one, Ctrl-C leaves that as it is")


def _short(text: str) -> str:
    """The beginning of a message, in one line."""
    text = printable(text[:200].strip().replace("\n", " "), one_line=True)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _clear(talk: Talk, argument: str) -> None:
    talk.chat.clear()
    say("the conversation is empty")


def _system(talk: Talk, argument: str) -> None:
    if argument:
        talk.chat.set_system(argument)
    say(f"system prompt: {talk.chat.system or 'none'}")


def _stats(talk: Talk, argument: str) -> None:
    say(stats(talk.llama, talk.chat))


def _context(talk: Talk, argument: str) -> None:
    used, n_ctx, reserve = talk.chat.n_used, talk.llama.n_ctx(), talk.chat.reserve
    say(
        f"{used} of {n_ctx} tokens used by {len(talk.chat.messages)} messages;"
        f" {max(n_ctx - used - reserve, 0)} left for the next message,"
        f" {reserve} kept for its answer"
    )


def _exit(talk: Talk, argument: str) -> None:
    talk.is_over = True


COMMANDS = {
    "help": Command("/help", "this text", _help),
    "undo": Command("/undo", "take back the last message and its answer", _undo),
    "regen": Command("/regen", "another answer to the last message", _regen),
    "edit": Command("/edit TEXT", "change the last message (without TEXT: in the line)", _edit),
    "clear": Command("/clear", "forget the conversation, keep the system prompt", _clear),
    "system": Command("/system TEXT", "set the system prompt (without TEXT: show it)", _system),
    "stats": Command(
        "/stats", "KV heads, window and bytes of the cache, speed of the last turn", _stats
    ),
    "context": Command("/context", "tokens used and left", _context),
    "exit": Command("/exit", "leave (also Ctrl-D)", _exit),
}
ALIASES = {"?": "help", "quit": "exit", "bye": "exit"}
ABOUT_INPUT = '''\
Paste a text of several lines and type a question behind it; Enter sends both, with an empty line
between them. If your terminal does not mark what is pasted, put the message between two lines
of """. Alt-Enter begins another line. Ctrl-C stops an answer and keeps what was said.
Other lines that begin with a slash are messages.'''
