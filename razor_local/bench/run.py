"""Razor against a full cache: speed at depth, memory, folding. What `razor-local bench` measures.

The contexts that are compared live in one process and take turns, never at once, and what counts is
the median of the paired ratios: a machine that is slow for a second is slow for both. Whoever comes
first alternates. After each token the cache is rolled back, so that all of them are decoded at the
same depth. Where steps are short a turn is several of them, because the first one after the other
side's turn takes longer; where a step takes seconds, fewer turns are made.

Batches of prefill begin where a prompt's do, at multiples of the largest batch, which any fold
block divides: one that crosses the end of a block would be cut in two.

Measurements come in the order that loads the fewest random caches: the deepest first, because a
full cache only has to lose tokens then, and contexts that the next batch needs too stay open.

A context is as large as its depth needs, as a user would set it: the window of razor is a part of
the context, so a small depth in a large context has another plan. Settings.n_ctx fixes one size for
all depths instead.

Every finished measurement is a record, a dict of plain numbers; report.py makes figures of
them.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from ..common.journal import Journal
from ..common.machine import describe_code, describe_gpus, describe_machine, free_memory
from ..common.progress import Clock, Progress
from ..errors import RazorError
from ..gguf.header import read_header
from ..gguf.split import read_parts
from ..model_setup import ModelSetup
from ..plan import MAX_N_CTX, N_CTX_PAD, Plan
from ..profile import ModelShape, Profile
from .energy import EnergyMeter
from .shapes import is_random
from .worker import READ_CAP, Context, Side, Worker, kept_bytes

VERSION = 1  # of the records
MIN_DEPTH = 8192  # smaller depths are measured in a context for this one: razor starts at about 4k
ROOM = 512  # tokens that a context is larger than its depth: a batch of prefill
MIN_PAIRS, MIN_BATCHES, MAX_BATCHES = 5, 2, 5
N_WARMUP = 3  # steps per side that do not count, unless they take seconds
# seconds: where no side's step takes longer, a turn is one that does not count and TURN more
SHORT_STEP = 0.05
TURN = 4
CHUNKS = (512, 256, 128, 64)  # tokens of a batch of prefill
ALIGNED = CHUNKS[0]  # depths of prefill are multiples of it; it is one of any fold block
# seconds: of shorter rounds MAX_BATCHES always, because a GPU's second one takes longer
SHORT_ROUND = 0.5
TILED = ("f32", "f16")  # KV types that flash attention on CPUs tiles, in batches of 64 and more
TILED_CHUNK = (
    256  # at least: in smaller ones tiles are cut, more of them where there are two groups
)
SMALL_CHUNKS = (16, 4)  # with the others a token's attention costs the same in any batch
SHORT_PROMPT = 512  # tokens that are prefilled for real
ENERGY_SECONDS = 2.0  # of decoding per side, or --seconds if that is less
# of steps, in the order in which a batch makes them; the real prefill leaves other rows behind
KINDS = ("memory", "decode", "energy", "prefill", "prompt", "fold", "fit", "real_prefill")
FIT_FROM = 4096  # tokens
FIT_WINDOW = 2048  # at most: the window of the fit has to be full at FIT_FROM


@dataclass(frozen=True)
class Settings:
    """What is measured.

    types: (K, V) of razor and of the full cache it is compared with; where that is not f16, with a
    full f16 cache too. n_ctx: tokens, 0: as each depth needs. max_pairs: of turns to decode;
    seconds: what one measurement may take before it makes fewer pairs. real_prefill: tokens that
    are prefilled for real as a check of random caches, with the first type, in every context that
    holds them, 0: as many as fold, in the smallest context, None: no check.
    """

    depths: tuple[int, ...] = (0, 8192, 32768)
    types: tuple[tuple[str, str], ...] = (("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q4_0"))
    n_ctx: int = 0
    max_pairs: int = 100
    seconds: float = 15.0
    real_prefill: int | None = None
    fit: bool = True


@dataclass(frozen=True)
class Step:
    """One measurement: its kind, the depth (or tokens, or n_ctx) it is about, its side if one."""

    kind: str
    depth: int
    side: str = ""

    @property
    def cost(self) -> float:
        """A guess of the seconds it takes with a model of 1B on two cores, for the time left."""
        d = self.depth
        return {
            "memory": 2 + d / 16000,
            "decode": min(20, 4 + d / 512) + d / 3000,
            "prompt": 1 + d / 12,
            "prefill": 17 + d / 2000,
            "fold": 12.0,
            "energy": 6.0,
            "fit": 2 + d / 4000,
            "real_prefill": 20 + d / 15,
        }[self.kind]


@dataclass(frozen=True)
class Batch:
    """Contexts that are open together, and what is measured on them. sides[0] is razor's."""

    sides: tuple[Side, ...]
    steps: tuple[Step, ...]

    def key(self, step: Step) -> dict[str, Any]:
        """The fields by which a record is told from all others."""
        razor = self.sides[0]
        return {
            "kind": step.kind,
            "type_k": razor.type_k,
            "type_v": razor.type_v,
            "n_ctx": razor.n_ctx,
            "window": razor.window,
            "depth": step.depth,
            "side": step.side,
        }


