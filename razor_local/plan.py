"""The plan of a context: which KV heads keep everything, and how many bytes that takes.

The plan is pure arithmetic and needs neither a model nor the native library. The formulas are those
of native/src/llama-razor.h. The backends allocate exactly Plan.kv_bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .errors import UnsupportedError, options
from .gguf.hyper_parameters import MAX_N_CTX

if TYPE_CHECKING:  # it imports numpy, and --help names KV_TYPES
    from .model_shape import ModelShape
    from .profile import Profile

SLACK = 64  # LLAMA_RAZOR_SLACK: tokens that can be rolled back over a fold
MAX_WINDOWS = 4  # maximum number of different windows, LLAMA_RAZOR_MAX_WINDOWS
COMPENSATION_CELLS = 4  # C: rows that hold the compensation token and its earlier values
N_CTX_PAD = 256  # llama.cpp rounds n_ctx up to it; the cells of local heads are rounded alike
NO_LOCAL_TYPES = "the KV types of local heads have no effect"  # if razor is not active


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
    """Return the bytes of one row (one token of one KV head) of head_dim elements.

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
class Group:
    """The local heads with one window: tokens of the window, cells of a head, number of heads."""

    window: int
    cells: int
    n_heads: int


@dataclass(frozen=True)
class LayerPlan:
    """KV heads and tensor bytes of one layer's cache.

    Attributes:
        windows: tokens that each KV head keeps in addition to its sinks, 0 for retrieval heads,
            which keep everything.
        bytes_sums: bytes of the F32 accumulators of the compensation tokens.
    """

    il: int
    windows: tuple[int, ...]
    bytes_k: int
    bytes_v: int
    bytes_sums: int

    @property
    def n_head_kv(self) -> int:
        return len(self.windows)

    @property
    def n_retrieval(self) -> int:
        return self.windows.count(0)

    @property
    def n_local(self) -> int:
        return self.n_head_kv - self.n_retrieval

    @property
    def kv_bytes(self) -> int:
        return self.bytes_k + self.bytes_v + self.bytes_sums


