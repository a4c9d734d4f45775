"""The slash commands of a chat on a pseudo-terminal."""

from __future__ import annotations

from tests.support.cli import MAIN
from tests.support.terminal import paste, terminal
from tests.support.texts import FACT, QUESTION

OTHER = FACT.replace("48213", "90517")


def ask(t, text: str, *answer: str) -> None:
    """Send a message, and wait for what its answer holds and the next prompt."""
    t.send(f"{text}\r")
    for part in (*answer, "MiB full", ">>>"):
        t.expect(part)


def test_undo_regen_and_edit():
    with terminal("-c", "2048") as t:
        t.expect(">>>")
        t.send("/undo\r")
        t.expect("there is no message to take back")
        t.send("/regen\r")
        t.expect("Error: there is no message yet that could be answered again; send one")
        t.send("/edit\r")
        t.expect("Error: there is no message yet")
        t.expect(">>>")
        ask(t, paste(f"{FACT}\nSecond line.") + QUESTION, "48213.")
        t.send("/regen\r")
        t.expect("at temperature 0 the answer is the same again")
        assert "prompt 1 new tokens" in t.expect("tok/s")
        t.expect(">>>")
        t.send("/edit\r")
        t.expect("Enter sends the changed message in place of the last one")
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
        t.expect("(stopped; nothing has changed)")
        t.send("/undo\r")
        t.expect("taken back: hello")