# -- what to measure


def make_batches(
    settings: Settings, shape: ModelShape, profile: Profile, energy: bool = False
) -> list[Batch]:
    """All measurements, the small contexts first. Raises RazorError for what cannot be measured."""
    if not settings.depths or not settings.types:
        raise RazorError("there is nothing to measure: name a depth and a KV type")
    groups: dict[int, list[int]] = {}
    for depth in sorted(set(settings.depths)):
        groups.setdefault(_context_size(settings, shape, depth), []).append(depth)
    batches = []
    for n_ctx, depths in sorted(groups.items()):
        for i, types in enumerate(settings.types):
            sides = _sides(types, n_ctx)
            plan = sides[0].plan(shape, profile)
            for side in sides[1:]:
                side.plan(shape, profile)  # a type may not fit the head size
            steps = [Step("memory", depths[-1], side.name) for side in sides]
            # at depth 0 a large context costs what a small one does
            points = {0} if n_ctx == min(groups) else set()
            points |= {_point(depth, n_ctx) for depth in depths if depth > SHORT_PROMPT}
            fills = _round_up(plan.sink_tokens + plan.window + plan.block, ALIGNED)
            if fills < max(points, default=0):
                points.add(fills)
            steps += [Step("decode", depth) for depth in depths]
            steps += [Step("prompt", depth) for depth in depths if 0 < depth <= SHORT_PROMPT]
            real = _real_tokens(settings, groups, n_ctx, fills) if i == 0 else 0
            if real:
                points |= {_point(real, n_ctx)}
                points |= {fills} if fills < max(points) else set()
            steps += [Step("prefill", point) for point in sorted(points)]
            steps += [Step("fold", depths[-1])]
            if energy:
                steps += [Step("energy", depths[-1])]
            if real:
                steps += [Step("real_prefill", real)]
            batches.append(Batch(sides, tuple(steps)))
    if settings.fit:
        batches += _fit_batch(settings, shape, profile, max(groups), max(settings.depths))
    return batches


def _context_size(settings: Settings, shape: ModelShape, depth: int) -> int:
    if settings.n_ctx:
        n_ctx = _round_up(settings.n_ctx, N_CTX_PAD)
        if depth + 1 > n_ctx:
            raise RazorError(
                f"depth {depth} does not fit into a context of {n_ctx} tokens; raise -c"
            )
        return n_ctx
    least = min(MIN_DEPTH, shape.n_ctx_train or MIN_DEPTH)
    n_ctx = _round_up(max(depth, least) + ROOM, N_CTX_PAD)
    if n_ctx > MAX_N_CTX:
        raise RazorError(f"depth {depth} is more than a context can hold ({MAX_N_CTX} tokens)")
    return n_ctx


def _sides(types: tuple[str, str], n_ctx: int, window: int = 0) -> tuple[Side, ...]:
    sides = [Side("razor", True, *types, n_ctx, window), Side("full", False, *types, n_ctx)]
    if types != ("f16", "f16"):
        sides.append(Side("full_f16", False, "f16", "f16", n_ctx))
    return tuple(sides)


def _point(depth: int, n_ctx: int) -> int:
    """The last depth, up to this one, where a batch begins and fits, one of 256 tokens at least."""
    return min(depth, n_ctx - CHUNKS[-1]) // ALIGNED * ALIGNED


