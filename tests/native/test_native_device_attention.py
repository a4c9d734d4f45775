"""The operations of devices (native/src/ggml-razor.h) alone, without a model.

Attention of one token, of a batch, and folds against float64, storing against ggml's own operation.

Run by tests/tools/other_backend.py; skipped where the device does not know them.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from razor_local.native.structs import InitParams, Tensor
from tests.support import runner

if runner.GPU_LAYERS == 0:
    pytest.skip("no layer is offloaded: tests.tools.other_backend does it", allow_module_level=True)

F32, F16, I32, I64 = 0, 1, 26, 27
TYPES = ["f16", "bf16", "q8_0", "q4_0"]
OFFSET = 24  # ggml-razor.h
ATTENTION, STORE, FOLD, BATCH = 0x525A4154, 0x525A5354, 0x525A464F, 0x525A4241
TILE, NEVER = 128, 2**31 - 1
GPU = 1


@dataclass(frozen=True)
class Case:
    kv_type: str
    d: int
    n_gqa: int
    retrieval: tuple[bool, ...]  # of each KV head
    n_ctx: int  # rows of a retrieval head
    cells: int  # rows of a local head
    n_kv: tuple[int, int]  # cells that are looked at: of retrieval heads, of local heads
    visible: float  # share of them that is not masked
    seed: int

    @property
    def n_head(self) -> int:
        return self.n_gqa * len(self.retrieval)

    @property
    def n_rows(self) -> int:
        n_retrieval = sum(self.retrieval)
        return n_retrieval * self.n_ctx + (len(self.retrieval) - n_retrieval) * self.cells


@dataclass(frozen=True)
class BatchCase(Case):
    """visible: share of the cells that some token sees."""

    n_tokens: int
    causal: bool  # the first token sees what others see, but the cells of the batch; else at random


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    lib = runner.bindings()._lib
    for name, args, result in (
        ("ggml_init", [InitParams], c_void_p),
        ("ggml_free", [c_void_p], None),
        ("ggml_new_tensor_3d", [c_void_p, c_int, c_int64, c_int64, c_int64], c_void_p),
        ("ggml_custom_4d", [c_void_p, c_int, c_int64, c_int64, c_int64, c_int64,
                            ctypes.POINTER(c_void_p), c_int, c_void_p, c_int, c_void_p], c_void_p),
        ("ggml_set_rows", [c_void_p] * 4, c_void_p),
        ("ggml_nbytes", [c_void_p], c_size_t),
        ("ggml_new_graph", [c_void_p], c_void_p),
        ("ggml_build_forward_expand", [c_void_p, c_void_p], None),
        ("ggml_backend_dev_by_type", [c_int], c_void_p),
        ("ggml_backend_dev_name", [c_void_p], c_char_p),
        ("ggml_backend_dev_init", [c_void_p, c_char_p], c_void_p),
        ("ggml_backend_dev_supports_op", [c_void_p, c_void_p], c_bool),
        ("ggml_backend_alloc_ctx_tensors", [c_void_p, c_void_p], c_void_p),
        ("ggml_backend_buffer_free", [c_void_p], None),
        ("ggml_backend_free", [c_void_p], None),
        ("ggml_backend_tensor_set", [c_void_p, c_void_p, c_size_t, c_size_t], None),
        ("ggml_backend_tensor_get", [c_void_p, c_void_p, c_size_t, c_size_t], None),
        ("ggml_backend_graph_compute", [c_void_p, c_void_p], c_int),
    ):  # fmt: skip
        function = getattr(lib, name)
        function.argtypes, function.restype = args, result
    return lib


def pack(x: np.ndarray, kv_type: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows as a cache of that type holds them, and their values."""
    qtype = GGMLQuantizationType[kv_type.upper()]
    packed = quants.quantize(x.astype(np.float32), qtype)
    return packed, quants.dequantize(packed, qtype).astype(np.float64)


def operation(
    ggml: ctypes.CDLL, ctx: int, case: Case, scale: float, magic: int = ATTENTION
) -> list:
    """The operation and its sources: q, k, v and both masks."""
    return attention(ggml, ctx, case, 1, [(F16, n, 1) for n in case.n_kv], scale, magic)


