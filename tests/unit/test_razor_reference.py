"""razor_local.verify.reference (numba) against plain float64 numpy (tests/support/reference.py)."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from razor_local.plan import KV_TYPES, fold_block
from razor_local.verify import reference
from tests.support import reference as plain

TOLERANCE = 2e-5  # F32 scores and weights; outputs are of order 1


def layer(
    n: int, n_rows: int, n_kv: int, group: int, d_k: int, d_v: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Queries at random positions, the positions, keys and values: attention far from uniform."""
    rng = np.random.default_rng(seed)
    k = rng.standard_normal((n, n_kv, d_k)) + rng.standard_normal((n_kv, d_k))
    v = rng.standard_normal((n, n_kv, d_v)) + rng.standard_normal((n_kv, d_v))
    positions = rng.permutation(n)[:n_rows]
    q = 2 * rng.standard_normal((len(positions), n_kv * group, d_k))
    return q.astype(np.float32), positions, k.astype(np.float32), v.astype(np.float32)


def expected(q, positions, k, v, retrieval, rule: plain.Razor) -> np.ndarray:
    """The same head by head, position by position, in float64."""
    n, n_kv, d_k = k.shape
    out = np.empty((*q.shape[:2], v.shape[2]))
    for head in range(q.shape[1]):
        kv = head // (q.shape[1] // n_kv)
        full = np.zeros((n, d_k))
        full[positions] = q[:, head]
        keys, values = k[:, kv].astype(float), v[:, kv].astype(float)
        head_out, _ = plain.attend(full, keys, values, None if retrieval[kv] else rule, rule.window)
        out[:, head] = head_out[positions]
    return out


@st.composite
def layers(draw):
    n = draw(st.integers(1, 500))
    n_kv, group = draw(st.sampled_from([(1, 1), (1, 4), (2, 2), (3, 1), (5, 3)]))
    d = draw(st.sampled_from([1, 8, 32, 80]))
    retrieval = draw(st.lists(st.integers(0, 1), min_size=n_kv, max_size=n_kv))
    rule = plain.Razor(
        (tuple(retrieval),),
        window=draw(st.sampled_from([1, 2, 63, 64, 65, 200, 300])),
        block=draw(st.sampled_from([1, 64, 128, 256])),
        sink_tokens=draw(st.sampled_from([0, 1, 4, 64, 130])),
        compensation=draw(st.booleans()),
    )
    data = layer(
        n, draw(st.sampled_from([1, 15, 17, 500])), n_kv, group, d, d, draw(st.integers(0, 99))
    )
    return data, retrieval, rule


@settings(derandomize=True, deadline=None, max_examples=60)
@given(layers())
def test_it_equals_plain_numpy(drawn) -> None:
    (q, positions, k, v), retrieval, rule = drawn
    got = reference.attention(
        q,
        positions,
        k,
        v,
        retrieval,
        window=rule.window,
        block=rule.block,
        sink_tokens=rule.sink_tokens,
        compensation=rule.compensation,
    )
    np.testing.assert_allclose(
        got, expected(q, positions, k, v, retrieval, rule), rtol=0, atol=TOLERANCE
    )


@settings(derandomize=True, deadline=None, max_examples=40)
@given(layers(), st.lists(st.sampled_from([1, 30, 64, 200, 300]), min_size=1, max_size=5))
def test_windows_of_each_head_equal_plain_numpy(drawn, some: list[int]) -> None:
    (q, positions, k, v), retrieval, rule = drawn
    windows = np.resize(some, len(retrieval))
    got = reference.attention(
        q,
        positions,
        k,
        v,
        retrieval,
        window=windows,
        block=rule.block,
        sink_tokens=rule.sink_tokens,
        compensation=rule.compensation,
    )
    group = q.shape[1] // len(retrieval)
    for kv, window in enumerate(windows.tolist()):
        heads = slice(kv * group, (kv + 1) * group)
        want = expected(
            q[:, heads],
            positions,
            k[:, [kv]],
            v[:, [kv]],
            retrieval[kv : kv + 1],
            replace(rule, window=window),
        )
        np.testing.assert_allclose(got[:, heads], want, rtol=0, atol=TOLERANCE)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.integers(1, 300),
    st.lists(st.sampled_from([0, 1, 2, 63, 64, 65, 400]), min_size=2, max_size=2),
)
def test_alibi_slopes_and_windows(n: int, windows: list[int]) -> None:
    q, positions, k, v = layer(n, 200, 2, 2, 16, 16, n)
    slopes = np.array([0.5, 0.25, 0.03, 0.001], np.float32)
    got = reference.attention(
        q, positions, k, v, [w == 0 for w in windows], window=windows, block=64, sink_tokens=0,
        compensation=False, slopes=slopes,
    )  # fmt: skip
    distance, start = positions[:, None] - np.arange(n), positions[:, None] // 64 * 64
    for head in range(4):
        kv = head // 2
        seen = (distance >= 0) & (np.arange(n) >= start - (windows[kv] or n))
        logits = q[:, head].astype(float) @ k[:, kv].T / 4 - slopes[head] * distance
        want = softmax(np.where(seen, logits, -np.inf)) @ v[:, kv]
        np.testing.assert_allclose(got[:, head], want, rtol=0, atol=TOLERANCE)


