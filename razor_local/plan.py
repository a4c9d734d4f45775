"""The plan of a context: which KV heads keep everything, and how many bytes that takes.

The plan is pure arithmetic and needs neither a model nor the native library. The formulas are those
of native/src/llama-razor.h. The backends allocate exactly Plan.kv_bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .errors import UnsupportedError, options
from .gguf.hyper_parameters import MAX_N_CTX

if TYPE_CHECKING:  # it imports numpy, and --help names KV_TYPES
    from .model_shape import ModelShape
    from .profile import Profile

SLACK = 64  # LLAMA_RAZOR_SLACK: tokens that can be rolled back over a fold
COMPENSATION_CELLS = 4  # C: rows that hold the compensation token and its earlier values
N_CTX_PAD = 256  # llama.cpp rounds n_ctx up to it; the cells of local heads are rounded alike


@dataclass(frozen=True)
class KVType:
    """A type of KV cache rows: its ggml id, elements per block and bytes per block."""

    ggml_id: int
    block: int
    block_bytes: int


KV_TYPES = {
    "f32": KVType(0, 1, 4),
    "f16": KVType(1, 1, 2),
    "bf16": KVType(30, 1, 2),
    "q8_0": KVType(8, 32, 34),
    "q5_1": KVType(7, 32, 24),
    "q5_0": KVType(6, 32, 22),
    "q4_1": KVType(3, 32, 20),
    "q4_0": KVType(2, 32, 18),
}


def row_size(kv_type: str, head_dim: int) -> int:
    """Bytes of one row (one token of one KV head) of head_dim elements.

    Raises UnsupportedError for an unknown type, and where the blocks of a quantized type do not
    divide head_dim.
    """
    info = _kv_type(kv_type)
    if head_dim % info.block:
        raise UnsupportedError(
            f"a {kv_type} KV cache needs a head size that is a multiple of {info.block}, this model"
            f" has {head_dim}; use f16"
        )
    return head_dim // info.block * info.block_bytes


@dataclass(frozen=True)
class LayerPlan:
    """KV heads and tensor bytes of one layer's cache."""

    il: int
    n_head_kv: int
    n_retrieval: int
    n_local: int
    bytes_k: int
    bytes_v: int
    bytes_sums: int  # F32 accumulators of the compensation token

    @property
    def kv_bytes(self) -> int:
        return self.bytes_k + self.bytes_v + self.bytes_sums