def _real_tokens(settings: Settings, sizes: Collection[int], n_ctx: int, fills: int) -> int:
    """Tokens of the real prefill in a context of n_ctx, one of these sizes; 0: none there."""
    wanted, largest = settings.real_prefill, max(sizes)
    if wanted is None or (wanted == 0 and n_ctx > min(sizes)):
        return 0
    real = wanted or min(fills + ALIGNED, n_ctx - CHUNKS[-1])
    if real > largest - CHUNKS[-1]:
        raise RazorError(
            f"a real prefill of {real} tokens does not fit into the largest context, of {largest}"
            " tokens; choose fewer"
        )
    return real if real <= n_ctx - CHUNKS[-1] else 0


def _fit_batch(
    settings: Settings, shape: ModelShape, profile: Profile, n_ctx: int, deepest: int
) -> list[Batch]:
    """Decoding over depth in one context with a window that does not change and is full from
    FIT_FROM on: a line whose slope is the share of the retrieval heads."""
    depths: list[int] = []
    while FIT_FROM << len(depths) <= deepest:
        depths.append(FIT_FROM << len(depths))
    if len(depths) < 3:
        return []  # any two points are on a line
    window = min(profile.window_min, FIT_WINDOW)
    sides = _sides(settings.types[0], n_ctx, window)[:2]
    sides[0].plan(shape, profile)
    return [Batch(sides, tuple(Step("fit", depth) for depth in depths))]


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# -- a run


def open_journal(path: Path | None, head: dict[str, Any]) -> Journal:
    """Raises RazorError for a file of another run, OSError."""

    def identity(head: dict[str, Any]) -> dict[str, Any]:
        names = ("version", "model", "setup", "settings", "code")
        cpu = (head.get("machine") or {}).get("cpu")  # its load may differ
        return {name: head.get(name) for name in names} | {"machine": cpu}

    def check(head: dict[str, Any], records: list[dict[str, Any]]) -> None:
        """Format the records, as is done when the run has ended."""
        from .report import FORMATS, Report, format_report

        for kind in FORMATS:
            format_report(Report(head, records), kind)

    return Journal(path, head, "a benchmark", identity, check)


