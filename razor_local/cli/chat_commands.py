"""The slash commands of a chat: a table, and the function of each command."""

from __future__ import annotations

import errno
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ..common.inputs import check_input, read_text_file
from ..errors import RazorError
from ..printable import printable
from . import generation
from .chat_status import context, stats
from .params import SEED, Number, Whole, count_text
from .terminal import is_ascii, say, sentence

if TYPE_CHECKING:
    from ..chat import Chat
    from ..llama import Llama
    from .terminal import MessageReader


MAX_BYTES_PER_TOKEN = 64  # of a file that may fit the context; real texts have about 4
SETTINGS: dict[str, click.ParamType[Any]] = {
    "temp": Number(0),
    "top_k": Whole(0, 2**31 - 1),
    "top_p": Number(0, 1),
    "min_p": Number(0, 1),
    "repeat_penalty": Number(0, min_open=True),
    "seed": SEED,
    "predict": Whole(-1, 2**31 - 1),
}


@dataclass
class Talk:
    """A conversation in a terminal: what commands work on.

    answer: called with a function such as chat.regenerate, shows what it streams.
    session: the name it was saved or loaded as. schema: of chat.grammar, as it was given. line:
    what the next line begins with. is_edit: the next message replaces the last one.
    """

    llama: Llama
    chat: Chat
    reader: MessageReader
    answer: Callable[[Callable[..., Any]], None]
    session: str | None = None
    schema: str = ""
    line: str = ""
    is_edit: bool = False
    is_over: bool = False


class Command(NamedTuple):
    """A command: how it is written, what it does, and the function, called with its argument.

    complete: returns the arguments that begin with a text.
    """

    usage: str
    help: str
    run: Callable[[Talk, str], None]
    complete: Callable[[str], list[str]] = lambda text: []

    @property
    def takes_argument(self) -> bool:
        return " " in self.usage


def parse(text: str) -> tuple[str, str] | None:
    """Return the name and the argument of a command, None for a message.

    "/usr/bin/ls is a path", texts of several words that begin with another word than a command, and
    of several lines that begin with a command without an argument are messages. Any other word
    behind a slash is taken for a misspelled command. Two words leave without a slash, as they do in
    other programs.
    """
    if text.rstrip() in ("exit", "quit"):
        return "exit", ""
    match = re.fullmatch(r"/([A-Za-z?]+)(?:\s+(.*))?", text, re.DOTALL)
    if match is None:
        return None
    name, argument = ALIASES.get(match[1], match[1]), (match[2] or "").strip()
    if argument and (name not in COMMANDS or "\n" in text and not COMMANDS[name].takes_argument):
        return None
    return name, argument


def unescape(text: str) -> str:
    """Return a message without the slash that was put before what looks like a command.

    Texts of several lines, such as code that begins with a comment, are left as they are.
    """
    is_escaped = text.startswith("//") and "\n" not in text and parse(text[1:]) is not None
    return text[1:] if is_escaped else text


def run(talk: Talk, line: str) -> bool:
    """Run the command in a line; return False if it is a message. Raises RazorError.

    Files and pasted texts before a command stay in the line.
    """
    markers, typed = talk.reader.split(line)
    command = parse(talk.reader.expand(typed))
    if command is None:
        return False
    if markers and not (typed.startswith("/") and command[0] in COMMANDS):
        return False
    name, argument = command
    if name not in COMMANDS:
        near = get_close_matches(name, [*COMMANDS, *ALIASES], n=1)
        hint = f"did you mean /{near[0]}? " if near else ""
        raise RazorError(
            f"there is no /{name}; {hint}/help shows the commands, and //{name} sends it as a"
            " message"
        )
    if argument and not COMMANDS[name].takes_argument:
        raise RazorError(f"/{name} takes no text; //{name} {argument} sends it as a message")
    talk.line = markers
    try:
        COMMANDS[name].run(talk, argument)
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of stdout has gone
            raise
        raise RazorError(sentence(error)) from error
    return True


def complete(text: str) -> tuple[int, list[str]]:
    """Return how many characters at the end of text the Tab key replaces, and by which texts."""
    name, space, argument = text.partition(" ")
    if not space:
        names = [f"/{name} " if COMMANDS[name].takes_argument else f"/{name}" for name in COMMANDS]
        return len(text), [one for one in names if text and one.startswith(text)]
    if name[:1] != "/" or name[1:] not in COMMANDS:
        return 0, []
    return len(argument), COMMANDS[name[1:]].complete(argument)


