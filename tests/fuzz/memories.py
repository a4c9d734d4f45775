"""Random operations on the memory of each kind of model, compared with fresh contexts.

    python -m tests.fuzz.memories --operations 100000
    python -m tests.fuzz.memories --operations 100000 tiny     # some models

The texts of a model branch off a common one, so a cache can be rolled back and continue with other
tokens. The logits of every decoded token must equal those of a context that read its text without
interruption.

The context is closed and created again from time to time, with another rewind log: in memory or on
disk, with or without a limit. On Linux the disk is full at times, or the file cannot be read.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from razor_local.model_file import ModelFile
from tests.support import arch_models, arch_runs, runner
from tests.support.runner import OFF, Context, Model, Override
from tests.support.tiny_models import TinySpec, make_model

# a plain model that computes quickly
TINY = TinySpec("llama", 2, 4, 2, 32, n_embd=32, n_ff=32, sharpness=1.0)
ARCHS = (
    "tiny", "llama", "qwen2vl", "qwen3vl", "gemma2", "gemma3", "gemma3n", "gemma4", "gpt-oss",
    "cohere2", "llama4", "falcon-h1", "granitehybrid", "jamba", "lfm2", "nemotron_h", "qwen35",
    "qwen35moe", "qwen3next",
)  # fmt: skip
N_TOKENS = 450
BRANCHES = (70, 150, 290)  # tokens that a text has in common with the first one
PARAMS = {"n_ctx": 1024, "n_ubatch": 128, "swa_full": False, "type_k": "f32", "type_v": "f32"}
# operation -> how often it is drawn
OPERATIONS = {
    "decode": 50, "decode_more": 15, "roll_back": 18, "roll_far_back": 4, "clear": 2, "save": 5,
    "load": 5, "load_damaged": 2, "abort": 5, "decode_on_a_full_disk": 1, "lose_log": 1,
    "restart": 1,
}  # fmt: skip
ROUNDS = 5  # of a run; afterwards the process must not use more than after the first one
MAX_GROWTH = 0.05  # maximum growth of the resident memory
HAS_PROC = Path("/proc/self/fd").is_dir()


class Finding(AssertionError):
    """The result of an operation differs from that of a fresh context."""


@dataclass
class Log:
    """The rewind log of a context.

    Attributes:
        place: "off", "ram" or "disk".
        limit: bytes, 0: unlimited.
        damaged: its file was full or was replaced, so the log may have ended.
    """

    place: str
    limit: int = 0
    damaged: bool = False

    @property
    def complete(self) -> bool:
        """Return True if a sequence can go back to any position."""
        return self.place != "off" and self.limit == 0 and not self.damaged

    def fault(self, ctx: Context) -> str:
        """Return what is wrong with the log of a context, "" if nothing is."""
        stats = ctx.stats()
        if stats.rewind_failure and not self.damaged:
            return f"the log has ended: {stats.rewind_failure.decode()}"
        if stats.rewind_failure and stats.rewind_bytes:
            return f"the log has ended and has {stats.rewind_bytes} bytes"
        if 0 < self.limit < stats.rewind_bytes:
            return f"the log has {stats.rewind_bytes} bytes, its limit is {self.limit}"
        return ""


class Fuzzer:
    """One context of a model, and the logits that it must compute."""

    def __init__(self, arch: str, seed: int, flash_attn: bool) -> None:
        path = path_of(arch)
        self.name = f"{arch}, flash attention {'on' if flash_attn else 'off'}, seed {seed}"
        self.rng = random.Random(f"{arch} {seed} {flash_attn}")
        self.done: Counter[str] = Counter()
        self.steps: list[str] = []
        self.hybrid = ModelFile(path).shape.recurrent_bytes > 0
        self.params = PARAMS | {"flash_attn": flash_attn}
        self.model = Model(path)
        self.texts = make_texts(path, self.rng)
        self.plan = draw_plan(self.rng, self.model)
        self.want = []
        for text in self.texts:
            with Context(self.model, with_log(self.plan, Log("ram")), **self.params) as ctx:
                self.want.append(ctx.decode(text))
                self.log_bytes = ctx.stats().rewind_bytes
        self.limit = noise(self.model, self.texts[0], self.params)
        self.plain = is_plain(path)
        self.open()
        self.states: list[tuple[bytes, bool, int, int]] = []  # bytes, whole, text, tokens

    def open(self) -> None:
        self.log = choose_log(self.rng, self.log_bytes)
        self.ctx = Context(self.model, with_log(self.plan, self.log), **self.params)
        self.text = 0
        self.logged = self.log.complete  # since the cache was empty

    def close(self) -> None:
        self.ctx.close()
        self.model.close()

    # -- operations --

    def step(self) -> None:
        operation = draw_operation(self.rng, OPERATIONS, self.log)
        n = len(self.steps)
        getattr(self, operation)()
        if fault := self.log.fault(self.ctx):
            self.fail(fault)
        self.done[operation] += len(self.steps) > n  # else there was nothing to do
        self.steps = self.steps[-30:]

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
            can = n_past - p0 <= possible or (self.plain and self.logged)
            if p0 == 0 or (can and not self.log.damaged):
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

    def decode_on_a_full_disk(self) -> None:
        if HAS_PROC and self.log.place == "disk" and not self.log.damaged:
            self.log.damaged, self.logged = True, False
            with full_disk(self.rng.choice([0, 1, 5000])):
                self.note("full disk")
                self.decode_more()

    def lose_log(self) -> None:
        if HAS_PROC and self.log.place == "disk" and not self.log.damaged:
            self.log.damaged, self.logged = True, False
            self.note("lose the file of the log")
            lose_log_file()

    def restart(self) -> None:
        self.note("restart")
        self.ctx.close()
        self.open()

    def branch(self) -> None:
        """Switch to any text that begins with the tokens in the cache."""
        if self.ctx.n_past == 0:
            self.logged = self.log.complete
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
        self.steps.append(f"text {self.text}, {self.ctx.n_past} tokens: {text}")

    def fail(self, text: str) -> None:
        raise Finding(
            "\n".join([f"{self.name}: {text}", str(self.plan), str(self.log), *self.steps])
        )


@functools.cache
def path_of(arch: str) -> Path:
    """Return the model of an architecture, or the tiny one."""
    if arch != "tiny":
        return arch_models.path_of(arch)
    return make_model(Path(_folder().name) / "tiny.gguf", TINY)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    """Return a folder that is deleted when the process ends."""
    return tempfile.TemporaryDirectory()


def draw_operation(rng: random.Random, operations: dict[str, int], log: Log) -> str:
    """Draw an operation. A log that is damaged is soon replaced."""
    weights = operations | ({"restart": 20} if log.damaged else {})
    return rng.choices(list(weights), list(weights.values()))[0]


def choose_log(rng: random.Random, size: int) -> Log:
    """Draw a rewind log.

    Args:
        rng: draws it.
        size: bytes of an unlimited log after one text (up to six blocks).
    """
    limit = rng.choice([0, 0, 0, size // 8, size // 6, size // 2, size])
    return rng.choice([Log("off"), Log("ram", limit), Log("disk", limit)])


def draw_plan(rng: random.Random, model: Model) -> Override:
    """Draw what the local heads of a model keep. A window of 120 leaves no spare cells."""
    mask = arch_runs.mask_of(model.layers())
    scope = tuple(0 if head else rng.choice([64, 128, 256]) for head in mask)
    windows: dict[str, Any] = rng.choice([{"window": 64}, {"window": 120}, {"scope": scope}])
    return Override(mask, compensation=rng.random() < 0.8, **windows)


def with_log(plan: Override, log: Log) -> Override:
    return replace(
        plan, rewind=log.place, rewind_limit=log.limit, rewind_folder=tempfile.gettempdir()
    )


@contextmanager
def full_disk(n: int) -> Iterator[None]:
    """Let the file of the log grow by n bytes only. Python ignores SIGXFSZ."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = os.fstat(runner.log_file()).st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def lose_log_file() -> None:
    """Replace the file of the log by one that cannot be read."""
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), runner.log_file(), inheritable=False)


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


