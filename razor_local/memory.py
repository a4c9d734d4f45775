"""Report the size and the content of a KV cache, and the memory of its model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import RazorError
from .native import Native
from .native.structs import REWIND
from .plan import KV_TYPES, Plan


@dataclass(frozen=True)
class LayerMemory:
    """KV heads and bytes of one layer's cache, as the library reports them."""

    il: int
    retrieval_kv_heads: int
    local_kv_heads: int
    kv_bytes: int


@dataclass(frozen=True)
class Memory:
    """The size of the KV cache and of its model, in bytes as allocated with the context.

    Attributes:
        active: whether local heads keep fewer than all tokens. If not, llama.cpp's own cache runs,
            and `why` is the reason.
        own_attention: whether layers whose cache is in host memory run razor_local's attention
            instead of llama.cpp's. A full cache can run it, too.
        device_attention: whether all layers whose cache is on a device run razor_local's attention.
            False if there are none, or some run llama.cpp's because the device does not support
            razor_local's or the layer has several windows.
        kv_bytes: sum of the backend buffers of the cache.
        kv_bytes_full: size of llama.cpp's own cache with the same types.
        kv_bytes_full_f16: size of a full f16 cache, None if no plan describes the model's cache.
        sliding_bytes, recurrent_bytes: parts of kv_bytes that razor does not change: layers with a
            sliding window, and recurrent states.
        layers: one per layer, empty if not active.
        n_tokens: tokens in the cache now.
        type_k, type_v, type_k_local, type_v_local: KV types of retrieval and of local heads by
            name; None if no plan describes the model's cache.
        weights_bytes: bytes of the whole model, whether mapped from the file or not.
        compute_bytes: buffers for the computation of a batch.
        rewind: where the rewind log is: "ram", "disk" or "off".
        rewind_bytes, rewind_limit: its size, which is not part of kv_bytes, and its limit.
        rewind_why: why the log is off, or why it ended; None while it is in use.
        checkpoints, checkpoint_bytes: number and size of the checkpoints of sliding windows and
            recurrent states; None for a model that needs none to go back.
        prefill: how the last prompt was read and the next one probably is: with full attention
            ("full", as a full cache always does) or with the compressed cache ("razor").
        prefill_why: why it is not "full"; None if it is.
        prefill_bytes: size of the largest temporary buffers so far. A prompt that is read with full
            attention needs them; they are freed afterwards, and are not part of kv_bytes.
        devices: names of the devices, besides the CPU, that hold a part of the model or cache.
    """

    active: bool
    why: str | None
    own_attention: bool
    device_attention: bool
    kv_bytes: int
    kv_bytes_full: int
    kv_bytes_full_f16: int | None
    layers: tuple[LayerMemory, ...]
    n_tokens: int
    n_ctx: int
    weights_bytes: int
    compute_bytes: int
    devices: tuple[str, ...]
    sliding_bytes: int = 0
    recurrent_bytes: int = 0
    type_k: str | None = None
    type_v: str | None = None
    type_k_local: str | None = None
    type_v_local: str | None = None
    rewind: str = "off"
    rewind_bytes: int = 0
    rewind_limit: int = 0
    rewind_why: str | None = None
    checkpoints: int | None = None
    checkpoint_bytes: int = 0
    prefill: str = "razor"
    prefill_why: str | None = None
    prefill_bytes: int = 0

    @property
    def share(self) -> float:
        """kv_bytes / kv_bytes_full; 1.0 for a model without a KV cache."""
        return self.kv_bytes / self.kv_bytes_full if self.kv_bytes_full else 1.0


@dataclass(frozen=True)
class SequenceStats:
    """One sequence of the cache, in tokens.

    Positions [sink_tokens, frontier) are folded into the compensation tokens of the local heads
    with the smallest window, n_folded of them. n_rollback: this many can be taken back from the end
    without evaluating again, with the rewind log.
    """

    n_tokens: int
    frontier: int
    n_folded: int
    n_rollback: int


def read_memory(
    library: Native,
    ctx: int,
    plan: Plan | None,
    why: str | None,
    n_tokens: int,
    n_ctx: int,
    why_no_log: str = "",
) -> Memory:
    """Return what the cache of a context takes, from the native library's own count.

    Args:
        ctx: llama_context pointer.
        plan: None for a cache that a plan does not describe.
        why: the reason where razor is not active.
        why_no_log: why the rewind log is off, None if it is not.
    """
    stats = library.stats(ctx)
    failure = stats.rewind_failure.decode("utf-8", "replace")
    layers: tuple[LayerMemory, ...] = ()
    if stats.active:
        rows = [library.layer(ctx, il) for il in range(stats.n_layer)]
        layers = tuple(
            LayerMemory(il, r.n_retrieval, r.n_local, r.bytes_k + r.bytes_v + r.bytes_sums)
            for il, r in enumerate(rows)
        )
    names = ("type_k", "type_v", "type_k_local", "type_v_local")
    types: dict[str, Any] = {name: getattr(plan, name, None) for name in names}
    if stats.active:
        known = {kv_type.ggml_id: name for name, kv_type in KV_TYPES.items()}
        types = {name: known[getattr(stats, name)] for name in names}
    places = library.memory(ctx)
    held = [m for m in places if not m.is_host and m.weights + m.cache]
    return Memory(
        active=bool(stats.active),
        why=why,
        own_attention=bool(stats.own_attention),
        device_attention=bool(stats.device_attention),
        kv_bytes=stats.kv_bytes,
        kv_bytes_full=plan.kv_bytes_full if plan and stats.active else stats.kv_bytes,
        kv_bytes_full_f16=plan.kv_bytes_full_f16 if plan else None,
        layers=layers,
        n_tokens=n_tokens,
        n_ctx=n_ctx,
        weights_bytes=sum(m.weights for m in places),
        compute_bytes=sum(m.compute for m in places),
        devices=tuple(dict.fromkeys(m.device.decode("utf-8", "replace") for m in held)),
        sliding_bytes=stats.kv_bytes_sliding,
        recurrent_bytes=stats.kv_bytes_recurrent,
        rewind=next(name for name, mode in REWIND.items() if mode == stats.rewind),
        rewind_bytes=stats.rewind_bytes,
        rewind_limit=stats.rewind_limit,
        prefill_bytes=stats.prefill_bytes,
        rewind_why=failure or why_no_log or (None if stats.active else why),
        **types,
    )


def read_sequence(library: Native, ctx: int, seq_id: int, why: str | None) -> SequenceStats:
    """Return tokens, frontier and folded tokens of a sequence.

    Args:
        ctx: llama_context pointer.
        why: the reason where razor is not active.

    Raises:
        RazorError: razor is not active, or there is no such sequence.
    """
    if not library.stats(ctx).active:
        raise RazorError(f"razor is not active in this context ({why})")
    try:
        seq = library.seq(ctx, seq_id)
    except IndexError:
        raise RazorError(f"the context has no sequence {seq_id}") from None
    return SequenceStats(seq.n_tokens, seq.frontier, seq.n_folded, seq.n_rollback)