def paths(text: str) -> list[str]:
    """Return the paths that begin with text, folders with a slash behind them."""
    folder, name = os.path.split(text)
    found = []
    with suppress(OSError, ValueError), os.scandir(os.path.expanduser(folder) or ".") as entries:
        for entry in entries:
            hidden = entry.name.startswith(".") and not name.startswith(".")
            if entry.name.startswith(name) and entry.name.isprintable() and not hidden:
                path = os.path.join(folder, entry.name)
                found.append(f"{path}/" if entry.is_dir() else path)
    return sorted(found)


def _save(talk: Talk, argument: str) -> None:
    from .. import sessions

    name = argument or talk.session
    if name is None:
        raise RazorError("expected a name: /save NAME")
    if talk.chat.last_message is None:
        raise RazorError("there is nothing to save yet")
    if name != talk.session:
        _refuse_other_conversation(name, talk)
    with _stoppable("nothing was saved"):
        session = sessions.save(name, talk.llama, talk.chat)
    talk.session = name
    size = session.n_bytes / 2**20
    ways = f"'/load {name}' and 'chat --session {shlex.quote(name)}'"
    say(f"saved as {name} ({size:.1f} MiB); {ways} continue it")


def _refuse_other_conversation(name: str, talk: Talk) -> None:
    """Raise RazorError if saving would replace a session that this conversation does not continue.

    Also raises OSError.
    """
    from .. import sessions

    if not os.path.lexists(sessions.path_of(name)):
        return
    advice = f"choose another name, or remove it with '/sessions rm {name}'"
    try:
        saved = sessions.read(name).chat["messages"]
    except (RazorError, OSError) as error:
        raise RazorError(f"session {name} exists, and {sentence(error)}; {advice}") from None
    now = talk.chat.messages[: len(saved)]
    same = [(m["role"], m.get("content")) for m in now] == [
        (m["role"], m.get("content")) for m in saved
    ]
    if not same:
        raise RazorError(f"session {name} holds another conversation; {advice}")


def _load(talk: Talk, argument: str) -> None:
    name, messages_only = argument.replace("--messages", "").strip(), "--messages" in argument
    if not name:
        raise RazorError("expected a name: /load NAME")
    with _stoppable("nothing was loaded"):
        say(load_session(name, talk.llama, talk.chat, messages_only))
    talk.session = name


def load_session(name: str, llama: Llama, chat: Chat, messages_only: bool = False) -> str:
    """Continue a session and return a line about it. Raises RazorError, OSError."""
    from .. import sessions

    sessions.load(name, llama, chat, messages_only)
    last = chat.last_message
    how = "to be read with the next message" if messages_only else "in the cache"
    n_messages = count_text(len(chat.messages), "message")
    about = f"session {name}: {n_messages}, {chat.n_used} tokens, {how}"
    return about if last is None else f"{about}; the last message: {_short(last)}"


def _sessions(talk: Talk, argument: str) -> None:
    from .. import sessions

    action, _, name = argument.partition(" ")
    if action == "rm" and name.strip():
        sessions.remove(name.strip())
        if name.strip() == talk.session:
            talk.session = None
        say(f"session {name.strip()} is removed")
    elif argument:
        raise RazorError("expected /sessions, or /sessions rm NAME")
    else:
        lines = [_about_session(name) for name in sessions.names()]
        say("\n".join(lines) if lines else "there are no sessions; /save NAME makes one")


def _about_session(name: str) -> str:
    from .. import sessions

    try:
        session = sessions.read(name)
    except (RazorError, OSError) as error:
        return f"{name}  {sentence(error)}"
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(session.saved))
    model = session.model["name"] or session.model["file"]
    n_messages = count_text(len(session.chat["messages"]), "message")
    return (
        f"{name}  {when}, {n_messages}, {session.n_tokens} tokens,"
        f" {session.n_bytes / 2**20:.1f} MiB, {printable(model, one_line=True)}"
    )


def _session_names(text: str) -> list[str]:
    from .. import sessions

    with suppress(RazorError, OSError):
        return [name for name in sessions.names() if name.startswith(text)]
    return []


def _session_actions(text: str) -> list[str]:
    return [action for action in map("rm {}".format, _session_names("")) if action.startswith(text)]