@dataclass(frozen=True)
class Plan:
    """The plan that a context follows. If active is False, every head keeps every token.

    Attributes:
        n_ctx: tokens of each sequence.
        block, sink_tokens: tokens (0 if inactive).
        groups: the local heads, largest window first.
        type_k, type_v: KV types of retrieval heads, of a full cache and of sliding layers.
        type_k_local, type_v_local: KV types of local heads; the same if inactive.
        kv_bytes: bytes of the whole cache.
        kv_bytes_full: bytes of a full cache with the same types and flash attention setting.
        kv_bytes_full_f16: bytes of llama.cpp's default, a full f16 cache.
        sliding_bytes, recurrent_bytes: parts of these three that razor does not change: layers with
            a sliding window (of sliding_cells tokens each), and states of recurrent layers.
        n_stream: number of sequences, each of which has a cache of its own. All bytes count them.
    """

    n_ctx: int
    active: bool
    why_inactive: str | None
    sink_tokens: int
    block: int
    groups: tuple[Group, ...]
    compensation: bool
    type_k: str
    type_v: str
    type_k_local: str
    type_v_local: str
    flash_attn: bool
    layers: tuple[LayerPlan, ...]
    shape: ModelShape
    sliding_cells: int = 0
    sliding_bytes: int = 0
    recurrent_bytes: int = 0
    n_stream: int = 1

    @property
    def window(self) -> int:
        """The largest window of local heads, 0 if inactive."""
        return self.groups[0].window if self.groups else 0

    @property
    def windows_text(self) -> str:
        """The windows of the local heads as text: "4,096", or "256 to 4,096"."""
        smallest = self.groups[-1].window if self.groups else 0
        return f"{smallest:,} to {self.window:,}" if smallest < self.window else f"{self.window:,}"

    def heads(self, il: int) -> tuple[list[int], list[int]]:
        """Return the indices of the retrieval heads and of the local heads of a layer."""
        windows = self.layers[il].windows
        return [i for i, w in enumerate(windows) if not w], [i for i, w in enumerate(windows) if w]

    @property
    def has_local_types(self) -> bool:
        """Whether local heads have other KV types than retrieval heads."""
        return (self.type_k_local, self.type_v_local) != (self.type_k, self.type_v)

    @property
    def types_text(self) -> str:
        """The KV types as text, such as "f16" or "f16; local heads keys q8_0, values q4_0"."""

        def pair(k: str, v: str) -> str:
            return k if k == v else f"keys {k}, values {v}"

        text = pair(self.type_k, self.type_v)
        if not self.has_local_types:
            return text
        return f"{text}; local heads {pair(self.type_k_local, self.type_v_local)}"

    @property
    def cells(self) -> int:
        """Cells of a local head with the largest window, 0 if inactive."""
        return self.groups[0].cells if self.groups else 0

    @property
    def kv_heads(self) -> int:
        return sum(layer.n_head_kv for layer in self.layers)

    @property
    def retrieval_kv_heads(self) -> int:
        return sum(layer.n_retrieval for layer in self.layers)

    @property
    def kv_bytes(self) -> int:
        layers = sum(layer.kv_bytes for layer in self.layers)
        return layers + self.sliding_bytes + self.recurrent_bytes

    @property
    def kv_bytes_full(self) -> int:
        return self._full_bytes(self.type_k, self.type_v, self.flash_attn)

    @property
    def kv_bytes_full_f16(self) -> int:
        return self.kv_bytes_full_as("f16")

    def kv_bytes_full_as(self, kv_type: str) -> int:
        """Bytes of a full cache with kv_type for both K and V, with flash attention."""
        return self._full_bytes(kv_type, kv_type, True)

    def _full_bytes(self, type_k: str, type_v: str, flash_attn: bool) -> int:
        shape = self.shape
        layers = _full_layers(shape, self.n_ctx, type_k, type_v, flash_attn)
        sliding = _sliding_bytes(shape, self.sliding_cells, type_k, type_v, flash_attn)
        one = sum(layer.kv_bytes for layer in layers) + sliding
        return self.n_stream * one + self.recurrent_bytes

    @property
    def share(self) -> float:
        """kv_bytes / kv_bytes_full; 1.0 for a model without KV heads."""
        full = self.kv_bytes_full
        return self.kv_bytes / full if full else 1.0

    def folds_between(self, first: int, end: int) -> bool:
        """Return True if a prompt at positions [first, end) folds after its first tokens.

        Only then does it differ whether the prompt is read with full attention.
        """
        if not self.active:
            return False
        window, last = self.groups[-1].window, end - 1
        next_fold = max(first, self.sink_tokens + window) // self.block * self.block + self.block
        return next_fold <= last and last // self.block * self.block - window > self.sink_tokens

    def prefill_bytes(self, n_tokens: int, n_embd: int, first: int = 0) -> int:
        """Return the bytes of the temporary buffers of a prompt read with full attention.

        These are the hidden states of all tokens between two layers (f32), and K and V of a layer.

        Args:
            n_tokens: tokens of the prompt.
            n_embd: elements of a hidden state.
            first: position of the first token. A copy of what local heads hold before it is needed.
        """
        types, shape = (self.type_k_local, self.type_v_local), self.shape
        rows = sum(map(row_size, types, (shape.head_dim_k, shape.head_dim_v)))
        heads = max((layer.n_head_kv for layer in self.layers if layer.n_local), default=0)
        start = first // self.block * self.block
        past = max(
            (g.cells if start - g.window > self.sink_tokens else first for g in self.groups),
            default=0,
        )
        return 4 * n_embd * n_tokens + heads * rows * (-(-(past + n_tokens) // 256) * 256)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain numbers, strings, lists and dicts, for JSON."""
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
            "sliding_cells": self.sliding_cells,
            "sliding_bytes": self.sliding_bytes,
            "recurrent_bytes": self.recurrent_bytes,
            "sink_tokens": self.sink_tokens,
            "window": self.window,
            "block": self.block,
            "cells": self.cells,
            "groups": [
                {"window": g.window, "cells": g.cells, "n_heads": g.n_heads} for g in self.groups
            ],
            "compensation": self.compensation,
            "type_k": self.type_k,
            "type_v": self.type_v,
            "type_k_local": self.type_k_local,
            "type_v_local": self.type_v_local,
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
                    "windows": list(layer.windows),
                }
                for layer in self.layers
            ],
        }