def resident_memory() -> int:
    """Return the resident bytes of this process, without what malloc keeps for later (glibc)."""
    gc.collect()
    if HAS_PROC and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return psutil.Process().memory_info().rss


def main(description: str, archs: Sequence[str], run: Callable[..., Counter[str]]) -> None:
    """Run the operations that the command line asks for, and print their numbers."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("archs", nargs="*", default=archs)
    arguments = parser.parse_args()
    started = time.monotonic()
    done: Counter[str] = Counter()
    memory, files = [], []
    for i in range(ROUNDS):
        n = arguments.operations // ROUNDS
        done += run(n, ROUNDS * arguments.seed + i, tuple(arguments.archs))
        memory.append(resident_memory())
        files.append(len(os.listdir("/proc/self/fd")) if HAS_PROC else 0)
    seconds = time.monotonic() - started
    n = len(arguments.archs)
    print(f"{sum(done.values()):,} operations on {n} architectures in {seconds:.0f} s, none found")
    print(", ".join(f"{name} {count:,}" for name, count in done.most_common()))
    print(
        f"{memory[0] / 2**20:.1f} MiB resident after a fifth, {memory[-1] / 2**20:.1f} MiB at the"
        f" end; {files[0]} open files after a fifth, {files[-1]} at the end"
    )
    if left := sorted(Path(tempfile.gettempdir()).glob("razor-rewind-*")):
        raise Finding(f"files are left: {left}")
    limit = inf if "ASAN_OPTIONS" in os.environ else memory[0] * (1 + MAX_GROWTH)
    if memory[-1] > limit or files[-1] > files[0]:  # ASan keeps freed memory
        raise Finding("the process has lost memory or files")


if __name__ == "__main__":
    main(__doc__, ARCHS, run)
