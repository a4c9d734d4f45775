"""Compute RazorAttention as the paper defines it (arXiv 2407.15891), to check the native cache.

It computes one layer at a time from the definitions, without ubatches, ring or accumulators, and
shares nothing with the C++ code. For a query q at position p and the keys and values k_j, v_j of
its KV head (query head h reads KV head h // (n_head / n_head_kv)):

    retrieval head  attends to all j in [0, p]
    local head      attends to the sinks j in [0, S), to its window j in [F, p], and to one
                    compensation token, which represents the folded positions [S, F):
                        k^ = 1/N_d sum k_j,  v^ = 1/N_d sum v_j,  N_d = F - S          (eq. 4)
                    whose weight is N_d exp(q.k^ / sqrt(d)), so + log N_d on its logit (eq. 5)
    soft cap        with a cap c, q.k becomes c tanh(q.k / c) before anything is added to it
    sink logits     gpt-oss: one more logit per query head, learned, whose value is 0
    ALiBi           - m_h (p - j) on the logit, m_h the slope of the query head; there is no
                    compensation token

The fold frontier F moves in blocks of B tokens (docs/architecture.md): with a window of L tokens,
which may differ from head to head, F = max(S, B floor(p / B) - L). round_rows() rounds rows to the
type of the cache.

Scores and weights are F32, and sums over tokens are F64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

ROW_CHUNK = 16  # queries (positions) that share a tile of keys
TILE = 64  # keys

Rounding = Callable[[np.ndarray], np.ndarray]


def frontier(
    positions: np.ndarray, sink_tokens: int, window: int | np.ndarray, block: int
) -> np.ndarray:
    """Return F for each position, int64: [sink_tokens, F) is folded for a query there."""
    start = np.asarray(positions, np.int64) // block * block
    return np.maximum(sink_tokens, start - window)


def attention(
    q: np.ndarray,
    positions: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    retrieval: np.ndarray,
    *,
    window: int | Sequence[int] | np.ndarray,
    block: int,
    sink_tokens: int,
    compensation: bool,
    scale: float | None = None,
    slopes: np.ndarray | None = None,
    cap: float = 0.0,
    sinks: np.ndarray | None = None,
    round_k: Rounding | None = None,
    round_v: Rounding | None = None,
) -> np.ndarray:
    """Compute the attention output of one layer, before the output projection.

    Args:
        q: f32 [n_rows, n_head, d_k], queries after RoPE.
        positions: int [n_rows], the position of each query, from 0 to n - 1.
        k, v: f32 [n, n_head_kv, d_k] and [n, n_head_kv, d_v], keys after RoPE and values of all
            tokens, as the cache returns them (round_rows).
        retrieval: 0/1 [n_head_kv].
        window, block, sink_tokens: L, B and S in tokens. L may be an int [n_head_kv].
        compensation: whether folded tokens are compensated; False drops them.
        scale: factor of q.k, by default 1 / sqrt(d_k).
        slopes: ALiBi's m_h, f32 [n_head].
        cap: soft cap of the logits, 0 for none.
        sinks: f32 [n_head], a logit without a value for each query head.
        round_k, round_v: how the cache rounds the compensation token, rows f32 [..., d].

    Returns:
        f32 [n_rows, n_head, d_v].

    Raises:
        ValueError: the shapes do not match.
    """
    n, n_kv, d_k = k.shape
    n_rows, n_head = q.shape[:2]
    positions = np.asarray(positions, np.int64)
    if q.shape[2] != d_k or v.shape[:2] != (n, n_kv) or n_head % n_kv or len(retrieval) != n_kv:
        raise ValueError(
            f"the shapes of q {q.shape}, k {k.shape}, v {v.shape} and of {len(retrieval)} KV heads"
            " do not match"
        )
    if positions.shape != (n_rows,) or (n_rows and not 0 <= positions.min() <= positions.max() < n):
        raise ValueError(f"{n_rows} queries at {positions.shape} positions of {n} tokens")

    # 1. For each KV head and query: it attends to [0, kept) and [first, position], and to the
    #    compensation token with the index comp (-1: none).
    first = np.zeros((n_kv, n_rows), np.int64)
    kept = np.zeros((n_kv, n_rows), np.int64)
    comp = np.full((n_kv, n_rows), -1, np.int64)
    comp_log: np.ndarray | list[float]
    comp_k, comp_v, comp_log = (np.zeros((0, n_kv, d_k)), np.zeros((0, n_kv, v.shape[2])), [])
    local = np.asarray(retrieval) == 0
    windows = np.broadcast_to(np.asarray(window, np.int64), n_kv)[local]
    fronts = frontier(positions, sink_tokens, windows[:, None], block)  # [local heads, n_rows]
    first[local], kept[local] = fronts, sink_tokens
    if compensation and local.any():
        folded = np.unique(fronts[fronts > sink_tokens])
        comp_k, comp_v, comp_log = fold(k, v, folded, sink_tokens)
        if round_k is not None:
            comp_k = round_k(comp_k.astype(np.float32))
        if round_v is not None:
            comp_v = round_v(comp_v.astype(np.float32))
        which = np.where(fronts > sink_tokens, np.searchsorted(folded, fronts), -1)
        comp[local] = which

    # 2. Run the kernel with the queries in order: neighbors attend to almost the same keys.
    order = np.argsort(positions, kind="stable")
    out = np.empty((n_rows, n_head, v.shape[2]), np.float32)
    out[order] = _kernel()(
        _heads_first(q[order] * np.float32(scale or 1 / math.sqrt(d_k))),
        positions[order],
        _heads_first(k),
        _heads_first(v),
        first[:, order],
        kept[:, order],
        comp[:, order],
        _heads_first(comp_k),
        _heads_first(comp_v),
        np.asarray(comp_log, np.float32),
        np.zeros(n_head, np.float32) if slopes is None else np.asarray(slopes, np.float32),
        np.float32(cap),
        np.full(n_head, -np.inf, np.float32) if sinks is None else np.asarray(sinks, np.float32),
    ).transpose(1, 0, 2)
    return out


def fold(
    k: np.ndarray, v: np.ndarray, frontiers: np.ndarray, sink_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the compensation tokens of all KV heads (eq. 4), and log N_d, for each frontier.

    Args:
        k, v: [n, n_head_kv, d].
        frontiers: ascending, each above sink_tokens.
        sink_tokens: S.

    Returns:
        f64 [len(frontiers), n_head_kv, d_k], the same for v, and log N_d as f64 [len(frontiers)].
    """
    counts = np.asarray(frontiers, np.float64) - sink_tokens
    edges = [sink_tokens, *frontiers]
    means = []
    for x in (k, v):
        parts = [
            x[a:b].sum(axis=0, dtype=np.float64) for a, b in zip(edges, edges[1:], strict=False)
        ]
        sums = np.cumsum(np.reshape(parts, (len(parts), *x.shape[1:])), axis=0)
        means.append(sums / counts[:, None, None])
    return means[0], means[1], np.log(counts)


