"""The slash commands of a chat on a pseudo-terminal."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys

import pytest

from razor_local.cli.history import History
from tests.support.cli import MAIN, piped
from tests.support.terminal import COUNTING, UP, paste, terminal
from tests.support.texts import FACT, QUESTION

OTHER = FACT.replace("48213", "90517")


def ask(t, text: str, *answer: str) -> None:
    """Send a message, and wait for what its answer holds and the next prompt."""
    t.send(f"{text}\r")
    for part in (*answer, "tok/s | context", ">>>"):
        t.expect(part)


def test_undo_regen_and_edit():
    with terminal("-c", "2048") as t:
        t.expect(">>>")
        for command, what in (
            ("/undo", "take back"),
            ("/regen", "answer again"),
            ("/edit", "change"),
            ("/edit A new text", "change"),
        ):
            t.send(f"{command}\r")
            shown = t.expect(f"Error: there is no message yet to {what}; send one")
            assert "Temperature" not in shown
            t.expect(">>>")
        ask(t, paste(f"{FACT}\nSecond line.") + QUESTION, "48213.")
        t.send("/regen\r")
        t.expect("Temperature 0 gives the most likely answer again")
        assert "prompt 1 new tokens" in t.expect("tok/s")
        t.expect(">>>")
        t.send("/edit\r")
        t.expect("Enter replaces the last message with the changed one")
        t.expect(f"[pasted text 1: 2 lines]{QUESTION}")  # in the line
        t.send("\x03")
        t.expect(">>>")
        t.send(f"/edit {OTHER} {QUESTION}\r")
        t.expect("The secret code of Marlow is 90517.")
        t.expect(">>>")
        t.send("/context\r")
        t.expect("used by 2 messages")
        t.expect(">>>")
        t.send("/edit\r")
        t.expect(f">>> {OTHER} {QUESTION}")
        t.send("\x01Yes. \r")  # at the beginning of the line
        t.expect("90517.")
        t.expect(">>>")
        t.send("/undo\r")
        t.expect(f"taken back: Yes. {OTHER[:40]}")
        t.send("/context\r")
        t.expect("used by 0 messages")
        t.send("/exit\r")
        assert t.wait()[0] == 0


def test_edit_on_a_terminal_that_cannot_edit():
    with terminal("-n", "1", TERM="dumb") as t:
        t.expect(">>>")
        ask(t, "hello")
        t.send("/edit\r")
        t.expect("Error: this terminal cannot show a line to be changed; use /edit NEW TEXT")
        t.expect(">>>")
        ask(t, "/edit hello again")
        t.send("/context\r")
        t.expect("used by 2 messages")


def test_a_stopped_edit_changes_nothing():
    slow = f"""
import os, signal
from razor_local import chat
edit = chat.Chat.edit
def stopped(self, text, progress, stop):
    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGINT)
    return edit(self, text, interrupt, stop)
chat.Chat.edit = stopped
{MAIN}
"""
    with terminal("-n", "1", "-b", "8", code=slow) as t:
        t.expect(">>>")
        ask(t, "hello")
        t.send("/edit a longer message of a few words more than the last one had\r")
        t.expect("Stopped. Nothing has changed.")
        t.send("/undo\r")
        t.expect("taken back: hello")


def test_a_file_whose_path_the_tab_key_completes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a long path would be broken into lines
    (tmp_path / "facts.txt").write_text(f"{FACT}\nSecond line.\n")
    (tmp_path / "factory.txt").write_text("x")
    with terminal("-c", "2048") as t:
        t.expect(">>>")
        t.send("/fi\t./fac\t")
        t.expect("/file ./fact")
        t.send("\t")  # two names are possible
        t.expect("factory.txt")
        t.expect("facts.txt")
        t.send("s\t\r")
        assert "left for it" in t.expect("left for it")
        t.expect("[file 1: facts.txt, ")
        t.expect("tokens]")
        t.send("/file none\r")
        t.expect("Error: none: No such file or directory")
        t.expect("[file 1: facts.txt, ")  # it is still there
        t.expect("tokens]")
        ask(t, QUESTION, "The secret code of Marlow is 48213.")
        t.send("/edit\r")
        t.expect(">>> [file 1: facts.txt, ")
        t.expect(QUESTION)


def test_a_file_on_a_terminal_that_cannot_edit(tmp_path):
    (tmp_path / "facts.txt").write_text(FACT)
    with terminal("-c", "2048", TERM="dumb") as t:
        t.expect(">>>")
        t.send(f"/file {tmp_path / 'facts.txt'}\r")
        t.expect("tokens and is part of the next message")
        t.expect(">>> [file 1: facts.txt, ")
        t.send("/context\r")
        t.expect("used by 0 messages")
        t.expect(">>> [file 1: facts.txt, ")
        t.send('"""\r')
        t.expect("...")
        ask(t, f'{QUESTION}"""', "The secret code of Marlow is 48213.")


