"""Measure plans of a model on a text, for the plan search in search.py.

Each plan reads the beginning of the text as a prompt, and predicts the tokens after it from its
compressed cache. Its predictions are compared with those of the full f16 cache, which reads the
text once; the log probabilities of the full cache are kept. A plan that is close enough must also
find the planted facts (facts.py) that the full cache finds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..common.journal import Journal
from ..common.machine import free_memory
from ..common.progress import Clock, Progress, Stop, check_stop
from ..errors import RazorError, UnsupportedError
from ..evaluation import set_source
from ..model_setup import ModelSetup
from ..model_shape import ModelShape
from ..plan import COMPENSATION_CELLS, N_CTX_PAD, SLACK, Plan, fold_block, split_type
from ..profile import Profile, kv_options
from ..scores import with_budget
from .facts import ROOM, Examiner, Outcome, make_exam
from .haystack import MadeText
from .perplexity import N_BATCH, Text, Window, log_softmax
from .policies import Policy, exact_full, may_share, type_fits
from .proof import is_as_good, is_enough
from .questions import Prompts
from .run import open_llama
from .search import (
    Candidate,
    OutOfTries,
    Space,
    find_best,
    find_smallest,
    last_that_holds,
    narrow,
    pareto,
)

if TYPE_CHECKING:
    from ..llama import Llama

# KV types of retrieval heads and of local heads, in the order in which they are tried
TYPES = (
    ("q8_0", "q8_0"), ("q8_0", "q4_0"), ("f16", "f16"), ("f16", "q8_0"), ("q4_0", "q4_0"),
)  # fmt: skip
FULL_TYPES = ("f16", "q8_0", "q5_0", "q4_0")  # of full caches, for comparison
MIN_WINDOW = 64  # smallest window of a plan with windows by layer, in tokens
LEAST_WEIGHT = 1e-5  # minimum loss of a layer, in nats: measured ones can be negative by chance
CELLS_DIVISOR = 2  # local heads keep at most half of the context, so that facts fit before it


def window_of(cells: int, profile: Profile) -> int:
    """Return the largest window that fits in this number of cells, 0 if none does."""
    room = cells - profile.sink_tokens - SLACK
    room -= COMPENSATION_CELLS if profile.compensation else 0
    return next((w for w in range(room, 0, -1) if w + fold_block(w) <= room), 0)


@dataclass(frozen=True)
class Figures:
    """The measurements of a plan.

    Attributes:
        kl: mean KL divergence from the full f16 cache over the counted tokens, in nats.
        kl_worst: mean KL divergence over the tenth of them with the largest divergence.
        same_top: share of tokens for which both caches predict the same most likely token.
        kv_bytes: bytes of the cache, counted by the native library.
        prefill: how the prompt was read, "full" or "razor".
    """

    kl: float
    kl_worst: float
    same_top: float
    kv_bytes: int
    prefill: str


class Tuner:
    """A model, a text, and the measurements of plans so far.

    Args:
        base: the profile whose heads and scores decide the order of the heads.
        windows: the parts of the text that are read; window.first is the length of the prompt.
        tries: maximum number of plans to measure that have the same window in all layers.
        by_layer: whether to search for a window for each layer afterwards.
    """

    def __init__(
        self,
        setup: ModelSetup,
        shape: ModelShape,
        base: Profile,
        text: Text,
        windows: list[Window],
        n_ctx: int,
        tries: int,
        journal: Journal,
        progress: Progress | None = None,
        stop: Stop | None = None,
        by_layer: bool = True,
    ) -> None:
        self.setup, self.shape, self.text, self.windows = setup, shape, text, windows
        self.base = replace(base, scope=None)
        self.n_ctx, self.tries, self._journal = n_ctx, tries, journal
        self.why_no_facts: str | None = None
        self._progress, self._stop = progress, stop
        self._full: list[np.ndarray] = []
        self._heads: dict[int, Profile] = {}  # by the number of retrieval heads
        self._examiner: Examiner | None = None
        self._sources: dict[str, Llama] = {}  # full caches by KV type
        self._stack = ExitStack()
        self.by_layer = by_layer
        plans = len(FULL_TYPES) + tries
        if by_layer:
            plans += shape.n_layer + 2 * len(self.layer_windows)
        reads = len(windows) * plans + 2 + tries // 2
        self._clock = Clock(progress, reads)

    def __enter__(self) -> Tuner:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # -- plans --

    @property
    def space(self) -> Space:
        """Return the plans to choose from. Raises UnsupportedError if there are none."""
        cells = tuple(
            n
            for n in range(N_CTX_PAD, self.n_ctx // CELLS_DIVISOR + 1, N_CTX_PAD)
            if window_of(n, self.base)
        )
        types = tuple(pair for pair in TYPES if all(type_fits(self.shape, t) for t in pair))
        flat = self.base.flat()
        if not cells or not types:
            raise UnsupportedError(
                f"a context of {self.n_ctx:,} tokens is too small to tune; use a larger one"
            )
        size = cache(lambda c: self.plan(c).kv_bytes)
        return Space(len(flat), cells, types, size, int(flat.sum()))

    def profile(self, candidate: Candidate) -> Profile:
        n = candidate.n_heads
        if n not in self._heads:
            self._heads[n] = with_budget(self.base, self.shape, n / len(self.base.flat()))
        if not candidate.windows:
            return self._heads[n].with_options(window_of(candidate.cells, self.base), None, None)
        scope = tuple(
            np.where(heads == 1, 0, window).astype(np.uint32)
            for heads, window in zip(self._heads[n].retrieval, candidate.windows, strict=True)
        )
        return replace(self._heads[n], scope=scope)

    def plan(self, candidate: Candidate) -> Plan:
        return self.policy(candidate).plan(self.shape, self.n_ctx)

    def policy(self, candidate: Candidate) -> Policy:
        """Return the policy of a candidate. Its name identifies the candidate."""
        if candidate.n_heads == len(self.base.flat()):
            return exact_full(self.shape, candidate.kv_type)
        types = f"{candidate.kv_type}+{candidate.local_type}"
        window = str(window_of(candidate.cells, self.base))
        if candidate.windows:
            window = f"by-layer-{sha256(repr(candidate.windows).encode()).hexdigest()[:8]}"
        return Policy(
            f"razor-{candidate.n_heads}-heads-{window}-{types}",
            f"razor-{types}",
            self.profile(candidate),
            candidate.kv_type,
            local_type=candidate.local_type,
        )

    def full(self, kv_type: str) -> Candidate:
        """Return a full cache as a candidate."""
        return Candidate(len(self.base.flat()), self.n_ctx, kv_type, kv_type)

    @property
    def layer_windows(self) -> tuple[int, ...]:
        """Return the windows that layers can have, in ascending order; () in a small context.

        These are at most plan.MAX_WINDOWS.
        """
        half, least = self.n_ctx // CELLS_DIVISOR, max(self.n_ctx // 32, MIN_WINDOW)
        some = (least, self.n_ctx // 8, self.n_ctx // 4, half - fold_block(half))
        return some if least < self.n_ctx // 8 else ()

    # -- measurements --

    def measure(self, candidate: Candidate) -> Figures:
        """Return the figures of a plan, which is measured only once. Raises RazorError, Stopped."""
        if candidate == self.full("f16"):  # the others are compared with it
            return Figures(0.0, 0.0, 1.0, self.plan(candidate).kv_bytes, "full")
        key = {"kind": "plan", "policy": self.policy(candidate).name}
        for record in self._journal.records:
            if all(record.get(name) == value for name, value in key.items()):
                self._clock.done(len(self.windows))
                return Figures(**{name: record[name] for name in Figures.__dataclass_fields__})
        figures = self._compare(self.policy(candidate))
        plan = {
            "n_heads": candidate.n_heads,
            "cells": candidate.cells,
            "kv_type": candidate.kv_type,
            "local_type": candidate.local_type,
            "windows": candidate.windows,
        }
        self._journal.add(key | plan | vars(figures))
        return figures

    def _compare(self, policy: Policy) -> Figures:
        if not self._full:
            self._full = [x for x, *_ in self._read(exact_full(self.shape, "f16"))]
        found = self._read(policy)
        kl, same = [], []
        for full, (ours, *_) in zip(self._full, found, strict=True):
            for start in range(0, len(full), N_BATCH):
                p, q = (x[start : start + N_BATCH].astype(np.float64) for x in (full, ours))
                kl.append(np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0))
                same.append(p.argmax(axis=1) == q.argmax(axis=1))
        each = np.sort(np.concatenate(kl))[::-1]
        worst = each[: max(len(each) // 10, 1)]
        return Figures(
            round(float(each.mean()), 9),
            round(float(worst.mean()), 9),
            round(float(np.concatenate(same).mean()), 6),
            *found[-1][1:],
        )

    def _read(self, policy: Policy) -> list[tuple[np.ndarray, int, str]]:
        """Return (log probabilities f32 [counted, n_vocab], KV bytes, prefill) of each window."""
        found = []
        self._clock.show(f"{policy.name}: loading")
        source = self._source(policy.kv_type) if may_share(policy) else None
        if source is not None and policy.name == exact_full(self.shape, policy.kv_type).name:
            llama, source = source, None
        else:
            llama = open_llama(self.setup, policy, self.n_ctx, self._stop, n_batch=N_BATCH)
        try:
            if source is not None and llama._full_prefill:
                set_source(llama, source)
            for window in self.windows:
                tokens = self.text.window(window).tolist()
                prompt = window.first - 1  # its last token predicts the first one that counts
                llama.reset()
                llama.prefill(
                    tokens[:prompt],
                    lambda done, total, _: self._clock.show(
                        f"{policy.name}, {done:,.0f} of {total:,.0f} tokens"
                    ),
                    self._stop,
                )
                check_stop(self._stop)
                rows = []
                for logits in llama.eval_logits(tokens[prompt:-1]):
                    check_stop(self._stop)
                    rows.append(log_softmax(logits).astype(np.float32))
                whole = np.concatenate(rows)
                if not np.isfinite(whole.max()):
                    raise RazorError(
                        f"{policy.name} computes logits that are not numbers; the model file is"
                        " damaged, or its values are too large for their types"
                    )
                memory = llama.memory()
                found.append((whole, memory.kv_bytes, memory.prefill))
                self._clock.done(1)
        finally:
            if llama not in self._sources.values():
                llama.close()
        return found

    def _source(self, kv_type: str) -> Llama | None:
        """Return a full cache that reads the prompt once for all plans of a KV type.

        None if there are several windows, whose prompts it would have to read again for each
        plan, or if memory is short.
        """
        if len(self.windows) > 1:
            return None
        if kv_type not in self._sources:
            policy = exact_full(self.shape, kv_type)
            if policy.plan(self.shape, self.n_ctx).kv_bytes > free_memory() // 4:
                return None
            llama = open_llama(self.setup, policy, self.n_ctx, self._stop, n_batch=N_BATCH)
            self._sources[kv_type] = self._stack.enter_context(closing(llama))
        return self._sources[kv_type]

    def facts(self, candidate: Candidate) -> Outcome | None:
        """Return how a plan answers the questions about planted facts, None if there are none.

        why_no_facts then has the reason.
        """
        if self.why_no_facts is not None:
            return None
        policy = self.policy(candidate)
        for record in self._journal.records:
            if record["kind"] == "facts" and record["policy"] == policy.name:
                return Outcome(np.array(record["found"], bool), np.array(record["logprob"]))
        try:
            outcome = self._ask(policy)
        except UnsupportedError as error:
            self.why_no_facts = str(error)
            return None
        self._journal.add(
            {
                "kind": "facts",
                "policy": policy.name,
                "found": outcome.found.tolist(),
                "logprob": np.round(outcome.logprob, 6).tolist(),
            }
        )
        self._clock.done(1)
        return outcome

    def _ask(self, policy: Policy) -> Outcome:
        if self._examiner is None:
            reach = self.n_ctx // CELLS_DIVISOR
            exam = make_exam(
                Prompts(self.setup.file),
                MadeText(),
                self.n_ctx - ROOM,
                reach,
                self.base.sink_tokens,
            )
            self._examiner = self._stack.enter_context(
                Examiner(
                    Path(self.setup.model),
                    self.shape,
                    exam,
                    self.setup.n_threads,
                    self.setup.n_gpu_layers,
                    lambda *_: self._clock.show("planting facts"),
                    self._stop,
                    self.setup.prefill,
                )
            )
        return self._examiner.ask(policy.profile, **policy.types)

    def keeps_facts(self, candidate: Candidate) -> bool:
        """Return True if the plan finds the facts of the full f16 cache, within `convert`'s limits.

        If the full cache itself finds too few facts for a comparison, every plan is good enough.
        """
        full = self.facts(self.full("f16"))
        if full is None or not is_enough(full):
            return True
        razor = self.facts(candidate)
        assert razor is not None  # the same questions were asked of the full cache
        return is_as_good(razor, full)


@dataclass(frozen=True)
class Goal:
    """The goal of a search: the smallest cache within max_kl, or the lowest KL within max_bytes."""

    max_kl: float | None
    max_bytes: int | None


@dataclass(frozen=True)
class Tuned:
    """The outcome of a search.

    Attributes:
        best: the best plan that reaches the goal, None if there is none or a full cache is better.
        why: why best is None, otherwise "".
        measured: the figures of every plan and full cache, in the order of measuring.
        lost_facts: plans that lost planted facts.
    """

    best: Candidate | None
    why: str
    measured: dict[Candidate, Figures]
    lost_facts: set[Candidate] = field(default_factory=set)

    def front(self) -> list[Candidate]:
        """Return the Pareto front of bytes and KL: plans that keep the facts, and full caches."""
        some = [c for c in self.measured if c not in self.lost_facts]
        points = [(self.measured[c].kv_bytes, self.measured[c].kl) for c in some]
        return [some[i] for i in pareto(points)]


def tune(tuner: Tuner, goal: Goal) -> Tuned:
    """Search for the best plan of a model.

    Raises RazorError, Stopped; the journal keeps the measurements.
    """
    space = tuner.space
    smallest = min(space.size(Candidate(0, space.cells[0], *types)) for types in space.types)
    if goal.max_bytes is not None and smallest > goal.max_bytes:
        raise RazorError(
            f"the smallest plan takes {smallest:,} bytes, more than {goal.max_bytes:,}; allow more"
            " bytes, or use a smaller context"
        )
    measured: dict[Candidate, Figures] = {}
    lost: set[Candidate] = set()

    full = {t: tuner.full(t) for t in FULL_TYPES if type_fits(tuner.shape, t)}

    def measure(candidate: Candidate) -> Figures:
        if candidate not in measured:
            if not candidate.windows and len(measured) == len(full) + tuner.tries:
                raise OutOfTries
            measured[candidate] = tuner.measure(candidate)
        return measured[candidate]

    def keeps_facts(candidate: Candidate) -> bool:
        if not tuner.keeps_facts(candidate):
            lost.add(candidate)
        return candidate not in lost

    def loss(candidate: Candidate) -> float:
        return measure(candidate).kl

    for candidate in full.values():
        measure(candidate)
    best: Candidate | None = None
    if goal.max_kl is not None:
        bound = goal.max_kl
        enough = {t for t, c in full.items() if measured[c].kl <= bound}
        below = min(measured[full[t]].kv_bytes for t in enough)  # f16 is always among them
        space = replace(space, types=tuple(pair for pair in space.types if pair[0] in enough))
        best = find_smallest(space, lambda c: loss(c) <= bound, below)
        if best is not None and not keeps_facts(best):
            # ask the measured plans first: this is quicker than measuring a new plan
            held = [c for c in measured if c not in full.values() and measured[c].kl <= bound]
            held = sorted((c for c in held if measured[c].kv_bytes < below), key=space.size)
            best = next((c for c in held if keeps_facts(c)), None)
            limit = below if best is None else space.size(best)
            smaller = find_smallest(space, lambda c: loss(c) <= bound and keeps_facts(c), limit)
            best = smaller or best
        if best is not None and tuner.by_layer:
            narrowest = narrow_layers(
                tuner, best, loss, lambda c: loss(c) <= bound and keeps_facts(c)
            )
            if narrowest is not None and tuner.plan(narrowest).kv_bytes < space.size(best):
                best = narrowest
        why = _why_none(measured, full, lost, bound, below)
    else:
        assert goal.max_bytes is not None
        ranked = find_best(space, loss, goal.max_bytes)
        best = next((c for c in ranked if keeps_facts(c)), None)
        if best is not None and tuner.by_layer:
            most = goal.max_bytes
            fitting = narrow_layers(
                tuner, best, loss, lambda c: tuner.plan(c).kv_bytes <= most, True
            )
            if fitting is not None and loss(fitting) < loss(best) and keeps_facts(fitting):
                best = fitting
        fits = [c for c in full.values() if measured[c].kv_bytes <= goal.max_bytes]
        better = [c for c in fits if best is None or measured[c].kl <= measured[best].kl]
        if better:
            name = f"full-{min(better, key=lambda c: measured[c].kl).kv_type}"
            best, why = None, f"the full cache {name} fits in these bytes and is as close or closer"
        else:
            why = f"each of the {len(ranked)} plans that fit loses planted facts"
    return Tuned(best, "" if best is not None else why, measured, lost)


def narrow_layers(
    tuner: Tuner,
    best: Candidate,
    loss: Callable[[Candidate], float],
    holds: Callable[[Candidate], bool],
    first: bool = False,
) -> Candidate | None:
    """Return a plan with the heads and types of the best one, and a window for each layer.

    Return None if no such plan holds. The cost of a narrow window differs more than tenfold between
    layers. Each layer is therefore narrowed alone, while all others have the second largest window.
    The losses weight the layers for narrow(), which decides which layer is narrowed next.

    Args:
        loss: measures a plan.
        holds: returns True if a plan is good enough.
        first: return the first plan that holds, the largest one, instead of the smallest one.
    """
    windows = tuner.layer_windows
    n_local = [int(sum(heads == 0)) for heads in tuner.profile(best).retrieval]
    if not windows or not any(n_local):
        return None

    def plan(of_layers: Sequence[int]) -> Candidate:
        return Candidate(best.n_heads, 0, best.kv_type, best.local_type, tuple(of_layers))

    n_layer = len(n_local)
    losses = [loss(plan([window] * n_layer)) for window in windows]
    wide = [windows[-2]] * n_layer
    weights = np.full(n_layer, LEAST_WEIGHT)
    for layer in np.flatnonzero(n_local).tolist():
        one = [*wide[:layer], windows[0], *wide[layer + 1 :]]
        weights[layer] = max(loss(plan(one)) - losses[-2], LEAST_WEIGHT)
    path = [plan(p) for p in narrow(windows, losses, (weights / weights.sum()).tolist(), n_local)]
    if first:
        index = next((i for i, c in enumerate(path) if holds(c)), -1)
    else:
        size = tuner.plan(best).kv_bytes
        at = min(range(len(path)), key=lambda i: abs(tuner.plan(path[i]).kv_bytes - size))
        index = last_that_holds(len(path), at, lambda i: holds(path[i]))
    return path[index] if index >= 0 else None


def _why_none(
    measured: dict[Candidate, Figures],
    full: dict[str, Candidate],
    lost: set[Candidate],
    bound: float,
    below: int,
) -> str:
    """Return a message: why no plan reaches the goal, and which one comes closest."""
    plans = {c: f for c, f in measured.items() if c not in full.values() and c not in lost}
    (smallest,) = (t for t, c in full.items() if measured[c].kv_bytes == below)
    why = f"none of the plans that are smaller than the full {smallest} cache has a KL divergence"
    why += f" of at most {bound:g} nats"
    why += f" and finds all facts ({len(lost)} lost some)" if lost else ""
    if plans:
        c, f = min(plans.items(), key=lambda item: item[1].kl)
        why += (
            f"; the best one has {f.kl:.4f} nats with {f.kv_bytes:,} bytes ({c.n_heads} retrieval"
            f" heads, types {c.kv_type} and {c.local_type})"
        )
    return why


def options_of(candidate: Candidate) -> str:
    """Return the command-line options that select the KV types of a plan."""
    return kv_options(*split_type(candidate.kv_type), *split_type(candidate.local_type))


def tuned_profile(tuner: Tuner, tuned: Tuned, goal: Goal, text: str) -> Profile:
    """Return the profile of the best plan, with its measurements."""
    assert tuned.best is not None
    best, figures = tuned.best, tuned.measured[tuned.best]
    profile = tuner.profile(best)
    n_full = tuned.measured[tuner.full("f16")].kv_bytes
    record: dict[str, str | int] = {
        "select": "tune",
        "tune_kl": f"{figures.kl:.6f}",
        "tune_kl_worst": f"{figures.kl_worst:.6f}",
        "tune_tokens": sum(w.end - w.start - w.first for w in tuner.windows),
        "tune_context": tuner.n_ctx,
        "tune_prefill": figures.prefill,
        "tune_kv_bytes": str(figures.kv_bytes),
        "tune_kv_bytes_full": str(n_full),
        "tune_options": options_of(best),
        "tune_text": text[:200],
    }
    if goal.max_kl is not None:
        record["tune_max_kl"] = f"{goal.max_kl:g}"
    else:
        record["tune_max_bytes"] = str(goal.max_bytes)
    full, razor = tuner.facts(tuner.full("f16")), None
    if full is not None and is_enough(full):
        razor = tuner.facts(best)
    if full is not None and razor is not None:
        record |= {
            "facts": len(full.found),
            "facts_found": razor.n_found,
            "facts_found_full": full.n_found,
            "facts_tokens": tuner.n_ctx,
            "facts_window": max(best.windows, default=window_of(best.cells, tuner.base)),
            "facts_kv_bytes": str(figures.kv_bytes),
            "facts_kv_bytes_full": str(n_full),
        }
    kept = {k: v for k, v in profile.calibration.items() if k not in ("select", "budget")}
    return replace(profile, calibration=kept | record)
