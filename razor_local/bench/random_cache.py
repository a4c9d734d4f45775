"""Saved states with random rows, which fill a deep cache in seconds.

The time of a token does not depend on the content of the rows.
"""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ..plan import COMPENSATION_CELLS, KV_TYPES, Group, Plan, row_size

if TYPE_CHECKING:
    import numpy as np

PARALLEL_FROM = 64 << 20  # bytes of a state
_STATE_HEAD = struct.Struct("<Ii")  # llama_context: magic, sequence
_RAZOR_HEAD = struct.Struct("<IIQ")  # llama_kv_cache_razor: magic, version, fingerprint of the plan


def local_rows(plan: Plan, group: Group, n_tokens: int) -> int:
    """Return the rows of the store of a local head in the group that n_tokens occupy."""
    if _frontier(plan, group, n_tokens) > plan.sink_tokens:
        return group.cells
    return min(n_tokens, group.cells - (COMPENSATION_CELLS if plan.compensation else 0))


def _frontier(plan: Plan, group: Group, n_tokens: int) -> int:
    """Return the fold frontier of the group once n_tokens are in the cache."""
    start = (n_tokens - 1) // plan.block * plan.block
    return max(plan.sink_tokens, start - group.window)


def kept_bytes(plan: Plan, n_tokens: int) -> int:
    """Return the bytes of K and V of n_tokens, which the attention of a decoded token reads."""
    shape = plan.shape
    dims = shape.head_dim_k, shape.head_dim_v
    row = sum(map(row_size, (plan.type_k, plan.type_v), dims))
    if plan.active:
        local_row = sum(map(row_size, (plan.type_k_local, plan.type_v_local), dims))
        n_local = sum(group.n_heads * local_rows(plan, group, n_tokens) for group in plan.groups)
        kept = plan.retrieval_kv_heads * n_tokens * row + n_local * local_row
    else:
        kept = sum(layer.n_head_kv for layer in plan.layers) * n_tokens * row
    if shape.sliding:
        row = row_size(plan.type_k, shape.sliding.head_dim_k)
        row += row_size(plan.type_v, shape.sliding.head_dim_v)
        kept += sum(shape.sliding.n_head_kv) * min(n_tokens, shape.sliding.window) * row
    return kept


def random_state(
    plan: Plan, n_tokens: int, saved: bytes, *, mrope: bool = False, n_threads: int = 1
) -> np.ndarray:
    """Return a saved sequence with random rows for llama_state_seq_set_data, as uint8.

    The layout is that of state_write() in llama_kv_cache and llama_kv_cache_razor. The cache of the
    sliding layers follows in models with sliding windows, the recurrent states in hybrid models.

    Args:
        plan: a plan with flash attention.
        n_tokens: number of tokens in the sequence.
        saved: a state of one token, saved by a context with this plan. Its head and its recurrent
            states are copied.
        mrope: whether the model has several positions per token.
        n_threads: number of threads that write a large state.
    """
    parts = _attention_parts(plan, n_tokens, saved, mrope)
    shape = plan.shape
    if shape.sliding:
        n_cells = min(n_tokens, shape.sliding.window)
        layers = [n for n in shape.sliding.n_head_kv if n]
        dims = (
            (plan.type_k, shape.sliding.head_dim_k),
            (plan.type_v, shape.sliding.head_dim_v),
        )
        parts += _cache_parts(range(n_tokens - n_cells, n_tokens), layers, dims, mrope)
    elif shape.recurrent_bytes:
        before = sum(len(what) * n for what, n in _attention_parts(plan, 1, saved, mrope))
        states = bytearray(saved[before:])
        struct.pack_into("<i", states, 4, n_tokens - 1)  # the position, after the number of cells
        parts.append((bytes(states), 1))
    return _repeated(parts, n_threads)


Parts = list[tuple[bytes, int]]  # bytes, repetitions
Dims = tuple[tuple[str, int], tuple[str, int]]  # types and elements of a row of K and of V