def test_what_was_typed_is_recalled_in_the_next_chat(tmp_path):
    text = f"{FACT}\nSecond line."
    for marked in (True, False):
        with terminal("-n", "1", code=COUNTING, XDG_DATA_HOME=str(tmp_path)) as t:
            t.expect(">>>")
            if marked:
                t.send(paste(text))
                t.expect("2 lines]")
                t.send("Q?\r")
            else:
                t.send(UP * 4)
                t.expect("Second line.")  # as it was sent
                t.send("\r")
            t.expect(f"<{len(text) + 4} {text[:20]!r} 4 lines>")
            t.expect(">>>")
            t.send("/context\r")
            t.expect("used by 2 messages")
            t.expect(">>>")
            t.send("exit now\r")
            t.expect("<8 'exit now' 1 lines>")
            t.expect(">>>")
            t.send("/exit\r")
            assert t.wait()[0] == 0
    path = tmp_path / "razor_local" / "history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert History(path).texts.count(f"{text}\n\nQ?") == 2


def test_what_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert piped("hi", tmp_path).returncode == 0
    for args, env in ((["--no-history"], {}), ([], {"TERM": "dumb"})):
        with terminal("-n", "1", *args, **env) as t:
            t.expect(">>>")
            ask(t, "hello")
            t.send("/exit\r")
            assert t.wait()[0] == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_chat_without_a_place_for_its_history_goes_on(tmp_path):
    (tmp_path / "razor_local").write_text("a file")
    with terminal("-n", "1", XDG_DATA_HOME=str(tmp_path)) as t:
        t.expect("note: the history of earlier chats cannot be used: ")
        t.expect(">>>")
        ask(t, "hello")
    (tmp_path / "razor_local").unlink()
    with terminal("-n", "1", XDG_DATA_HOME=str(tmp_path)) as t:
        t.expect(">>>")
        (tmp_path / "razor_local" / "history").mkdir()
        t.send("hello\r")
        t.expect("history is not kept any more: ")
        t.expect(" %)")
        t.expect(">>>")
        t.send("hello\r")
        assert "not kept" not in t.expect(" %)")


def test_a_conversation_is_saved_and_loaded(tmp_path):
    with terminal("-c", "2048", XDG_DATA_HOME=str(tmp_path)) as t:
        t.expect(">>>")
        for command, told in (
            ("/save work", "Error: there is nothing to save yet"),
            ("/save", "Error: expected a name: /save NAME"),
            ("/load", "Error: expected a name: /load NAME"),
            ("/load work", "Error: there is no session work; none has been saved yet"),
            ("/sessions", "there are no sessions; /save NAME makes one"),
            ("/sessions rm work", "Error: there is no session work"),
            ("/sessions of mine", "Error: expected /sessions, or /sessions rm NAME"),
        ):
            t.send(f"{command}\r")
            t.expect(told)
            t.expect(">>>")
        ask(t, f"{FACT} {QUESTION}", "48213.")
        t.send("/save work\r")
        t.expect("saved as work (")
        t.expect(">>>")
        t.send("/clear\r")
        t.expect(">>>")
        t.send("/load wo\t\r")
        assert "session work: 2 messages, " in t.expect(
            "in the cache; the last message: The secret"
        )
        t.expect(">>>")
        ask(t, QUESTION, "48213.")
        t.send("/save\r")
        t.expect("saved as work (")
        t.send("/save other\r")
        t.expect("saved as other (")
        t.expect(">>>")
    with terminal("-c", "2048", "--session", "work", XDG_DATA_HOME=str(tmp_path)) as t:
        t.expect("session work: 4 messages, ")
        t.expect(">>>")
        t.send(f"{QUESTION}\r")
        numbers = t.expect(" %)")
        assert "48213." in numbers and int(re.search(r"prompt (\d+) new", numbers)[1]) < 40
        t.expect(">>>")
        t.send("/save\r")
        t.expect("saved as work (")
        t.send("/sessions\r")
        t.expect("other  20")
        t.expect("work  20")
        assert re.search(r", 6 messages, \d+ tokens, \d\.\d MiB, ", t.expect("razor-default"))
        t.send("/save other\r")  # it holds the beginning of this conversation
        t.expect("saved as other (")
        t.send("/sessions rm ot\t\r")
        t.expect("session other is removed")
    with terminal("-c", "4096", XDG_DATA_HOME=str(tmp_path)) as t:
        t.expect(">>>")
        t.send("/load work\r")
        t.expect("Error: session work was saved with another plan (window 256, here 512, context")
        t.expect(">>>")
        t.send("/load work --messages\r")
        t.expect("session work: 6 messages")
        t.expect("to be read with the next message")
        t.expect(">>>")
        ask(t, QUESTION, "48213.")