def test_values_may_be_wider_than_keys_and_the_scale_free() -> None:
    q, positions, k, v = layer(300, 300, 2, 2, 24, 40, 1)
    rule = plain.Razor(((0, 1),), 64, 64)
    got = reference.attention(
        q, positions, k, v, [0, 1], window=64, block=64, sink_tokens=4, compensation=True, scale=0.1
    )
    want = expected(q * (0.1 * 24**0.5), positions, k, v, [0, 1], rule)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


def test_equations_4_and_5_by_hand() -> None:
    """Ten tokens, one sink, a window of 3 in blocks of 2: at position 8, [1, 5) is folded."""
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 10, 1, 4)).astype(np.float32)
    q = rng.standard_normal((1, 1, 4)).astype(np.float32)
    got = reference.attention(
        q, np.array([8]), k, v, [0], window=3, block=2, sink_tokens=1, compensation=True
    )
    keys = np.concatenate([k[:1, 0], k[1:5, 0].mean(axis=0, keepdims=True), k[5:9, 0]])
    values = np.concatenate([v[:1, 0], v[1:5, 0].mean(axis=0, keepdims=True), v[5:9, 0]])
    logits = keys @ q[0, 0] / 2 + np.array([0, np.log(4), 0, 0, 0, 0])
    np.testing.assert_allclose(got[0, 0], softmax(logits) @ values, atol=1e-6)


@pytest.mark.parametrize("window", [1, 63, 64, 255, 256, 511, 512, 1024, 4000, 100000])
def test_the_frontier_is_that_of_the_plain_reference(window: int) -> None:
    block = fold_block(window)
    assert block == plain.block_of(window)
    positions = np.arange(0, 3 * window + 1000, 7)
    want = plain.Razor((), window, block).frontier(positions)
    np.testing.assert_array_equal(reference.frontier(positions, 4, window, block), want)


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_rows_are_rounded_as_their_type_can(kv_type: str) -> None:
    rows = np.random.default_rng(0).standard_normal((50, 3, 64)).astype(np.float32)
    packed = reference.pack_rows(rows, kv_type)
    row_bytes = packed.shape[-1] * packed.dtype.itemsize
    assert row_bytes == 64 // KV_TYPES[kv_type].block * KV_TYPES[kv_type].block_bytes
    back = reference.round_rows(rows, kv_type)
    step = {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 254, "q5_1": 1 / 62, "q4_1": 1 / 30,
            "q5_0": 1 / 31, "q4_0": 1 / 15}[kv_type]  # fmt: skip
    spread = np.abs(rows).max() * 2
    assert np.abs(back - rows).max() <= step * spread
    np.testing.assert_allclose(reference.round_rows(back, kv_type), back, atol=1e-2)


@pytest.mark.parametrize("size", [64, 128])
def test_rotation_is_orthonormal_and_its_own_inverse(size: int) -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 5, 128)).astype(np.float32)
    np.testing.assert_allclose(reference.rotate(reference.rotate(a, size), size), a, atol=1e-5)
    dots = (reference.rotate(a, size) * reference.rotate(b, size)).sum(axis=1)
    np.testing.assert_allclose(dots, (a * b).sum(axis=1), rtol=1e-4, atol=1e-4)


def test_layers_that_do_not_fit_are_refused() -> None:
    q, positions, k, v = layer(20, 5, 2, 2, 8, 8, 0)
    rest = {"window": 4, "block": 64, "sink_tokens": 4, "compensation": True}
    for args in (
        (q[:, :3], positions, k, v, [0, 0]),
        (q[:, :, :4], positions, k, v, [0, 0]),
        (q, positions + 20, k, v, [0, 0]),
        (q, positions[1:], k, v, [0, 0]),
        (q, positions, k, v[:10], [0, 0]),
        (q, positions, k, v, [0]),
    ):
        with pytest.raises(ValueError):
            reference.attention(*args, **rest)


@pytest.mark.slow
def test_32k_tokens_of_a_layer_in_seconds() -> None:
    """1,024 queries of a layer of 1B shape, 32 query and 8 KV heads of 64."""
    q, positions, k, v = layer(32768, 1024, 8, 4, 64, 64, 0)
    rest = {"window": 6553, "block": 256, "sink_tokens": 4, "compensation": True}
    reference.attention(q[:1], positions[:1], k, v, np.ones(8), **rest)  # compiled
    for kind, heads in (("retrieval", np.ones(8)), ("local", np.zeros(8))):
        start = time.monotonic()
        out = reference.attention(q, positions, k, v, heads, **rest)
        seconds = time.monotonic() - start
        print(f"{kind}: {seconds:.1f} s")
        assert np.isfinite(out).all()
        assert seconds < 60