@contextmanager
def _stoppable(then: str) -> Iterator[None]:
    """Let Ctrl-C end what runs inside the block, but not the chat."""
    try:
        yield
    except KeyboardInterrupt:
        raise RazorError(f"stopped; {then}") from None


def _help(talk: Talk, argument: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"{command.usage:{width}}  {command.help}" for command in COMMANDS.values()]
    say("\n".join([*lines, "", ABOUT_INPUT]))


def _undo(talk: Talk, argument: str) -> None:
    text = talk.chat.undo()
    if text is None:
        raise RazorError("there is no message yet to take back; send one")
    if talk.chat.last_message is None:
        talk.session = None  # the next conversation is another one
    say(f"taken back: {_short(text)}")


def _regen(talk: Talk, argument: str) -> None:
    if talk.chat.last_message is None:
        raise RazorError("there is no message yet to answer again; send one")
    if talk.chat.sampling.temp == 0:
        say("Temperature 0 gives the most likely answer again; /set temp 0.8 gives others.")
    talk.answer(talk.chat.regenerate)


def _edit(talk: Talk, argument: str) -> None:
    last = talk.chat.last_message
    if last is None:
        raise RazorError("there is no message yet to change; send one")
    if argument:
        talk.answer(partial(talk.chat.edit, argument))
        return
    if not talk.reader.can_edit:
        raise RazorError("this terminal cannot show a line to be changed; use /edit NEW TEXT")
    talk.line, talk.is_edit = talk.reader.line_of(last), True
    say("Enter replaces the last message with the changed one, Ctrl-C changes nothing")


def _file(talk: Talk, argument: str) -> None:
    if not argument:
        raise RazorError("expected the path of a text file: /file PATH")
    path, n_ctx = _path(argument), talk.llama.n_ctx()
    check_input(path, "a text file")
    n_bytes, max_bytes = path.stat().st_size, n_ctx * MAX_BYTES_PER_TOKEN
    if n_bytes > max_bytes:
        raise RazorError(
            f"{path} has {n_bytes / 2**20:,.1f} MiB, more text than a context of {n_ctx} tokens"
            " holds; use a shorter file, or start with a larger -c"
        )
    text = read_text_file(path, max_bytes)
    if "\0" in text:
        raise RazorError(f"{path} is a binary file, expected a text file")
    if not text.strip():
        raise RazorError(f"{path} is empty")
    n_tokens, n_before = _n_tokens(talk, text), _n_tokens(talk, talk.reader.expand(talk.line))
    left = talk.chat.n_left - n_before - n_tokens
    if left < 0:
        raise RazorError(
            f"{path} has {n_tokens} tokens, {left + n_tokens} of the context of {n_ctx} are left:"
            " use a shorter file, clear the conversation, or start with a larger -c"
        )
    talk.line += talk.reader.add_file(path.name, text, n_tokens)
    say(f"{path} has {n_tokens} tokens and is part of the next message; {left} are left for it")


def _path(argument: str) -> Path:
    """Return the path that is meant, which may be quoted as shells do it."""
    if "\0" in argument:
        raise RazorError(f"{argument} is not the name of a file")
    path = os.path.expanduser(argument)
    with suppress(ValueError):
        words = shlex.split(argument)
        if len(words) == 1 and not os.path.exists(path):
            path = os.path.expanduser(words[0])
    return Path(path)


def _n_tokens(talk: Talk, text: str) -> int:
    return len(talk.llama.tokenize(text.encode("utf-8", "surrogateescape"), add_bos=False))


def _short(text: str) -> str:
    """Return the beginning of a message, in one line."""
    text = printable(text[:200].strip().replace("\n", " "), one_line=True)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _clear(talk: Talk, argument: str) -> None:
    talk.chat.clear()
    talk.session = None  # the next conversation is another one
    say("the conversation is empty")


def _system(talk: Talk, argument: str) -> None:
    if argument:
        talk.chat.set_system(argument)
    say(f"system prompt: {talk.chat.system or 'none'}")


def _stats(talk: Talk, argument: str) -> None:
    say(stats(talk.llama, talk.chat))


def _context(talk: Talk, argument: str) -> None:
    say(context(talk.chat, is_ascii()))


