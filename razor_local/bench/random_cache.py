"""Saved states with random rows, which fill a deep cache in seconds.

The time of a token does not depend on the content of the rows.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
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
    row = row_size(plan.type_k, plan.shape.head_dim_k) + row_size(
        plan.type_v, plan.shape.head_dim_v
    )
    if not plan.active:
        return sum(layer.n_head_kv for layer in plan.layers) * n_tokens * row
    n_rows = plan.retrieval_kv_heads * n_tokens
    n_rows += sum(group.n_heads * local_rows(plan, group, n_tokens) for group in plan.groups)
    return n_rows * row


def random_state(plan: Plan, n_tokens: int, saved: bytes, n_threads: int = 1) -> np.ndarray:
    """Return a saved sequence with random rows for llama_state_seq_set_data, as uint8.

    The layout is that of state_write() in llama_kv_cache and llama_kv_cache_razor.

    Args:
        plan: a plan with flash attention.
        n_tokens: number of tokens in the sequence.
        saved: a state saved by a context with this plan; its head is copied.
        n_threads: number of threads that write a large state.
    """
    import numpy as np

    rng = np.random.default_rng(n_tokens)

    def random_row(kv_type: str, n_elements: int) -> bytes:
        """Return one row of small finite values."""
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

    shape = plan.shape
    parts: list[tuple[bytes, int]] = [(saved[: _STATE_HEAD.size], 1)]  # bytes, repetitions
    dims = ((plan.type_k, shape.head_dim_k), (plan.type_v, shape.head_dim_v))
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
    parts.append((struct.pack("<II", 1, n_tokens), 1))  # streams, cells
    cells = np.zeros((n_tokens, 3), np.int32)  # position, number of sequences, sequence 0
    cells[:, 0] = np.arange(n_tokens)
    cells[:, 1] = 1
    parts.append((cells.tobytes(), 1))
    parts.append((struct.pack("<II", 0, len(full)), 1))  # V is not transposed, layers
    for kv_type, head_dim in dims:
        for n_heads in full:
            row_bytes = n_heads * row_size(kv_type, head_dim)
            parts.append((struct.pack("<iQ", KV_TYPES[kv_type].ggml_id, row_bytes), 1))
            parts.append((random_row(kv_type, n_heads * head_dim), n_tokens))
    if plan.active:
        for layer in plan.layers:
            heads = [(group, layer.windows.count(group.window)) for group in plan.groups]
            heads = [(group, n) for group, n in heads if n]
            for kv_type, head_dim in dims:
                for group, n in heads:
                    used = local_rows(plan, group, n_tokens)
                    parts.append((random_row(kv_type, n * head_dim), used))
            for _, n in heads if plan.compensation else ():
                for _, head_dim in dims:
                    parts.append((random_row("f32", n * head_dim), 2))
    return _repeated(parts, n_threads)


def _repeated(parts: Sequence[tuple[bytes, int]], n_threads: int) -> np.ndarray:
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