def split_type(text: str) -> tuple[str, str]:
    """Return the KV types of K and V: those of "q8_0/q4_0", or one for both of "q8_0"."""
    type_k, _, type_v = text.partition("/")
    return type_k, type_v or type_k


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
    n_ubatch: int = 512,
    swa_full: bool | None = None,
    type_k_local: str | None = None,
    type_v_local: str | None = None,
    n_stream: int = 1,
) -> Plan:
    """Make the plan of a context of n_ctx tokens (0: the trained length; rounded up to 256).

    profile None: llama.cpp's own full cache. window, sink_tokens and compensation override the
    profile. n_ubatch: tokens, which layers with a sliding window keep in addition to it. swa_full:
    these layers keep everything; None: llama.cpp's default for a full cache, and not with razor.
    type_k_local, type_v_local: KV types of local heads; None: type_k and type_v. If the plan is
    inactive, they have no effect, and why_inactive says so. n_stream: number of sequences, each
    with n_ctx tokens.
    Raises ProfileError for a profile of another shape or values out of range, and
    UnsupportedError for combinations of types that llama.cpp refuses and for a compensation token
    in an ALiBi model.
    """
    n_ctx = padded_n_ctx(shape, n_ctx)
    local_types = type_k_local or type_k, type_v_local or type_v
    for name in (type_k, *local_types):
        _kv_type(name)
    unused = f" ({NO_LOCAL_TYPES})" if type_k_local or type_v_local else ""
    if _kv_type(type_v).block > 1 and not flash_attn:
        raise UnsupportedError(
            f"a quantized V cache ({type_v}) needs flash attention; switch it on or use f16 for V"
        )
    full = Plan(
        n_ctx=n_ctx,
        active=False,
        why_inactive=None,
        sink_tokens=0,
        block=0,
        groups=(),
        compensation=False,
        type_k=type_k,
        type_v=type_v,
        type_k_local=type_k,
        type_v_local=type_v,
        flash_attn=flash_attn,
        layers=_times(_full_layers(shape, n_ctx, type_k, type_v, flash_attn), n_stream),
        shape=shape,
        recurrent_bytes=n_stream * shape.recurrent_bytes,
        n_stream=n_stream,
    )

    def with_sliding(plan: Plan) -> Plan:
        keep_all = not plan.active if swa_full is None else swa_full
        cells = sliding_cells(shape, n_ctx, n_ubatch, keep_all)
        n_bytes = n_stream * _sliding_bytes(shape, cells, type_k, type_v, flash_attn)
        return replace(plan, sliding_cells=cells, sliding_bytes=n_bytes)

    full = with_sliding(full)
    if profile is None:
        return replace(full, why_inactive=f"no profile{unused}")

    profile = profile.with_options(window, sink_tokens, compensation)
    profile.check_shape(shape)
    if profile.compensation and (shape.max_alibi_bias or profile.method == "alibi"):
        raise UnsupportedError(
            f"razor does not support a compensation token in models with ALiBi ({shape.arch}); pass"
            f" {options(compensation=False)}, or {options(razor=False)} to run a full cache"
        )
    windows, block = head_windows(profile, n_ctx)
    if not any(map(any, windows)):
        whole = profile.scope is None or profile.flat().all()
        return replace(
            full,
            why_inactive=(
                "every KV head is a retrieval head"
                if whole
                else f"no scope is below {n_ctx:,} tokens"
            )
            + unused,
        )
    extra = COMPENSATION_CELLS if profile.compensation else 0
    cells = {
        window: _round_up(profile.sink_tokens + extra + window + block + SLACK, N_CTX_PAD)
        for window in sorted({w for layer in windows for w in layer if w}, reverse=True)
    }
    saving = {window: n for window, n in cells.items() if n < n_ctx}
    if not saving:
        return replace(
            full,
            why_inactive=f"RazorAttention saves nothing up to {min(cells.values()):,} tokens of"
            f" context{unused}",
        )
    if _kv_type(local_types[1]).block > 1 and not flash_attn:
        raise UnsupportedError(
            f"a quantized V cache of local heads ({local_types[1]}) needs flash attention; switch"
            " it on or use f16 for V"
        )
    windows = [tuple(w if w in saving else 0 for w in layer) for layer in windows]
    counts = Counter(w for layer in windows for w in layer)
    active = replace(
        full,
        active=True,
        sink_tokens=profile.sink_tokens,
        block=block,
        groups=tuple(Group(window, n, counts[window]) for window, n in saving.items()),
        compensation=profile.compensation,
        type_k_local=local_types[0],
        type_v_local=local_types[1],
        layers=_times(
            _layers(
                shape,
                windows,
                saving,
                n_ctx,
                profile.compensation,
                (type_k, type_v),
                local_types,
                flash_attn,
            ),
            n_stream,
        ),
    )
    return with_sliding(active)