def _set(talk: Talk, argument: str) -> None:
    from ..chat import Sampling

    chat = talk.chat
    values: dict[str, Any] = asdict(chat.sampling) | {"predict": chat.max_tokens}
    if argument:
        argument = re.sub(r"^parameter\s+", "", argument)  # as in ollama
        written, *rest = re.split(r"[\s=]+", argument, maxsplit=1)
        text = "".join(rest).strip()
        name = _spellings().get(_plain(written))
        if name is None:
            near = get_close_matches(_plain(written), _spellings(), n=1, cutoff=0.4)
            hint = f"did you mean {_spellings()[near[0]]}? " if near else ""
            raise RazorError(f"/set {written}: {hint}expected one of {', '.join(SETTINGS)}")
        if not text:
            raise RazorError(f"/set {written}: expected a value, as in /set temp 0.2")
        try:
            value = SETTINGS[name].convert(text, None, None)
        except click.BadParameter as error:
            raise RazorError(f"/set {written}: {error.message}") from None
        if name == "predict" and value == 0:
            raise RazorError(f"/set {written}: 0 is not a number of tokens, or -1 for unlimited")
        values[name] = None if value == -1 else value
        chat.max_tokens = values["predict"]
        chat.sampling = Sampling(**{key: values[key] for key in values if key != "predict"})
    say(", ".join(f"{key} {-1 if values[key] is None else values[key]}" for key in SETTINGS))


@cache
def _spellings() -> dict[str, str]:
    """Map every spelling that the command line takes to the name of the sampling option."""
    from .chat import chat

    return {
        _plain(option): param.name
        for param in chat.params
        if param.name in SETTINGS
        for option in (param.name, *param.opts)
    }


def _plain(option: str) -> str:
    return option.lower().lstrip("-").replace("_", "-")


def _settings(text: str) -> list[str]:
    return [f"{name} " for name in SETTINGS if _plain(name).startswith(_plain(text))]


def _json(talk: Talk, argument: str) -> None:
    if argument == "off":
        talk.chat.grammar, talk.schema = None, ""
    elif argument:
        source = argument if argument.startswith("{") else _path(argument)
        talk.chat.grammar, talk.schema = (
            generation.schema_grammar(source, "/json"),
            _short(argument),
        )
    if talk.chat.grammar is None:
        say("answers are free text; /json SCHEMA or /json FILE makes them JSON")
    else:
        what = f"the JSON schema {talk.schema}" if talk.schema else "the grammar of --grammar"
        say(f"answers follow {what}; /json off turns it off")


def _schemas(text: str) -> list[str]:
    return [*(word for word in ("off",) if word.startswith(text)), *paths(text)]


def _exit(talk: Talk, argument: str) -> None:
    talk.is_over = True


COMMANDS = {
    "help": Command("/help", "show this text", _help),
    "undo": Command("/undo", "take back the last message and its answer", _undo),
    "regen": Command("/regen", "generate another answer to the last message", _regen),
    "edit": Command("/edit [TEXT]", "change the last message and send it again", _edit),
    "file": Command("/file PATH", "add a text file to the next message", _file, paths),
    "save": Command("/save [NAME]", "save the conversation and its cache", _save, _session_names),
    "load": Command(
        "/load NAME",
        "continue a saved conversation (--messages: no cache)",
        _load,
        _session_names,
    ),
    "sessions": Command(
        "/sessions [rm NAME]",
        "list saved conversations, or remove one",
        _sessions,
        _session_actions,
    ),
    "clear": Command("/clear", "forget the conversation, keep the system prompt", _clear),
    "system": Command("/system [TEXT]", "show the system prompt, or set it", _system),
    "stats": Command("/stats", "show device, memory, heads and speed", _stats),
    "context": Command("/context", "show the tokens used and left", _context),
    "set": Command(
        "/set [NAME VALUE]", "show the sampling options, or change one", _set, _settings
    ),
    "json": Command(
        "/json SCHEMA|off", "make answers follow a JSON schema, or one in a file", _json, _schemas
    ),
    "exit": Command("/exit", "leave (also Ctrl-D)", _exit),
}
ALIASES = {"?": "help", "quit": "exit", "bye": "exit"}
ABOUT_INPUT = '''\
Paste a text of several lines and type a question after it; Enter sends both, with an empty line
between them. If your terminal does not mark pasted text, put the message between two lines of """.
Alt-Enter starts a new line. Ctrl-C stops an answer and keeps the text so far.
A line with only exit or quit leaves, too. To send a message that looks like a command, put another
slash before it: //help. Other lines that begin with a slash are messages.'''
