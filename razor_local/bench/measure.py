"""Measure a batch of contexts.

The contexts take turns and never run at once, and the side that begins alternates. The result is
the median of the paired ratios, because a slow second of the machine affects both sides alike.
After each token the cache is rolled back, so all contexts decode at the same depth. A turn has
several steps if they are short, because the first step after the other side's turn takes longer.
If a step takes seconds, fewer turns are made.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..common.progress import Clock
from ..plan import Plan
from .batches import CHUNKS, Batch, Settings, Side, Step
from .energy import EnergyMeter
from .random_cache import kept_bytes
from .worker import Context, Worker

MIN_PAIRS, MIN_BATCHES, MAX_BATCHES = 5, 2, 5
N_WARMUP = 3  # warm-up steps per side, fewer if they take seconds
SHORT_STEP = 0.05  # seconds; if all steps are shorter, a turn is a warm-up step and TURN more
TURN = 4
SHORT_ROUND = 0.5  # seconds; shorter rounds are made MAX_BATCHES times: the second is slow on GPUs
TILED = ("f32", "f16")  # KV types that flash attention on CPUs tiles, from batches of 64 on
TILED_CHUNK = 256  # smallest batch for these types: smaller ones cut tiles
SMALL_CHUNKS = (16, 4)  # for other types: a token's attention costs the same in any batch
ENERGY_SECONDS = 2.0  # seconds of decoding per side, or --seconds if that is less


class Contexts:
    """The open contexts. Sides that differ in their name alone share one."""

    def __init__(self, worker: Worker, full_worker: Worker, clock: Clock) -> None:
        self._worker, self._full_worker, self._clock = worker, full_worker, clock
        self._open: dict[Side, Context] = {}  # by the side without its name

    def take(self, sides: Sequence[Side]) -> list[Context]:
        """Return contexts of the sides after closing all others."""
        for side in self._open.keys() - {nameless(side) for side in sides}:
            self._open.pop(side).close()
        for side in sides:
            key = nameless(side)
            if key not in self._open:
                self._clock.show(f"making a context ({side.name})")
                worker = self._worker if side.razor else self._full_worker
                self._open[key] = worker.open(side)
            self._open[key].side = side
        return [self._open[nameless(side)] for side in sides]


def nameless(side: Side) -> Side:
    return replace(side, name="")


@dataclass
class Measure:
    """The measurements of one batch."""

    batch: Batch
    plans: dict[str, Plan]  # by name of the side
    weights_bytes: int
    contexts: Contexts
    settings: Settings
    meter: EnergyMeter
    clock: Clock
    idle: float | None = None  # seconds of a step of razor and the full cache without tokens

    def records(self, steps: Sequence[Step]) -> Iterator[tuple[Step, dict[str, Any]]]:
        """Run the steps and yield each with its record."""
        if not steps:
            return
        contexts = self.contexts.take(self.batch.sides)
        if not self._tiled and any(step.kind == "prefill" for step in steps):
            self._measure_idle(contexts)  # while the contexts are empty
        for step in steps:
            yield step, getattr(self, step.kind)(contexts, step.depth)

    def show(self, what: str) -> None:
        razor = self.batch.sides[0]
        self.clock.show(f"{razor.type_k}/{razor.type_v}, {razor.n_ctx:,} tokens: {what}")

    def memory(self, side: Side, depth: int) -> dict[str, Any]:
        """Measure one side alone: the bytes of its KV buffers and the peak while it decodes."""
        (context,) = self.contexts.take([side])
        self.show(f"memory ({side.name})")
        context.fill(depth)
        is_known = context.worker.ask("peak_rss", True) is not None
        context.run(2 if depth + 2 <= side.n_ctx else 1)
        return {
            "kv_bytes": context.kv_bytes(),
            "peak_rss": context.worker.ask("peak_rss") if is_known else None,
            "device": context.device_bytes(),
        }

    @property
    def _tiled(self) -> bool:
        types = {self.batch.sides[0].type_k, self.batch.sides[0].type_v}
        return len(types) == 1 and types <= set(TILED)

    def _measure_idle(self, contexts: list[Context]) -> float:
        if self.idle is None:
            self.idle = sum(
                min(self._first_step(context, 0), context.step()) for context in contexts[:2]
            )
        return self.idle

    def decode(self, contexts: list[Context], depth: int) -> dict[str, Any]:
        """Measure the milliseconds of decodes, and of reading the bytes that a decode needs."""
        self._fill(contexts, depth)
        turns = self._steps(contexts, f"decoding at {depth:,}", self.settings.seconds)
        needed = {
            name: self.weights_bytes + kept_bytes(plan, depth) for name, plan in self.plans.items()
        }
        read = {
            c.side.name: c.worker.ask("read_seconds", needed[c.side.name]) * 1e3 for c in contexts
        }
        return turns | {"read_bytes": needed, "read_ms": read}

    def _fill(self, contexts: list[Context], depth: int) -> None:
        for context in contexts:
            self.show(f"filling {depth:,} tokens ({context.side.name})")
            context.fill(depth)
            # A depth is often a multiple of the block, where the next step folds. Only one step
            # per block does that, so go past it.
            if 0 < depth < context.side.n_ctx - 1:
                context.append(1)

    def _steps(self, contexts: list[Context], what: str, seconds: float) -> dict[str, Any]:
        """Measure the milliseconds of a step in turns, as many as fit into seconds.

        If a turn has several steps, their median counts. The number of steps is in the result.
        """
        self.show(what)
        for _ in range(N_WARMUP):
            took = [context.step() for context in contexts]
            if sum(took) > 2:
                break
        short = max(took) < SHORT_STEP
        pairs = int(seconds / max(sum(took) * (1 + TURN if short else 1), 1e-9))
        pairs = min(max(MIN_PAIRS, pairs), self.settings.max_pairs)

        def turn(context: Context) -> float:
            # The first step of a turn takes longer: caches are cold, and a GPU switches processes.
            return statistics.median(context.steps(1 + TURN)[1:]) if short else context.step()

        ms = self._in_turn(contexts, what, pairs, turn)
        return {"ms": ms, "steps": TURN if short else 1}

    def _in_turn(
        self,
        contexts: list[Context],
        what: str,
        rounds: int,
        measure: Callable[[Context], float],
    ) -> dict[str, list[float]]:
        """Measure the milliseconds of each side in rounds whose order alternates."""
        ms: dict[str, list[float]] = {context.side.name: [] for context in contexts}
        for i in range(rounds):
            self.show(f"{what}, {i + 1} of {rounds}")
            for context in contexts if i % 2 == 0 else reversed(contexts):
                ms[context.side.name].append(round(measure(context) * 1e3, 6))
        return ms

    def prompt(self, contexts: list[Context], depth: int) -> dict[str, Any]:
        """Measure the milliseconds of a real prefill of depth tokens, at most one batch."""

        def prefill(context: Context) -> float:
            context.fill(0)
            return context.append(depth)

        what = f"a prompt of {depth:,} tokens"
        first = self._in_turn(contexts[:2], what, 1, prefill)
        seconds = sum(ms[0] for ms in first.values()) / 1e3
        return {"tokens": depth, "ms": self._rest(contexts[:2], what, first, seconds, prefill)}

    def prefill(self, contexts: list[Context], depth: int) -> dict[str, Any]:
        """Measure the milliseconds of a batch of prompt tokens after depth tokens."""
        contexts = contexts[:2]
        n_ctx, block = contexts[0].side.n_ctx, self.plans["razor"].block
        what = f"prefill at {depth:,}"
        budget = self.settings.seconds

        def prefill(context: Context, n_tokens: int) -> float:
            # Fill the cache again before whole blocks: a cache that was only rolled back to the
            # start of a block has already folded for it, and a prompt has not.
            if context.side.razor and n_tokens % block == 0:
                context.fill(0)
            context.rewind(depth)
            return context.append(n_tokens)

        # 1. Choose the tokens of a first round, fewer if attention takes most of the time.
        idle = 0.0 if self._tiled else self._measure_idle(contexts)
        took = sum(self._first_step(context, depth) for context in contexts)
        n_first = TILED_CHUNK if self._tiled else CHUNKS[-1]
        if not self._tiled and took > 3 * idle:
            n_first = next(
                (n for n in (n_first, *SMALL_CHUNKS) if took * n <= budget), SMALL_CHUNKS[-1]
            )
        n_first = min(n_first, n_ctx - depth)
        # 2. Time it, and choose the largest batch that the budget allows.
        first = self._in_turn(contexts, what, 1, lambda c: prefill(c, n_first))
        per_token = sum(ms[0] for ms in first.values()) / 1e3 / n_first
        n_tokens = next(
            (
                n
                for n in CHUNKS
                if n >= n_first and depth + n <= n_ctx and per_token * n * MIN_BATCHES <= budget
            ),
            n_first,
        )
        # 3. Measure.
        ms = self._rest(
            contexts,
            what,
            first if n_tokens == n_first else {},
            per_token * n_tokens,
            lambda c: prefill(c, n_tokens),
        )
        return {"tokens": n_tokens, "ms": ms}

    def _first_step(self, context: Context, depth: int) -> float:
        self.show(f"filling {depth:,} tokens ({context.side.name})")
        context.fill(depth)
        return context.step()

    def _rest(
        self,
        contexts: list[Context],
        what: str,
        first: dict[str, list[float]],
        seconds: float,
        measure: Callable[[Context], float],
    ) -> dict[str, list[float]]:
        """Measure the milliseconds of as many rounds as fit.

        Args:
            first: milliseconds of a first round, which count if it took 5 seconds or more.
                A shorter one was a warm-up.
            seconds: the time of a round.
        """
        least = MAX_BATCHES if seconds < SHORT_ROUND else MIN_BATCHES
        rounds = min(max(least, int(self.settings.seconds / max(seconds, 1e-9))), MAX_BATCHES)
        rounds = min(rounds, self.settings.max_pairs)
        if not first or seconds < 5:
            return self._in_turn(contexts, what, rounds, measure)
        rest = self._in_turn(contexts, what, rounds - 1, measure)
        return {name: first[name] + rest[name] for name in first}

    def fold(self, contexts: list[Context], depth: int) -> dict[str, Any]:
        """Measure the milliseconds of razor's decodes across folds near the end of the context."""
        razor = contexts[0]
        plan = self.plans["razor"]
        last = razor.side.n_ctx - plan.block  # the last position that opens a block
        # Start 8 tokens before a fold and end 8 after one.
        starts = [max(0, last - i * plan.block - 8) for i in range(3)]
        razor.fill(starts[-1])
        self.show("decoding across a fold")
        took = min(razor.step() for _ in range(N_WARMUP))
        n_steps = int(self.settings.seconds / took)
        folds = 1 + min(max(0, n_steps - 16) // plan.block, 2)
        razor.fill(starts[folds - 1])
        razor.run(1)
        n_tokens = last + 8 - razor.depth
        began = razor.depth
        ms = [round(seconds * 1e3, 6) for seconds in razor.run(n_tokens)]
        positions = [i for i in range(n_tokens) if (began + i) % plan.block == 0]
        return {"start": began, "ms": {"razor": ms}, "folds_at": positions}

    def energy(self, contexts: list[Context], depth: int) -> dict[str, Any]:
        """Measure the joules and seconds of some decoded tokens on each side."""
        found = {}
        for context in contexts:
            self.show(f"energy ({context.side.name})")
            self._fill([context], depth)
            took = context.step()
            room = context.side.n_ctx - context.depth
            n_tokens = int(min(ENERGY_SECONDS, self.settings.seconds) / took)
            n_tokens = max(1, min(room, max(4, n_tokens)))
            self.meter.start()
            context.run(n_tokens)
            joules, seconds = self.meter.stop()
            found[context.side.name] = {"tokens": n_tokens, "joules": joules, "seconds": seconds}
        return {"energy": found}

    def real_prefill(self, contexts: list[Context], depth: int) -> dict[str, Any]:
        """Compare a cache that was really prefilled with a random one of the same depth.

        The record has the seconds of the prefill and the milliseconds of decodes on both caches.
        """
        contexts = contexts[:2]
        seconds = {context.side.name: 0.0 for context in contexts}
        for context in contexts:
            context.fill(0)
        done, i = 0, 0
        while done < depth:
            n = min(CHUNKS[0], depth - done)
            self.show(f"a real prefill, {done:,} of {depth:,} tokens")
            for context in contexts if i % 2 == 0 else reversed(contexts):
                seconds[context.side.name] += context.append(n)
            done, i = done + n, i + 1
        budget = self.settings.seconds / 2
        if depth < contexts[0].side.n_ctx - 1:
            for context in contexts:
                context.append(1)
        real = self._steps(contexts, f"decoding at {depth:,} after a real prefill", budget)
        self._fill(contexts, depth)
        random = self._steps(contexts, f"decoding at {depth:,} in a random cache", budget)
        return {"seconds": seconds, "ms": real["ms"], "random_ms": random["ms"]}
