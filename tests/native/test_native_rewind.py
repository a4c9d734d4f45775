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
from tests.support.sequences import N_SEQ, TOLERANCE, Sequences, make_texts
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
    n_local = sum(not x for row in plan.mask for x in row)
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
            # 1. decode in calls of different sizes, which the other context can repeat
            target = rng.choice([200, 500, 1000])
            while state.n < target:
                n = rng.choice([1, 1, 1, 7, 40, state.to_fold(), 128, 200])
                new = runner.random_tokens(
                    min(n, target - state.n), SPEC.n_vocab, rng.randrange(99)
                )
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


def test_bytes_of_the_log(model, tmp_path: Path) -> None:
    """The log grows by a block per fold and shrinks when the sequence goes back."""
    for name, type_size in (("window-24", 4), ("several windows, no compensation", 4)):
        plan = PLANS[name]
        size = block_bytes(plan, type_size)
        for folder in (None, tmp_path):
            with Context(model, override(name, folder), n_ctx=N_CTX) as ctx:
                assert ctx.stats().rewind_bytes == 0
                state = Model(plan)
                for n in (500, 300):
                    ctx.decode(runner.random_tokens(n, SPEC.n_vocab, 1))
                    state.decode(n)
                    assert ctx.stats().rewind_bytes == len(state.log) * size
                assert ctx.seq_rm(300)
                state.go(300)
                if folder is None:  # a file shrinks only when it is empty
                    assert ctx.stats().rewind_bytes == len(state.log) * size
                ctx.clear()
                assert ctx.stats().rewind_bytes == 0


@pytest.mark.parametrize("disk", [False, True], ids=["ram", "disk"])
@pytest.mark.parametrize("name", ["window-24", "tight, several windows", "tight, no compensation"])
def test_a_log_with_a_limit(name: str, disk: bool, model, tmp_path: Path) -> None:
    """The oldest blocks go. What cannot be gone back to is refused, and nothing changes."""
    plan, n_blocks, seed = PLANS[name], 3, 7
    size = block_bytes(plan, 4)
    limit = n_blocks * size + size // 2
    tokens = runner.random_tokens(N_CTX, SPEC.n_vocab, seed)
    with Context(model, override(name, tmp_path if disk else None, limit), n_ctx=N_CTX) as ctx:
        want = ctx.decode(tokens, 32)
        for n in (600, 999, N_CTX):
            ctx.clear()
            state = Model(plan, n_blocks)
            ctx.decode(tokens[:n], 32)
            state.decode(n)
            assert ctx.stats().rewind_bytes == min(n_blocks, len(state.log)) * size <= limit
            assert ctx.stats().rewind_limit == limit
            check_far(ctx, state)
            lowest = state.lowest()
            assert 0 < lowest < n - plan.block
            assert not ctx.seq_rm(lowest - 1) and ctx.pos_max() == n - 1
            assert ctx.seq_rm(lowest)
            state.go(lowest)
            check_far(ctx, state)
            np.testing.assert_allclose(
                ctx.decode(tokens[lowest:], 32), want[lowest:], rtol=0, atol=TOLERANCE
            )


def test_a_limit_below_a_block(model) -> None:
    plan = PLANS["window-24"]
    with Context(model, override("window-24", limit=block_bytes(plan, 4) - 1), n_ctx=N_CTX) as ctx:
        ctx.decode(runner.random_tokens(700, SPEC.n_vocab, 1))
        assert ctx.stats().rewind_bytes == 0
        state = Model(plan, 0)
        state.decode(700)
        check_far(ctx, state)