def sliding_cells(shape: ModelShape, n_ctx: int, n_ubatch: int, swa_full: bool) -> int:
    """Tokens that each layer with a sliding window keeps; 0 for a model without such layers."""
    if shape.sliding is None:
        return 0
    if swa_full:
        return n_ctx
    return _round_up(min(n_ctx, shape.sliding.window + n_ubatch), N_CTX_PAD)


def head_windows(profile: Profile, n_ctx: int) -> tuple[list[tuple[int, ...]], int]:
    """Return the window of each KV head of each layer, in tokens, and their block.

    A window is 0 for retrieval heads and for heads whose scope is not below n_ctx: they keep
    everything. Scopes are rounded up to a multiple of the block, which is that of their mean, and
    then merged.
    """
    if profile.scope is None:
        divided = n_ctx // profile.window_divisor if profile.window_divisor else 0
        length = max(profile.window_min, divided)
        heads = [tuple(0 if h else length for h in layer.tolist()) for layer in profile.retrieval]
        return heads, fold_block(length)
    scopes = [tuple(s if s < n_ctx else 0 for s in layer.tolist()) for layer in profile.scope]
    local = [s for layer in scopes for s in layer if s]
    block = fold_block(sum(local) // len(local) if local else 0)
    larger = merge_windows(_round_up(s, block) for s in local)
    return [
        tuple(larger[_round_up(s, block)] if s else 0 for s in layer) for layer in scopes
    ], block


def merge_windows(windows: Iterable[int]) -> dict[int, int]:
    """Replace the windows of heads by at most MAX_WINDOWS different ones.

    While there are more, one window is replaced by the next larger one: the window for which this
    adds the fewest tokens over all heads, and the smallest of several such windows.

    Args:
        windows: tokens, one for each head.

    Returns:
        The window that replaces each of the different windows.
    """
    counts = sorted(Counter(windows).items())
    result = {window: window for window, _ in counts}
    while len(counts) > MAX_WINDOWS:
        costs = [n * (counts[i + 1][0] - w) for i, (w, n) in enumerate(counts[:-1])]
        i = costs.index(min(costs))
        (window, n), (larger, n_larger) = counts[i : i + 2]
        counts[i : i + 2] = [(larger, n_larger + n)]
        result = {w: larger if to == window else to for w, to in result.items()}
    return result


def padded_n_ctx(shape: ModelShape, n_ctx: int) -> int:
    """Return n_ctx rounded as llama.cpp does; 0 means the model's trained length."""
    if n_ctx == 0:
        n_ctx = shape.n_ctx_train
    if not 0 < n_ctx <= MAX_N_CTX:
        raise UnsupportedError(f"the context size is {n_ctx}, expected 1 to {MAX_N_CTX}")
    return _round_up(n_ctx, N_CTX_PAD)


def fold_block(window: int) -> int:
    """Return B: the largest power of two <= max(window/4, 1), clamped to 64..512."""
    quarter = max(window // 4, 1)
    return min(max(1 << (quarter.bit_length() - 1), 64), 512)


def _layers(
    shape: ModelShape,
    windows: Sequence[tuple[int, ...]],
    cells: dict[int, int],
    n_ctx: int,
    compensation: bool,
    types: tuple[str, str],
    local_types: tuple[str, str],
    flash_attn: bool,
) -> tuple[LayerPlan, ...]:
    """Plan the layers of a cache.

    Args:
        windows: the window of each KV head.
        cells: cells of a head, by window.
        types, local_types: KV types (K, V) of retrieval heads and of local heads.
    """
    dims = d_k, d_v = shape.head_dim_k, shape.head_dim_v
    row_k, row_v = map(row_size, types, dims)
    local_k, local_v = map(row_size, local_types, dims)
    padded = not cells and not flash_attn  # a full cache pads V of every layer to the widest
    width = shape.v_width or max(map(len, windows), default=0) * d_v
    layers = []
    for il, layer in enumerate(windows):
        rows = n_ctx * layer.count(0)
        local_rows = sum(cells[window] for window in layer if window)
        local = len(layer) - layer.count(0)
        if padded:
            # a hybrid or sliding model has no cache in its other layers
            has_cache = len(layer) > 0 or not (shape.sliding or shape.recurrent_bytes)
            bytes_v = n_ctx * row_size(types[1], width) if has_cache else 0
        else:
            bytes_v = rows * row_v + local_rows * local_v
        layers.append(
            LayerPlan(
                il=il,
                windows=layer,
                bytes_k=rows * row_k + local_rows * local_k,
                bytes_v=bytes_v,
                bytes_sums=3 * local * (d_k + d_v) * 4 if compensation else 0,
            )
        )
    return tuple(layers)


def _full_layers(
    shape: ModelShape, n_ctx: int, type_k: str, type_v: str, flash_attn: bool
) -> tuple[LayerPlan, ...]:
    windows = [(0,) * n for n in shape.n_head_kv]
    types = type_k, type_v
    return _layers(shape, windows, {}, n_ctx, False, types, types, flash_attn)


def _times(layers: tuple[LayerPlan, ...], n: int) -> tuple[LayerPlan, ...]:
    """Return the layers of n equal caches."""
    return tuple(
        replace(
            layer,
            bytes_k=n * layer.bytes_k,
            bytes_v=n * layer.bytes_v,
            bytes_sums=n * layer.bytes_sums,
        )
        for layer in layers
    )


def _sliding_bytes(
    shape: ModelShape, cells: int, type_k: str, type_v: str, flash_attn: bool
) -> int:
    if shape.sliding is None:
        return 0
    d_k, d_v = shape.sliding.head_dim_k, shape.sliding.head_dim_v
    row_k, row_v = row_size(type_k, d_k), row_size(type_v, d_v)
    bytes_k = sum(n * row_k for n in shape.sliding.n_head_kv)
    if flash_attn:
        bytes_v = sum(n * row_v for n in shape.sliding.n_head_kv)
    else:
        bytes_v = row_size(type_v, shape.v_width) * len(shape.sliding.n_head_kv)
    return cells * (bytes_k + bytes_v)


def _kv_type(name: str) -> KVType:
    if name not in KV_TYPES:
        raise UnsupportedError(
            f"'{name}' is not a KV cache type, expected one of {', '.join(KV_TYPES)}"
        )
    return KV_TYPES[name]


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
