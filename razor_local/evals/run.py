"""Ask each policy the same questions, and keep the answers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.journal import Journal
from ..common.machine import describe_code, describe_machine
from ..common.progress import Clock, Progress, Stop, check_stop
from ..model_setup import ModelSetup
from ..model_shape import ModelShape
from ..plan import N_CTX_PAD
from .policies import Policy
from .questions import Answerer, Sample

if TYPE_CHECKING:
    from ..llama import Llama

VERSION = 1  # of the records


def describe_run(
    what: str, setup: ModelSetup, shape: ModelShape, policies: Sequence[Policy], **settings: Any
) -> dict[str, Any]:
    """Return the head of a run. what is needle, ruler, perplexity or longbench."""
    return {
        "version": VERSION,
        "eval": what,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "code": describe_code(),
        "machine": describe_machine(),
        "model": {
            "file": Path(setup.model).name,
            "name": shape.name,
            "fingerprint": shape.fingerprint,
            "kv_heads": sum(shape.n_head_kv),
            "n_ctx_train": shape.n_ctx_train,
        },
        "setup": {k: v for k, v in asdict(setup).items() if k not in ("model", "sidecar", "lib")},
        "policies": [_describe_policy(policy) for policy in policies],
        "settings": settings,
        "profile": _origin(setup, policies),
    }


def _origin(setup: ModelSetup, policies: Sequence[Policy]) -> str | None:
    """Return the source of the profile, None if only full caches run."""
    found = None if all(policy.profile is None for policy in policies) else setup.found
    return None if found is None else found.origin


def _describe_policy(policy: Policy) -> dict[str, Any]:
    profile = policy.profile
    described = {
        "name": policy.name,
        "series": policy.series,
        "budget": policy.budget,
        "kv_type": policy.kv_type,
    }
    if policy.local_type is not None:
        described["local_type"] = policy.local_type
    if profile is None:
        return described | {"retrieval_kv_heads": None}
    heads = profile.flat()
    return described | {
        "retrieval_kv_heads": int(heads.sum()),
        "retrieval_sha256": hashlib.sha256(heads.tobytes()).hexdigest()[:16],
        "window_min": profile.window_min,
        "window_divisor": profile.window_divisor,
        "sink_tokens": profile.sink_tokens,
        "compensation": profile.compensation,
    }


def run_identity(head: dict[str, Any]) -> dict[str, Any]:
    """Return what must be equal for a run to be resumed."""
    names = ("version", "eval", "model", "setup", "policies", "settings", "code")
    cpu = (head.get("machine") or {}).get("cpu")  # the load may differ
    return {name: head.get(name) for name in names} | {"machine": cpu}


def open_journal(path: Path | None, head: dict[str, Any]) -> Journal:
    """Open the journal of an evaluation. Raises RazorError for a file of another run, OSError."""

    def check(head: dict[str, Any], records: list[dict[str, Any]]) -> None:
        """Format the records as at the end of a run, which fails if they are malformed."""
        from . import perplexity_report, report

        if head["eval"] == "perplexity":
            for kind in ("json", "md"):
                perplexity_report.format_report(
                    perplexity_report.PerplexityReport(head, records), kind
                )
            return
        for record in records:
            if record["kind"] == "answer" and not 0 <= record["score"] <= 1:
                raise ValueError(f"score {record['score']}")
        for kind in ("json", "md"):
            report.format_report(report.Report(head, records), kind)

    return Journal(path, head, "an evaluation", run_identity, check)


def run_questions(
    setup: ModelSetup,
    policies: Sequence[Policy],
    samples: Sequence[Sample],
    score: Callable[[Sample, list[str]], float],
    journal: Journal,
    head: dict[str, Any],
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> None:
    """Ask the questions that have no answer in the journal, by length and policy.

    A context is as large as its length, because the window depends on it. The journal gets a record
    of the cache for each policy and length, and one with the answers and their score for each
    sample. Raises RazorError if a context cannot be created, Stopped; finished answers are kept.
    """
    done = {
        (r["policy"], r["task"], r["length"], r["depth"], r["index"])
        for r in journal.records
        if r["kind"] == "answer"
    }

    def is_done(policy: Policy, sample: Sample) -> bool:
        return (policy.name, *sample.key().values()) in done

    rows = [
        (length, policy, [s for s in samples if s.length == length and not is_done(policy, s)])
        for length in dict.fromkeys(s.length for s in samples)
        for policy in policies
    ]
    clock = Clock(progress, sum(sum(_costs(some)) for _, _, some in rows))
    if journal.head is None:
        journal.begin(head)
    for length, policy, some in rows:
        if not some:
            continue
        what = f"{policy.name}, {length:,} tokens"
        clock.show(f"{what}: loading")
        answerer = Answerer(open_llama(setup, policy, length, stop))
        try:
            cache = {"kind": "cache", "policy": policy.name, "length": length}
            if not journal.has(cache):
                journal.add(cache | describe_cache(answerer.llama))
            for sample, cost in zip(some, _costs(some), strict=True):
                depth = "" if sample.depth is None else f" at {sample.depth:g} %"
                label = f"{what}: {sample.task}{depth}"
                clock.show(label)
                answers = answerer.ask(sample, lambda *_, label=label: clock.show(label), stop)
                journal.add(
                    {"kind": "answer", "policy": policy.name}
                    | sample.key()
                    | {
                        "n_prompt": sample.n_prompt,
                        "expected": [list(question.answers) for question in sample.questions],
                        "answers": answers,
                        "score": score(sample, answers),
                    }
                )
                clock.done(cost)
        finally:
            answerer.llama.close()


def open_llama(
    setup: ModelSetup, policy: Policy, n_ctx: int, stop: Stop | None = None, **options: Any
) -> Llama:
    """Open a Llama with the policy's cache. Raises Stopped while it loads."""
    from ..llama import Llama

    return Llama(
        setup.file,
        n_ctx=-(-n_ctx // N_CTX_PAD) * N_CTX_PAD,
        n_threads=setup.n_threads,
        n_threads_batch=setup.n_threads,
        n_gpu_layers=setup.n_gpu_layers,
        progress=lambda _part: check_stop(stop),
        rewind="off",
        prefill=setup.prefill,
        **policy.llama_args(),
        **options,
    )


def describe_cache(llama: Any) -> dict[str, Any]:
    """Return the bytes of the cache, counted by the native library."""
    memory = llama.memory()
    return {
        "n_ctx": memory.n_ctx,
        "active": memory.active,
        "why": memory.why,
        "kv_bytes": memory.kv_bytes,
        "kv_bytes_full_f16": memory.kv_bytes_full_f16,
    }


def _costs(samples: Sequence[Sample]) -> list[int]:
    """Estimate the tokens that each sample takes. The same text is not read twice in a row."""
    costs, before = [], None
    for sample in samples:
        read = 0 if sample.text == before else sample.n_prompt
        costs.append(read + 4 * sample.max_tokens * len(sample.questions))
        before = sample.text
    return costs
