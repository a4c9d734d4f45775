"""The slash commands of a chat, on a scripted model; test_cli_chat_commands.py has a terminal."""

from __future__ import annotations

import os
import random
import re
from functools import partial
from pathlib import Path

import pytest

from razor_local import ContextFullError, RazorError, sessions
from razor_local.chat import Chat, Sampling
from razor_local.cli.chat import chat as chat_command
from razor_local.cli.chat_commands import COMMANDS, SETTINGS, Talk, complete, parse, run, unescape
from razor_local.cli.run import run as run_command
from razor_local.cli.terminal import MessageReader, is_ascii
from tests.support.scripted_model import ScriptedModel, make, render, roles


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/help", ("help", "")),
        ("/? ", ("help", "")),
        ("/quit", ("exit", "")),
        ("/system", ("system", "")),
        ("/system You  know codes.", ("system", "You  know codes.")),
        ("/system\n\nYou know codes.\nAnd words.\n", ("system", "You know codes.\nAnd words.")),
        ("/etc", ("etc", "")),
        ("/usr/bin/ls is a path", None),
        ("/exit code 3", ("exit", "code 3")),
        ("/clear it all up", ("clear", "it all up")),
        ("/etc holds files", None),
        (" /help", None),
        ("/help\n/clear", None),
        ("exit", ("exit", "")),
        ("quit ", ("exit", "")),
        (" exit", None),
        ("exit the building", None),
        ("Exit", None),
        ("//", None),
        ("//help", None),
        ("/", None),
        ("", None),
        ("hello", None),
    ],
)
def test_what_is_a_command(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("//help", "/help"),
        ("//system You know codes.", "/system You know codes."),
        ("//text", "/text"),
        ("// a comment in C", "// a comment in C"),
        ("//usr/bin is a path", "//usr/bin is a path"),
        ("//set up the board\nmain();", "//set up the board\nmain();"),
        ("///help", "///help"),
        ("//", "//"),
        ("http://help", "http://help"),
    ],
)
def test_what_looks_like_a_command_is_sent_with_another_slash(text, sent):
    assert unescape(text) == sent


def test_help_fits_a_terminal_and_names_every_command():
    width = max(len(command.usage) for command in COMMANDS.values())
    for name, command in COMMANDS.items():
        assert command.usage.split()[0] == f"/{name}"
        assert width + 2 + len(command.help) <= 79, command.usage


def test_the_page_names_every_command_and_option():
    page = (Path(__file__).parents[2] / "docs" / "chat.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        assert f"`/{name}" in page, name
    params = [*chat_command.params, *run_command.params]
    options = {option for parameter in params for option in parameter.opts}
    named = set(re.findall(r"`(?:razor-local chat )?(--[a-z-]+)", page))
    assert named - {"--messages"} <= options
    assert {"--session", "--no-history", "--on-full", "--hide-thinking"} <= named


@pytest.fixture
def reader(monkeypatch) -> MessageReader:
    monkeypatch.setenv("TERM", "dumb")  # no prompt_toolkit, which would want a terminal
    return MessageReader()


class Model(ScriptedModel):
    """A token for each byte in plain text, too."""

    def tokenize(self, text, add_bos=True, special=False):
        return list(text)


@pytest.fixture
def talk(reader) -> Talk:
    """A conversation of one turn in a context of 400 tokens."""
    model = Model([b"one\0", b"two\0"], n_ctx=400)
    chat = Chat(model, render)
    list(chat.say("first"))
    return Talk(model, chat, reader, lambda begin: list(begin()))


def told(talk, line, capsys):
    assert run(talk, line)
    return capsys.readouterr().err


# -- Tab


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/he", (3, ["/help"])),
        ("/ed", (3, ["/edit "])),
        ("/nonsense", (9, [])),
        ("", (0, [])),
        ("he", (2, [])),
        ("/help ", (0, [])),
        ("some text", (0, [])),
    ],
)
def test_commands_are_completed(text, expected):
    assert complete(text) == expected