def test_a_saved_conversation_is_not_replaced_by_another_one(tmp_path):
    folder = tmp_path / "razor_local" / "sessions"
    with terminal("-c", "2048", "-n", "4", XDG_DATA_HOME=str(tmp_path)) as t:
        t.expect(">>>")
        t.send("hello\r")
        t.expect(" %)")
        t.send("/save work\r")
        t.expect("saved as work (")
        before = (folder / "work.session").read_bytes()
        (folder / "bad.session").write_text("x")
        for end in ("/clear", "/undo"):
            t.send(f"{end}\r")
            t.expect(">>>")
            t.send("good morning\r")
            t.expect(" %)")
            t.send("/save work\r")
            t.expect("Error: session work holds another conversation; choose another name, or")
            t.send("/save\r")
            t.expect("Error: expected a name: /save NAME")
            t.send("/save bad\r")
            t.expect("Error: session bad exists, and the file of session bad is damaged")
        assert (folder / "work.session").read_bytes() == before


def test_a_pipe_goes_on_with_a_session(tmp_path):
    env = {"XDG_DATA_HOME": str(tmp_path)}
    with terminal("-c", "2048", **env) as t:
        t.expect(">>>")
        ask(t, f"{FACT} {QUESTION}", "48213.")
        t.send("/save work\r")
        t.expect("saved as work (")

    def piped(*args):
        command = [sys.executable, "-c", MAIN, "chat", *args]
        return subprocess.run(
            command, input=QUESTION, capture_output=True, text=True, env=os.environ | env
        )

    done = piped("-c", "2048", "--session", "work")
    assert done.returncode == 0 and done.stdout == "The secret code of Marlow is 48213.\n"
    assert int(re.search(r"prompt (\d+) new", done.stderr)[1]) < 40
    for args, code, told in (
        (["--session", "none"], 1, "Error: there is no session none; there are: work"),
        (["--session", "../x"], 1, "Error: '../x' cannot be the name of a session"),
        (["--session", "work", "--system", "x"], 2, "--system and --session exclude each other"),
    ):
        done = piped(*args)
        assert done.returncode == code and told in done.stderr and done.stdout == ""


def test_settings_and_answers_in_json(tmp_path):
    schema = '{"type": "object", "properties": {"code": {"type": "integer"}}, "required": ["code"]}'
    (tmp_path / "code.json").write_text(schema)
    with terminal("-c", "2048") as t:
        t.expect(">>>")
        t.send("/set temp 0\r")
        t.expect("temp 0.0, top_k 40")
        t.send(f"/json {tmp_path}/co\t\r")
        t.expect("answers follow the JSON schema")
        t.expect(">>>")
        t.send(f"{FACT} {QUESTION}\r")
        answer = t.expect("prompt ")
        assert isinstance(json.loads(re.search(r"\{.*\}", answer, re.DOTALL)[0])["code"], int)
        t.expect(">>>")
        t.send("/json off\r")
        t.expect("answers are free text")
        t.expect(">>>")
        ask(t, QUESTION, "The secret code of Marlow is")
        t.send("/context\r")
        t.expect("█")
        t.expect("free")
    with terminal(TERM="dumb") as t:
        t.expect(">>>")
        t.send("/context\r")
        t.expect("# used, + kept, . free")


