"""Random operations on the memory of each kind of model, compared with fresh contexts.

    python -m tests.fuzz.memories --operations 100000

The texts of a model branch off a common one, so a cache can be rolled back and continue with other
tokens. The logits of every decoded token must equal those of a context that read its text without
interruption.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from razor_local.model_file import ModelFile
from tests.support import arch_models, arch_runs, runner
from tests.support.runner import OFF, Context, Model, Override

ARCHS = (
    "llama", "qwen2vl", "qwen3vl", "gemma2", "gemma3", "gemma3n", "gemma4", "gpt-oss", "cohere2",
    "llama4", "falcon-h1", "granitehybrid", "jamba", "lfm2", "nemotron_h", "qwen35", "qwen35moe",
    "qwen3next",
)  # fmt: skip
N_TOKENS = 450
BRANCHES = (70, 150, 290)  # tokens that a text has in common with the first one
PARAMS = {"n_ctx": 1024, "n_ubatch": 128, "swa_full": False, "type_k": "f32", "type_v": "f32"}


class Finding(AssertionError):
    """The result of an operation differs from that of a fresh context."""


class Fuzzer:
    """One context of a model, and the logits that it must compute."""

    def __init__(self, arch: str, seed: int, flash_attn: bool) -> None:
        path = arch_models.path_of(arch)
        self.name = f"{arch}, flash attention {'on' if flash_attn else 'off'}, seed {seed}"
        self.rng = random.Random(f"{arch} {seed} {flash_attn}")
        self.done: Counter[str] = Counter()
        self.log: list[str] = []
        self.hybrid = ModelFile(path).shape.recurrent_bytes > 0
        self.params = PARAMS | {"flash_attn": flash_attn}
        self.model = Model(path)
        self.texts = make_texts(path, self.rng)
        self.rewind = self.rng.choice(["off", "ram", "disk"])
        razor = make_override(self.model, self.rewind)
        self.want = []
        for text in self.texts:
            with Context(self.model, razor, **self.params) as ctx:
                self.want.append(ctx.decode(text))
        self.limit = noise(self.model, self.texts[0], self.params)
        self.ctx = Context(self.model, razor, **self.params)
        self.text = 0
        self.plain = is_plain(path)
        self.logged = self.rewind != "off"  # since the cache was empty
        self.states: list[tuple[bytes, bool, int, int]] = []  # bytes, whole, text, tokens

    def close(self) -> None:
        self.ctx.close()
        self.model.close()

    # -- operations --

    def step(self) -> None:
        operations = {
            self.decode: 50, self.decode_more: 15, self.roll_back: 18, self.roll_far_back: 4,
            self.clear: 2, self.save: 5, self.load: 5, self.load_damaged: 2, self.abort: 5,
        }  # fmt: skip
        operation = self.rng.choices(list(operations), list(operations.values()))[0]
        operation()
        self.done[operation.__name__] += 1

    def decode(self, most: int = 4) -> None:
        n_past = self.ctx.n_past
        n = min(self.rng.randint(1, most), N_TOKENS - n_past)
        if n == 0:
            self.roll_far_back()
            return
        self.note(f"decode {n}")
        status, got = self.ctx.try_decode(self.texts[self.text][n_past : n_past + n])
        if status != 0:
            self.fail(f"llama_decode returned {status}: {runner.last_error()}")
        self.check(got, n_past)

    def decode_more(self) -> None:
        self.decode(150)

    def roll_back(self, most: int = 40) -> None:
        n_past = self.ctx.n_past
        p0 = max(0, n_past - self.rng.randint(1, most))
        possible = self.ctx.seq().n_rollback
        self.note(f"remove from {p0}")
        if self.ctx.seq_rm(p0):
            if self.ctx.n_past != p0:
                self.fail(f"{self.ctx.n_past} tokens are left")
            self.branch()
        else:
            if self.ctx.pos_max() + 1 != n_past:
                self.fail("a refused rollback has changed the cache")
            if p0 == 0 or n_past - p0 <= possible or (self.plain and self.logged):
                self.fail(f"a rollback was refused, although {possible} tokens can be removed")

    def roll_far_back(self) -> None:
        self.roll_back(N_TOKENS)

    def clear(self) -> None:
        self.note("clear")
        self.ctx.clear(self.rng.random() < 0.5)
        self.branch()

    def save(self) -> None:
        if self.ctx.n_past == 0:
            return
        whole = self.rng.random() < 0.3
        self.note(f"save {'all' if whole else 'the sequence'}")
        self.states.append((self.ctx.save(whole), whole, self.text, self.ctx.n_past))
        self.states = self.states[-4:]

    def load(self) -> None:
        if not self.states:
            return
        state, whole, text, n_tokens = self.rng.choice(self.states)
        self.note(f"load {n_tokens} tokens of text {text}")
        if not self.ctx.load(state, whole):
            self.fail(f"a state was refused: {runner.last_error()}")
        if self.ctx.n_past != n_tokens:
            self.fail(f"{self.ctx.n_past} tokens were loaded")
        self.text = text
        self.logged = False

    def load_damaged(self) -> None:
        """Load a truncated state, which must change nothing or leave the cache empty."""
        if not self.states:
            return
        state, whole, _, _ = self.rng.choice(self.states)
        n_past = self.ctx.n_past
        end = self.rng.randrange(16, len(state) - 1)
        self.note(f"load {end} bytes of {len(state)}")
        if self.ctx.load(state[:end], whole):
            self.fail("a state that ends too early was taken")
        if self.ctx.n_past not in (0, n_past):
            self.fail(f"{self.ctx.n_past} tokens are left, before there were {n_past}")

    def abort(self) -> None:
        n_past = self.ctx.n_past
        n = min(self.rng.randint(1, 200), N_TOKENS - n_past)
        if n == 0:
            return
        nodes = self.rng.randint(0, 600)
        self.note(f"decode {n}, abort after {nodes} nodes")
        self.ctx.abort_after(nodes)
        try:
            status, got = self.ctx.try_decode(self.texts[self.text][n_past : n_past + n])
        finally:
            self.ctx.abort_after(None)
        if status == 0:
            self.check(got, n_past)
            return
        held = self.ctx.pos_max() + 1
        if held != 0 and (self.hybrid or not n_past <= held < n_past + n):
            self.fail(f"{held} tokens are left, before there were {n_past}")
        self.ctx.n_past = held

    def branch(self) -> None:
        """Switch to any text that begins with the tokens in the cache."""
        if self.ctx.n_past == 0:
            self.logged = self.rewind != "off"
        held = self.texts[self.text][: self.ctx.n_past]
        fitting = [i for i, text in enumerate(self.texts) if text[: len(held)] == held]
        self.text = self.rng.choice(fitting)

    # -- checks --

    def check(self, got: np.ndarray, n_past: int) -> None:
        want = self.want[self.text][n_past : n_past + len(got)]
        error = float(np.abs(got - want).max())
        if not error <= self.limit:
            self.fail(f"logits differ by {error:.3g}, {self.limit:.3g} is accepted")

    def note(self, text: str) -> None:
        self.log.append(f"text {self.text}, {self.ctx.n_past} tokens: {text}")
        self.log = self.log[-30:]

    def fail(self, text: str) -> None:
        raise Finding("\n".join([f"{self.name}: {text}", *self.log]))


def make_override(model: Model, rewind: str) -> Override:
    """Return the Override of a model whose rewind log is "off", in "ram" or on "disk"."""
    mask = arch_runs.mask_of(model.layers())
    return Override(mask, window=64, rewind=rewind, rewind_folder=tempfile.gettempdir())


def is_plain(path: Path) -> bool:
    """Return True if the memory of a model has no part that cannot go back."""
    shape = ModelFile(path).shape
    return shape.recurrent_bytes == 0 and not shape.sliding


def make_texts(path: Path, rng: random.Random) -> list[list[int]]:
    """Return the tokens of texts of a model."""
    first = arch_runs.tokens_of(path)[:1] + [rng.randrange(4, 100) for _ in range(N_TOKENS - 1)]
    texts = [first]
    for n in BRANCHES:
        texts.append(first[:n] + [rng.randrange(4, 100) for _ in range(N_TOKENS - n)])
    return texts


def noise(model: Model, text: list[int], params: dict[str, Any]) -> float:
    """Return the largest difference of logits to accept.

    The order of sums depends on the cells and batches of the tokens. This is also true of
    llama.cpp's own cache, on which the differences are measured.
    """
    with Context(model, OFF, **params) as ctx:
        want = ctx.decode(text)
    worst = 0.0
    for size in (1, 37, 100):
        with Context(model, OFF, **params) as ctx:
            worst = max(worst, float(np.abs(ctx.decode(text, size) - want).max()))
    return max(1e-4, 4 * worst)


def run(n: int, seed: int = 0, archs: Sequence[str] = ARCHS, fuzzer: Any = Fuzzer) -> Counter[str]:
    """Run n operations, distributed evenly over the architectures. Raises Finding.

    Args:
        fuzzer: called with an architecture, the seed, and whether flash attention is on.
    """
    done: Counter[str] = Counter()
    runs = [(arch, flash_attn) for arch in archs for flash_attn in (True, False)]
    for arch, flash_attn in runs:
        with closing(fuzzer(arch, seed, flash_attn)) as machine:
            while sum(machine.done.values()) < n / len(runs):
                machine.step()
            done += machine.done
    return done


def main(description: str, archs: Sequence[str], run: Callable[..., Counter[str]]) -> None:
    """Run the operations that the command line asks for, and print their numbers."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("archs", nargs="*", default=archs)
    arguments = parser.parse_args()
    started = time.monotonic()
    done = run(arguments.operations, arguments.seed, tuple(arguments.archs))
    seconds = time.monotonic() - started
    n = len(arguments.archs)
    print(f"{sum(done.values()):,} operations on {n} architectures in {seconds:.0f} s, none found")
    print(", ".join(f"{name} {count:,}" for name, count in done.most_common()))


if __name__ == "__main__":
    main(__doc__, ARCHS, run)