def test_paths_are_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "notes").mkdir()
    for name in ("notes.txt", "notes/a b.txt", ".hidden", "other", "bad\x1bname"):
        (tmp_path / name).write_text("x")
    assert complete("/file no") == (2, ["notes.txt", "notes/"])
    assert complete("/file notes/") == (6, ["notes/a b.txt"])
    assert complete("/file notes/a b") == (9, ["notes/a b.txt"])
    assert complete("/file ") == (0, ["notes.txt", "notes/", "other"])
    assert complete("/file .h") == (2, [".hidden"])
    assert complete("/file ~/o") == (3, ["~/other"])
    assert complete(f"/file {tmp_path}/o")[1] == [f"{tmp_path}/other"]
    assert complete("/file none/x") == (6, []) and complete("/file bad") == (3, [])


# -- /file


def test_a_file_is_part_of_the_next_message(talk, tmp_path, capsys):
    path = tmp_path / "my notes.txt"
    path.write_bytes(b"\xef\xbb\xbfLine one.\r\nLine two.\n")
    assert run(talk, f"/file {path}")
    left = 400 - talk.chat.n_used - talk.chat.reserve - 20
    told = f"{path} has 20 tokens and is part of the next message; {left} are left for it\n"
    assert capsys.readouterr().err == told
    assert talk.line == "[file 1: my notes.txt, 20 tokens]"
    line = f"{talk.line}What is in it?"
    assert not run(talk, line)
    assert talk.reader.message(line) == "Line one.\nLine two.\n\nWhat is in it?"
    assert talk.reader.line_of("Line one.\nLine two.\n\nWhat is in it?") == line


def test_commands_behind_a_file_leave_it_in_the_line(talk, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"{name} " * 5)
    run(talk, f"/file {tmp_path / 'a'}")
    run(talk, f"{talk.line}/file {tmp_path / 'b'}")
    assert talk.line == "[file 1: a, 10 tokens][file 2: b, 10 tokens]"
    left = 400 - talk.chat.n_used - talk.chat.reserve - 22  # an empty line is between them
    assert run(talk, f"{talk.line}/context") and f"; {left + 2} are left" in capsys.readouterr().err
    assert talk.line == "[file 1: a, 10 tokens][file 2: b, 10 tokens]"
    assert talk.reader.message(talk.line) == "a a a a a \n\nb b b b b "
    for text in ("/etc", "exit", " /help"):
        assert not run(talk, talk.line + text)


@pytest.mark.parametrize("quoted", ["'{}'", '"{}"', "escaped", "~"])
def test_paths_may_be_quoted_as_shells_do_it(talk, tmp_path, monkeypatch, quoted):
    (tmp_path / "my notes.txt").write_text("text")
    monkeypatch.setenv("HOME", str(tmp_path))
    name = str(tmp_path / "my notes.txt")
    argument = {"escaped": name.replace(" ", "\\ "), "~": "~/my notes.txt"}.get(quoted)
    run(talk, f"/file {argument or quoted.format(name)}")
    assert talk.line == "[file 1: my notes.txt, 4 tokens]"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", "expected the path of a text file: /file PATH"),
        ("none", "none: No such file or directory"),
        ("folder", "folder is a folder, expected a text file"),
        ("pipe", "pipe is a named pipe, expected a text file"),
        ("/dev/zero", "/dev/zero is a device, expected a text file"),
        ("binary", "binary is a binary file, expected a text file"),
        ("latin", "latin is not a text in UTF-8"),
        ("empty", "empty is empty"),
        ("long", "long has 395 tokens, 36[0-9] of the context of 400 are left: use a shorter"),
        ("huge", "huge has 1.0 MiB, more text than a context of 400 tokens holds; use a"),
        ("a\0b", "is not the name of a file"),
    ],
)
def test_what_is_no_text_file_that_fits_is_refused(talk, tmp_path, monkeypatch, name, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(b"abc\0def")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "long").write_text("x" * 395)
    (tmp_path / "huge").write_text("x" * (1 << 20))
    with pytest.raises(RazorError, match=expected):
        run(talk, f"/file {name}")
    assert talk.line == ""


def test_unknown_commands_are_named(talk):
    with pytest.raises(RazorError, match=r"there is no /regenrate; did you mean /regen\? /help"):
        run(talk, "/regenrate")
    with pytest.raises(RazorError, match="there is no /nonsense; /help shows the commands"):
        run(talk, "/nonsense")


# -- /undo, /regen, /edit