def test_a_full_context():
    text = "word " * 60
    with terminal("-c", "256", "-n", "4") as t:
        t.expect(">>>")
        ask(t, text)
        ask(t, text)
        t.send(f"{text}\r")
        t.expect("note: 9")
        t.expect("% of the context is used; /clear empties it, or start with a larger -c")
        t.expect(">>>")
        t.send(f"{text}\r")
        t.expect("Error: the conversation with this message has")
        t.expect(">>>")
        t.send("/context\r")
        t.expect("by 6 messages")
    with terminal("-c", "256", "-n", "4", "--on-full", "drop-oldest") as t:
        t.expect(">>>")
        ask(t, text)
        ask(t, text)
        t.send(f"{text}\r")
        t.expect("% of the context is used; messages that do not fit will drop the oldest ones")
        t.expect(">>>")
        t.send(f"{text}\r")
        t.expect("Dropped to make room: the oldest message and its answer.")
        assert "note: " not in t.expect(">>>")
        t.send("/context\r")
        shown = t.expect("drops the oldest messages")
        match = re.search(
            r"(\d+) of 256 tokens used by 6 messages \(2 were dropped\); (\d+) left for the next"
            r" message, (\d+) kept for its answer\s+a longer message, up to (\d+) tokens, $",
            shown.partition("/context")[2].replace("drops the oldest messages", ""),
        )
        assert match, shown
        used, free, kept, most = map(int, match.groups())
        assert used + free + kept == 256 and free + kept < used < most
        t.send("/clear\r")
        t.expect("the conversation is empty")
        t.send("/context\r")
        assert "dropped" not in t.expect("0 messages;") + t.expect(">>>")


# the built-in model, its first answer in thoughts
THINKING = f"""
from razor_local.prompt import reasoning
init = reasoning.Reasoning.__init__
def thinking(self, prompt):
    init(self, prompt)
    self._held = "<think>Hm." + chr(27) + "[2J</think>"
reasoning.Reasoning.__init__ = thinking
{MAIN}
"""


def test_thoughts_are_dim_or_hidden(tmp_path):
    with terminal("-n", "1", code=THINKING) as t:
        t.expect(">>>")
        ask(t, "hi", "<think>", r"Hm.\x1b[2J", "</think>")
        assert "\x1b[2m<think>Hm." in t.raw and "\x1b[2J" not in t.raw
    with terminal("-n", "1", code=THINKING, NO_COLOR="1") as t:
        t.expect(">>>")
        ask(t, "hi", "<think>", "Hm.", "</think>")
        assert "\x1b[2m" not in t.raw
    with terminal("-n", "1", "--hide-thinking", code=THINKING) as t:
        t.expect(">>>")
        t.send("hi\r")
        t.expect("(thinking)")
        assert "think" not in t.expect("tok/s")
    shown = piped("hi", tmp_path, THINKING).stdout
    assert shown.startswith("<think>Hm.\x1b[2J</think>")
    command = [sys.executable, "-c", THINKING, "chat", "--hide-thinking"]
    hidden = subprocess.run(command, input="hi", capture_output=True, text=True)
    assert hidden.stdout == shown.removeprefix("<think>Hm.\x1b[2J</think>")
    assert "think" not in hidden.stderr


def test_lines_are_broken_at_the_width_of_the_terminal():
    for columns, answer in (
        (25, "The secret code of Marlow\nis 48213."),
        (10, "The secret code of Marlow is 48213."),
    ):
        with terminal("-c", "2048", COLUMNS=str(columns)) as t:
            t.expect(">>>")
            t.send(f"{FACT} {QUESTION}\r")
            t.expect(f"\n{answer}")


@pytest.mark.parametrize("word", ["exit", "quit"])
def test_a_word_alone_leaves(word):
    with terminal("-n", "1", code=COUNTING) as t:
        t.expect(">>>")
        t.send(f"{word} is a word\r")
        t.expect(f"<14 '{word} is a word' 1 lines>")
        t.expect(">>>")
        t.send(f" {word}\r")
        t.expect(f"<5 ' {word}' 1 lines>")
        t.expect(">>>")
        t.send(f"//{word}\r")
        t.expect(f"<5 '/{word}' 1 lines>")
        t.expect(">>>")
        t.send(f"{word}\r")
        assert t.wait()[0] == 0
