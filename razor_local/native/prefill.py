"""How a context reads prompts: with full attention, or with the compressed cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import UnsupportedError, options
from .library import Native


def is_on_device(C: Any, n_gpu_layers: int, offload_kqv: bool = True) -> bool:
    """Return True if layers of the KV cache are on a device, such as a GPU."""
    return bool(C.llama_supports_gpu_offload() and n_gpu_layers != 0 and offload_kqv)


def why_compressed(lib: Native, ctx: int, asked: str, on_device: bool) -> str | None:
    """Return why a razor context reads prompts with the compressed cache, None if it does not.

    Args:
        ctx: pointer of a context in which razor is active.
        asked: "auto", "full" or "razor", see the argument prefill of Llama.
        on_device: whether the cache is on a device.

    Raises:
        UnsupportedError: asked is "full", and the context does not support it.
    """
    if asked == "razor":
        return options(prefill="razor")
    if asked == "auto" and on_device:
        return f"the cache is on a device; {options(prefill='full')} changes this"
    if lib.lib.llama_razor_set_full_prefill(ctx, True):
        lib.lib.llama_razor_set_full_prefill(ctx, False)
        return None
    why = lib.last_error()
    if asked == "full":
        raise UnsupportedError(
            f"{why}; pass {options(prefill='razor')} or {options(prefill='auto')}"
        )
    return why


@contextmanager
def full_attention(lib: Native, ctx: int) -> Iterator[None]:
    """Use full attention for the batches that the block decodes.

    This requires that why_compressed() returns None. The cache is compressed after each batch. A
    batch in the block can have more than n_batch tokens.
    """
    lib.lib.llama_razor_set_full_prefill(ctx, True)
    try:
        yield
    finally:
        lib.lib.llama_razor_set_full_prefill(ctx, False)