@dataclass(frozen=True)
class Plan:
    """What a context will really do. Where active is False every head keeps every token.

    window, block, cells, sink_tokens: tokens (0 where inactive). kv_bytes: bytes of the whole
    cache; kv_bytes_full: of a full cache with the same types and flash attention setting;
    kv_bytes_full_f16: of llama.cpp's default, a full f16 cache.
    """

    n_ctx: int
    active: bool
    why_inactive: str | None
    sink_tokens: int
    window: int
    block: int
    cells: int
    compensation: bool
    type_k: str
    type_v: str
    flash_attn: bool
    layers: tuple[LayerPlan, ...]
    shape: ModelShape

    @property
    def kv_heads(self) -> int:
        return sum(layer.n_head_kv for layer in self.layers)

    @property
    def retrieval_kv_heads(self) -> int:
        return sum(layer.n_retrieval for layer in self.layers)

    @property
    def kv_bytes(self) -> int:
        return sum(layer.kv_bytes for layer in self.layers)

    @property
    def kv_bytes_full(self) -> int:
        return _full_bytes(self.shape, self.n_ctx, self.type_k, self.type_v, self.flash_attn)

    @property
    def kv_bytes_full_f16(self) -> int:
        return self.kv_bytes_full_as("f16")

    def kv_bytes_full_as(self, kv_type: str) -> int:
        """Bytes of a full cache with kv_type for both K and V, with flash attention."""
        return _full_bytes(self.shape, self.n_ctx, kv_type, kv_type, True)

    @property
    def share(self) -> float:
        """kv_bytes / kv_bytes_full; 1.0 for a model without KV heads."""
        full = self.kv_bytes_full
        return self.kv_bytes / full if full else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Everything above as plain numbers, strings, lists and dicts (for JSON)."""
        return {
            "n_ctx": self.n_ctx,
            "active": self.active,
            "why_inactive": self.why_inactive,
            "kv_bytes": self.kv_bytes,
            "kv_bytes_full": self.kv_bytes_full,
            "kv_bytes_full_f16": self.kv_bytes_full_f16,
            "share": self.share,
            "kv_heads": self.kv_heads,
            "retrieval_kv_heads": self.retrieval_kv_heads,
            "sink_tokens": self.sink_tokens,
            "window": self.window,
            "block": self.block,
            "cells": self.cells,
            "compensation": self.compensation,
            "type_k": self.type_k,
            "type_v": self.type_v,
            "flash_attn": self.flash_attn,
            "layers": [
                {
                    "il": layer.il,
                    "n_head_kv": layer.n_head_kv,
                    "n_retrieval": layer.n_retrieval,
                    "n_local": layer.n_local,
                    "bytes_k": layer.bytes_k,
                    "bytes_v": layer.bytes_v,
                    "bytes_sums": layer.bytes_sums,
                }
                for layer in self.layers
            ],
        }


def make_plan(
    shape: ModelShape,
    profile: Profile | None,
    n_ctx: int,
    type_k: str = "f16",
    type_v: str = "f16",
    flash_attn: bool = True,
    window: int | None = None,
    sink_tokens: int | None = None,
    compensation: bool | None = None,
) -> Plan:
    """The plan of a context of n_ctx tokens (0: the model's trained length; rounded up to 256).

    profile None: llama.cpp's own full cache. window, sink_tokens and compensation override the
    profile. Raises ProfileError for a profile of another shape or values out of range, and
    UnsupportedError for combinations of types that llama.cpp refuses and for profiles of ALiBi
    scopes.
    """
    n_ctx = padded_n_ctx(shape, n_ctx)
    _kv_type(type_k)
    if _kv_type(type_v).block > 1 and not flash_attn:
        raise UnsupportedError(
            f"a quantized V cache ({type_v}) needs flash attention; switch it on or use f16 for V"
        )
    full = Plan(
        n_ctx=n_ctx,
        active=False,
        why_inactive=None,
        sink_tokens=0,
        window=0,
        block=0,
        cells=0,
        compensation=False,
        type_k=type_k,
        type_v=type_v,
        flash_attn=flash_attn,
        layers=_layers(shape, shape.n_head_kv, n_ctx, 0, False, type_k, type_v, flash_attn),
        shape=shape,
    )
    if profile is None:
        return replace(full, why_inactive="no profile")

    profile = profile.with_options(window, sink_tokens, compensation)
    profile.check_shape(shape)
    if profile.method != "rope":
        raise UnsupportedError(
            f"razor cannot run profiles of the method '{profile.method}', only of 'rope'; pass"
            f" {options(razor=False)} to run a full cache"
        )
    divided = n_ctx // profile.window_divisor if profile.window_divisor else 0
    length = max(profile.window_min, divided)
    block = fold_block(length)
    extra = COMPENSATION_CELLS if profile.compensation else 0
    cells = _round_up(profile.sink_tokens + extra + length + block + SLACK, N_CTX_PAD)
    retrieval = tuple(int(layer.sum()) for layer in profile.retrieval)
    if retrieval == shape.n_head_kv:
        return replace(full, why_inactive="every KV head is a retrieval head")
    if cells >= n_ctx:
        return replace(
            full,
            why_inactive=f"RazorAttention saves nothing up to {cells:,} tokens of context",
        )
    return replace(
        full,
        active=True,
        sink_tokens=profile.sink_tokens,
        window=length,
        block=block,
        cells=cells,
        compensation=profile.compensation,
        layers=_layers(
            shape, retrieval, n_ctx, cells, profile.compensation, type_k, type_v, flash_attn
        ),
    )


def padded_n_ctx(shape: ModelShape, n_ctx: int) -> int:
    """n_ctx as llama.cpp rounds it; 0 means the model's trained length."""
    if n_ctx == 0:
        n_ctx = shape.n_ctx_train
    if not 0 < n_ctx <= MAX_N_CTX:
        raise UnsupportedError(f"the context size is {n_ctx}, expected 1 to {MAX_N_CTX}")
    return _round_up(n_ctx, N_CTX_PAD)


def fold_block(window: int) -> int:
    """B: the largest power of two <= max(window/4, 1), clamped to 64..512."""
    quarter = max(window // 4, 1)
    return min(max(1 << (quarter.bit_length() - 1), 64), 512)


def _layers(
    shape: ModelShape,
    retrieval: tuple[int, ...],
    n_ctx: int,
    cells: int,
    compensation: bool,
    type_k: str,
    type_v: str,
    flash_attn: bool,
) -> tuple[LayerPlan, ...]:
    d_k, d_v = shape.head_dim_k, shape.head_dim_v
    row_k, row_v = row_size(type_k, d_k), row_size(type_v, d_v)
    widest = max(retrieval, default=0)
    padded = cells == 0 and not flash_attn  # a full cache pads V of every layer to the widest
    layers = []
    for il, (n_head_kv, r) in enumerate(zip(shape.n_head_kv, retrieval, strict=True)):
        local = n_head_kv - r
        layers.append(
            LayerPlan(
                il=il,
                n_head_kv=n_head_kv,
                n_retrieval=r,
                n_local=local,
                bytes_k=(r * n_ctx + local * cells) * row_k,
                bytes_v=((widest if padded else r) * n_ctx + local * cells) * row_v,
                bytes_sums=3 * local * (d_k + d_v) * 4 if compensation else 0,
            )
        )
    return tuple(layers)


def _full_bytes(shape: ModelShape, n_ctx: int, type_k: str, type_v: str, flash_attn: bool) -> int:
    layers = _layers(shape, shape.n_head_kv, n_ctx, 0, False, type_k, type_v, flash_attn)
    return sum(layer.kv_bytes for layer in layers)


def _kv_type(name: str) -> KVType:
    if name not in KV_TYPES:
        raise UnsupportedError(
            f"'{name}' is not a KV cache type, expected one of {', '.join(KV_TYPES)}"
        )
    return KV_TYPES[name]


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
