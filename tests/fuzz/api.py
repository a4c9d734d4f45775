"""Differential fuzzer of Llama: random operations, each compared with a new context.

    python -m tests.fuzz.api --operations 20000 --seed 1

The operations are prompts with common prefixes, open streams, interrupts at any moment, stop(),
rollback, edits, failing callbacks, states loaded here and in another process, and two models used
by two threads at once. It stops at the first finding and prints the operations that led to it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import numpy as np

from razor_local import ContextFullError, Llama, RazorError
from razor_local.evaluation import clear_cache, n_cached
from razor_local.llama import llama_cpp
from razor_local.profile import Profile
from tests.support.tiny_models import TinySpec, make_model

N_CTX = 768
SPEC = TinySpec(n_layer=2, n_vocab=64, sharpness=1.0, seed=3)
TOLERANCE = 0.1  # llama.cpp's attention rounds depending on the number of rows; logits are near 8
OPTIONS = {
    "n_ctx": N_CTX,
    "n_batch": 128,
    "n_threads": 1,
    "n_threads_batch": 1,
    "type_k": "f32",
    "type_v": "f32",
}


class Interrupt(BaseException):
    """The exception of the signal handler."""


class Finding(AssertionError):
    """A difference from a new context."""


def make_llama(path: Path, razor: bool) -> Llama:
    retrieval = tuple(np.array([1, 0], np.uint8) for _ in range(SPEC.n_layer))
    profile = Profile(retrieval=retrieval, window_min=96, window_divisor=0)
    # a fresh context reads what the other one may have read in several prompts
    return Llama(path, razor=profile if razor else False, prefill="razor", **OPTIONS)


def logits_of(llama: Llama, tokens: list[int]) -> np.ndarray:
    """Return the logits after the tokens: f32 [n_vocab]."""
    llama.prefill(tokens)
    return llama._last_logits().copy()


def worker(path: Path, razor: bool, pipe: Any) -> None:
    """Load states in another process, and send the logits of their next token."""
    with closing(make_llama(path, razor)) as llama:
        while (asked := pipe.recv()) is not None:
            state, token = asked
            llama.load_state(state)
            llama.eval([token])
            pipe.send((llama.n_tokens, llama._last_logits().copy()))


def end(pipe: Any) -> None:
    with suppress(OSError):  # the worker may have ended already
        pipe.send(None)


def interrupted(use: Callable[[], object], seconds: float) -> None:
    """Call use(), and interrupt it with an exception of a signal handler unless it ends earlier."""

    def handler(*_: Any) -> None:
        raise Interrupt

    # an interrupt in a finalizer goes to this hook; pytest's keeps it, with the generators in its
    # traceback, which then own the Llama
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    before = signal.signal(signal.SIGALRM, handler)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            use()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Interrupt:
        pass
    finally:
        signal.signal(signal.SIGALRM, before)
        sys.unraisablehook = hook


class Fuzzer:
    """A Llama, a second one with the same plan to compare with, and the expected state."""

    def __init__(self, path: Path, seed: int, razor: bool, pipe: Any = None) -> None:
        self.rng = random.Random(seed)
        self.llama, self.fresh = make_llama(path, razor), make_llama(path, razor)
        self.pipe = pipe
        self.states: list[tuple[Any, list[int]]] = []
        self.stream: Any = None  # an open generator, and the tokens that it will have evaluated
        self.expected: list[int] | None = []  # tokens in the cache; None: not known
        self.log: list[str] = []
        self.done: Counter[str] = Counter()
        self.texts = [self.tokens(n) for n in (3, 40, 150, 300, 500)]
        self.cached: dict[tuple[int, ...], np.ndarray] = {}

    def close(self) -> None:
        self.llama.close()
        self.fresh.close()

    def tokens(self, n: int) -> list[int]:
        return [self.rng.randrange(SPEC.n_vocab) for _ in range(n)]

    def prompt(self) -> list[int]:
        """Make a prompt from the start of one of a few texts, followed by random tokens."""
        text = self.rng.choice(self.texts)
        return text[: self.rng.randint(1, len(text))] + self.tokens(self.rng.choice([0, 1, 9, 60]))

    def held(self) -> list[int]:
        return self.llama._input_ids.tolist()

    def step(self) -> None:
        operations = [
            self.eval, self.prefill, self.prefill, self.generate, self.open_stream, self.go_on,
            self.close_stream, self.interrupt, self.interrupt, self.stop, self.roll_back,
            self.edit, self.save, self.load, self.fails, self.complete, self.reset, self.sample,
            self.too_long, self.logits,
        ]  # fmt: skip
        if self.pipe is not None and self.rng.random() < 0.2:
            operations.append(self.load_elsewhere)
        operation = self.rng.choice(operations)
        self.log = [*self.log[-30:], operation.__name__]
        self.done[operation.__name__] += 1
        alone = (self.open_stream, self.go_on, self.close_stream, self.interrupt)
        if self.stream is not None and operation not in alone:
            self.refused(operation)
        else:
            operation()
        if self.expected is not None and self.held() != self.expected:
            self.fail(f"holds {len(self.held())} tokens, expected {len(self.expected)}")
        self.expected = self.held()
        if self.stream is None and self.rng.random() < 0.5:
            self.check()

    def refused(self, operation: Callable[[], None]) -> None:
        """Check that an operation is refused while a stream is open, and changes nothing."""
        before = self.held()
        for use in (
            lambda: self.llama.eval([1]),
            lambda: self.llama.prefill([1, 2]),
            self.llama.save_state,
            self.llama.reset,
        ):
            try:
                use()
            except RazorError:
                continue
            self.fail("was not refused while a stream is open")
        if self.held() != before:
            self.fail("a refused request changed the cache")

    def check(self) -> None:
        """Compare the logits with those of a new context."""
        tokens = self.held()
        if not tokens:
            return
        found, expected = logits_of(self.llama, tokens), self.reference(tokens)
        if not np.allclose(found, expected, rtol=0, atol=TOLERANCE):
            self.fail(f"logits after {len(tokens)} tokens differ by {abs(found - expected).max()}")
        if self.held() != tokens or n_cached(self.llama) != len(tokens):
            self.fail("the cache does not hold the tokens")

    def reference(self, tokens: list[int]) -> np.ndarray:
        key = tuple(tokens)
        if key not in self.cached:
            if len(self.cached) > 200:
                self.cached.clear()
            self.fresh.reset()
            clear_cache(self.fresh)
            self.cached[key] = logits_of(self.fresh, tokens)
        return self.cached[key]

    def fail(self, what: str) -> None:
        raise Finding(f"{what}; the operations before: {' '.join(self.log)}")

    # -- operations

    def eval(self) -> None:
        tokens = self.tokens(self.rng.choice([1, 1, 2, 30, 130]))
        if len(self.expected) + len(tokens) > N_CTX:
            return
        expected = self.expected + tokens
        while tokens:
            n = self.rng.randint(1, len(tokens))
            self.llama.eval(tokens[:n])
            del tokens[:n]
        self.expected = expected

    def logits(self) -> None:
        tokens = self.tokens(self.rng.choice([1, 5, 140]))
        if len(self.expected) + len(tokens) > N_CTX:
            return
        wanted = [self.rng.random() < 0.5 for _ in tokens]
        rows = np.concatenate(
            [np.empty((0, SPEC.n_vocab), np.float32)]
            + [rows.copy() for rows in self.llama.eval_logits(tokens, wanted)]
        )
        expected = self.expected + tokens
        if len(rows) != sum(wanted):
            self.fail(f"{len(rows)} rows of logits for {sum(wanted)} tokens")
        if any(wanted):
            i = max(i for i, one in enumerate(wanted) if one)
            if not np.allclose(
                rows[-1], self.reference(self.expected + tokens[: i + 1]), atol=TOLERANCE
            ):
                self.fail("wrong rows of logits")
        self.expected = expected

    def prefill(self) -> None:
        tokens = self.prompt()
        done = self.llama.prefill(tokens)
        if not done.complete or done.n_reused + done.n_evaluated < len(tokens):
            self.fail(f"prefill() reports {done} of {len(tokens)} tokens")
        self.expected = tokens

    def generate(self) -> None:
        tokens, n = self.prompt(), self.rng.randint(1, 6)
        run = self.llama.generate(tokens, temp=0)
        said = [next(run) for _ in range(n)]
        if self.rng.random() < 0.5:
            run.close()
        del run
        best = self.reference(tokens)
        if best[said[0]] < best.max() - 2 * TOLERANCE:
            self.fail("the first token is not the likeliest")
        self.expected = tokens + said[:-1]

    def open_stream(self) -> None:
        if self.stream is not None:
            return
        tokens = self.prompt()
        self.stream = self.llama.generate(tokens, temp=0.8)
        self.last = next(self.stream)
        self.expected = tokens

    def go_on(self) -> None:
        if self.stream is None or len(self.expected) + 6 > N_CTX:
            return
        more = self.tokens(2) if self.rng.random() < 0.2 else []
        self.expected = [*self.expected, self.last, *more]
        self.last = self.stream.send(more) if more else next(self.stream)

    def close_stream(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.stream = None

    def interrupt(self) -> None:
        """Interrupt a request at any point. check() finds out what the cache then holds."""
        tokens = self.prompt()
        use = self.rng.choice(
            [
                lambda: self.llama.prefill(tokens),
                lambda: self.llama.prefill(tokens, stop=lambda: False),
                lambda: list(zip(self.llama.generate(tokens, temp=0), range(8), strict=False)),
                lambda: self.llama.eval(tokens[:50]),
                lambda: self.states and self.llama.load_state(self.rng.choice(self.states)[0]),
                self.llama.save_state,
                self.llama.reset,
            ]
        )
        if self.stream is not None:
            use = lambda: next(self.stream)  # noqa: E731
        self.expected = None
        if threading.current_thread() is threading.main_thread():
            try:
                interrupted(use, 10 ** self.rng.uniform(-5, -2))
            except (ContextFullError, StopIteration):
                pass
        self.stream = None

    def stop(self) -> None:
        tokens, left = self.prompt(), [self.rng.randint(0, 40)]

        def stop() -> bool:
            left[0] -= 1
            return left[0] < 0

        done = self.llama.prefill(tokens, stop=stop)
        if done.complete:
            self.expected = tokens
        else:
            self.expected = None
            if self.held() != tokens[: self.llama.n_tokens]:
                self.fail("a stopped prefill() left other tokens")

    def roll_back(self) -> None:
        n = len(self.expected)
        keep = self.rng.randint(0, n) if self.rng.random() < 0.5 else max(n - 3, 0)
        self.llama.n_tokens = keep
        self.llama._requires_eval = True
        tokens = self.tokens(2)
        if keep + 2 <= N_CTX:
            self.llama.eval(tokens)
            self.expected = self.expected[:keep] + tokens

    def edit(self) -> None:
        if not self.expected:
            return
        tokens = list(self.expected)
        tokens[self.rng.randrange(len(tokens))] = self.rng.randrange(SPEC.n_vocab)
        self.llama.prefill(tokens)
        self.expected = tokens

    def save(self) -> None:
        self.states = [*self.states[-4:], (self.llama.save_state(), list(self.expected))]

    def load(self) -> None:
        if self.states:
            state, tokens = self.rng.choice(self.states)
            self.llama.load_state(state)
            self.expected = list(tokens)

    def load_elsewhere(self) -> None:
        if not self.states:
            return
        state, tokens = self.rng.choice(self.states)
        if len(tokens) >= N_CTX:
            return
        token = self.rng.randrange(SPEC.n_vocab)
        self.pipe.send((state, token))
        n, logits = self.pipe.recv()
        expected = self.reference([*tokens, token])
        if n != len(tokens) + 1 or not np.allclose(logits, expected, rtol=0, atol=TOLERANCE):
            self.fail("another process goes on from the state with other logits")

    def fails(self) -> None:
        """Callbacks that raise."""
        tokens, left = self.prompt(), [self.rng.randint(0, 20)]

        def raises(*_: Any) -> bool:
            left[0] -= 1
            if left[0] < 0:
                raise KeyError("of a callback")
            return False

        def processor(_ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
            raises()
            return logits * 2

        processors = llama_cpp.LogitsProcessorList([processor])
        self.expected = None
        try:
            if self.rng.random() < 0.5:
                self.llama.prefill(tokens, progress=raises, stop=raises)
            else:
                run = self.llama.generate(tokens, temp=0, logits_processor=processors)
                for _ in range(30):
                    next(run)
        except KeyError:
            pass
        except ContextFullError:
            pass

    def complete(self) -> None:
        tokens = self.prompt()[: N_CTX - 20]
        bias = {self.rng.randrange(SPEC.n_vocab): 3.0} if self.rng.random() < 0.3 else None
        n = self.rng.randint(1, 8)
        run = self.llama.generate(tokens, temp=0)
        expected = [next(run) for _ in range(n)]
        run.close()
        run = self.llama.generate(tokens, temp=0)
        found = [next(run) for _ in range(n)]
        run.close()
        if bias is None and found != expected:
            # Other batches round differently, which may decide between two tokens.
            i = next(i for i in range(n) if found[i] != expected[i])
            logits = self.reference(tokens + expected[:i])
            if abs(logits[found[i]] - logits[expected[i]]) > 2 * TOLERANCE:
                self.fail("the same request has another answer")
        if bias:
            self.llama._check_tokens(list(bias))
        self.expected = tokens + found[:-1]

    def sample(self) -> None:
        if not self.expected:
            return
        token, best = self.llama.sample(temp=0), self.reference(self.expected)
        if best[token] < best.max() - 2 * TOLERANCE:
            self.fail("sample() does not give the likeliest token")

    def reset(self) -> None:
        self.llama.reset()
        self.expected = []

    def too_long(self) -> None:
        for use in (self.llama.prefill, self.llama.eval):
            try:
                use([1] * (N_CTX + 1))
            except ContextFullError:
                continue
            self.fail("a text longer than the context was taken")


def run(n: int, seed: int, seconds: float = float("inf")) -> Counter[str]:
    """Run n operations, or as many as the time allows. Raises Finding."""
    ends = time.monotonic() + seconds
    done: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = make_model(Path(folder) / "m.gguf", SPEC)
        context = multiprocessing.get_context("spawn")
        fuzzers = []
        for razor in (True, False):
            ours, theirs = context.Pipe()
            process = context.Process(target=worker, args=(path, razor, theirs), daemon=True)
            process.start()
            theirs.close()  # so that recv() raises EOFError if the worker has ended
            stack.callback(process.join)
            stack.callback(end, ours)
            fuzzers.append(stack.enter_context(closing(Fuzzer(path, seed, razor, ours))))
        while sum(done.values()) < n and time.monotonic() < ends:
            for fuzzer in fuzzers:
                for _ in range(200):
                    fuzzer.step()
            _in_threads(fuzzers, 50)
            done = fuzzers[0].done + fuzzers[1].done
    return done


def _in_threads(fuzzers: list[Fuzzer], n: int) -> None:
    """Use both models at once, each in a separate thread."""
    errors: list[BaseException] = []

    def work(fuzzer: Fuzzer) -> None:
        try:
            for _ in range(n):
                fuzzer.step()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(fuzzer,)) for fuzzer in fuzzers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--operations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.monotonic()
    done = run(arguments.operations, arguments.seed)
    print(f"{sum(done.values()):,} operations in {time.monotonic() - started:.0f} s, none found")
    print(", ".join(f"{name} {n:,}" for name, n in done.most_common()))


if __name__ == "__main__":
    main()
