"""Prove a choice of retrieval heads by asking for facts that are planted in a text.

Head scores measure how heads treat random tokens. They do not show whether the model still finds
facts with the chosen heads, and neither does a small KL divergence on plain text. Therefore the
full cache and a razor context, whose local heads have folded every fact, read the same text and
answer the same questions (evals/facts.py). Razor reads the text with the compressed cache, as
`serve` and contexts on GPUs do. Other contexts read prompts with full attention by default, but the
compressed cache is the harder test.

If facts are lost, heads are added in order of their *fact score*: the attention of the query heads
of the full cache from a question and its answer to the sentence of the fact. Attention to a fact
does not mean that it is used, so the questions are asked again without each of the weaker heads,
and the least useful ones are removed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..common.progress import Progress, Stop, silent
from ..errors import UnsupportedError
from ..model_file import open_model
from ..plan import Plan, make_plan
from ..profile import Profile, split_heads
from ..scores import group_max
from .facts import ROOM, Examiner, Outcome, make_exam
from .haystack import Haystack, MadeText
from .questions import Prompts

N_TOKENS = 1024  # maximum length of a prompt
WINDOW_DIVISOR = 3  # window = length of the prompt / 3; all facts are placed before it
TOLERANCE = 0.05  # maximum share of the facts that may be lost
MAX_LOSS = 0.5  # maximum loss of the mean log probability of the values, in nats
MIN_FOUND = 0.25  # share of the facts that the full cache has to find for a proof
MAX_BUDGET = 0.15  # maximum share of retrieval heads after heads were added
MIN_ROOM = 2  # heads that may always be added, even beyond MAX_BUDGET
EXTRA = 5  # candidates added beyond that limit, then pruned
MAX_TRIALS = 10  # heads that are left out one at a time, to take about as long as the scores
MIN_WORTH = 0.02  # nats: heads worth less are removed too, as long as the choice holds
# Approximate tokens that prove() reads if it changes heads: a text and 20 questions of 30 tokens,
# for the full cache, the choice, more heads, each trial and five smaller choices.
TOKENS_READ = (8 + MAX_TRIALS) * (N_TOKENS + 20 * 30)


@dataclass(frozen=True)
class Proof:
    """The outcome of a choice of heads, and the choice after it was changed.

    Attributes:
        retrieval: the heads, one uint8 array [n_head_kv] per layer.
        n_added, n_removed: KV heads added to and removed from the original choice (net).
        full, razor: the outcomes of the full cache and of these heads.
        plan: of the razor context in which the questions were asked.
    """

    retrieval: tuple[np.ndarray, ...]
    n_added: int
    n_removed: int
    full: Outcome
    razor: Outcome
    plan: Plan

    @property
    def conclusive(self) -> bool:
        """True if the full cache finds at least MIN_FOUND of the facts."""
        return is_enough(self.full)

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
            "facts_heads_removed": self.n_removed,
        }


def is_enough(full: Outcome) -> bool:
    """Return True if the full cache finds enough facts to compare with."""
    return full.n_found >= MIN_FOUND * len(full.found)


def is_as_good(razor: Outcome, full: Outcome) -> bool:
    """Return True if razor matches the full cache within TOLERANCE and MAX_LOSS."""
    n_lost = full.n_found - razor.n_found
    loss = float(full.logprob.mean() - razor.logprob.mean())
    return n_lost <= TOLERANCE * len(full.found) and loss <= MAX_LOSS


def prove(
    model_path: str | os.PathLike[str],
    profile: Profile,
    *,
    may_change: bool = True,
    haystack: Haystack | None = None,
    n_threads: int | None = None,
    n_gpu_layers: int = -1,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> Proof:
    """Plant facts, compare the profile's heads with the full cache, and change them if they lose.

    The changed heads are returned if they are as good as the full cache, or make the values more
    likely than the original heads do; otherwise the original heads. Likelihood decides because the
    number of facts found is noisier.

    Args:
        may_change: False: the profile's heads are examined as they are.
        haystack: the text to plant the facts in; None: sentences made by razor-local.
        n_gpu_layers: -1: all.

    Raises:
        UnsupportedError: the model cannot be examined: it has no tokenizer, or its context is too
            short to hold the facts.
        Stopped: between two operations of the computation.
        RazorError, GGUFError, OSError.
    """
    model = open_model(model_path)
    shape = model.shape
    n_tokens = min(N_TOKENS, (shape.n_ctx_train or N_TOKENS + ROOM) - ROOM)
    base = profile.with_options(max(n_tokens // WINDOW_DIVISOR, 1), None, None)
    plan = make_plan(shape, base, n_tokens + ROOM, "f16", "f16")
    if not plan.active:
        raise UnsupportedError(
            f"a context of {plan.n_ctx:,} tokens drops nothing ({plan.why_inactive})"
        )
    (progress or silent)(0, 1, "planting facts")
    exam = make_exam(
        Prompts(model),
        haystack or MadeText(),
        n_tokens,
        base.window_min + plan.block,
        base.sink_tokens,
    )
    with Examiner(
        model.path, shape, exam, n_threads, n_gpu_layers, progress, stop, prefill="razor"
    ) as examiner:
        full, per_query_head = examiner.full()
        fact_scores = group_max(per_query_head, shape.n_head, shape.n_head_kv)

        def ask(flat: np.ndarray, what: str) -> Outcome:
            heads = split_heads(flat, shape.n_head_kv)
            return examiner.ask(replace(base, retrieval=heads), what=f"planting facts: {what}")

        start = flat = profile.flat()
        razor = ask(flat, f"{flat.sum()} retrieval heads")
        if may_change and is_enough(full) and not is_as_good(razor, full):
            other, outcome = improve(start, fact_scores, ask, lambda o: is_as_good(o, full))
            if is_as_good(outcome, full) or outcome.logprob.sum() > razor.logprob.sum():
                flat, razor = other, outcome
    retrieval = split_heads(flat, shape.n_head_kv)
    plan = make_plan(shape, replace(base, retrieval=retrieval), exam.n_ctx, "f16", "f16")
    n_added, n_removed = (int((a & ~b & 1).sum()) for a, b in ((flat, start), (start, flat)))
    return Proof(retrieval, n_added, n_removed, full, razor, plan)


def improve(
    start: np.ndarray,
    fact_scores: np.ndarray,
    ask: Callable[[np.ndarray, str], Outcome],
    holds: Callable[[Outcome], bool],
) -> tuple[np.ndarray, Outcome]:
    """Return improved heads and their outcome.

    1. Add the heads with the highest fact scores, EXTRA more than may stay.
    2. Leave out each of the MAX_TRIALS retrieval heads with the lowest fact scores once.
    3. Remove those whose absence costs the least log probability, as many as the limit requires.
    4. Remove more of those worth less than MIN_WORTH, by bisection, as long as the rest holds and
       the removals cost at most MIN_WORTH per head. Redundant heads each seem worthless when left
       out alone.

    Args:
        start: u8 [KV heads], 1 for a retrieval head.
        fact_scores: f64 [KV heads].
        ask: the outcome with other heads; its second argument says what is done.
        holds: whether an outcome is good enough.
    """
    n_start, total = int(start.sum()), len(start)
    most = min(max(math.floor(MAX_BUDGET * total), n_start + MIN_ROOM), total)
    order = np.argsort(-fact_scores, kind="stable")
    together = start.copy()
    together[[i for i in order if not start[i]][: max(most + EXTRA - n_start, 0)]] = 1
    logprob = ask(together, f"{together.sum()} retrieval heads").logprob.mean()

    tested = [int(i) for i in order[::-1] if together[i]][:MAX_TRIALS]
    worth: dict[int, float] = {}  # nats
    for n, i in enumerate(tested):
        without = together.copy()
        without[i] = 0
        outcome = ask(without, f"without one head, {n + 1} of {len(tested)}")
        worth[i] = float(logprob - outcome.logprob.mean())
    least = sorted(tested, key=lambda i: worth[i])

    def leave(n: int) -> tuple[np.ndarray, Outcome]:
        flat = together.copy()
        flat[least[:n]] = 0
        return flat, ask(flat, f"{flat.sum()} retrieval heads")

    low = int(together.sum()) - most
    high = max(low, sum(value < MIN_WORTH for value in worth.values()))
    best = leave(low)
    while low < high and holds(best[1]):
        middle = (low + high + 1) // 2
        fewer = leave(middle)
        cost = best[1].logprob.mean() - fewer[1].logprob.mean()
        if holds(fewer[1]) and cost <= MIN_WORTH * (middle - low):
            low, best = middle, fewer
        else:
            high = middle - 1
    return best
