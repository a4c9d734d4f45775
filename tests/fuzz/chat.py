"""Soak test of a conversation: random turns, each compared with a fresh context.

    python -m tests.fuzz.chat --minutes 20 --seed 1

The turns are messages, long texts, edits, undo, regenerated answers, answers that are stopped at a
random moment, and sessions that are saved and loaded. Every answer is compared with that of a
context that reads the whole conversation again. The memory of the process at the end is compared
with that after a fifth of the time.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import psutil

from razor_local import ContextFullError, Llama, sessions
from razor_local.chat import Chat, Sampling, chat_template
from razor_local.evaluation import clear_cache
from razor_local.model_setup import DEFAULT_MODEL
from tests.support.texts import text_with

# llama.cpp's rounding depends on the number of rows, which may decide between two tokens
TOLERANCE = 0.1
MAX_GROWTH = 0.02  # maximum growth of the resident memory
NAMES = ["Marlow", "Ashby", "Corwin", "Delphine", "Everard", "Fenwick"]


class Finding(AssertionError):
    """An answer that differs from that of a fresh context, or memory that grows."""


@dataclass
class Report:
    """The result of a run.

    Attributes:
        done: number of operations by name.
        compared: number of answers that were compared.
        stopped: number of answers that were stopped.
        memory: resident bytes after a fifth of the time and at the end.
    """

    done: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    stopped: int = 0
    memory: list[int] = field(default_factory=list)


class Soak:
    """A conversation, and a second context that answers the same messages from scratch."""

    def __init__(self, model: Path, n_ctx: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.llama, self.fresh = Llama(model, n_ctx=n_ctx), Llama(model, n_ctx=n_ctx)
        self.chat = self._new_chat()
        self.report = Report()
        self.log: list[str] = []
        self.has_session = False

    def close(self) -> None:
        self.llama.close()
        self.fresh.close()

    def touch_memory(self) -> None:
        """Fill both caches once, because the system counts a page from its first use on."""
        for llama in (self.llama, self.fresh):
            llama.prefill([1] * (llama.n_ctx() - 1))
            llama.reset()
            clear_cache(llama)

    def _new_chat(self) -> Chat:
        return Chat(self.llama, chat_template(self.llama), max_tokens=40, sampling=Sampling(temp=0))

    def step(self) -> None:
        operation = self.rng.choice(
            [self.say] * 6 + [self.edit, self.regenerate] * 2 + [self.undo, self.system, self.clear]
            + [self.save, self.load, self.leave]
        )  # fmt: skip
        self.log = [*self.log[-30:], operation.__name__]
        self.report.done[operation.__name__] += 1
        try:
            operation()
        except ContextFullError:
            self.chat.clear()

    def message(self) -> str:
        """Return a question, often after a text that contains the answer."""
        name, code = self.rng.choice(NAMES), self.rng.randrange(10000, 99999)
        question = f"What is the secret code of {name}?"
        n_words = self.rng.choice([0, 0, 20, 200, self.llama.n_ctx() // 8, self.llama.n_ctx() // 3])
        if not n_words:
            return question
        fact = f"The secret code of {name} is {code}."
        return f"{text_with(fact, n_words, self.rng.randrange(100))}\n\n{question}"

    def answer(self, begin: Callable[..., Iterator[str]]) -> None:
        """Read an answer, or stop it at a random moment, and compare it with a fresh context."""
        stop = None
        if self.rng.random() < 0.3:
            calls = iter(range(self.rng.choice([0, 1, 2, 5, 10, 20])))
            stop = lambda: next(calls, None) is None  # noqa: E731
        before = [dict(message) for message in self.chat.messages]
        said = "".join(begin(stop=stop))
        turn = self.chat.last
        assert turn is not None
        if turn.ended == "stopped":
            self.report.stopped += 1
        if not turn.n_answer:
            if turn.ended == "stopped" and self.chat.messages != before:
                self.fail("a turn without an answer changed the conversation")
            return
        if self.chat.messages[-1]["content"] != said:
            self.fail("the conversation holds another answer")
        self.compare()

    def compare(self) -> None:
        """Compare the last answer with that of a context that reads the conversation again."""
        answer = self.chat.messages[-1]["tokens"]
        known = self.chat._known_now().tokens
        prompt = known[: len(known) - len(answer)]
        self.fresh.reset()
        clear_cache(self.fresh)
        self.fresh.prefill(prompt)
        for i, token in enumerate(answer):
            logits = self.fresh._last_logits()
            if logits[token] < logits.max() - TOLERANCE:
                self.fail(
                    f"token {i} of the answer to {len(prompt)} tokens is {token}, a fresh context"
                    f" gives {logits.argmax()}, {logits.max() - logits[token]:.2f} above it"
                )
            self.fresh.eval([token])
        self.report.compared += 1

    def fail(self, what: str) -> None:
        raise Finding(f"{what}; the operations before: {' '.join(self.log)}")

    # -- operations

    def say(self) -> None:
        text = self.message()
        self.answer(lambda stop: self.chat.say(text, stop=stop))

    def edit(self) -> None:
        if self.chat.last_message is not None:
            text = self.message()
            self.answer(lambda stop: self.chat.edit(text, stop=stop))

    def regenerate(self) -> None:
        if self.chat.last_message is not None:
            self.answer(lambda stop: self.chat.regenerate(stop=stop))

    def leave(self) -> None:
        """Close an answer after a few pieces."""
        pieces = self.chat.say(self.message())
        for _ in range(self.rng.randint(0, 5)):
            next(pieces, None)
        pieces.close()

    def undo(self) -> None:
        self.chat.undo()

    def clear(self) -> None:
        self.chat.clear()

    def system(self) -> None:
        self.chat.set_system(self.rng.choice([None, "Answer in few words."]))

    def save(self) -> None:
        if self.chat.last_message is not None:
            sessions.save("soak", self.llama, self.chat)
            self.has_session = True

    def load(self) -> None:
        if self.has_session:
            sessions.load("soak", self.llama, self.chat)


def run(
    model: Path,
    seconds: float,
    seed: int,
    n_ctx: int = 8192,
    turns: int = 10**9,
    max_growth: float = MAX_GROWTH,
) -> Report:
    """Run turns until the time is over or all are done. Raises Finding."""
    started, process = time.monotonic(), psutil.Process()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict("os.environ", {"XDG_DATA_HOME": folder}),
        closing(Soak(model, n_ctx, seed)) as soak,
    ):
        memory = soak.report.memory
        soak.touch_memory()
        while (passed := time.monotonic() - started) < seconds and turns > 0:
            turns -= 1
            if passed > seconds / 5 and not memory:
                memory.append(process.memory_info().rss)
            soak.step()
        memory.append(process.memory_info().rss)
        if memory[-1] > memory[0] * (1 + max_growth):
            soak.fail(f"the memory grew from {memory[0]:,} to {memory[-1]:,} bytes")
        return soak.report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    report = run(arguments.model, arguments.minutes * 60, arguments.seed)
    first, last = report.memory[0], report.memory[-1]
    print(
        f"{sum(report.done.values()):,} operations, {report.compared:,} answers equal to those of a"
        f" fresh context, {report.stopped:,} stopped; {first / 2**20:.1f} MiB resident after a"
        f" fifth of the time, {last / 2**20:.1f} MiB at the end ({last / first - 1:+.1%})"
    )
    print(", ".join(f"{name} {n:,}" for name, n in report.done.most_common()))


if __name__ == "__main__":
    main()
