"""Run a benchmark of razor against a full cache: speed at depth, memory and folds.

Measurements are ordered to load as few random caches as possible. The deepest comes first, because
a full cache then only has to drop tokens, and contexts that the next batch needs stay open.

Every finished measurement is a record, a dict of plain numbers. figures.py computes figures from
the records.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from ..common.journal import Journal
from ..common.machine import describe_code, describe_gpus, describe_machine, free_memory
from ..common.progress import Clock, Progress
from ..errors import RazorError
from ..model_file import ModelFile
from ..model_setup import ModelSetup
from ..model_shape import ModelShape
from ..profile import Profile
from .batches import KINDS, Batch, Settings, Side, Step, make_batches
from .energy import EnergyMeter
from .figures import VERSION, Report
from .ggml import READ_CAP
from .measure import Contexts, Measure, nameless
from .random_cache import kept_bytes
from .report import FORMATS, format_report
from .shape_file import is_random
from .worker import Worker


def open_journal(path: Path | None, head: dict[str, Any]) -> Journal:
    """Open the journal of a benchmark. Raises RazorError for a file of another run, OSError."""

    def identity(head: dict[str, Any]) -> dict[str, Any]:
        names = ("version", "model", "setup", "settings", "code")
        cpu = (head.get("machine") or {}).get("cpu")  # the load may differ
        return {name: head.get(name) for name in names} | {"machine": cpu}

    def check(head: dict[str, Any], records: list[dict[str, Any]]) -> None:
        """Format the records as at the end of a run, which fails if they are malformed."""
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
    """Take all measurements that are not in the journal yet.

    Args:
        setup: the model and its profile.
        settings: the measurements to take.
        stock_lib: folder of a stock build for the full caches. None uses the package's own library
            with razor off.
        resume: path of the journal, or None to keep the records in memory only.
        only: the KINDS to measure now. The run can be resumed later with the others.
        progress: called with the progress.

    Returns:
        The head of the run and all records.

    Raises:
        RazorError: a context cannot be created, or the machine has too little memory.
    """
    # 1. Plan the measurements.
    shape, profile = setup.read()
    meter = EnergyMeter()
    batches = make_batches(settings, shape, profile, bool(meter.sources))
    head = _describe_run(setup, settings, stock_lib, shape, profile, meter)
    for batch in batches:
        _check_memory(setup, batch, shape, profile, head["model"]["file_bytes"])
    with ExitStack() as stack:
        # 2. Drop those that the journal holds.
        journal = stack.enter_context(open_journal(resume, head))
        left = [
            [s for s in batch.steps if s.kind in only and not journal.has(batch.key(s))]
            for batch in batches
        ]
        clock = Clock(progress, sum(step.cost for steps in left for step in steps))
        if not any(left) and journal.head is not None:
            return journal.head, journal.records
        # 3. Start the workers.
        clock.show("loading the model")
        worker = Worker(setup, beside_another=stock_lib is not None)
        stack.callback(worker.close)
        full_worker = worker
        if stock_lib is not None:
            full_worker = Worker(replace(setup, lib=str(stock_lib)), beside_another=True)
            stack.callback(full_worker.close)
        if journal.head is None:
            journal.begin(head | {"library": worker.ask("describe")})
        # 4. Measure, and add each record to the journal.
        contexts = Contexts(worker, full_worker, clock)
        measures = []
        for batch, steps in zip(batches, left, strict=True):
            plans = {side.name: side.plan(shape, profile) for side in batch.sides}
            measure = Measure(
                batch, plans, head["model"]["weights_bytes"], contexts, settings, meter, clock
            )
            measures.append((measure, steps))
        for measure, step, record in _records(measures):
            journal.add(measure.batch.key(step) | record)
            clock.done(step.cost)
    assert journal.head is not None
    return journal.head, journal.records


def _records(
    measures: Sequence[tuple[Measure, Sequence[Step]]],
) -> Iterator[tuple[Measure, Step, dict[str, Any]]]:
    """Take the measurements and yield each with its record, grouped by the size of the context."""
    for _, group in groupby(measures, lambda pair: pair[0].batch.sides[0].n_ctx):
        together = list(group)
        # Measure the memory of a side that several batches share once. The contexts measured last
        # stay open for the first of the other measurements.
        memory: dict[Side, list[tuple[Measure, Step, Side]]] = {}
        for others in (False, True):
            for measure, steps in reversed(together):
                for side in measure.batch.sides:
                    if (side.name == "full_f16") == others:
                        memory.setdefault(nameless(side), []).extend(
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


def _describe_run(
    setup: ModelSetup,
    settings: Settings,
    stock_lib: Path | None,
    shape: ModelShape,
    profile: Profile,
    meter: EnergyMeter,
) -> dict[str, Any]:
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
            "random_weights": is_random(setup.file.header),
            "fingerprint": shape.fingerprint,
            "file_bytes": sum(part.file_size for part in setup.file.parts),
            "weights_bytes": weights_bytes(setup.file),
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
        # journals of runs without types of local heads do not have these keys
        "settings": {
            name: value
            for name, value in asdict(settings).items()
            if value is not None or not name.endswith("_local")
        },
        "profile": setup.found.origin if setup.found else None,
    }


def weights_bytes(model: ModelFile) -> int:
    """Return the bytes of weights that decoding one token reads.

    The token embedding is left out unless it is also the output head. Of the experts only the
    share that a token uses counts.
    """
    tensors = {tensor.name: tensor.nbytes for part in model.parts for tensor in part.tensors}
    if "output.weight" in tensors:
        tensors.pop("token_embd.weight", None)
    tensors.pop("position_embd.weight", None)
    header = model.header
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
    plans = [side.plan(shape, profile) for side in batch.sides]
    deepest = max(step.depth for step in batch.steps)
    states = [kept_bytes(plan, plan.n_ctx if plan.active else deepest) for plan in plans]
    needed = max(states) + (512 << 20)  # a guess for the buffers of the graph
    if not setup.n_gpu_layers:
        # The contexts stay; a state and the matrix of read_seconds() exist one at a time.
        beside = min(READ_CAP, max(states) + model_bytes)
        needed = max(needed, beside + (512 << 20))
        needed += model_bytes + sum(plan.kv_bytes for plan in plans)
    free = free_memory()
    if needed > free:
        raise RazorError(
            f"{plans[0].type_k}/{plans[0].type_v} against full caches of {plans[0].n_ctx:,} tokens"
            f" need about {needed / 2**30:.1f} GiB of memory, but {free / 2**30:.1f} GiB are free;"
            " leave out that depth or type"
        )
