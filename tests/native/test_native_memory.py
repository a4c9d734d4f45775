"""Bytes in backend buffers = the formula of llama-razor.h = razor_local.plan, exactly."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from razor_local.plan import make_plan
from razor_local.profile import Profile, read_model_shape
from tests.support import reference, runner
from tests.support.tiny_models import TinySpec

# 20 KV heads in 5 layers, 3 of them (15 %) retrieval heads
SPEC = TinySpec("llama", 5, 4, 4, 64, n_embd=32, n_ff=32, n_vocab=32, seed=31)
MASK = ((0, 1, 0, 0), (0, 0, 0, 0), (1, 0, 0, 1), (0, 0, 0, 0), (0, 0, 0, 0))

# small compute buffers: the caches are what is looked at
PARAMS = {"n_batch": 16, "n_ubatch": 16}


def row_bytes(kv: str, n: int) -> int:
    block, size = {
        "f32": (1, 4),
        "f16": (1, 2),
        "bf16": (1, 2),
        "q8_0": (32, 34),
        "q5_1": (32, 24),
        "q5_0": (32, 22),
        "q4_1": (32, 20),
        "q4_0": (32, 18),
    }[kv]
    return n // block * size


def layer_bytes(
    n_ctx: int, cells: int, r: int, l_heads: int, kv: tuple[str, str], compensation: bool
) -> tuple[int, int, int]:
    """K, V and accumulator bytes of a layer with r retrieval and l_heads local heads."""
    d = SPEC.head_dim
    rows = r * n_ctx + l_heads * cells
    sums = 3 * l_heads * 2 * d * 4 if compensation else 0
    return rows * row_bytes(kv[0], d), rows * row_bytes(kv[1], d), sums


def full_bytes(n_ctx: int, kv: tuple[str, str]) -> int:
    n_heads = sum(SPEC.kv_heads)
    return n_ctx * n_heads * sum(row_bytes(t, SPEC.head_dim) for t in kv)


def check(
    model: runner.Model,
    n_ctx: int,
    kv: tuple[str, str],
    flash_attn: bool = True,
    mask: tuple[tuple[int, ...], ...] = MASK,
    window: int = 0,
    compensation: bool = True,
    offload_kqv: bool = True,
) -> int:
    """Compare a context's buffers, per layer and in sum, with both formulas. Returns the bytes."""
    override = runner.Override(
        bytes(x for row in mask for x in row), window=window, compensation=compensation
    )
    length = window or reference.window_of(n_ctx, 4000, 5)
    cells = reference.cells_of(length, 4, compensation)
    want = []
    for row in mask:
        r = sum(row)
        want.append(layer_bytes(n_ctx, cells, r, len(row) - r, kv, compensation))

    profile = Profile(
        tuple(np.array(row, np.uint8) for row in mask),
        compensation=compensation,
    )
    shape = read_model_shape(model.path)
    plan = make_plan(shape, profile, n_ctx, *kv, flash_attn, window=window or None)
    assert plan.active

    params = PARAMS | {"n_ctx": n_ctx, "flash_attn": flash_attn, "offload_kqv": offload_kqv}
    with runner.Context(model, override, type_k=kv[0], type_v=kv[1], **params) as ctx:
        stats, buffers = ctx.stats(), ctx.buffers()
        layers = [ctx.layer(il) for il in range(stats.n_layer)]
    assert (stats.active, stats.n_ctx, stats.n_layer, stats.n_stream) == (1, n_ctx, len(mask), 1)
    assert (stats.sink_tokens, stats.window, stats.cells) == (4, length, cells)
    assert (stats.block, stats.compensation) == (reference.block_of(length), compensation)
    assert (stats.type_k, stats.type_v) == tuple(runner.KV_TYPES[t] for t in kv)

    got = [(x.bytes_k, x.bytes_v, x.bytes_sums) for x in layers]
    assert got == want
    assert got == [(x.bytes_k, x.bytes_v, x.bytes_sums) for x in plan.layers]
    assert [(x.n_head_kv, x.n_retrieval, x.n_local) for x in layers] == [
        (len(row), sum(row), len(row) - sum(row)) for row in mask
    ]

    rows = sum(map(sum, mask)) * n_ctx
    assert stats.kv_bytes_retrieval == rows * sum(row_bytes(t, SPEC.head_dim) for t in kv)
    assert stats.kv_bytes_retrieval + stats.kv_bytes_local == stats.kv_bytes
    assert stats.kv_bytes == sum(b.bytes for b in buffers) == sum(map(sum, want)) == plan.kv_bytes
    assert all(b.name.decode() for b in buffers)
    return int(stats.kv_bytes)