def cached(model, chat):
    """What the cache holds of the conversation: the whole of it, up to its last token at least."""
    n = chat.n_used - 1
    return n > 0 and model.cache[:n] == chat._known_now().tokens[:n]


def test_undo_takes_back_the_last_message_and_its_answer():
    model, chat = make(["one\0", "two\0", "three\0"], system="s")
    list(chat.say("first"))
    n_used = chat.n_used
    list(chat.say("second"))
    assert chat.undo() == "second" and chat.n_used == n_used
    assert roles(chat) == [("system", "s"), ("user", "first"), ("assistant", "one")]
    assert "".join(chat.say("third")) == "three"
    assert chat.last.n_reused == n_used + len("><u:") and cached(model, chat)
    assert chat.undo() == "third" and chat.undo() == "first"
    assert roles(chat) == [("system", "s")] and chat.n_used == 0
    assert chat.undo() is None and roles(chat) == [("system", "s")]


def test_another_answer_has_another_seed_and_reads_nothing_again():
    model, chat = make(["one\0", "two\0", "three\0"], sampling=Sampling(seed=5))
    list(chat.say("x"))
    assert "".join(chat.regenerate()) == "two" and model.sampling["seed"] == 6
    assert roles(chat) == [("user", "x"), ("assistant", "two")]
    assert chat.last.n_evaluated == 1 and cached(model, chat)
    assert "".join(chat.regenerate()) == "three"
    assert roles(chat) == [("user", "x"), ("assistant", "three")]


def test_an_edited_message_replaces_the_last_one():
    model, chat = make(["one\0", "two\0", "three\0"])
    list(chat.say("first"))
    list(chat.say("a long second message"))
    assert "".join(chat.edit("a long third message")) == "three"
    expected = [("user", "first"), ("assistant", "one"), ("user", "a long third message")]
    assert roles(chat) == [*expected, ("assistant", "three")]
    assert chat.last.n_reused == len("<u:first><a:one><u:a long ") and cached(model, chat)


def test_without_a_message_there_is_nothing_to_answer_again():
    _, chat = make([], system="s")
    for begin in (chat.regenerate, lambda: chat.edit("x")):
        with pytest.raises(RazorError, match="there is no message yet"):
            begin()
    assert roles(chat) == [("system", "s")]


@pytest.mark.parametrize(
    ("begin", "how"),
    [
        ("edit", "stopped"),
        ("edit", "interrupted"),
        ("edit", "too long"),
        ("regenerate", "interrupted"),
        ("regenerate", "too long"),
    ],
)
def test_an_answer_that_never_begins_replaces_nothing(begin, how):
    model, chat = make(["one\0", "two\0", "three\0"], max_tokens=None)
    list(chat.say("first"))
    list(chat.say("second"))
    before, n_used = roles(chat), chat.n_used
    again = chat.regenerate if begin == "regenerate" else partial(chat.edit, "other")
    if how == "stopped":
        assert list(again(stop=lambda: True)) == []
    elif how == "interrupted":

        def interrupt(*_):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            list(again(interrupt))
    else:
        chat.max_tokens = 199
        with pytest.raises(ContextFullError):
            list(again())
        chat.max_tokens = None
    assert roles(chat) == before and chat.n_used == n_used
    assert "".join(chat.say("third")) == "three"
    assert roles(chat)[:-2] == before and cached(model, chat)


class Merging(ScriptedModel):
    """Reads "ab" as one token, which its answers never have: tokens 300 and b"ab" are one text."""

    def tokenize(self, text, add_bos=True, special=False):
        parts = text.split(b"ab")
        return [t for i, part in enumerate(parts) for t in ([300] if i else []) + list(part)]

    def piece(self, token):
        return b"ab" if token == 300 else super().piece(token)


def test_answers_keep_the_tokens_that_the_model_produced():
    model = Merging([b"ab1\0", b"ab2\0", b"ab3\0", b"ab4\0"])
    chat = Chat(model, render)
    for text in ("one", "two", "three"):
        list(chat.say(text))
    n_cached = len(model.cache)
    assert 300 not in model.cache
    list(chat.regenerate())
    assert chat.last.n_evaluated == 1 and chat.last.n_prompt + 3 == n_cached
    chat.undo()
    model.answers = [b"ab5\0"]
    list(chat.say("four"))
    assert 300 not in model.cache and chat.last.n_evaluated == len("four><a:")
    assert model.cache == list(b"<u:one><a:ab1><u:two><a:ab2><u:four><a:ab5")


