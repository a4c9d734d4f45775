"""Choose the slots of a server and their context sizes for the free memory."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from ..errors import MemoryFullError, option
from ..fit import MARGIN, MIN_AUTO, RAM, ContextOptions, DryModel, Need, no_room

DEFAULT_SLOTS = 4  # as llama-server
MAX_PROMPT_CACHE = 8192  # MiB, the default of llama-server


@dataclass(frozen=True)
class Slots:
    """The slots of a server.

    Attributes:
        n_slots: requests that are computed at the same time.
        n_ctx: tokens of each slot.
        need: the memory of the model and all slots.
        prompt_cache: MiB of main memory for prompts that are in no slot any more.
        why_fewer: why there are fewer than DEFAULT_SLOTS, None if they were asked for.
    """

    n_slots: int
    n_ctx: int
    need: Need
    prompt_cache: int
    why_fewer: str | None


def choose_slots(
    model: str | os.PathLike[str],
    options: ContextOptions,
    *,
    n_slots: int | None = None,
    n_ctx: int | None = None,
    n_max: int = 0,
    n_gpu_layers: int = -1,
) -> Slots:
    """Choose the slots for the memory that is free now.

    Args:
        options: all but n_slots.
        n_slots: number of slots. None means DEFAULT_SLOTS, or fewer if they do not fit or if razor
            would save nothing in their contexts.
        n_ctx: tokens of each slot (0: trained length). None means the largest context that fits and
            leaves MARGIN free in each memory.
        n_max: maximum of that context (0: trained length).

    Raises:
        MemoryFullError: the slots do not fit.
        RazorError, OSError: what DryModel and DryModel.need raise.
    """
    with DryModel(model, n_gpu_layers=n_gpu_layers) as dry:
        free = dry.available(options.n_batch)
        limits = {name: n - MARGIN for name, n in free.items()}
        n_max = dry.padded(min(n_max or dry.n_ctx_train, dry.n_ctx_train or n_max))
        smallest = min(MIN_AUTO, n_max)
        saves = options.profile is not None and dry.need(n_max, options).active
        why_fewer = None
        for n in [n_slots] if n_slots else range(DEFAULT_SLOTS, 0, -1):
            several = replace(options, n_slots=n)
            if n_ctx is None:
                need = dry.largest(limits, several, n_max)
                fits = need is not None and need.n_ctx >= smallest
                fewer = saves and need is not None and not need.active
            else:
                need = dry.need(n_ctx, several)
                fits, fewer = need.room(free) >= 0, False
            if need is not None and fits and not (fewer and n > 1 and not n_slots):
                spare = limits.get(RAM, 0) - sum(p.total for p in need.places if p.name == RAM)
                prompt_cache = min(max(spare, 0) // 2 >> 20, MAX_PROMPT_CACHE)
                return Slots(n, need.n_ctx, need, prompt_cache, why_fewer)
            why_fewer = "with more of them, razor would save nothing" if fits else "no more fit"
        one = several if n_slots else replace(options, n_slots=1)
        if n_ctx is None:
            raise MemoryFullError(no_room(dry, limits, one, smallest))
        sentence = no_room(dry, free, one, n_ctx)
        raise MemoryFullError(f"{sentence}, or a smaller {option('n_ctx')}, or fewer slots")