def round_rows(rows: np.ndarray, kv_type: str) -> np.ndarray:
    """Round rows f32 [..., d] to a KV cache type (plan.KV_TYPES), and return f32."""
    return unpack_rows(pack_rows(rows, kv_type), kv_type)


def pack_rows(rows: np.ndarray, kv_type: str) -> np.ndarray:
    """Convert rows f32 [..., d] to a KV cache type: [..., bytes] or [..., d], as gguf does."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    return quantize(np.ascontiguousarray(rows, np.float32), GGMLQuantizationType[kv_type.upper()])


def unpack_rows(packed: np.ndarray, kv_type: str) -> np.ndarray:
    """Convert the result of pack_rows() back to f32 [..., d]."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return dequantize(packed, GGMLQuantizationType[kv_type.upper()])


def rotate(rows: np.ndarray, size: int) -> np.ndarray:
    """Multiply each run of size elements of rows [..., d] by the Walsh-Hadamard matrix.

    llama.cpp does this to q, k and v of quantized caches to spread outliers over the row. The
    matrix is orthonormal and its own inverse, so q.k does not change.
    """
    x = np.asarray(rows, np.float32).reshape(-1, size)
    rotated: np.ndarray = (x @ _hadamard(size)).astype(np.float32).reshape(rows.shape)
    return rotated


def rotation_sizes(
    type_k: str, type_v: str, head_dim_k: int, head_dim_v: int
) -> tuple[int | None, int | None]:
    """Return the sizes for rotate() that llama.cpp uses for K (and q) and for V.

    For K it is the largest 64 * 2^i that divides the head size, and for V it is 64. It is None
    unless the type is quantized and the head size is a multiple of 64.
    """
    from ..plan import KV_TYPES

    size_k = size_v = None
    if KV_TYPES[type_k].block > 1 and head_dim_k % 64 == 0:
        size_k = 64
        while head_dim_k % (2 * size_k) == 0:
            size_k *= 2
    if KV_TYPES[type_v].block > 1 and head_dim_v % 64 == 0:
        size_v = 64
    return size_k, size_v


@cache
def _hadamard(size: int) -> np.ndarray:
    matrix: np.ndarray = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / math.sqrt(size)).astype(np.float32)


def _heads_first(x: np.ndarray) -> np.ndarray:
    """Transpose [n, heads, d] to f32 [heads, n, d]."""
    return np.ascontiguousarray(x.transpose(1, 0, 2), np.float32)


