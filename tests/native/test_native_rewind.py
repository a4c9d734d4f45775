"""The rewind log: a sequence goes back to any position, as if it had never gone further."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import reference, runner
from tests.support.reference import Razor, cells_of
from tests.support.runner import Context, Override
from tests.support.sequences import N_CTX_SEQ, N_SEQ, TOLERANCE, Sequences, make_texts
from tests.support.tiny_models import TinySpec

N_CTX = 1024
SPEC = TinySpec("llama", 2, 4, 2, 64, seed=41, sharpness=1.0)
MASK = ((0, 1), (0, 0))
PLANS = {
    "window-24": reference.make_razor(MASK, 24),
    "tight": reference.make_razor(MASK, 120),
    "tight, no compensation": reference.make_razor(MASK, 124, compensation=False),
    "block 128, no sinks": reference.make_razor(MASK, 568, sink_tokens=0),
    "several windows": reference.make_scoped(((24, 0), (300, 130)), N_CTX),
    "tight, several windows": reference.make_scoped(((64, 320), (320, 64)), N_CTX, 60),
    "several windows, no compensation": reference.make_scoped(
        ((64, 256), (64, 0)), N_CTX, compensation=False
    ),
    "split layers": reference.make_razor(MASK, 24),
}
CACHES: dict[str, dict[str, Any]] = {
    "f32": {"type_k": "f32", "type_v": "f32", "flash_attn": False},
    "f16": {"type_k": "f16", "type_v": "f16", "flash_attn": False},
    "f16-flash": {"type_k": "f16", "type_v": "f16", "flash_attn": True},
    "q8_0-flash": {"type_k": "q8_0", "type_v": "q8_0", "flash_attn": True},
}


def override(name: str, folder: Path | None = None, limit: int = 0) -> Override:
    """Return the Override of a plan with the log in a folder, or in memory."""
    types = {"type_k_local": "q8_0", "type_v_local": "f16"} if name == "split layers" else {}
    where = {"rewind": "ram"} if folder is None else {"rewind": "disk"}
    return runner.override(
        PLANS[name], rewind_limit=limit, rewind_folder=str(folder or ""), **where, **types
    )


@pytest.fixture(scope="module")
def model(tiny) -> Iterator[runner.Model]:
    with runner.Model(tiny(SPEC)) as loaded:
        yield loaded


def block_bytes(plan: Razor, type_size: int) -> int:
    """Return the bytes of a block of the log, for rows of type_size bytes per number."""
    n_local = sum(not plan.mask[il][kv] for il in range(SPEC.n_layer) for kv in range(SPEC.n_kv))
    rows = plan.block + (1 if plan.compensation else 0)
    return n_local * 2 * SPEC.head_dim * (rows * type_size + (4 if plan.compensation else 0))


class Model:
    """What the cache of one sequence holds, and how far back it can go.

    Attributes:
        n: tokens.
        high: the positions below it were written, also those of removed tokens.
        cheap: whether the last fold of a window can be undone by its compensation token.
        log: the starts of the blocks in the log.
    """

    def __init__(self, plan: Razor, limit: int | None = None) -> None:
        self.plan, self.limit = plan, limit
        self.windows = sorted({w for row in plan.windows or ((plan.window,),) for w in row if w})
        sinks, comp = plan.sink_tokens, plan.compensation
        self.rings = {
            w: cells_of(w, sinks, comp, plan.block) - sinks - 4 * comp for w in self.windows
        }
        positions = range(N_CTX + 1)
        self.frontier = {w: [int(plan.frontier(p, w)) for p in positions] for w in self.windows}
        # the position before which the row of a position is folded
        self.folds_at = {
            w: [next((p for p in positions if self.folded(p, w) > row), -1) for row in positions]
            for w in self.windows
        }
        self.empty()

    def empty(self) -> None:
        sinks = self.plan.sink_tokens
        self.n = self.high = 0
        self.frontiers = dict.fromkeys(self.windows, sinks)
        self.undo: dict[int, int | None] = dict.fromkeys(self.windows)
        self.log: list[int] = []

    def folded(self, p: int, w: int) -> int:
        return self.frontier[w][p]

    def decode(self, n: int) -> None:
        for p in range(self.n, self.n + n):
            before = dict(self.frontiers)
            for w in self.windows:
                if self.folded(p, w) > before[w]:
                    self.undo[w], self.frontiers[w] = before[w], self.folded(p, w)
            if self.frontiers != before:
                self.log.append(p)
                if self.limit is not None:
                    self.log = self.log[max(0, len(self.log) - self.limit) :]
            self.high = max(self.high, p + 1)
        self.n += n

    def to_fold(self) -> int:
        """Return the number of tokens until the next block."""
        return self.plan.block - self.n % self.plan.block

    def in_ring(self, p: int) -> bool:
        """Return True if a rollback to p needs nothing from the log."""
        for w in self.windows:
            to = self.folded(p, w)
            if to < self.frontiers[w]:
                lost = self.high > to + self.rings[w]
                if lost or (self.plan.compensation and self.undo[w] != to):
                    return False
        return True

    def needed(self, p: int) -> tuple[set[int], int]:
        """Return the blocks that a rollback to p needs, and the rows that are in the ring then."""
        block, sinks = self.plan.block, self.plan.sink_tokens
        high = min([self.high] + [self.folded(p, w) + self.rings[w] for w in self.windows])
        blocks = set()
        for w in self.windows:
            to = self.folded(p, w)
            if self.plan.compensation and sinks < to < self.frontiers[w]:
                blocks.add(p // block * block + block)
            lost = min(p, self.high - self.rings[w])  # rows below it are not in the ring now
            blocks.update(self.folds_at[w][max(sinks, high - self.rings[w]) : max(lost, 0)])
        return blocks, high

    def can_go(self, p: int) -> bool:
        return p == 0 or p >= self.n or self.in_ring(p) or self.needed(p)[0] <= set(self.log)

    def go(self, p: int) -> None:
        if p == 0:
            self.empty()
            return
        if p >= self.n:
            return
        if not self.in_ring(p):
            self.high = self.needed(p)[1]
        for w in self.windows:
            if self.folded(p, w) < self.frontiers[w]:
                self.frontiers[w], self.undo[w] = self.folded(p, w), None
        self.log = [start for start in self.log if start <= p]
        self.n = p

    def lowest(self) -> int:
        """Return the smallest position to which, and above which, a rollback is possible."""
        p = self.n
        while p > 0 and self.can_go(p - 1):
            p -= 1
        return p


def check_far(ctx: Context, state: Model) -> None:
    assert ctx.seq().n_rollback == state.n - state.lowest()
    assert ctx.pos_min() == (max(state.lowest(), 1) - 1 if state.n else -1)


@pytest.mark.parametrize("disk", [False, True], ids=["ram", "disk"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", PLANS)
def test_rewinds_to_random_positions(
    name: str, cache: str, disk: bool, model, tmp_path: Path
) -> None:
    """The next 16 tokens are bit-identical to those of a context that never went further."""
    if name == "split layers" and not CACHES[cache]["flash_attn"]:
        pytest.skip("quantized values need flash attention")
    rng = random.Random(f"{name} {cache}")
    params = {"n_ctx": N_CTX, "n_batch": 256, "n_ubatch": 128, **CACHES[cache]}
    with (
        Context(model, override(name, tmp_path if disk else None), **params) as ctx,
        Context(model, runner.override(PLANS[name]) if name != "split layers" else override(name),
                **params) as fresh,
    ):  # fmt: skip
        assert ctx.stats().rewind == (2 if disk else 1) and not list(tmp_path.iterdir())
        state, calls = Model(PLANS[name]), []
        for _ in range(12):
            # 1. decode in calls of different sizes, so that the other context can repeat those that are left
            target = rng.choice([200, 500, 1000])
            while state.n < target:
                n = rng.choice([1, 1, 1, 7, 40, state.to_fold(), 128, 200])
                new = runner.random_tokens(min(n, target - state.n), SPEC.n_vocab, rng.randrange(99))
                ctx.decode(new)
                calls.append(new)
                state.decode(len(new))
            check_far(ctx, state)
            # 2. go back
            ends = np.cumsum([len(new) for new in calls]).tolist()
            i = rng.randrange(len(calls) - 1)
            assert state.can_go(ends[i]) and ctx.seq_rm(ends[i])
            state.go(ends[i])
            del calls[i + 1 :]
            check_far(ctx, state)
            # 3. compare
            fresh.clear()
            for new in calls:
                fresh.decode(new)
            new = runner.random_tokens(min(16, N_CTX - state.n), SPEC.n_vocab, rng.randrange(99))
            np.testing.assert_array_equal(ctx.decode(new, 1), fresh.decode(new, 1))
            calls += [[token] for token in new]
            state.decode(len(new))
