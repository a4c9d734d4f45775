"""Proves a choice of retrieval heads: facts are planted in a text and asked for.

Head scores measure how heads treat random tokens. Whether a model still finds facts with the heads
that were chosen by them is another question, and the only one that counts: a choice that loses
every fact can have a KL divergence of .01 on plain text. So the same text is read twice, by the
full cache and by a razor context whose local heads have folded every fact, and both are asked the
same questions (evals/facts.py).

Where facts are lost, heads are added by their *fact score*: the attention that the query heads of
the full cache pay from a question and its answer to the sentence of the fact. How many are needed
is found by bisection.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..evals.facts import ROOM, Examiner, Outcome, Progress, make_exam
from ..evals.haystack import Haystack, MadeText
from ..evals.questions import Prompts
from ..plan import Plan, make_plan
from ..profile import Profile, read_model_shape, split_heads
from .scores import group_max

N_TOKENS = 1536  # of a prompt, at most
WINDOW_DIVISOR = 3  # the window is a third of that; no fact stands in it
TOLERANCE = 0.05  # of the facts may be lost
MAX_LOSS = 1.0  # nats that a value may be less likely than with the full cache, on average
MIN_FOUND = 0.25  # of the facts, by the full cache: with fewer nothing is proved
MAX_BUDGET = 0.15  # share of KV heads up to which heads are added
MIN_ROOM, MAX_ROOM = 2, 16  # heads that may be added in any case, and at most


@dataclass(frozen=True)
class Proof:
    """What became of a choice of heads.

    Attributes:
        retrieval: the heads, one uint8 array [n_head_kv] per layer: the choice and what was added.
        n_added: KV heads that the proof added.
        full, razor: the outcomes of the full cache and of these heads.
        plan: of the razor context in which the questions were asked.
    """

    retrieval: tuple[np.ndarray, ...]
    n_added: int
    full: Outcome
    razor: Outcome
    plan: Plan

    @property
    def conclusive(self) -> bool:
        """Whether the full cache finds enough facts to compare with."""
        return self.full.n_found >= MIN_FOUND * len(self.full.found)

    @property
    def holds(self) -> bool:
        return self.conclusive and is_as_good(self.razor, self.full)

    def record(self) -> dict[str, str | int]:
        """The keys razor.calibration.* that docs/format.md describes."""
        return {
            "facts": len(self.full.found),
            "facts_found": self.razor.n_found,
            "facts_found_full": self.full.n_found,
            "facts_tokens": self.plan.n_ctx,
            "facts_window": self.plan.window,
            "facts_kv_bytes": str(self.plan.kv_bytes),
            "facts_kv_bytes_full": str(self.plan.kv_bytes_full),
            "facts_heads_added": self.n_added,
        }


def is_as_good(razor: Outcome, full: Outcome) -> bool:
    """Whether razor is as good as the full cache, within TOLERANCE and MAX_LOSS."""
    n_lost = full.n_found - razor.n_found
    loss = float(full.logprob.mean() - razor.logprob.mean())
    return n_lost <= TOLERANCE * len(full.found) and loss <= MAX_LOSS


def prove(
    model_path: str | os.PathLike[str],
    profile: Profile,
    *,
    may_add: bool = True,
    haystack: Haystack | None = None,
    n_threads: int | None = None,
    n_gpu_layers: int = -1,
    progress: Progress = lambda what, part, left: None,
) -> Proof:
    """Plant facts, compare the profile's heads with the full cache, and add heads where they lose.

    At most MAX_BUDGET of the KV heads keep every token in the end, or MIN_ROOM more than the
    profile has. Of all choices that were tried, the smallest that holds is returned; if none
    does, the one that makes the values most likely: how many facts are found depends on luck more.

    Args:
        may_add: False: the profile's heads are examined as they are.
        haystack: the text to plant the facts in; None: sentences made by razor-local.
        n_gpu_layers: -1: all.

    Raises:
        UnsupportedError: the model cannot be examined: it has no tokenizer, or its context is too
            short to hold the facts.
        KeyboardInterrupt: Ctrl-C, between two operations of the computation.
        RazorError, GGUFError, OSError.
    """
    model_path = Path(model_path)
    shape = read_model_shape(model_path)
    n_tokens = min(N_TOKENS, (shape.n_ctx_train or N_TOKENS + ROOM) - ROOM)
    window = n_tokens // WINDOW_DIVISOR
    exam = make_exam(Prompts(model_path), haystack or MadeText(), n_tokens, window)
    base = replace(profile, window_min=window, window_divisor=0)
    with Examiner(model_path, shape, exam, n_threads, n_gpu_layers, progress) as examiner:
        full, per_query_head = examiner.full()
        fact_scores = group_max(per_query_head, shape.n_head, shape.n_head_kv)
        tried: dict[int, Outcome] = {}
        start = profile.flat()
        order = [i for i in np.argsort(-fact_scores, kind="stable") if not start[i]]

        def heads(n_added: int) -> tuple[np.ndarray, ...]:
            flat = start.copy()
            flat[order[:n_added]] = 1
            return split_heads(flat, shape.n_head_kv)

        def run(n_added: int) -> bool:
            n = int(start.sum()) + n_added
            what = f"planting facts: {n} retrieval heads"
            tried[n_added] = examiner.ask(replace(base, retrieval=heads(n_added)), what=what)
            return is_as_good(tried[n_added], full)

        conclusive = full.n_found >= MIN_FOUND * len(full.found)
        n_added = 0
        if not run(0) and may_add and conclusive:
            n_added = _fewest(run, _room(start))
            if not is_as_good(tried[n_added], full):
                n_added = max(tried, key=lambda n: tried[n].logprob.sum())
    plan = make_plan(shape, replace(base, retrieval=heads(n_added)), exam.n_ctx, "f16", "f16")
    return Proof(heads(n_added), n_added, full, tried[n_added], plan)


def _room(flat: np.ndarray) -> int:
    """How many heads may be added to these."""
    n, total = int(flat.sum()), len(flat)
    return min(max(math.floor(MAX_BUDGET * total) - n, MIN_ROOM), MAX_ROOM, total - n)


def _fewest(holds: Callable[[int], bool], room: int) -> int:
    """Return the smallest number from 1 to room that holds, by bisection; room if it does not.

    That more heads hold where fewer do is taken for granted.
    """
    if room < 1 or not holds(room):
        return max(room, 0)
    low, high = 0, room  # low does not hold, high does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