@pytest.mark.parametrize("limit", [0, 4], ids=["unlimited", "limited"])
def test_rewinds_of_sequences(limit: int, model) -> None:
    """Sequences go back one by one, all together, and as copies that share blocks."""
    name = "window-24"
    size = block_bytes(PLANS[name], 4)
    razor = override(name, limit=limit * size)
    texts = make_texts(model, razor)
    with Sequences(model, razor, texts) as seqs:
        assert seqs.fill([500, 130, 0, 330]) <= TOLERANCE
        n_blocks = seqs.ctx.stats().rewind_bytes // size
        if limit:
            assert n_blocks == limit
        else:
            states = [Model(PLANS[name]) for _ in range(N_SEQ)]
            for s, n in enumerate(seqs.held):
                states[s].decode(n)
            assert n_blocks == sum(len(state.log) for state in states)
            assert [seqs.ctx.seq(s).n_rollback for s in range(N_SEQ)] == seqs.held
        # 1. one
        n, lowest = 500, 500 - seqs.ctx.seq(0).n_rollback
        p = max(lowest, 170)
        assert seqs.ctx.seq_rm(p, seq_id=0)
        assert seqs.lengths() == [p, 130, 0, 330]
        seqs.held[0] = p
        assert seqs.fill([n, 140, 20, 340], seed=1) <= TOLERANCE
        # 2. all, or none
        p = max(seqs.held[s] - seqs.ctx.seq(s).n_rollback for s in range(N_SEQ))
        if limit:
            assert not seqs.ctx.seq_rm(p - 1, seq_id=-1)
            assert seqs.lengths() == seqs.held
        p = max(p, 100)
        assert seqs.ctx.seq_rm(p, seq_id=-1)
        seqs.held = [min(n, p) for n in seqs.held]
        assert seqs.lengths() == seqs.held
        assert seqs.fill([500, 200, 70, 400], seed=2) <= TOLERANCE
        # 3. copies
        before = seqs.ctx.stats().rewind_bytes
        seqs.ctx.seq_rm(-1, -1, seq_id=2)
        seqs.ctx.seq_cp(0, 2)
        assert seqs.ctx.stats().rewind_bytes <= before
        assert seqs.ctx.seq(2).n_rollback == seqs.ctx.seq(0).n_rollback
        seqs.text[2], seqs.held[2] = seqs.text[0], seqs.held[0]
        for s in (2, 0):
            p = max(seqs.held[s] - seqs.ctx.seq(s).n_rollback, 90)
            assert seqs.ctx.seq_rm(p, seq_id=s)
            seqs.held[s] = p
            assert seqs.fill([n + 10 * (i == s) for i, n in enumerate(seqs.held)]) <= TOLERANCE
        assert seqs.fill([510, 300, 510, 500], seed=3) <= TOLERANCE


def test_the_oldest_blocks_of_all_sequences_go(model) -> None:
    name = "window-24"
    razor = override(name, limit=4 * block_bytes(PLANS[name], 4))
    texts = make_texts(model, razor, 2)
    with Sequences(model, razor, texts, n_seq=2) as seqs:
        for order, back in (
            ([0] * 256, (256, 0)),  # 3 blocks of sequence 0
            ([1] * 192, (256 - 64, 192)),  # 2 of sequence 1: one of sequence 0 has gone
            ([1] * 64, (256 - 128, 256)),
        ):
            seqs.decode(order)
            assert tuple(seqs.ctx.seq(s).n_rollback for s in (0, 1)) == back


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "seq"])
def test_a_loaded_state_has_no_log(whole: bool, model) -> None:
    """States are equal with and without a log. After loading, going back is possible as far as
    without one, and to what was decoded since then."""
    plan = PLANS["window-24"]
    tokens = runner.random_tokens(N_CTX, SPEC.n_vocab, 3)
    with (
        Context(model, override("window-24"), n_ctx=N_CTX) as ctx,
        Context(model, runner.override(plan), n_ctx=N_CTX) as other,
    ):
        want = ctx.decode(tokens)
        for one in (ctx, other):
            one.clear()
            one.decode(tokens[:600])
        state = ctx.save(whole)
        assert state == other.save(whole)
        assert ctx.seq().n_rollback == 600
        assert ctx.load(state, whole)
        assert ctx.stats().rewind_bytes == 0
        assert ctx.seq().n_rollback == other.seq().n_rollback < 600
        ctx.decode(tokens[600:900])
        assert ctx.seq().n_rollback == 900 - 576  # of the block that was folded last before
        assert not ctx.seq_rm(575)
        assert ctx.seq_rm(590)
        np.testing.assert_allclose(ctx.decode(tokens[590:]), want[590:], rtol=0, atol=TOLERANCE)