def _attention_parts(plan: Plan, n_tokens: int, saved: bytes, mrope: bool) -> Parts:
    """Return the head of a state and the cache of the layers with full attention."""
    shape = plan.shape
    parts: Parts = [(saved[: _STATE_HEAD.size], 1)]
    dims = ((plan.type_k, shape.head_dim_k), (plan.type_v, shape.head_dim_v))
    local_dims = ((plan.type_k_local, shape.head_dim_k), (plan.type_v_local, shape.head_dim_v))
    if plan.active:
        parts.append((saved[_STATE_HEAD.size :][: _RAZOR_HEAD.size], 1))
        head = struct.pack("<II", n_tokens, n_tokens)
        for group in plan.groups:
            head += struct.pack("<IqI", _frontier(plan, group, n_tokens), -1, 0)
        parts.append((head, 1))
    if plan.active:  # each retrieval head is saved like a layer
        full = [1] * sum(layer.n_retrieval for layer in plan.layers)
    else:
        full = [layer.n_head_kv for layer in plan.layers if layer.n_head_kv > 0]
    parts += _cache_parts(range(n_tokens), full, dims, mrope)
    if plan.active:
        for layer in plan.layers:
            heads = [(group, layer.windows.count(group.window)) for group in plan.groups]
            heads = [(group, n) for group, n in heads if n]
            for kv_type, head_dim in local_dims:
                for group, n in heads:
                    used = local_rows(plan, group, n_tokens)
                    parts.append((_random_row(kv_type, n * head_dim), used))
            for _, n in heads if plan.compensation else ():
                for _, head_dim in dims:
                    parts.append((_random_row("f32", n * head_dim), 2))
    return parts


def _cache_parts(positions: range, layers: list[int], dims: Dims, mrope: bool) -> Parts:
    """Return the parts of llama_kv_cache::state_write(). layers: the KV heads of each layer."""
    import numpy as np

    n_cells = len(positions)
    cells = np.zeros((n_cells, 6 if mrope else 3), np.int32)
    cells[:, 0] = positions
    cells[:, 1] = 1  # sequences; the last column is the sequence, 0
    if mrope:  # columns 2 to 4: two more positions, which text repeats, and the token
        cells[:, 2:4] = cells[:, :1]
    parts: Parts = [(struct.pack("<II", 1, n_cells), 1)]  # streams, cells
    parts.append((cells.tobytes(), 1))
    parts.append((struct.pack("<II", 0, len(layers)), 1))  # V is not transposed, layers
    for kv_type, head_dim in dims:
        for n_heads in layers:
            row_bytes = n_heads * row_size(kv_type, head_dim)
            parts.append((struct.pack("<iQ", KV_TYPES[kv_type].ggml_id, row_bytes), 1))
            parts.append((_random_row(kv_type, n_heads * head_dim), n_cells))
    return parts


def _random_row(kv_type: str, n_elements: int) -> bytes:
    """Return a row of small finite values."""
    import numpy as np

    rng = np.random.default_rng(n_elements)
    if kv_type in ("f32", "f16"):
        values = rng.standard_normal(n_elements) / 8
        return values.astype(np.float32 if kv_type == "f32" else np.float16).tobytes()
    if kv_type == "bf16":
        bits = (rng.standard_normal(n_elements) / 8).astype(np.float32).view(np.uint32)
        return (bits >> 16).astype(np.uint16).tobytes()
    info = KV_TYPES[kv_type]
    blocks = rng.integers(0, 256, (n_elements // info.block, info.block_bytes), np.uint8)
    scale = np.float16(2.0**-9).tobytes()
    blocks[:, :2] = np.frombuffer(scale, np.uint8)
    if kv_type in ("q4_1", "q5_1"):  # scale and minimum
        blocks[:, 2:4] = np.frombuffer(scale, np.uint8)
    return blocks.tobytes()


def _repeated(parts: Parts, n_threads: int) -> np.ndarray:
    """Concatenate parts, each repeated as often as its number says.

    Several threads write a large result, because first touching the memory takes most of the time.
    """
    import numpy as np

    ends = np.cumsum([len(what) * n for what, n in parts])
    out = np.empty(int(ends[-1]), np.uint8)

    def write(part: tuple[tuple[bytes, int], int]) -> None:
        (what, n), end = part
        to = out[end - len(what) * n : end]
        # Write several rows at once: copying a short row costs as much as copying a long one.
        several = min(n, max(1, 65536 // len(what)))
        piece = np.frombuffer(what * several, np.uint8)
        whole = to.size // piece.size
        to[: whole * piece.size].reshape(whole, piece.size)[:] = piece
        rest = to[whole * piece.size :]
        rest[:] = piece[: rest.size]

    work = zip(parts, ends.tolist(), strict=True)
    if n_threads == 1 or out.size < PARALLEL_FROM:
        for part in work:
            write(part)
    else:
        with ThreadPoolExecutor(min(n_threads, 16)) as pool:
            list(pool.map(write, work))
    return out