def run_bench(
    setup: ModelSetup,
    settings: Settings,
    *,
    stock_lib: Path | None = None,
    resume: Path | None = None,
    only: Collection[str] = KINDS,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measures everything that resume does not hold yet; the head of the run and its records.

    only: the KINDS to measure now; a run that is resumed with others has the rest too. stock_lib:
    folder of a stock build for the full caches, None: the package's own library with razor off.
    Raises RazorError where a context cannot be set up or memory does not suffice.
    """
    shape, profile = setup.read()
    meter = EnergyMeter()
    batches = make_batches(settings, shape, profile, bool(meter.sources))
    head = _describe_run(setup, settings, stock_lib, shape, profile, meter)
    for batch in batches:
        _check_memory(setup, batch, shape, profile, head["model"]["file_bytes"])
    with ExitStack() as stack:
        journal = stack.enter_context(open_journal(resume, head))
        left = [
            [s for s in batch.steps if s.kind in only and not journal.has(batch.key(s))]
            for batch in batches
        ]
        clock = Clock(progress, sum(step.cost for steps in left for step in steps))
        if not any(left) and journal.head is not None:
            return journal.head, journal.records
        clock.show("loading the model")
        worker = Worker(setup, beside_another=stock_lib is not None)
        stack.callback(worker.close)
        full_worker = worker
        if stock_lib is not None:
            full_worker = Worker(replace(setup, lib=str(stock_lib)), beside_another=True)
            stack.callback(full_worker.close)
        if journal.head is None:
            journal.begin(head | {"library": worker.ask("describe")})
        contexts = _Contexts(worker, full_worker, clock)
        measures = []
        for batch, steps in zip(batches, left, strict=True):
            plans = {side.name: side.plan(shape, profile) for side in batch.sides}
            measure = _Measure(
                batch, plans, head["model"]["weights_bytes"], contexts, settings, meter, clock
            )
            measures.append((measure, steps))
        for measure, step, record in _records(measures):
            journal.add(measure.batch.key(step) | record)
            clock.done(step.cost)
    assert journal.head is not None
    return journal.head, journal.records


def _describe_run(
    setup: ModelSetup,
    settings: Settings,
    stock_lib: Path | None,
    shape: ModelShape,
    profile: Profile,
    meter: EnergyMeter,
) -> dict[str, Any]:
    header = read_header(setup.model)
    heads = profile.flat()
    return {
        "version": VERSION,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "code": describe_code(),
        "machine": describe_machine() | {"gpus": describe_gpus(), "energy_meters": meter.sources},
        "model": {
            "file": Path(setup.model).name,
            "name": shape.name,
            "arch": shape.arch,
            "random_weights": is_random(header),
            "fingerprint": shape.fingerprint,
            "file_bytes": sum(part.file_size for part in read_parts(header)),
            "weights_bytes": weights_bytes(setup.model),
            "n_layer": shape.n_layer,
            "kv_heads": int(heads.size),
            "retrieval_kv_heads": int(heads.sum()),
            "retrieval_sha256": hashlib.sha256(heads.tobytes()).hexdigest()[:16],
            "window_min": profile.window_min,
            "window_divisor": profile.window_divisor,
            "sink_tokens": profile.sink_tokens,
        },
        "setup": {k: v for k, v in asdict(setup).items() if k not in ("model", "sidecar", "lib")}
        | {"full_cache": "another build" if stock_lib else "the same library, razor off"},
        "settings": asdict(settings),
    }


def weights_bytes(model: str | os.PathLike[str]) -> int:
    """Bytes of weights that decoding one token reads: all but the token embedding where the output
    head is another tensor, and of the experts those that a token uses."""
    header = read_header(model)
    parts = read_parts(header)
    tensors = {tensor.name: tensor.nbytes for part in parts for tensor in part.tensors}
    if "output.weight" in tensors:
        tensors.pop("token_embd.weight", None)
    tensors.pop("position_embd.weight", None)
    arch = header.string("general.architecture")
    count, used = (
        header.entries.get(f"{arch}.{key}") for key in ("expert_count", "expert_used_count")
    )
    share = 1.0
    if count and used and isinstance(count.value, int) and isinstance(used.value, int):
        share = used.value / count.value if count.value else 1.0
    return round(sum(n * (share if "_exps" in name else 1.0) for name, n in tensors.items()))


def _check_memory(
    setup: ModelSetup, batch: Batch, shape: ModelShape, profile: Profile, model_bytes: int
) -> None:
    free = free_memory()
    if free is None:
        return
    plans = [side.plan(shape, profile) for side in batch.sides]
    deepest = max(step.depth for step in batch.steps)
    states = [kept_bytes(plan, plan.n_ctx if plan.active else deepest) for plan in plans]
    needed = max(states) + (512 << 20)  # buffers of the graph are a guess
    if not setup.n_gpu_layers:
        # beside the contexts, one at a time: a state, or what is read to time reading
        beside = min(READ_CAP, max(states) + model_bytes)
        needed = max(needed, beside + (512 << 20))
        needed += model_bytes + sum(plan.kv_bytes for plan in plans)
    if needed > free:
        raise RazorError(
            f"{plans[0].type_k}/{plans[0].type_v} against full caches of {plans[0].n_ctx:,} tokens"
            f" needs about {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free;"
            " leave out that depth or type"
        )


# -- measurements


class _Contexts:
    """The open contexts. Those that are alike have one, under the name of whoever uses it."""

    def __init__(self, worker: Worker, full_worker: Worker, clock: Clock) -> None:
        self._worker, self._full_worker, self._clock = worker, full_worker, clock
        self._open: dict[Side, Context] = {}  # by the side without its name

    def take(self, sides: Sequence[Side]) -> list[Context]:
        """Contexts of the sides, after closing all others."""
        for side in self._open.keys() - {_nameless(side) for side in sides}:
            self._open.pop(side).close()
        for side in sides:
            key = _nameless(side)
            if key not in self._open:
                self._clock.show(f"making a context ({side.name})")
                worker = self._worker if side.razor else self._full_worker
                self._open[key] = worker.open(side)
            self._open[key].side = side
        return [self._open[_nameless(side)] for side in sides]


def _nameless(side: Side) -> Side:
    return replace(side, name="")


def _records(
    measures: Sequence[tuple[_Measure, Sequence[Step]]],
) -> Iterator[tuple[_Measure, Step, dict[str, Any]]]:
    """Measures; what and its record, one after the other, the contexts of a size together."""
    for _, group in groupby(measures, lambda pair: pair[0].batch.sides[0].n_ctx):
        together = list(group)
        # sides that are alike in several batches are measured once; what is measured last stays
        # open for what comes first of the rest
        memory: dict[Side, list[tuple[_Measure, Step, Side]]] = {}
        for others in (False, True):
            for measure, steps in reversed(together):
                for side in measure.batch.sides:
                    if (side.name == "full_f16") == others:
                        memory.setdefault(_nameless(side), []).extend(
                            (measure, step, side)
                            for step in steps
                            if step.kind == "memory" and step.side == side.name
                        )
        for users in memory.values():
            if users:
                measure, step, side = users[0]
                record = measure.memory(side, step.depth)
                for user, its_step, _ in users:
                    yield user, its_step, record
        for measure, steps in together:
            rest = [step for step in steps if step.kind != "memory"]
            rest.sort(key=lambda step: (KINDS.index(step.kind), -step.depth))
            for step, record in measure.records(rest):
                yield measure, step, record


@dataclass
class _Measure:
    """The measurements of one batch."""

    batch: Batch
    plans: dict[str, Plan]  # by side
    weights_bytes: int
    contexts: _Contexts
    settings: Settings
    meter: EnergyMeter
    clock: Clock
    idle: float | None = None  # seconds of a step of razor and the full cache without tokens

    def records(self, steps: Sequence[Step]) -> Iterator[tuple[Step, dict[str, Any]]]:
        if not steps:
            return
        contexts = self.contexts.take(self.batch.sides)
        if not self._tiled and any(step.kind == "prefill" for step in steps):
            self._measure_idle(contexts)  # now: later they would have to be filled again
        for step in steps:
            yield step, getattr(self, step.kind)(contexts, step.depth)

    def show(self, what: str) -> None:
        razor = self.batch.sides[0]
        self.clock.show(f"{razor.type_k}/{razor.type_v}, {razor.n_ctx:,} tokens: {what}")

    def memory(self, side: Side, depth: int) -> dict[str, Any]:
        """A side alone beside the model: bytes of its KV buffers, and the peak while it decodes."""
        (context,) = self.contexts.take([side])
        self.show(f"memory ({side.name})")
        context.fill(depth)
        told = context.worker.ask("peak_rss", True) is not None
        context.run(2 if depth + 2 <= side.n_ctx else 1)
        return {
            "kv_bytes": context.kv_bytes(),
            "peak_rss": context.worker.ask("peak_rss") if told else None,
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
        """Milliseconds of decodes in turn, and of reading the bytes that each needs."""
        self._fill(contexts, depth)
        turns = self._steps(contexts, f"decoding at {depth:,}", self.settings.seconds)
        needed = {
            name: self.weights_bytes + kept_bytes(plan, depth) for name, plan in self.plans.items()
        }
        read = {
            c.side.name: c.worker.ask("read_seconds", needed[c.side.name]) * 1e3 for c in contexts
        }
        return turns | {"read_bytes": needed, "read_ms": read}

    def fit(self, contexts: list[Context], depth: int) -> dict[str, Any]:
        self._fill(contexts, depth)
        what = f"decoding at {depth:,} with a fixed window"
        return self._steps(contexts, what, self.settings.seconds / 3)

    def _fill(self, contexts: list[Context], depth: int) -> None:
        for context in contexts:
            self.show(f"filling {depth:,} tokens ({context.side.name})")
            context.fill(depth)
            # a depth is often a multiple of the block: the step after it folds, as one in a block
            # does, and all the others do not
            if 0 < depth < context.side.n_ctx - 1:
                context.append(1)

    def _steps(self, contexts: list[Context], what: str, seconds: float) -> dict[str, Any]:
        """Milliseconds of a step in each side's turns, as many as fit into seconds, and the steps
        of a turn: of several the median counts."""
        self.show(what)
        for _ in range(N_WARMUP):
            took = [context.step() for context in contexts]
            if sum(took) > 2:
                break
        short = max(took) < SHORT_STEP
        pairs = int(seconds / max(sum(took) * (1 + TURN if short else 1), 1e-9))
        pairs = min(max(MIN_PAIRS, pairs), self.settings.max_pairs)

        def turn(context: Context) -> float:
            # one after the other side's takes longer: caches are cold, a GPU changes its process
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
        """Milliseconds of each side, in rounds; whoever comes last alternates."""
        ms: dict[str, list[float]] = {context.side.name: [] for context in contexts}
        for i in range(rounds):
            self.show(f"{what}, {i + 1} of {rounds}")
            for context in contexts if i % 2 == 0 else reversed(contexts):
                ms[context.side.name].append(round(measure(context) * 1e3, 6))
        return ms

    def prompt(self, contexts: list[Context], depth: int) -> dict[str, Any]:
        """Milliseconds of a real prefill of depth tokens, at most a batch."""

        def prefill(context: Context) -> float:
            context.fill(0)
            return context.append(depth)

        what = f"a prompt of {depth:,} tokens"
        first = self._in_turn(contexts[:2], what, 1, prefill)
        seconds = sum(ms[0] for ms in first.values()) / 1e3
        return {"tokens": depth, "ms": self._rest(contexts[:2], what, first, seconds, prefill)}

    def prefill(self, contexts: list[Context], depth: int) -> dict[str, Any]:
        """Milliseconds of a batch of prompt tokens behind depth, against a full cache alike."""
        contexts = contexts[:2]
        n_ctx, block = contexts[0].side.n_ctx, self.plans["razor"].block
        what = f"prefill at {depth:,}"
        budget = self.settings.seconds

        def prefill(context: Context, n_tokens: int) -> float:
            # whole blocks fold as often as a prompt's do: a cache that only went back to where a
            # block begins would have folded for it already
            if context.side.razor and n_tokens % block == 0:
                context.fill(0)
            context.rewind(depth)
            return context.append(n_tokens)

        idle = 0.0 if self._tiled else self._measure_idle(contexts)
        took = sum(self._first_step(context, depth) for context in contexts)
        n_first = TILED_CHUNK if self._tiled else CHUNKS[-1]
        if not self._tiled and took > 3 * idle:  # attention is most of it
            fits = (n for n in (n_first, *SMALL_CHUNKS) if took * n <= budget)
            n_first = next(fits, SMALL_CHUNKS[-1])
        n_first = min(n_first, n_ctx - depth)
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
        ms = self._rest(contexts, what, first if n_tokens == n_first else {}, per_token * n_tokens,
                        lambda c: prefill(c, n_tokens))  # fmt: skip
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
        """Milliseconds of as many rounds as fit, a round takes seconds. A first round counts only
        if it took so long that warming up means nothing."""
        least = MAX_BATCHES if seconds < SHORT_ROUND else MIN_BATCHES
        fit = min(max(least, int(self.settings.seconds / max(seconds, 1e-9))), MAX_BATCHES)
        rounds = min(fit, self.settings.max_pairs)
        if not first or seconds < 5:
            return self._in_turn(contexts, what, rounds, measure)
        rest = self._in_turn(contexts, what, rounds - 1, measure)
        return {name: first[name] + rest[name] for name in first}

    def fold(self, contexts: list[Context], depth: int) -> dict[str, Any]:
        """Milliseconds of razor's decodes in a row across folds, near the end of the context."""
        razor = contexts[0]
        plan = self.plans["razor"]
        last = razor.side.n_ctx - plan.block  # the last position that opens a block
        # from 8 tokens before a fold to 8 behind one
        starts = [max(0, last - i * plan.block - 8) for i in range(3)]
        razor.fill(starts[-1])
        self.show("decoding across a fold")
        took = min(razor.step() for _ in range(N_WARMUP))
        fit = int(self.settings.seconds / took)
        folds = 1 + min(max(0, fit - 16) // plan.block, 2)
        razor.fill(starts[folds - 1])
        razor.run(1)
        n_tokens = last + 8 - razor.depth
        began = razor.depth
        ms = [round(seconds * 1e3, 6) for seconds in razor.run(n_tokens)]
        positions = [i for i in range(n_tokens) if (began + i) % plan.block == 0]
        return {"start": began, "ms": {"razor": ms}, "folds_at": positions}

    def energy(self, contexts: list[Context], depth: int) -> dict[str, Any]:
        """Joules and seconds per decoded token of each side, of what the meters see."""
        found = {}
        for context in contexts:
            self.show(f"energy ({context.side.name})")
            self._fill([context], depth)
            took = context.step()
            room = context.side.n_ctx - context.depth
            fit = int(min(ENERGY_SECONDS, self.settings.seconds) / took)
            n_tokens = max(1, min(room, max(4, fit)))
            self.meter.start()
            context.run(n_tokens)
            joules, seconds = self.meter.stop()
            found[context.side.name] = {
                "tokens": n_tokens, "joules": joules, "seconds": seconds
            }  # fmt: skip
        return {"energy": found}

    def real_prefill(self, contexts: list[Context], depth: int) -> dict[str, Any]:
        """Seconds of a real prefill of depth tokens, then milliseconds of decodes on that cache and
        on a random one of the same depth."""
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


def median_ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles of the paired ratios: (median, lower, upper)."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    if len(ratios) == 1:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high
