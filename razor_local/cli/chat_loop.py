"""The loop of a chat in a terminal: reading messages, showing answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..errors import RazorError
from .chat_status import numbers
from .terminal import echo, is_dumb, say, sentence

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..chat import Chat, Turn
    from ..common.progress import Progress, Stop
    from ..llama import Llama
    from .history import History

    Begin = Callable[[Progress, Stop], Iterator[str]]  # begins an answer, as chat.regenerate

FILLING = 0.9  # the part of the context from which on a note says so


def converse(
    display: Display,
    session: str | None,
    keep_history: bool,
    first: str | None = None,
    single_turn: bool = False,
) -> None:
    """Read messages and commands, and answer them, until the user leaves.

    Args:
        session: the name of the session that was loaded
        keep_history: whether the next chat can recall what is typed
        first: a message to answer before the first one is read
        single_turn: whether to leave after the first answer
    """
    from . import chat_commands
    from .terminal import MessageReader

    chat = display.chat
    history = _history() if keep_history and not is_dumb() else None
    with MessageReader(chat_commands.complete, history) as reader:

        def answer(begin: Begin, again: bool = True) -> None:
            with reader.hold_input():
                display.show(begin, again)
            display.note_filling()

        if first is not None:
            with _shown():
                answer(partial(chat.say, first), False)
        talk = chat_commands.Talk(display.llama, chat, reader, answer, session)
        while not talk.is_over and not (single_turn and chat.last is not None):
            begin, is_edit, talk.line, talk.is_edit = talk.line, talk.is_edit, "", False
            try:
                line = reader.read(begin)
            except KeyboardInterrupt:
                say("/exit or Ctrl-D to leave")
                continue
            if line is None:
                return
            with _shown():
                if chat_commands.run(talk, line):
                    continue
                text = chat_commands.unescape(reader.message(line))
                if text.strip():
                    answer(partial(chat.edit if is_edit else chat.say, text), is_edit)


@contextmanager
def _shown() -> Iterator[None]:
    """Show an error of the library, or an interrupt after an answer, instead of ending the chat."""
    try:
        yield
    except RazorError as error:
        say(f"Error: {error}")
    except KeyboardInterrupt:
        say("/exit or Ctrl-D to leave")


def _history() -> History | None:
    """Return the history of earlier chats. If it cannot be used, show a note and return None."""
    from .history import History

    try:
        return History()
    except (RazorError, OSError) as error:
        say(f"note: the history of earlier chats cannot be used: {sentence(error)}")
        return None


@dataclass
class Display:
    """Show the answers of a conversation: the text on stdout, everything else on stderr.

    Attributes:
        once: whether the process ends after one answer, so that nothing is kept.
        is_filling: whether a note has said that the context is nearly full.
    """

    llama: Llama
    chat: Chat
    hide_thinking: bool = False
    once: bool = False
    is_filling: bool = False

    def show(self, begin: Begin, again: bool = False) -> None:
        """Stream one answer, then show how it ended and a line of numbers.

        Args:
            again: whether it replaces the answer to the last message
        """
        from .chat_output import AnswerWriter
        from .interrupt import stop_on_interrupt
        from .terminal import ProgressBar

        with (
            AnswerWriter(self.hide_thinking) as writer,
            ProgressBar() as bar,
            stop_on_interrupt() as stop,
        ):
            for piece in begin(bar, stop):
                bar.close()
                writer.write(piece)
        turn = self.chat.last
        assert turn is not None  # begin() has answered
        if turn.n_answer:
            echo()
        if turn.ended == "stopped":
            say("Stopped." if self.once else f"Stopped. {_kept(turn, again)}")
        elif turn.ended == "context":
            say(f"The context of {self.llama.n_ctx():,} tokens is full: {self._when_full()}.")
        elif turn.ended == "loop":
            say("The answer was stopped because it kept repeating itself.")
        elif turn.ended == "length":
            say(f"The answer was stopped after {turn.n_answer:,} tokens, the limit of --predict.")
        if turn.n_dropped and (turn.n_answer or turn.ended == "end"):
            what = f"the {turn.n_dropped} oldest messages and their answers"
            if turn.n_dropped == 1:
                what = "the oldest message and its answer"
            say(f"Dropped to make room: {what}.")
        say(numbers(self.llama, self.chat, turn))

    def note_filling(self) -> None:
        """Say once that the context is nearly full."""
        part, was_filling = self.chat.n_used / self.llama.n_ctx(), self.is_filling
        self.is_filling = part >= FILLING
        if self.is_filling and not was_filling:
            say(f"note: {part:.0%} of the context is used; {self._when_full()}")

    def _when_full(self) -> str:
        if self.chat.drop_oldest:
            return "messages that do not fit will drop the oldest ones"
        return "use a larger -c" if self.once else "/clear empties it, or start with a larger -c"


def _kept(turn: Turn, again: bool) -> str:
    """Return what a conversation keeps of a turn that was stopped."""
    if turn.n_answer:
        return "The answer so far is kept."
    return "Nothing has changed." if again else "The message is not kept."
