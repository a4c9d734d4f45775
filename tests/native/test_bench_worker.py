"""The worker of the benchmark: its random cache is a real one in all that costs time, its contexts
are at the depth that was asked for, its memory is the process's.
"""

from __future__ import annotations

import ctypes
import signal

import numpy as np
import pytest

from razor_local.bench import random_cache
from razor_local.bench import worker as bench_worker
from razor_local.bench.batches import Side
from razor_local.bench.random_cache import kept_bytes, random_state
from razor_local.bench.shape_file import write_shape_model
from razor_local.bench.worker import Session, SessionContext, Worker
from razor_local.errors import RazorError
from razor_local.model_file import read_model_shape
from razor_local.model_setup import ModelSetup
from razor_local.plan import make_plan
from razor_local.profile import Profile
from tests.support import runner
from tests.support.bench import KV, MASK, SPEC
from tests.support.small_shapes import SMALL, small_shape


@pytest.mark.parametrize("type_kv", ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_random_cache_has_the_state_of_a_prefill(tiny, type_kv: str) -> None:
    session = Session(ModelSetup(str(tiny(SPEC, KV))))
    side = SessionContext(session, Side("razor", True, type_kv, type_kv, 1024))
    for depth in (1, 4, 5, 64, 300, 1000):
        side.fill(0)
        for _ in range(depth):
            side.append(1)
        size = side.api.llama_state_seq_get_size(side.ctx, 0)
        want = side.native.seq(side.ctx, 0)
        side.fill(depth)
        got = side.native.seq(side.ctx, 0)
        assert (got.n_tokens, got.frontier) == (want.n_tokens, want.frontier)
        assert side.api.llama_state_seq_get_size(side.ctx, 0) == size
        assert side.step() > 0
        assert side.step() > 0  # the first was taken out again
    side.close()


def test_types_of_local_heads(tiny) -> None:
    path = tiny(SPEC, KV)
    session = Session(ModelSetup(str(path)))
    side = SessionContext(session, Side("razor", True, "f16", "q8_0", 1024, "q8_0", "q4_0"))
    for _ in range(300):
        side.append(1)
    size = side.api.llama_state_seq_get_size(side.ctx, 0)
    side.fill(300)
    assert side.api.llama_state_seq_get_size(side.ctx, 0) == size
    assert side.step() > 0
    side.close()
    plan = side.plan
    assert plan.has_local_types
    row, local_row = 64 * 2 + 68, 68 + 36
    assert kept_bytes(plan, 1000) == 3 * 1000 * row + 3 * plan.cells * local_row


def test_full_cache_is_filled_too(tiny) -> None:
    session = Session(ModelSetup(str(tiny(SPEC, KV))))
    side = SessionContext(session, Side("full", False, "f16", "f16", 1024))
    assert not side.native.stats(side.ctx).active
    side.fill(700)
    assert side.api.llama_memory_seq_pos_max(side.memory, 0) == 699
    assert side.step() > 0
    side.close()


@pytest.mark.parametrize("razor", [True, False])
def test_depth_is_what_was_asked_for(tiny, razor: bool) -> None:
    session = Session(ModelSetup(str(tiny(SPEC, KV))))
    side = SessionContext(session, Side("side", razor, "f16", "f16", 1024))

    def depth() -> int:
        return side.api.llama_memory_seq_pos_max(side.memory, 0) + 1

    side.fill(640)
    assert side.append(200) > 0 and depth() == 840
    side.rewind(640)  # over folds: a razor cache is filled again
    assert depth() == 640 == side.depth
    assert len(side.run(5)) == 5 and depth() == 645
    assert len(side.steps(3)) == 3 and depth() == 645 == side.depth
    side.rewind(0)
    assert depth() == 0 and side.step() > 0 and depth() == 0
    side.close()


@pytest.mark.parametrize("razor", [True, False])
def test_random_rows_are_loaded_only_where_they_are_not_there(tiny, razor, monkeypatch) -> None:
    session = Session(ModelSetup(str(tiny(SPEC, KV))))
    side = SessionContext(session, Side("side", razor, "q8_0", "f16", 1024))
    loaded = []
    make = session.random_state
    monkeypatch.setattr(
        session, "random_state", lambda *args: loaded.append(args[1]) or make(*args)
    )

    def state() -> bytes:
        data = (ctypes.c_uint8 * side.api.llama_state_seq_get_size(side.ctx, 0))()
        side.api.llama_state_seq_get_data(side.ctx, data, len(data), 0)
        return bytes(data)

    side.fill(800)
    first = state()
    side.append(1)
    side.step()
    side.fill(800)  # the newest are taken out
    assert loaded == [800] and side.depth == 800 and len(state()) == len(first)
    if not razor:
        assert state() == first
    side.fill(300)  # razor's window has gone on
    assert loaded == ([800, 300] if razor else [800])
    assert side.api.llama_memory_seq_pos_max(side.memory, 0) == 299
    side.rewind(200)
    side.append(150)  # those are no random rows
    side.fill(300)
    assert loaded == ([800, 300, 200, 300] if razor else [800, 300])
    side.fill(800)
    assert loaded[-1] == 800 and state() == first
    side.close()


def test_state_is_kept_beside_a_model_on_a_gpu(tiny, monkeypatch) -> None:
    session = Session(ModelSetup(str(tiny(SPEC, KV)), n_gpu_layers=-1))
    side = SessionContext(session, Side("full", False, "f16", "f16", 1024))
    side.fill(900)
    kept = session._state
    assert kept is not None and kept[1] == 900
    side.fill(0)
    side.fill(900)
    assert session._state[2] is kept[2]
    if session.peak_rss(reset=True) is not None:
        assert session._state is None
    monkeypatch.setattr(bench_worker, "free_memory", lambda: 1000)
    side.fill(0)
    side.fill(900)
    assert session._state is None  # there is no room for it
    side.close()


def test_large_states_are_written_by_threads(tiny, monkeypatch) -> None:
    plan = make_plan(
        read_model_shape(tiny(SPEC, KV)), Profile(MASK, window_min=100, window_divisor=0), 4096
    )
    one = random_state(plan, 4000, bytes(24))
    monkeypatch.setattr(random_cache, "PARALLEL_FROM", 0)
    assert (random_state(plan, 4000, bytes(24), n_threads=3) == one).all()


def test_buffers_are_read_from_the_log_of_a_stock_build() -> None:
    session = Session.__new__(Session)
    session.logged = {}
    for line in (
        b"load_tensors:        CUDA0 model buffer size =  4155.99 MiB\n",
        b"load_tensors:   CPU_Mapped model buffer size =   281.81 MiB\n",
        b"llama_kv_cache:      CUDA0 KV buffer size =  1024.00 MiB\n",
        b"sched_reserve:      CUDA0 compute buffer size =   258.50 MiB\n",
        b"sched_reserve:  CUDA_Host compute buffer size =    24.01 MiB\n",
        b"llama_context:  CUDA_Host  output buffer size =     0.49 MiB\n",
        b"sched_reserve:      CUDA0 compute buffer size =   300.00 MiB\n",
    ):
        session._read_log(2, line, None)
    session.devices, session.native = ["CUDA0"], None
    side = SessionContext.__new__(SessionContext)
    side.session, side.native, side.logged = session, None, session.logged
    assert side.device_bytes() == round(4155.99 * 2**20) + (1024 + 300 << 20)


SCOPES = tuple(np.where(row, 0, (64, 200, 64)[: len(row)]).astype(np.uint32) for row in MASK)


@pytest.mark.parametrize("n_tokens", [50, 150, 300, 1000])
@pytest.mark.parametrize("compensation", [True, False])
def test_states_of_several_windows_can_be_loaded(compensation, n_tokens, tiny) -> None:
    """A state has the size of one that the library saves, and decoding continues after it."""
    path = tiny(SPEC)
    profile = Profile(MASK, scope=SCOPES, compensation=compensation)
    plan = make_plan(read_model_shape(path), profile, 1024)
    assert len(plan.groups) == 2
    override = runner.Override(
        bytes(profile.flat()),
        scope=tuple(np.concatenate(SCOPES).tolist()),
        compensation=compensation,
    )
    params = {"n_ctx": 1024, "type_k": "f16", "type_v": "f16", "flash_attn": True}
    with runner.Model(path) as model, runner.Context(model, override, **params) as ctx:
        ctx.decode([1] * n_tokens)
        saved = ctx.save(False)
        state = random_state(plan, n_tokens, saved)
        assert len(state) == len(saved)
        assert ctx.load(state.tobytes(), False)
        assert ctx.seq().n_tokens == n_tokens
        ctx.decode([1] * 20)


@pytest.mark.parametrize("razor", [True, False])
@pytest.mark.parametrize("arch", SMALL)
def test_caches_of_every_shape_are_filled(tmp_path, arch: str, razor: bool) -> None:
    """A random state is as large as a decoded one, and decoding continues after it."""
    path = write_shape_model(tmp_path / "m.gguf", small_shape(arch), retrieval=0.5)
    session = Session(ModelSetup(str(path), window_min=64, window_divisor=0))
    side = SessionContext(session, Side("any", razor, "f16", "q8_0", 1024))
    assert side.plan.active == razor
    for depth in (30, 500):
        side.fill(depth)
        n_random = len(side._save(0))
        assert side.step() > 0 and side.step() > 0
        assert side.api.llama_memory_seq_pos_max(side.memory, 0) + 1 == side.depth == depth
        side.fill(0)
        side.append(depth)
        assert len(side._save(0)) == n_random
    side.append(20)
    side.close()


def test_kept_bytes_are_the_rows_that_a_token_reads(tiny) -> None:
    shape = read_model_shape(tiny(SPEC, KV))
    plan = make_plan(shape, Profile(MASK, window_min=100, window_divisor=0), 1024)
    row = 2 * 64 * 2  # K and V of one head, f16
    assert kept_bytes(plan, 0) == 0
    assert kept_bytes(plan, 3) == 6 * 3 * row  # nothing folded, no compensation yet
    # 3 retrieval heads keep all, 3 local heads no more than their cells
    assert kept_bytes(plan, 1000) == (3 * 1000 + 3 * plan.cells) * row
    assert kept_bytes(make_plan(shape, None, 1024), 1000) == 6 * 1000 * row
    plan = make_plan(shape, Profile(MASK, scope=SCOPES), 1024)
    cells = sum(group.n_heads * group.cells for group in plan.groups)
    assert kept_bytes(plan, 1000) == (3 * 1000 + cells) * row


def test_process_serves_contexts_and_says_what_is_wrong(tiny) -> None:
    worker = Worker(ModelSetup(str(tiny(SPEC, KV)), window_min=200))
    try:
        found = worker.ask("describe")
        assert found["build"]["version"] and "CPU" in [d["type"] for d in found["devices"]]
        razor = worker.open(Side("razor", True, "q8_0", "q8_0", 1024))
        full = worker.open(Side("full", False, "f16", "f16", 1024))
        assert full.kv_bytes() == 3 * 2 * 64 * 2 * 2 * 1024
        shape, profile = ModelSetup(str(tiny(SPEC, KV)), window_min=200).read()
        assert profile.window_min == 200
        assert razor.kv_bytes() == make_plan(shape, profile, 1024, "q8_0", "q8_0").kv_bytes
        small, large = (worker.ask("read_seconds", n) for n in (1 << 20, 64 << 20))
        assert 0 < small < large
        razor.fill(1000)
        with pytest.raises(RazorError, match="100 tokens could not be decoded"):
            razor.append(100)
    finally:
        worker.close()
    with pytest.raises(RazorError, match="razor does nothing at 256 tokens"):
        worker = Worker(ModelSetup(str(tiny(SPEC, KV))))
        try:
            worker.open(Side("razor", True, "f16", "f16", 256))
        finally:
            worker.close()
    with pytest.raises(RazorError, match="has no razor profile"):
        Worker(ModelSetup(str(tiny(SPEC))))


@pytest.mark.parametrize(
    ("how", "why"),
    [(signal.SIGKILL, "is there enough memory"), (signal.SIGABRT, "see its last message above")],
)
def test_a_worker_that_ends_is_told_from_one_that_answers(tiny, how: int, why: str) -> None:
    worker = Worker(ModelSetup(str(tiny(SPEC, KV))))
    try:
        worker._process.send_signal(how)
        worker._process.wait()
        with pytest.raises(RazorError, match=f"ended with exit code -{int(how)}; {why}"):
            worker.ask("describe")
    finally:
        worker.close()


def test_memory_of_a_worker_grows_with_its_contexts(tiny) -> None:
    worker = Worker(ModelSetup(str(tiny(SPEC, KV))))
    try:
        before = worker.ask("peak_rss", True)
        if before is None:
            pytest.skip("this system does not let the peak start anew")
        full = worker.open(Side("full", False, "f32", "f32", 65536))
        taken = worker.ask("peak_rss") - before
        assert full.kv_bytes() == 192 << 20
        assert (192 << 20) * 0.9 < taken < (192 << 20) * 1.6
        # the model is on the CPU, whatever else there is
        assert (full.device_bytes() or 0) < full.kv_bytes()
    finally:
        worker.close()