@pytest.fixture(scope="module")
def model(tiny):
    with runner.Model(tiny(SPEC)) as loaded:
        yield loaded


@pytest.mark.parametrize("kv", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("n_ctx", [4096, 32768, 131072])
def test_bytes_at_long_contexts(n_ctx: int, kv: str, model) -> None:
    """The plan of the paper; at 4k its window of 4000 saves nothing, so a shorter one there."""
    window = 1000 if n_ctx == 4096 else 0
    got = check(model, n_ctx, (kv, kv), window=window)
    share = got / full_bytes(n_ctx, (kv, kv))
    if n_ctx >= 32768:
        # 15 % retrieval heads, window n/5
        assert share <= 0.34, f"{share:.4f} of the full cache"
    assert share < 0.5


@pytest.mark.parametrize("flash_attn", [True, False], ids=["fa", "nofa"])
@pytest.mark.parametrize(
    "mask",
    [
        MASK,
        ((0, 0, 0, 0),) * 5,
        ((1, 1, 1, 1), (0, 0, 0, 0), (1, 1, 1, 0), (0, 0, 0, 0), (1, 0, 0, 0)),
        ((1, 1, 1, 1),) * 4 + ((0, 1, 1, 1),),
    ],
    ids=["some", "all-local", "uneven", "one-local"],
)
@pytest.mark.parametrize("compensation", [True, False], ids=["comp", "nocomp"])
def test_bytes_of_masks(mask, flash_attn: bool, compensation: bool, model) -> None:
    """Without flash attention upstream pads V to the widest layer, ours does not."""
    kv = ("q8_0", "f16")
    check(model, 2048, kv, flash_attn, mask, window=300, compensation=compensation)


@pytest.mark.parametrize("kv", ["f32", "bf16", "q5_1", "q5_0", "q4_1"])
def test_bytes_of_other_types(kv: str, model) -> None:
    check(model, 2048, (kv, kv), window=500)


@pytest.mark.parametrize("compensation", [True, False], ids=["comp", "nocomp"])
def test_bytes_where_cells_are_rounded_up(compensation: bool, model) -> None:
    """Windows about the one that fills 256 cells exactly, and where the block grows."""
    for window in (118, 120, 121, 122, 124, 125, 511, 512, 1023, 1024):
        check(model, 2048, ("f16", "f16"), window=window, compensation=compensation)


def test_bytes_of_mixed_types_and_no_offload(model) -> None:
    check(model, 2048, ("q8_0", "q4_0"), window=500, offload_kqv=False)


def test_window_that_saves_nothing(model) -> None:
    """At 4k the default window of 4000 covers the context: the full cache, to the byte."""
    override = runner.Override(bytes(x for row in MASK for x in row))
    params = PARAMS | {"n_ctx": 4096, "type_k": "f16", "type_v": "f16", "flash_attn": True}
    with runner.Context(model, override, **params) as ctx:
        stats = ctx.stats()
    profile = Profile(tuple(np.array(row, np.uint8) for row in MASK))
    plan = make_plan(read_model_shape(model.path), profile, 4096)
    assert (stats.active, plan.active) == (0, False)
    assert stats.kv_bytes == plan.kv_bytes == full_bytes(4096, ("f16", "f16"))


def test_full_cache(model) -> None:
    with runner.Context(model, **PARAMS, n_ctx=2048, type_k="q8_0", type_v="f16") as ctx:
        stats = ctx.stats()
        with pytest.raises(ValueError):
            ctx.layer(0)
        assert ctx.buffers() == []
    plan = make_plan(read_model_shape(model.path), None, 2048, "q8_0", "f16", False)
    assert stats.kv_bytes == plan.kv_bytes == full_bytes(2048, ("q8_0", "f16"))


@pytest.mark.parametrize("n_ctx", [1000, 1025, 4000])
def test_context_size_is_padded_alike(n_ctx: int, model) -> None:
    """llama.cpp rounds the context size up; the planner does the same."""
    override = runner.Override(bytes(20), window=64)
    with runner.Context(model, override, **PARAMS, n_ctx=n_ctx, type_k="f16", type_v="f16") as ctx:
        stats = ctx.stats()
    profile = Profile(tuple(np.zeros(4, np.uint8) for _ in MASK))
    plan = make_plan(read_model_shape(model.path), profile, n_ctx, flash_attn=False, window=64)
    assert (stats.n_ctx, stats.kv_bytes) == (plan.n_ctx, plan.kv_bytes)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_agrees(tiny) -> None:
    """What the operating system sees: the process grows by as much less as the plan says."""
    path = str(tiny(SPEC))
    params = PARAMS | {"n_ctx": 65536, "type_k": "f16", "type_v": "f16", "flash_attn": True}
    override = runner.Override(bytes(x for row in MASK for x in row))
    growth = {}
    for name, razor in (("razor", override), ("full", runner.OFF)):
        with runner.Worker(None) as process:
            growth[name] = process(runner.rss_growth, path, razor, params)
    profile = Profile(tuple(np.array(row, np.uint8) for row in MASK))
    plan = make_plan(read_model_shape(Path(path)), profile, 65536)
    saved = plan.kv_bytes_full - plan.kv_bytes
    assert growth["full"] - growth["razor"] == pytest.approx(saved, rel=0.05)


def test_sequence_statistics(model) -> None:
    """Tokens, fold frontier and folded tokens as the reference defines them."""
    razor = reference.make_razor(MASK, 100)
    with runner.Context(model, runner.override(razor), n_ctx=1024) as ctx:
        seq = ctx.seq()
        assert (seq.n_tokens, seq.n_folded, seq.n_rollback) == (0, 0, 0)
        for n in (1, 50, 104, 130, 300, 301, 800):
            ctx.decode([1] * (n - ctx.n_past))
            seq, frontier = ctx.seq(), int(razor.frontier(n - 1))
            assert (seq.n_tokens, seq.frontier, seq.n_folded) == (n, frontier, frontier - 4)
        assert ctx.model.layers() == list(SPEC.kv_heads)
        with pytest.raises(ValueError):
            ctx.seq(1)
        with pytest.raises(ValueError):
            ctx.layer(5)


def test_least_that_is_saved(tiny) -> None:
    """256 cells of one head: both sides run razor for it."""
    path = tiny(TinySpec("llama", 2, 4, 2, 32, n_ctx_train=2048))
    override = runner.Override(bytes((1, 0, 1, 1)), window=557, compensation=False)
    profile = Profile((np.array([1, 0], np.uint8), np.array([1, 1], np.uint8)))
    for flash_attn in (False, True):
        with runner.Model(path) as model:
            with runner.Context(model, override, n_ctx=1024, flash_attn=flash_attn) as ctx:
                stats = ctx.stats()
        plan = make_plan(
            read_model_shape(path),
            profile,
            1024,
            "f32",
            "f32",
            flash_attn,
            window=557,
            compensation=False,
        )
        assert stats.active and plan.active
        assert stats.kv_bytes == plan.kv_bytes < plan.kv_bytes_full