def test_a_rewound_state_continues(model) -> None:
    """A state that is saved after going back is that of a context that never went further."""
    tokens = runner.random_tokens(N_CTX, SPEC.n_vocab, 4)
    for name in PLANS:
        if name == "split layers":
            continue
        with (
            Context(model, override(name), n_ctx=N_CTX) as ctx,
            Context(model, override(name), n_ctx=N_CTX) as other,
        ):
            want = ctx.decode(tokens)
            for p in (700, 640, 300):
                assert ctx.seq_rm(p)
                assert other.load(ctx.save(False), False)
                n_back = other.seq().n_rollback
                got = other.decode(tokens[p:])
                np.testing.assert_allclose(got, want[p:], rtol=0, atol=TOLERANCE)
                # and it goes back no further than is right
                assert other.load(ctx.save(False), False)
                assert other.seq_rm(p - n_back)
                got = other.decode(tokens[p - n_back :])
                np.testing.assert_allclose(got, want[p - n_back :], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["tight", "tight, several windows", "block 128, no sinks"])
def test_an_aborted_fold_is_undone(name: str, model) -> None:
    """... also if the ubatch has overwritten the rows to be folded, at any node of its graph."""
    plan = PLANS[name]
    tokens = runner.random_tokens(N_CTX, SPEC.n_vocab, 5)
    n = N_CTX - 2 * plan.block
    with Context(model, override(name), n_ctx=N_CTX) as ctx:
        want = ctx.decode(tokens)
        aborted = 0
        for n_nodes in range(1, 400, 13):
            assert ctx.seq_rm(n)
            ctx.abort_after(n_nodes)
            status, _ = ctx.try_decode(tokens[n : n + plan.block])
            ctx.abort_after(None)
            if status == 0:
                break
            aborted += 1
            assert ctx.pos_max() == n - 1 and ctx.seq().n_rollback == n
            ctx.n_past = n
            if aborted % 2:  # else once more
                np.testing.assert_allclose(ctx.decode(tokens[n:]), want[n:], rtol=0, atol=TOLERANCE)
                assert ctx.seq_rm(100)
                ctx.decode(tokens[100:n])
        assert aborted > (3 if runner.GPU_LAYERS == 0 else 0)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_a_log_that_cannot_be_read(model, tmp_path: Path) -> None:
    """seq_rm() is false and nothing has changed."""
    tokens = runner.random_tokens(N_CTX, SPEC.n_vocab, 6)
    with Context(model, override("window-24", tmp_path), n_ctx=N_CTX) as ctx:
        want = ctx.decode(tokens)
        ctx.clear()
        ctx.decode(tokens[:900])
        size = os.fstat(runner.log_file()).st_size
        assert ctx.stats().rewind_bytes == size > 0
        os.ftruncate(runner.log_file(), size // 2)
        assert ctx.seq_rm(880) and ctx.seq_rm(850)  # with what is left of it
        ctx.decode(tokens[850:900])
        os.ftruncate(runner.log_file(), 0)
        assert ctx.seq().n_rollback == 900
        assert not ctx.seq_rm(300)
        assert (ctx.seq().n_tokens, ctx.pos_max()) == (900, 899)
        stats = ctx.stats()
        assert stats.rewind_failure == b"Input/output error" and stats.rewind_bytes == 0
        assert ctx.pos_min() == 900 - ctx.seq().n_rollback - 1 > 0
        np.testing.assert_allclose(ctx.decode(tokens[900:]), want[900:], rtol=0, atol=TOLERANCE)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("damage", ["overwritten", "a hole", "closed"])
def test_a_log_with_other_bytes(damage: str, model, tmp_path: Path) -> None:
    """... or in another file: seq_rm() is false and nothing has changed."""
    tokens = runner.random_tokens(N_CTX, SPEC.n_vocab, 6)
    with Context(model, override("window-24", tmp_path), n_ctx=N_CTX) as ctx:
        want = ctx.decode(tokens)
        assert ctx.seq_rm(900)
        fd = runner.log_file()
        size = os.fstat(fd).st_size
        if damage == "overwritten":
            for offset in range(0, size, 1000):
                os.pwrite(fd, b"x", offset)
        elif damage == "a hole":  # as left by pages that the system could not write
            os.ftruncate(fd, 0)
            os.ftruncate(fd, size)
        else:
            with open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), fd)
        assert not ctx.seq_rm(300)
        assert (ctx.seq().n_tokens, ctx.pos_max()) == (900, 899)
        stats = ctx.stats()
        why = b"Bad file descriptor" if damage == "closed" else b"Input/output error"
        assert stats.rewind_failure == why and stats.rewind_bytes == 0
        np.testing.assert_allclose(ctx.decode(tokens[900:]), want[900:], rtol=0, atol=TOLERANCE)


@pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir() or runner.GPU_LAYERS > 0, reason="needs /proc and fork"
)
def test_a_forked_process_leaves_the_log_alone(model, tmp_path: Path) -> None:
    """It shares the file. Its copy of the log ends when it is read."""
    tokens = runner.random_tokens(N_CTX, SPEC.n_vocab, 6)
    with Context(model, override("window-24", tmp_path), n_ctx=N_CTX) as ctx:
        want = ctx.decode(tokens)
        assert ctx.seq_rm(900)

        def go_back() -> None:
            assert not ctx.seq_rm(300)
            assert ctx.stats().rewind_failure == b"Operation not permitted"

        for operation in (ctx.clear, ctx.close, go_back):
            child = os.fork()
            if child == 0:
                try:
                    operation()
                    os._exit(0)
                finally:
                    os._exit(1)
            assert os.waitpid(child, 0)[1] == 0
        # a file that was truncated would have a hole in front of this block
        np.testing.assert_allclose(ctx.decode(tokens[900:]), want[900:], rtol=0, atol=TOLERANCE)
        assert ctx.seq_rm(300)
        np.testing.assert_allclose(ctx.decode(tokens[300:]), want[300:], rtol=0, atol=TOLERANCE)


def test_a_full_disk(model, disk: Path) -> None:
    """The log ends and gives its space back. The sequence continues."""
    tokens = runner.random_tokens(N_CTX, SPEC.n_vocab, 6)
    with Context(model, override("window-24", disk), n_ctx=N_CTX) as ctx:
        want = ctx.decode(tokens[:300])
        assert ctx.seq().n_rollback == 300 and ctx.stats().rewind_failure == b""
        (disk / "ballast").write_bytes(bytes(1 << 19))
        want = np.concatenate([want, ctx.decode(tokens[300:])])
        stats = ctx.stats()
        assert (stats.rewind_failure, stats.rewind_bytes) == (b"No space left on device", 0)
        (disk / "ballast").unlink()
        assert os.statvfs(disk).f_bavail == os.statvfs(disk).f_blocks
        state = Model(PLANS["window-24"], 0)
        state.decode(N_CTX)
        check_far(ctx, state)
        with Context(model, runner.override(PLANS["window-24"]), n_ctx=N_CTX) as fresh:
            expected = np.concatenate([fresh.decode(tokens[:300]), fresh.decode(tokens[300:])])
            np.testing.assert_array_equal(want, expected)


def test_refused_parameters_of_the_log(model, tmp_path: Path) -> None:
    for folder, why in ((tmp_path / "none", "No such file or directory"), (None, "NULL")):
        razor = runner.override(
            PLANS["window-24"], rewind="disk", rewind_folder=str(folder) if folder else ""
        )
        with pytest.raises(runner.LoadError, match=why) as error:
            Context(model, razor, n_ctx=N_CTX)
        assert "\n" not in str(error.value)
        if folder:
            assert str(error.value).startswith(f"the rewind log cannot be created in {folder} (")
    params = runner.raw_params(override("window-24"))
    params.rewind = 3
    assert not runner.razor_api().llama_razor_set_override(params)
    assert runner.last_error() == "rewind is 3, expected 0 to 2"