def _attend(
    q: np.ndarray,
    positions: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    first: np.ndarray,
    kept: np.ndarray,
    comp: np.ndarray,
    comp_k: np.ndarray,
    comp_v: np.ndarray,
    comp_log: np.ndarray,
    slopes: np.ndarray,
    cap: Any,
    sinks: np.ndarray,
) -> np.ndarray:
    """Compute softmax(q.k + bias) v for each query: f32 [n_head, n_rows, d_v]. q is scaled.

    Chunks of queries are multiplied with tiles of keys, with an online softmax (running maximum and
    sum). Each tile is loaded once for a whole group of query heads.
    """
    n_head, n_rows, d_k = q.shape
    n_kv, _, d_v = v.shape
    group = n_head // n_kv
    n_chunks = (n_rows + ROW_CHUNK - 1) // ROW_CHUNK
    out = np.empty((n_head, n_rows, d_v), np.float32)
    for task in prange(n_kv * n_chunks):
        kv, start = task // n_chunks, task % n_chunks * ROW_CHUNK
        end = min(start + ROW_CHUNK, n_rows)
        rows = end - start
        total = np.zeros((group, rows))
        best = np.full((group, rows), -np.inf, np.float32)
        acc = np.zeros((group, rows, d_v))
        part = np.empty(d_v, np.float32)
        keys = np.empty((d_k, TILE), np.float32)
        score = np.empty(TILE, np.float32)

        # 1. Start with the compensation token, and find the range of keys for the chunk.
        low: Any
        high: Any
        n_sinks: Any
        low, high, n_sinks = positions[end - 1], np.int64(0), np.int64(0)
        for r in range(start, end):
            low = min(low, first[kv, r])
            high = max(high, positions[r] + 1)
            n_sinks = max(n_sinks, kept[kv, r])
            c = comp[kv, r]
            for g in range(group):
                sink = sinks[kv * group + g]
                logit = np.float32(-np.inf)
                if c >= 0:
                    dot = np.float32(0)
                    for i in range(d_k):
                        dot += q[kv * group + g, r, i] * comp_k[kv, c, i]
                    if cap > 0:
                        dot = cap * np.float32(math.tanh(dot / cap))
                    logit = dot + comp_log[c]
                top = max(sink, logit)
                if top == -np.inf:
                    continue
                best[g, r - start] = top
                weight = math.exp(np.float64(logit) - np.float64(top))
                total[g, r - start] = weight + math.exp(np.float64(sink) - np.float64(top))
                if c >= 0:
                    for i in range(d_v):
                        acc[g, r - start, i] = weight * comp_v[kv, c, i]

        # 2. Add the tiles of keys that any query of the chunk attends to.
        for t in range(0, high, TILE):
            if t >= n_sinks and t + TILE <= low:
                continue
            n_keys = min(TILE, high - t)
            for j in range(n_keys):
                for i in range(d_k):
                    keys[i, j] = k[kv, t + j, i]
            for j in range(n_keys, TILE):
                for i in range(d_k):
                    keys[i, j] = 0
            for r in range(start, end):
                pos, sees_from, sees_sinks = positions[r], first[kv, r], kept[kv, r]
                if pos < t or (t >= sees_sinks and t + n_keys <= sees_from):
                    continue
                for g in range(group):
                    head = kv * group + g
                    for j in range(TILE):
                        score[j] = 0
                    for i in range(d_k):
                        x = q[head, r, i]
                        for j in range(TILE):
                            score[j] += x * keys[i, j]
                    if cap > 0:
                        for j in range(n_keys):
                            score[j] = cap * np.float32(math.tanh(score[j] / cap))
                    top = best[g, r - start]
                    for j in range(n_keys):
                        at = t + j
                        if at <= pos and (at < sees_sinks or at >= sees_from):
                            score[j] -= slopes[head] * np.float32(pos - at)
                            top = max(top, score[j])
                        else:
                            score[j] = -np.inf
                    if top == -np.inf:
                        continue
                    if top > best[g, r - start]:
                        shrink = math.exp(np.float64(best[g, r - start]) - np.float64(top))
                        total[g, r - start] *= shrink
                        for i in range(d_v):
                            acc[g, r - start, i] *= shrink
                        best[g, r - start] = top
                    weight_sum = np.float32(0)
                    for i in range(d_v):
                        part[i] = 0
                    for j in range(n_keys):
                        weight = np.float32(math.exp(score[j] - top))
                        weight_sum += weight
                        for i in range(d_v):
                            part[i] += weight * v[kv, t + j, i]
                    total[g, r - start] += weight_sum
                    for i in range(d_v):
                        acc[g, r - start, i] += part[i]

        # 3. Normalize.
        for r in range(rows):
            for g in range(group):
                for i in range(d_v):
                    out[kv * group + g, start + r, i] = acc[g, r, i] / total[g, r]
    return out


prange: Any = range  # numba's prange once _kernel() has compiled _attend()


@cache
def _kernel() -> Callable[..., np.ndarray]:
    """Compile _attend() for all threads of numba (NUMBA_NUM_THREADS)."""
    global prange
    import numba

    prange = numba.prange
    # Products may be fused and sums reordered, but -inf and NaN keep their meaning.
    options: dict[str, Any] = {"parallel": True, "fastmath": {"contract", "reassoc"}}
    try:
        compiled = numba.njit(cache=True, **options)(_attend)
    except RuntimeError:  # numba found no folder to cache the code in
        compiled = numba.njit(**options)(_attend)
    function: Callable[..., np.ndarray] = compiled
    return function