def attention(
    ggml: ctypes.CDLL,
    ctx: int,
    case: Case,
    n_tokens: int,
    more: list[tuple[int, int, int]],
    scale: float,
    magic: int,
) -> list:
    """An operation and its sources: q, k, v and more of a type and size."""
    kv_type = runner.KV_TYPES[case.kv_type]
    sources = [
        ggml.ggml_new_tensor_3d(ctx, F32, case.d, case.n_head, n_tokens),
        ggml.ggml_new_tensor_3d(ctx, kv_type, case.d, case.n_rows, 1),
        ggml.ggml_new_tensor_3d(ctx, kv_type, case.d, case.n_rows, 1),
        *(ggml.ggml_new_tensor_3d(ctx, *args, 1) for args in more),
    ]
    out = ggml.ggml_custom_4d(ctx, F32, case.d * case.n_head, n_tokens, 1, 1,
                              (c_void_p * len(sources))(*sources), len(sources),
                              None, 1, None)  # fmt: skip
    bits = sum(1 << h for h, retrieval in enumerate(case.retrieval) if retrieval)
    params = struct.pack(
        "<IfiiQii", magic, scale, case.n_ctx, case.cells, bits, len(case.retrieval), 0
    )
    ctypes.memmove(out + Tensor.op_params.offset + OFFSET, params, len(params))
    return [out, *sources]


