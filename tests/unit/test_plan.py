"""The plan's arithmetic: hand-computed numbers, then properties that hold for every plan."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from razor_local.errors import ProfileError, UnsupportedError
from razor_local.model_shape import ModelShape
from razor_local.plan import (
    KV_TYPES,
    MAX_WINDOWS,
    SLACK,
    fold_block,
    make_plan,
    merge_windows,
    row_size,
)
from razor_local.profile import Profile


def shape(n_head_kv: tuple[int, ...], d_k: int = 128, d_v: int = 128, n_ctx_train: int = 8192):
    n_head = tuple(4 * n for n in n_head_kv)
    return ModelShape("llama", len(n_head_kv), n_head, n_head_kv, d_k, d_v, n_ctx_train)


def profile(rows: list[list[int]], **options) -> Profile:
    return Profile(tuple(np.array(row, np.uint8) for row in rows), **options)


def with_counts(n_head_kv: tuple[int, ...], counts: list[int], **options) -> Profile:
    return profile(
        [[1] * r + [0] * (n - r) for n, r in zip(n_head_kv, counts, strict=True)], **options
    )


def test_row_sizes():
    sizes = {
        "f32": 512,
        "f16": 256,
        "bf16": 256,
        "q8_0": 136,
        "q5_1": 96,
        "q5_0": 88,
        "q4_1": 80,
        "q4_0": 72,
    }
    assert {name: row_size(name, 128) for name in KV_TYPES} == sizes


def test_types_are_those_of_ggml():
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    for name, info in KV_TYPES.items():
        kind = GGMLQuantizationType[name.upper()]
        assert info.ggml_id == int(kind)
        assert (info.block, info.block_bytes) == GGML_QUANT_SIZES[kind]


@pytest.mark.parametrize(
    ("window", "block"),
    [(1, 64), (256, 64), (511, 64), (512, 128), (1023, 128), (1024, 256), (2047, 256),
     (2048, 512), (2**30, 512)],
)  # fmt: skip
def test_fold_block(window, block):
    assert fold_block(window) == block


def test_32k_by_hand():
    """Llama 3.1 8B: 32 layers x 8 KV heads of 128, 38 retrieval heads, n_ctx 32,768, f16.

    L = max(4000, 32768/5) = 6553; B = 512; 4 + 4 + 6553 + 512 + 64 = 7137 -> 7168 cells.
    Rows of 256 bytes. 38*32768 + 218*7168 = 2,807,808 rows for K and for V.
    Sums: 3 * 218 * 256 * 4 bytes. Full: 256 * 32768 rows, twice.
    """
    heads = (8,) * 32
    counts = [2, 2, 2, 2, 2, 2] + [1] * 26
    plan = make_plan(shape(heads), with_counts(heads, counts), 32768)
    assert plan.active and plan.why_inactive is None
    assert (plan.window, plan.block, plan.cells) == (6553, 512, 7168)
    assert (plan.kv_heads, plan.retrieval_kv_heads) == (256, 38)
    assert 38 * 32768 + 218 * 7168 == 2_807_808
    assert plan.kv_bytes == 2 * 2_807_808 * 256 + 3 * 218 * 256 * 4 == 1_438_267_392
    assert plan.kv_bytes_full == 2 * 256 * 32768 * 256 == 4_294_967_296
    assert plan.share == pytest.approx(0.3349, abs=1e-4)


def test_small_context_by_hand():
    """4 layers x 4 KV heads of 32, heads (1,0) (1,1) (1,2), window max(256, 2048/8), q8_0 K.

    4 + 4 + 256 + 64 + 64 = 392 -> 512 cells. K rows 34 bytes, V rows 64 bytes.
    """
    rows = [[0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    small = profile(rows, window_min=256, window_divisor=8)
    plan = make_plan(shape((4,) * 4, 32, 32), small, 2048, "q8_0", "f16")
    local, mixed = plan.layers[0], plan.layers[1]
    assert plan.cells == 512
    assert (local.n_retrieval, local.n_local) == (0, 4)
    assert (local.bytes_k, local.bytes_v) == (4 * 512 * 34, 4 * 512 * 64)
    assert local.bytes_sums == 3 * 4 * 64 * 4
    assert (mixed.n_retrieval, mixed.n_local) == (3, 1)
    assert mixed.bytes_k == (3 * 2048 + 512) * 34
    assert mixed.bytes_v == (3 * 2048 + 512) * 64
    assert plan.kv_bytes == sum(layer.kv_bytes for layer in plan.layers)


def test_without_flash_attention_v_of_a_full_cache_is_as_wide_as_the_widest_layer():
    heads = (4, 4, 2)
    p = with_counts(heads, [3, 1, 0], window_min=64, window_divisor=0)
    plan = make_plan(shape(heads, 64, 32), p, 4096, flash_attn=False)
    cells = plan.cells
    assert [layer.bytes_v for layer in plan.layers] == [
        (3 * 4096 + 1 * cells) * 64,
        (1 * 4096 + 3 * cells) * 64,
        (0 * 4096 + 2 * cells) * 64,
    ]
    assert [layer.bytes_k for layer in plan.layers] == [
        (3 * 4096 + 1 * cells) * 128,
        (1 * 4096 + 3 * cells) * 128,
        (0 * 4096 + 2 * cells) * 128,
    ]
    assert plan.kv_bytes_full == 4096 * (10 * 128 + 12 * 64)


def test_different_key_and_value_sizes():
    p = with_counts((2,), [1], window_min=64, window_divisor=0, compensation=False)
    plan = make_plan(shape((2,), 192, 128), p, 1024)
    assert plan.cells == 256  # 4 + 0 + 64 + 64 + 64
    assert plan.layers[0].bytes_k == (1024 + 256) * 384
    assert plan.layers[0].bytes_v == (1024 + 256) * 256
    assert plan.layers[0].bytes_sums == 0


def test_compensation_takes_cells():
    p = with_counts((2,), [1], window_min=124, window_divisor=0)
    cells = {c: make_plan(shape((2,)), p, 1024, compensation=c).cells for c in (True, False)}
    assert 4 + 124 + 64 + SLACK == 256
    assert cells == {True: 512, False: 256}


def test_n_ctx_is_rounded_up_and_zero_is_the_trained_length():
    heads = (2,)
    p = with_counts(heads, [1], window_min=64)
    assert make_plan(shape(heads), p, 1000).n_ctx == 1024
    assert make_plan(shape(heads), p, 1024).n_ctx == 1024
    assert make_plan(shape(heads), p, 0).n_ctx == 8192
    for bad in (-1, 2**31):
        with pytest.raises(UnsupportedError, match=f"the context size is {bad}"):
            make_plan(shape(heads), p, bad)


def test_inactive_plans_say_why():
    heads = (2, 2)
    full = make_plan(shape(heads), None, 4096)
    assert not full.active and full.why_inactive == "no profile"
    assert full.kv_bytes == full.kv_bytes_full == 4096 * 4 * 512
    assert full.retrieval_kv_heads == full.kv_heads == 4
    all_retrieval = make_plan(shape(heads), with_counts(heads, [2, 2]), 32768)
    assert all_retrieval.why_inactive == "every KV head is a retrieval head"
    short = make_plan(shape(heads), with_counts(heads, [1, 1]), 4352)
    assert short.why_inactive == "RazorAttention saves nothing up to 4,608 tokens of context"
    assert short.kv_bytes == short.kv_bytes_full
    assert make_plan(shape(heads), with_counts(heads, [1, 1]), 4864).active


def test_options_override_the_profile():
    heads = (2,)
    p = with_counts(heads, [1])
    plan = make_plan(shape(heads), p, 32768, window=100, sink_tokens=0, compensation=False)
    assert (plan.window, plan.block, plan.sink_tokens, plan.compensation) == (100, 64, 0, False)
    assert plan.cells == 256
    assert make_plan(shape(heads), p, 32768).window == 6553
    with pytest.raises(ProfileError, match="sink_tokens is 5000, expected 0 to 4096"):
        make_plan(shape(heads), p, 32768, sink_tokens=5000)
    with pytest.raises(ProfileError, match="window is -1, expected 1 to"):
        make_plan(shape(heads), p, 32768, window=-1)


def test_refused_combinations():
    heads = (2,)
    with pytest.raises(UnsupportedError, match="'q3_k' is not a KV cache type"):
        make_plan(shape(heads), None, 4096, "q3_k")
    with pytest.raises(UnsupportedError, match="V cache .q4_0. needs flash attention"):
        make_plan(shape(heads), None, 4096, "f16", "q4_0", flash_attn=False)
    make_plan(shape(heads), None, 4096, "q4_0", "f16", flash_attn=False)
    with pytest.raises(UnsupportedError, match="multiple of 32, this model has 80"):
        make_plan(shape(heads, 80, 80), None, 4096, "q8_0")
    assert make_plan(shape(heads, 80, 80), None, 4096).kv_bytes_full_f16 == 4096 * 2 * 320
    with pytest.raises(ProfileError, match="2 layers x 3 KV heads, the model has 1 layers x 2 KV"):
        make_plan(shape(heads), with_counts((3, 3), [1, 1]), 4096)


def test_to_dict_is_json_and_complete():
    heads = (2, 4)
    plan = make_plan(shape(heads), with_counts(heads, [1, 1]), 32768, "q8_0", "q4_0")
    data = json.loads(json.dumps(plan.to_dict()))
    assert {
        "kv_bytes", "kv_bytes_full", "kv_heads", "retrieval_kv_heads", "sink_tokens", "window",
        "n_ctx", "type_k", "type_v", "layers",
    } <= set(data)  # fmt: skip
    assert data["kv_bytes"] == plan.kv_bytes and data["type_v"] == "q4_0"
    assert sum(x["bytes_k"] + x["bytes_v"] + x["bytes_sums"] for x in data["layers"]) == (
        plan.kv_bytes
    )


# -- scopes


def scoped(rows: list[list[int]], **options) -> Profile:
    return profile(
        [[int(x == 0) for x in row] for row in rows],
        scope=tuple(np.array(row, np.uint32) for row in rows),
        **options,
    )


def test_scopes_are_rounded_up_to_the_block_of_their_mean():
    # (1000 + 300 + 600 + 20)/4 = 480: blocks of 64
    plan = make_plan(shape((4, 2)), scoped([[0, 1000, 300, 0], [600, 20]]), 4096)
    assert (plan.active, plan.block, plan.sink_tokens) == (True, 64, 4)
    assert [layer.windows for layer in plan.layers] == [(0, 1024, 320, 0), (640, 64)]
    assert [(g.window, g.cells, g.n_heads) for g in plan.groups] == [
        (1024, 1280, 1), (640, 1024, 1), (320, 512, 1), (64, 256, 1)
    ]  # fmt: skip
    assert (plan.window, plan.cells, plan.windows_text) == (1024, 1280, "64 to 1,024")
    assert plan.retrieval_kv_heads == 2
    rows = 2 * 4096 + 1280 + 512 + 1024 + 256
    assert plan.kv_bytes == rows * 2 * 256 + 3 * 4 * 256 * 4


def test_heads_that_would_save_nothing_keep_everything():
    # a scope of the whole context does not count for the block, one below it does
    plan = make_plan(shape((4,)), scoped([[4096, 100, 3900, 0]]), 4096)
    assert plan.layers[0].windows == (0, 256, 0, 0) and plan.block == 256
    for scopes in ([[4096, 5000, 0, 0]], [[3900, 3900, 0, 3900]]):
        plan = make_plan(shape((4,)), scoped(scopes), 4096)
        assert not plan.active and plan.kv_bytes == plan.kv_bytes_full
    assert plan.why_inactive == "RazorAttention saves nothing up to 4,864 tokens of context"
    plan = make_plan(shape((4,)), scoped([[4096, 5000, 0, 0]]), 4096)
    assert plan.why_inactive == "no scope is below 4,096 tokens"
    plan = make_plan(shape((4,)), scoped([[0, 0, 0, 0]]), 4096)
    assert plan.why_inactive == "every KV head is a retrieval head"


def test_a_window_replaces_the_scopes():
    p = scoped([[0, 100, 300, 800]])
    plan = make_plan(shape((4,)), p, 4096, window=500)
    assert plan.layers[0].windows == (0, 500, 500, 500) and len(plan.groups) == 1


def test_windows_are_merged_where_that_adds_the_fewest_tokens():
    assert merge_windows([1, 2, 3, 4]) == {1: 1, 2: 2, 3: 3, 4: 4}
    # 100 -> 200: 3 * 100 tokens; 200 -> 450: 250; 450 -> 600: 150; 600 -> 800: 200
    heads = [100] * 3 + [200, 450, 600, 800]
    assert merge_windows(heads) == {100: 100, 200: 200, 450: 600, 600: 600, 800: 800}
    # of equal costs the smallest window; a window may be replaced twice
    assert merge_windows([1, 2, 3, 20, 40, 80]) == {1: 3, 2: 3, 3: 3, 20: 20, 40: 40, 80: 80}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(range(64, 5000, 64)), min_size=1, max_size=40))
def test_merged_windows_are_few_and_not_smaller(windows):
    larger = merge_windows(windows)
    assert set(larger) == set(windows) and len(set(larger.values())) <= MAX_WINDOWS
    assert all(larger[w] >= w and larger[w] in windows for w in windows)
    ordered = sorted(set(windows))
    assert [larger[w] for w in ordered] == sorted(larger[w] for w in ordered)
    if len(ordered) <= MAX_WINDOWS:
        assert all(larger[w] == w for w in windows)


# -- properties

LAYERS = st.lists(
    st.integers(1, 16).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))),
    min_size=1,
    max_size=6,
)
TYPES = st.sampled_from(sorted(KV_TYPES))
DIMS = st.sampled_from([32, 64, 96, 128, 256])


@settings(max_examples=200, deadline=None)
@given(
    layers=LAYERS,
    d_k=DIMS,
    d_v=DIMS,
    n_ctx=st.integers(1, 200_000),
    type_k=TYPES,
    type_v=TYPES,
    local_k=st.none() | TYPES,
    local_v=st.none() | TYPES,
    flash=st.booleans(),
    sinks=st.integers(0, 4096),
    window_min=st.integers(1, 2**20),
    divisor=st.integers(0, 64),
    compensation=st.booleans(),
)
def test_every_plan(
    layers, d_k, d_v, n_ctx, type_k, type_v, local_k, local_v, flash, sinks, window_min, divisor,
    compensation,
):  # fmt: skip
    assume(flash or all(KV_TYPES[name].block == 1 for name in (type_v, local_v or type_v)))
    heads, counts = tuple(n for n, _ in layers), [r for _, r in layers]
    p = with_counts(
        heads,
        counts,
        sink_tokens=sinks,
        window_min=window_min,
        window_divisor=divisor,
        compensation=compensation,
    )
    local = {"type_k_local": local_k, "type_v_local": local_v}
    plan = make_plan(shape(heads, d_k, d_v), p, n_ctx, type_k, type_v, flash, **local)
    assert plan.n_ctx % 256 == 0 and 0 <= plan.n_ctx - n_ctx < 256
    assert plan.kv_heads == sum(heads)

    # what a local head needs, from the meaning of the words rather than from the code
    length = max(window_min, plan.n_ctx // divisor if divisor else 0)
    need = sinks + (4 if compensation else 0) + length + fold_block(length) + SLACK
    cells = next(n for n in range(need, need + 256) if n % 256 == 0)
    assert plan.active == (cells < plan.n_ctx and sum(counts) < sum(heads))
    if not plan.active:
        assert plan.kv_bytes == plan.kv_bytes_full and plan.why_inactive
        assert ("have no effect" in plan.why_inactive) == bool(local_k or local_v)
        assert not plan.has_local_types
        return
    assert plan.cells == cells and plan.window == length
    assert plan.retrieval_kv_heads == sum(counts)
    sums = sum(layer.bytes_sums for layer in plan.layers)
    row = row_size(type_k, d_k) + row_size(type_v, d_v)
    local_row = row_size(local_k or type_k, d_k) + row_size(local_v or type_v, d_v)
    n_local = sum(heads) - sum(counts)
    assert plan.kv_bytes - sums == sum(counts) * plan.n_ctx * row + n_local * cells * local_row
    if local_row <= row:
        assert plan.kv_bytes < plan.kv_bytes_full  # what a context does without asking


def test_types_of_local_heads():
    heads = (4, 2)
    p = with_counts(heads, [1, 1], window_min=512, window_divisor=0)
    plan = make_plan(shape(heads), p, 4096, "f16", "q8_0", type_k_local="q8_0")
    assert (plan.type_k_local, plan.type_v_local) == ("q8_0", "q8_0")
    assert plan.types_text == "keys f16, values q8_0; local heads q8_0"
    assert plan.kv_bytes_full == make_plan(shape(heads), None, 4096, "f16", "q8_0").kv_bytes
    assert plan.to_dict()["type_k_local"] == "q8_0"
    same = make_plan(shape(heads), p, 4096, type_k_local="f16", type_v_local="f16")
    assert same == make_plan(shape(heads), p, 4096) and same.types_text == "f16"
    with pytest.raises(UnsupportedError, match=r"V cache of local heads \(q4_0\) needs flash"):
        make_plan(shape(heads), p, 4096, flash_attn=False, type_v_local="q4_0")
    with pytest.raises(UnsupportedError, match="'q3_k' is not a KV cache type"):
        make_plan(shape(heads), p, 4096, type_k_local="q3_k")
    with pytest.raises(UnsupportedError, match="a q8_0 KV cache needs a head size"):
        make_plan(shape(heads, 80, 80), p, 4096, type_k_local="q8_0")
    short = make_plan(shape(heads), p, 768, flash_attn=False, type_v_local="q4_0")
    assert short.why_inactive == (
        "RazorAttention saves nothing up to 768 tokens of context (the KV types of local heads"
        " have no effect)"
    )


@settings(max_examples=100, deadline=None)
@given(layers=LAYERS, n_ctx=st.integers(1, 100_000), more=st.integers(0, 100_000), type_=TYPES)
def test_bytes_grow_with_context_and_heads(layers, n_ctx, more, type_):
    heads, counts = tuple(n for n, _ in layers), [r for _, r in layers]
    p = with_counts(heads, counts, window_min=512, window_divisor=5)

    def bytes_at(n: int, profile_: Profile | None = p) -> int:
        return make_plan(shape(heads), profile_, n, type_, type_).kv_bytes

    assert bytes_at(n_ctx) <= bytes_at(n_ctx + more)
    il = next((i for i, (n, r) in enumerate(layers) if r < n), None)
    if il is not None:
        counts[il] += 1
        assert bytes_at(n_ctx) <= bytes_at(n_ctx, with_counts(heads, counts, window_min=512)) + (
            3 * 16 * 6 * 256 * 4  # a head less to keep sums for
        )


@pytest.mark.parametrize("type_", sorted(KV_TYPES))
def test_share_at_32k_with_15_percent_heads(type_):
    """What the tools promise at 32k; the sums weigh more where rows are small."""
    heads = (8,) * 32
    counts = [2] * 6 + [1] * 26  # 38 of 256: 14.8 %
    plan = make_plan(shape(heads), with_counts(heads, counts), 32768, type_, type_)
    assert plan.share <= 0.34


def test_shares_of_the_design_table():
    heads = (20,)
    p = with_counts(heads, [3])  # 15 %
    shares = {n: make_plan(shape(heads), p, n).share for n in (8192, 16384, 24576, 131072)}
    assert shares[8192] == pytest.approx(0.63, abs=0.01)  # a block has 512 tokens
    assert shares[16384] == pytest.approx(0.39, abs=0.01)
    assert shares[24576] == pytest.approx(0.33, abs=0.02)
    assert shares[131072] == pytest.approx(0.32, abs=0.01)