def test_answers_that_were_tokenized_again_keep_those_tokens():
    """After another system prompt the conversation is read again, as the tokenizer has it."""
    model = Merging([b"ab1\0", b"ab2\0", b"ab3\0", b"ab4\0"])
    chat = Chat(model, render)
    list(chat.say("one"))
    chat.set_system("s")
    list(chat.say("two"))
    assert model.cache.count(300) == 1
    list(chat.regenerate())
    assert chat.last.n_evaluated == 1
    chat.undo()
    assert chat.n_used == len(b"<s:s><u:one><a:*1><a:")  # nothing was kept of it: as it is rendered
    list(chat.say("three"))
    assert chat.last.n_reused == len("<s:s><u:one><a:*1><u:t")


def test_random_turns_leave_a_conversation_that_a_fresh_cache_would_have():
    rng = random.Random(0)
    model, chat = make([], n_ctx=2000)
    for turn in range(300):
        model.answers = [f"{rng.choice('abc') * rng.randint(0, 5)}{turn}\0".encode()]
        stop_at = rng.choice([None, None, None, 0, 1])
        n_before = len(chat.messages)
        action = rng.choice(["say", "say", "say", "regenerate", "edit", "undo", "system", "clear"])
        if chat.last_message is None and action in ("regenerate", "edit"):
            continue
        if action == "undo":
            chat.undo()
        elif action == "system":
            chat.set_system(rng.choice([None, "s", "t"]))
        elif action == "clear" and turn % 10 == 0:
            chat.clear()
        else:
            text = [] if action == "regenerate" else [f"{rng.choice('xyz') * rng.randint(1, 9)}"]
            begin = {"regenerate": chat.regenerate, "edit": chat.edit}.get(action, chat.say)
            said = []
            try:
                for piece in begin(*text, stop=lambda at=stop_at, said=said: len(said) == at):
                    said.append(piece)
            except ContextFullError:
                chat.clear()
            if chat.last.n_answer:
                assert (
                    model.cache[: chat.n_used]
                    == list(render(chat.messages)[:-4].encode())[: len(model.cache)]
                )
                assert cached(model, chat)
        said = [m["role"] for m in chat.messages if m["role"] != "system"]
        assert said == ["user", "assistant"] * (len(said) // 2), n_before


# -- /save, /load, /sessions


def test_damaged_sessions_are_listed_as_such(talk, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    folder = tmp_path / "razor_local" / "sessions"
    folder.mkdir(parents=True)
    (folder / "bad.session").write_text("x")
    (folder / "other.txt").write_text("x")
    (folder / ".bad.session.0.part").write_text("x")
    assert re.fullmatch(
        r"bad  the file of session bad is damaged .*\n", told(talk, "/sessions", capsys)
    )
    assert complete("/load ") == (0, ["bad"]) and complete("/sessions rm b") == (4, ["rm bad"])
    assert told(talk, "/sessions rm bad", capsys) == "session bad is removed\n"
    assert told(talk, "/sessions", capsys).startswith("there are no sessions")


@pytest.mark.parametrize("name", ["save", "load"])
def test_an_interrupt_ends_saving_and_not_the_chat(talk, monkeypatch, name):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sessions, name, interrupted)
    with pytest.raises(RazorError, match="stopped; nothing was"):
        run(talk, f"/{name} work")


# -- /set, /context, /json


def test_settings_are_shown_and_changed(talk, capsys):
    talk.chat.sampling = Sampling(seed=5)
    shown = "temp 0.8, top_k 40, top_p 0.95, min_p 0.05, repeat_penalty 1.0, seed 5, predict -1\n"
    assert told(talk, "/set", capsys) == shown
    values = {"temp": 0.2, "top_k": 7, "top_p": 0.5, "min_p": 0.0, "repeat_penalty": 1.1}
    for name, value in values.items():
        assert f"{name} {value}," in told(talk, f"/set {name} {value}", capsys)
    assert told(talk, "/set predict 9", capsys).endswith("predict 9\n") and talk.chat.reserve == 9
    list(talk.chat.say("x"))
    assert talk.llama.sampling == values | {"seed": 5}
    told(talk, "/set seed 100", capsys)
    talk.llama.answers = [b"ok\0"]
    list(talk.chat.say("x"))
    assert talk.llama.sampling["seed"] == 100
    assert "seed -1, predict -1" in told(talk, "/set seed -1", capsys) + told(
        talk, "/set predict -1", capsys
    )
    assert talk.chat.sampling.seed is None and talk.chat.max_tokens is None


def test_settings_have_all_spellings_of_the_command_line(talk, capsys):
    spellings = {
        (option, param.name)
        for command in (chat_command, run_command)
        for param in command.params
        for option in param.opts
        if param.name in SETTINGS
    }
    assert {("--temperature", "temp"), ("-n", "predict"), ("--top-k", "top_k")} < spellings
    for option, name in spellings:
        plain = option.lstrip("-")
        for written in (option, plain, plain.replace("-", "_"), plain.upper()):
            for between in (" ", "=", "  "):
                assert f"{name} 1" in told(talk, f"/set {written}{between}1", capsys)
        assert f"{name} 1" in told(talk, f"/set parameter {name} 1", capsys)
        told(talk, f"/set {name} 0.5" if name.endswith("_p") else f"/set {name} 2", capsys)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("temp", "/set temp: expected a value, as in /set temp 0.2"),
        (
            "xyzzy 3",
            "/set xyzzy: expected one of temp, top_k, top_p, min_p, repeat_penalty, seed, predict",
        ),
        ("temprature 3", "/set temprature: did you mean temp? expected one of temp, top_k"),
        ("topk 3", "/set topk: did you mean top_k? expected one of temp"),
        ("repetition_penalty 1", "/set repetition_penalty: did you mean repeat_penalty? expected"),
        ("temp hot", "/set temp: hot is not a number"),
        ("temp nan", "/set temp: nan is not a number"),
        ("temp -1", "/set temp: -1.0 is not in the range x>=0"),
        ("top_p 1.5", "/set top_p: 1.5 is not in the range 0<=x<=1"),
        ("top_k 0.5", "/set top_k: '0.5' is not a valid integer"),
        ("seed -2", "/set seed: -2 is not in the range"),
        ("predict 0", "/set predict: 0 is not a number of tokens, or -1"),
    ],
)
def test_settings_of_other_values_are_refused(talk, argument, expected):
    before = talk.chat.sampling
    with pytest.raises(RazorError, match=f"^{re.escape(expected)}"):
        run(talk, f"/set {argument}")
    assert talk.chat.sampling is before and talk.chat.max_tokens is None