def run(ggml: ctypes.CDLL, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """What the device computes, and what is right: f64 [n_head, d]."""
    rng = np.random.default_rng(case.seed)
    scale = 1 / np.sqrt(case.d)
    device = ggml.ggml_backend_dev_by_type(GPU)
    ctx = ggml.ggml_init(InitParams(1 << 20, None, True))
    backend = ggml.ggml_backend_dev_init(device, None)
    buffer = None
    try:
        out, q, k, v, *masks = operation(ggml, ctx, case, scale)
        if not ggml.ggml_backend_dev_supports_op(device, out):
            pytest.skip(f"{ggml.ggml_backend_dev_name(device).decode()} does not know it")
        graph = ggml.ggml_new_graph(ctx)
        ggml.ggml_build_forward_expand(graph, out)
        buffer = ggml.ggml_backend_alloc_ctx_tensors(ctx, backend)

        def put(tensor: int, data: np.ndarray) -> None:
            data = np.ascontiguousarray(data)
            ggml.ggml_backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)

        n_rows = Tensor.from_address(k).ne[1]
        x_q = rng.standard_normal((case.n_head, case.d)).astype(np.float32)
        k_packed, x_k = pack(2 * rng.standard_normal((n_rows, case.d)), case.kv_type)
        v_packed, x_v = pack(rng.standard_normal((n_rows, case.d)), case.kv_type)
        x_masks = []
        for n in case.n_kv:
            mask = np.where(rng.random(n) < case.visible, 0.0, -np.inf).astype(np.float16)
            for _ in range(2):  # whole tiles
                start = rng.integers(0, n)
                mask[start : start + n // 3] = -np.inf
            mask[rng.integers(0, n)] = np.float16(5.0)  # as of a compensation token
            x_masks.append(mask)
        put(q, x_q)
        put(k, k_packed)
        put(v, v_packed)
        for tensor, mask in zip(masks, x_masks, strict=True):
            put(tensor, mask)
        got = np.empty((case.n_head, case.d), np.float32)
        for _ in range(2):
            assert ggml.ggml_backend_graph_compute(backend, graph) == 0
        ggml.ggml_backend_tensor_get(out, got.ctypes.data, 0, got.nbytes)
    finally:
        if buffer:
            ggml.ggml_backend_buffer_free(buffer)
        ggml.ggml_backend_free(backend)
        ggml.ggml_free(ctx)

    want = np.empty((case.n_head, case.d))
    row = 0
    for group, is_retrieval in enumerate((True, False)):
        for head_kv in (h for h, r in enumerate(case.retrieval) if r == is_retrieval):
            rows = slice(row, row + case.n_kv[group])
            row += case.n_ctx if is_retrieval else case.cells
            heads = slice(head_kv * case.n_gqa, (head_kv + 1) * case.n_gqa)
            s = x_q[heads].astype(np.float64) @ x_k[rows].T * scale + x_masks[group]
            p = np.exp(s - s.max(axis=1, keepdims=True))
            want[heads] = p @ x_v[rows] / p.sum(axis=1, keepdims=True)
    return got, want


@st.composite
def cases(draw: st.DrawFn) -> Case:
    cells = 256 * draw(st.integers(1, 12))
    n_ctx = 256 * draw(st.sampled_from([1, 2, 3, 8, 40]))
    n_kv = 256 * draw(st.integers(1, n_ctx // 256)), 32 * draw(st.integers(1, cells // 32))
    return Case(
        kv_type=draw(st.sampled_from(TYPES)),
        d=draw(st.sampled_from([64, 128])),
        n_gqa=draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 12, 16])),
        retrieval=tuple(draw(st.lists(st.booleans(), min_size=1, max_size=9))),
        n_ctx=n_ctx,
        cells=cells,
        n_kv=n_kv,
        visible=draw(st.sampled_from([0.0, 0.02, 0.5, 1.0])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_any_shape(ggml: ctypes.CDLL, case: Case) -> None:
    got, want = run(ggml, case)
    assert np.abs(got - want).max() <= 5e-5


@pytest.mark.parametrize("kv_type", TYPES)
def test_a_long_context(ggml: ctypes.CDLL, kv_type: str) -> None:
    """One retrieval head beside seven short local ones: chunks of one head on the whole device."""
    heads = (False,) * 5 + (True,) + (False,) * 2
    got, want = run(ggml, Case(kv_type, 128, 4, heads, 65536, 4608, (65536, 4608), 0.9, 1))
    assert np.abs(got - want).max() <= 5e-5


@contextmanager
def device_memory(ggml: ctypes.CDLL) -> Iterator[tuple[int, int]]:
    """A context for tensors, and the backend."""
    ctx = ggml.ggml_init(InitParams(1 << 20, None, True))
    backend = ggml.ggml_backend_dev_init(ggml.ggml_backend_dev_by_type(GPU), None)
    try:
        yield ctx, backend
    finally:
        ggml.ggml_backend_free(backend)
        ggml.ggml_free(ctx)


def ours(ggml: ctypes.CDLL, ctx: int, sources: list[int], params: bytes) -> int:
    """An operation without an output."""
    op = ggml.ggml_custom_4d(
        ctx, F32, 1, 1, 1, 1, (c_void_p * len(sources))(*sources), len(sources), None, 1, None
    )
    ctypes.memmove(op + Tensor.op_params.offset + OFFSET, params, len(params))
    if not ggml.ggml_backend_dev_supports_op(ggml.ggml_backend_dev_by_type(GPU), op):
        pytest.skip("the device does not know it")
    return op


def compute(
    ggml: ctypes.CDLL,
    ctx: int,
    backend: int,
    ops: list[int],
    data: list[tuple[int, np.ndarray]],
    results: list[tuple[int, np.ndarray]],
    times: int = 1,
) -> None:
    """Puts data into tensors, runs the operations in order, and fills the results."""
    graph = ggml.ggml_new_graph(ctx)
    for op in ops:
        ggml.ggml_build_forward_expand(graph, op)
    buffer = ggml.ggml_backend_alloc_ctx_tensors(ctx, backend)
    try:
        for tensor, values in data:
            ggml.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)
        for _ in range(times):
            assert ggml.ggml_backend_graph_compute(backend, graph) == 0
        for tensor, out in results:
            ggml.ggml_backend_tensor_get(tensor, out.ctypes.data, 0, out.nbytes)
    finally:
        ggml.ggml_backend_buffer_free(buffer)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("kv_type", TYPES)
def test_rows_are_stored_as_ggml_does(ggml: ctypes.CDLL, kv_type: str, d: int) -> None:
    """Bit for bit, and nothing else is touched. With zeros, and numbers of equal size."""
    rng = np.random.default_rng(d)
    n_rows, n_stored, type_id = 600, 96, runner.KV_TYPES[kv_type]
    x = rng.standard_normal((2, n_stored, d)).astype(np.float32)
    x[:, 3] = 0.0
    x[:, 4] = np.sign(x[:, 4])
    places = rng.permutation(n_rows)[:n_stored].astype(np.int64)
    with device_memory(ggml) as (ctx, backend):
        current = [ggml.ggml_new_tensor_3d(ctx, F32, d, n_stored, 1) for _ in range(2)]
        caches = [ggml.ggml_new_tensor_3d(ctx, type_id, d, n_rows, 1) for _ in range(4)]
        rows = ggml.ggml_new_tensor_3d(ctx, I64, n_stored, 1, 1)
        ops = [ours(ggml, ctx, [*current, *caches[:2], rows], struct.pack("<I", STORE))]
        for cache, tensor in zip(caches[2:], current, strict=True):
            ops.append(ggml.ggml_set_rows(ctx, cache, tensor, rows))
        before = rng.integers(0, 256, ggml.ggml_nbytes(caches[0]), np.uint8)
        after = np.empty((4, before.size), np.uint8)
        data = [*zip(current, x, strict=True), (rows, places), *((c, before) for c in caches)]
        compute(ggml, ctx, backend, ops, data, list(zip(caches, after, strict=True)))
    assert (after[:2] == after[2:]).all()
    assert (after[0] != after[1]).any()


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("n_fold", [3, 64, 512])
@pytest.mark.parametrize("kv_type", TYPES)
def test_folds(ggml: ctypes.CDLL, kv_type: str, n_fold: int, d: int) -> None:
    """The rows of three heads behind rows of others; sums go from one slot to another."""
    rng = np.random.default_rng(n_fold + d)
    n_local, cells, first, n_slots, source, target = 3, 768, 100, 3, 2, 0
    n_rows, n_folded = first + n_local * cells, 2000
    fold = np.tile(rng.permutation(cells - 2)[:n_fold].astype(np.int32), (5, 1))
    means = np.array([cells - 2, cells - 1], np.int64)
    packed, x = zip(*(pack(rng.standard_normal((n_rows, d)), kv_type) for _ in "kv"), strict=True)
    sums = rng.standard_normal((2, n_slots, n_local, d)).astype(np.float32)
    got_sums, got_rows = np.empty_like(sums), [np.empty_like(rows) for rows in packed]
    with device_memory(ggml) as (ctx, backend):
        caches = [
            ggml.ggml_new_tensor_3d(ctx, runner.KV_TYPES[kv_type], d, n_rows, 1) for _ in "kv"
        ]
        accumulators = [ggml.ggml_new_tensor_3d(ctx, F32, n_local * d, n_slots, 1) for _ in "kv"]
        inputs = [
            (ggml.ggml_new_tensor_3d(ctx, I32, n_fold, 5, 1), fold),
            (ggml.ggml_new_tensor_3d(ctx, I32, 1, 1, 1), np.array([source], np.int32)),
            (ggml.ggml_new_tensor_3d(ctx, I64, 1, 1, 1), np.array([target], np.int64)),
            (ggml.ggml_new_tensor_3d(ctx, I64, 2, 1, 1), means),
            (ggml.ggml_new_tensor_3d(ctx, F32, 1, 1, 1), np.array([1 / n_folded], np.float32)),
        ]
        sources = [*caches, *accumulators, *(tensor for tensor, _ in inputs)]
        op = ours(ggml, ctx, sources, struct.pack("<Iiixxxxq", FOLD, n_local, cells, first))
        data = [*zip(caches, packed, strict=True), *zip(accumulators, sums, strict=True), *inputs]
        results = [*zip(accumulators, got_sums, strict=True), *zip(caches, got_rows, strict=True)]
        compute(ggml, ctx, backend, [op], data, results)
    for i in range(2):
        heads = x[i][first:].reshape(n_local, cells, d)
        total = sums[i, source] + heads[:, fold[0]].sum(axis=1)
        np.testing.assert_allclose(got_sums[i, target], total, rtol=0, atol=1e-3)
        assert (got_sums[i, [1, 2]] == sums[i, [1, 2]]).all()
        _, mean = pack(got_sums[i, target] / np.float32(n_folded), kv_type)
        values = quants.dequantize(got_rows[i], GGMLQuantizationType[kv_type.upper()])
        stored = values[first:].reshape(n_local, cells, d)[:, means]
        step = {"f16": 1e-3, "bf16": 8e-3, "q8_0": 8e-3, "q4_0": 0.13}[kv_type]  # of the largest
        assert np.abs(stored - mean[:, None]).max() <= step * np.abs(mean).max()
        others = np.ones(n_rows, bool)
        others[(first + np.arange(n_local)[:, None] * cells + means).ravel()] = False
        assert (got_rows[i][others] == packed[i][others]).all()


def test_64_kv_heads(ggml: ctypes.CDLL) -> None:
    heads = tuple(h % 3 == 0 for h in range(64))
    got, want = run(ggml, Case("f16", 64, 1, heads, 1024, 256, (1024, 256), 0.9, 1))
    assert np.abs(got - want).max() <= 5e-5


def test_other_custom_operations_are_refused(ggml: ctypes.CDLL) -> None:
    case = Case("f16", 64, 1, (True,), 256, 256, (256, 256), 1.0, 1)
    device = ggml.ggml_backend_dev_by_type(GPU)
    ctx = ggml.ggml_init(InitParams(1 << 20, None, True))
    try:
        assert not ggml.ggml_backend_dev_supports_op(
            device, operation(ggml, ctx, case, 1.0, magic=0)[0]
        )
    finally:
        ggml.ggml_free(ctx)


def batch_operation(ggml: ctypes.CDLL, ctx: int, case: BatchCase, scale: float) -> list:
    """The operation and its sources: q, k, v, since of both groups, bias and tiles."""
    n_tiles = sum(-(-n // TILE) for n in case.n_kv)
    n_full, n_local = case.n_kv
    more = [(I32, n_full, 1), (I32, n_local, 1), (F32, n_local, 1), (I32, 2, n_tiles)]
    return attention(ggml, ctx, case, case.n_tokens, more, scale, BATCH)


@pytest.fixture(scope="module")
def batch_types(ggml: ctypes.CDLL) -> list[str]:
    """KV types whose batches the device knows."""
    device = ggml.ggml_backend_dev_by_type(GPU)
    ctx = ggml.ggml_init(InitParams(1 << 20, None, True))
    try:
        known = []
        for kv_type in TYPES:
            case = BatchCase(kv_type, 128, 4, (True, False), 256, 256, (256, 256), 1.0, 1, 2, True)
            if ggml.ggml_backend_dev_supports_op(device, batch_operation(ggml, ctx, case, 1.0)[0]):
                known.append(kv_type)
    finally:
        ggml.ggml_free(ctx)
    if not known:
        pytest.skip(f"{ggml.ggml_backend_dev_name(device).decode()} does not know it")
    return known


def draw_since(rng: np.random.Generator, case: BatchCase, n: int) -> np.ndarray:
    """The first token that sees each of n cells: i32 [n]."""
    since = np.where(rng.random(n) < case.visible, 0, NEVER).astype(np.int32)
    if case.causal:
        start = int(rng.integers(0, max(n - case.n_tokens, 0) + 1))
        since[start : start + case.n_tokens] = np.arange(case.n_tokens)[: n - start]
        return since
    since[since == 0] = rng.integers(0, case.n_tokens, (since == 0).sum())
    for _ in range(3):  # whole tiles, and edges in them
        start = int(rng.integers(0, n))
        start -= start % TILE if rng.random() < 0.7 else 0
        length = TILE * int(rng.integers(1, 4))
        since[start : start + length] = rng.choice([0, NEVER, rng.integers(0, case.n_tokens)])
    return since


def make_tiles(since: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Smallest and largest of each tile: i32 [n, 2]."""
    spread = np.full((2, -(-len(since) // TILE) * TILE), NEVER, np.int32)
    spread[:, : len(since)] = since, np.where(bias != 0, NEVER, since)
    low, high = spread.reshape(2, -1, TILE)
    return np.stack([low.min(axis=1), high.max(axis=1)], axis=1)


def run_batch(ggml: ctypes.CDLL, case: BatchCase) -> tuple[np.ndarray, np.ndarray]:
    """What the device computes for some tokens, and what is right: f64 [n, n_head, d]."""
    rng = np.random.default_rng(case.seed)
    scale = 1 / np.sqrt(case.d)
    x_q = rng.standard_normal((case.n_tokens, case.n_head, case.d)).astype(np.float32)
    k_packed, x_k = pack(2 * rng.standard_normal((case.n_rows, case.d)), case.kv_type)
    v_packed, x_v = pack(rng.standard_normal((case.n_rows, case.d)), case.kv_type)
    sinces = [draw_since(rng, case, n) for n in case.n_kv]
    biases = [np.zeros(n, np.float32) for n in case.n_kv]
    seen = np.flatnonzero(sinces[1] != NEVER)
    if len(seen) > 0 and rng.random() < 0.8:  # as of a compensation token
        biases[1][rng.choice(seen, 2)] = rng.choice([1e-3, 1.0, 5.0, 9.7, 12.0], 2)
    tiles = np.concatenate([make_tiles(*both) for both in zip(sinces, biases, strict=True)])
    got = np.full((case.n_tokens, case.n_head, case.d), np.nan, np.float32)
    with device_memory(ggml) as (ctx, backend):
        out, *sources = batch_operation(ggml, ctx, case, scale)
        values = [x_q, k_packed, v_packed, *sinces, biases[1], tiles]
        data = [(t, np.ascontiguousarray(x)) for t, x in zip(sources, values, strict=True)]
        compute(ggml, ctx, backend, [out], data, [(out, got)], times=2)
    assert np.isfinite(got).all()

    n_chosen = 2 + 2**24 // (case.n_head * max(case.n_kv) * case.d)
    tokens = np.arange(case.n_tokens)
    if n_chosen < case.n_tokens:  # float64 takes its time
        tokens = np.unique([0, case.n_tokens - 1, *rng.choice(tokens, n_chosen)])
    want = np.zeros((len(tokens), case.n_head, case.d))
    row = 0
    for group, is_retrieval in enumerate((True, False)):
        hidden = sinces[group] > tokens[:, None]
        some = ~hidden.all(axis=1)  # what sees nothing gives zeros
        for head_kv in (h for h, r in enumerate(case.retrieval) if r == is_retrieval):
            rows = slice(row, row + case.n_kv[group])
            row += case.n_ctx if is_retrieval else case.cells
            for head in range(head_kv * case.n_gqa, (head_kv + 1) * case.n_gqa):
                s = x_q[tokens, head].astype(np.float64) @ x_k[rows].T * scale + biases[group]
                s = np.where(hidden, -np.inf, s)[some]
                p = np.exp(s - s.max(axis=1, keepdims=True))
                want[some, head] = p @ x_v[rows] / p.sum(axis=1, keepdims=True)
    return got[tokens], want


def check_batch(got: np.ndarray, want: np.ndarray) -> None:
    """Scaled queries and weights may be rounded to F16, nothing else."""
    error = got - want
    assert np.abs(error).max() <= 4e-3
    assert np.sqrt((error**2).mean()) <= 8e-4


@st.composite
def batch_cases(draw: st.DrawFn, types: list[str]) -> BatchCase:
    cells = 256 * draw(st.integers(1, 12))
    n_ctx = 256 * draw(st.sampled_from([1, 2, 3, 8, 40]))
    n_kv = tuple(
        draw(st.one_of(st.integers(1, n), st.integers(1, n // 256).map(lambda i: 256 * i)))
        for n in (n_ctx, cells)
    )
    return BatchCase(
        kv_type=draw(st.sampled_from(types)),
        d=draw(st.sampled_from([64, 128])),
        n_gqa=draw(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 12, 16])),
        retrieval=tuple(draw(st.lists(st.booleans(), min_size=1, max_size=6))),
        n_ctx=n_ctx,
        cells=cells,
        n_kv=n_kv,
        visible=draw(st.sampled_from([0.0, 0.02, 0.5, 1.0])),
        seed=draw(st.integers(0, 2**32 - 1)),
        n_tokens=draw(st.one_of(st.integers(2, 80), st.integers(81, 600))),
        causal=draw(st.booleans()),
    )


@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_batches_of_any_shape(
    ggml: ctypes.CDLL, batch_types: list[str], data: st.DataObject
) -> None:
    check_batch(*run_batch(ggml, data.draw(batch_cases(batch_types))))


@pytest.mark.parametrize("visible", [1.0, 0.9])
@pytest.mark.parametrize("d", [64, 128])
def test_a_batch_in_a_long_context(
    ggml: ctypes.CDLL, batch_types: list[str], d: int, visible: float
) -> None:
    """All tokens see most tiles whole, or each tile has hidden cells."""
    heads = (False, True) + (False,) * 5 + (True,)
    for kv_type in batch_types:
        case = BatchCase(kv_type, d, 4, heads, 65536, 4608, (65536, 4608), visible, 1, 512, True)
        check_batch(*run_batch(ggml, case))


def test_a_batch_that_sees_nothing(ggml: ctypes.CDLL, batch_types: list[str]) -> None:
    """Zeros where no cell is seen, and only there."""
    case = BatchCase("f16", 128, 4, (True, False), 512, 512, (500, 130), 0.0, 3, 70, False)
    got, want = run_batch(ggml, case)
    check_batch(got, want)
    assert (got[want == 0.0] == 0.0).all()


def test_a_batch_of_64_kv_heads(ggml: ctypes.CDLL, batch_types: list[str]) -> None:
    heads = tuple(h % 3 == 0 for h in range(64))
    case = BatchCase("f16", 64, 1, heads, 1024, 256, (1024, 256), 0.9, 1, 65, True)
    check_batch(*run_batch(ggml, case))