def test_the_context_as_a_bar(talk, capsys, monkeypatch):
    def bar():
        return told(talk, "/context", capsys).splitlines()[1]

    assert bar() == f"[{'#' * 2}{'+' * 4}{'.' * 44}] # used, + kept, . free"
    monkeypatch.setenv("TERM", "xterm")
    if not is_ascii():
        assert bar() == f"[{'█' * 2}{'▒' * 4}{'░' * 44}] █ used, ▒ kept, ░ free"
    talk.llama._n_ctx = talk.chat.n_used
    assert set(bar()[1:51]) <= {"█", "#"}
    talk.chat.clear()
    assert not set(bar()[1:51]) & {"█", "#"}


SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'


def test_answers_follow_a_schema(talk, capsys, tmp_path):
    assert told(talk, "/json", capsys).startswith("answers are free text; ")
    assert "answers follow the JSON schema" in told(talk, f"/json {SCHEMA}", capsys)
    list(talk.chat.say("x"))
    by_text = talk.llama.sampling["grammar"]
    (tmp_path / "a.json").write_text(SCHEMA)
    assert "answers follow the JSON schema" in told(talk, f"/json {tmp_path}/a.json", capsys)
    assert talk.chat.grammar._grammar == by_text._grammar
    assert told(talk, "/json", capsys).startswith("answers follow the JSON schema")
    assert told(talk, "/json off", capsys).startswith("answers are free text; ")
    talk.llama.answers = [b"ok\0"]
    list(talk.chat.say("x"))
    assert "grammar" not in talk.llama.sampling


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("{", "/json is not JSON: Expecting property name"),
        ("none.json", "none.json: No such file or directory"),
        ('{"type": "nonsense"}', "the JSON schema of /json cannot be converted to a grammar"),
        ('{"$ref": "https://example.org/x"}', "the JSON schema of /json cannot be converted to a"),
        ('{"type": "string", "maxLength": 100000}', '"maxLength" is 100000, the largest supported'),
        ("bad.json", "bad.json is nested too deeply for a JSON schema"),
        (
            "list.json",
            "the JSON schema of list.json cannot be converted to a grammar: it is a list",
        ),
    ],
)
def test_what_is_no_schema_is_refused(talk, argument, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("[" * 100000)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(RazorError, match=re.escape(expected)):
        run(talk, f"/json {argument}")
    assert talk.chat.grammar is None


# -- a full context


def filled(n_ctx, **kwargs):
    """A conversation of three turns whose messages are answered by their first letter."""
    model, chat = make(["a\0", "b\0", "c\0", "d\0"], n_ctx=n_ctx, max_tokens=4, **kwargs)
    for letter in "abc":
        list(chat.say(letter * 20))
    return model, chat


def test_the_oldest_messages_are_dropped_as_far_as_need_be():
    for n_message in range(1, 60):
        model, chat = filled(124, system="s", drop_oldest=True)
        text = "d" * n_message
        list(chat.say(text))
        full = "<s:s>" + "".join(f"<u:{c * 20}><a:{c}>" for c in "abc") + f"<u:{text}><a:"
        n_dropped = -(-max(0, len(full) + 4 - 124) // len("<u:aaaaaaaaaaaaaaaaaaaa><a:a>"))
        assert chat.last.n_dropped == n_dropped
        kept = [("system", "s")]
        for c in "abc"[n_dropped:]:
            kept += [("user", c * 20), ("assistant", c)]
        assert roles(chat) == [*kept, ("user", text), ("assistant", "d")]
        assert bytes(model.cache).decode() == render(chat.messages[:-1]) + "d"
        assert chat.undo() == text and chat.n_used <= 124
        model.answers = [b"e\0"]
        assert "".join(chat.say("e")) == "e"


def test_a_message_that_does_not_fit_alone_is_refused():
    for again in (False, True):
        model, chat = filled(124, system="s", drop_oldest=True)
        before = roles(chat)
        assert chat.n_left == 124 - 4 - len("<s:s><u:><a:")
        begin = chat.edit if again else chat.say
        with pytest.raises(ContextFullError, match="has 121 tokens and 4 are kept .* holds 124"):
            list(begin("x" * (chat.n_left + 1)))
        assert roles(chat) == before
        assert "".join(begin("x" * chat.n_left)) == "d" and chat.last.n_dropped == 3 - again
        assert [role for role, _ in roles(chat)] == ["system", "user", "assistant"]


def test_by_default_nothing_is_dropped():
    model, chat = filled(124, system="s")
    before = roles(chat)
    with pytest.raises(ContextFullError):
        list(chat.say("d" * 40))
    assert roles(chat) == before and chat.n_left == 124 - 4 - chat.n_used


def test_a_stopped_turn_drops_nothing():
    model, chat = filled(124, drop_oldest=True)
    before = roles(chat)
    assert list(chat.say("d" * 60, stop=lambda: True)) == []
    assert roles(chat) == before


def test_dropping_takes_a_few_renderings_of_a_long_conversation():
    n_renderings = 0

    def counting(messages):
        nonlocal n_renderings
        n_renderings += 1
        return render(messages)

    model = ScriptedModel([b"ok\0"] * 300, n_ctx=5000)
    chat = Chat(model, counting, drop_oldest=True)
    for i in range(300):
        list(chat.say(str(i)))
    n_renderings, model.answers = 0, [b"ok\0"]
    list(chat.say("x" * 4000))
    assert chat.last.n_dropped > 200 and n_renderings < 12


def test_text_after_a_command_that_takes_none_is_not_sent(talk) -> None:
    with pytest.raises(RazorError, match="/undo takes no text; //undo 2 sends it as a message"):
        run(talk, "/undo 2")
    assert not run(talk, "//undo 2") and unescape("//undo 2") == "/undo 2"
    assert not run(talk, "/help\nis how this begins")
