"""Ask each policy the same questions, and keep the answers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.journal import Journal
from ..common.machine import describe_code, describe_machine, free_memory
from ..common.progress import Clock, Progress, Stop, check_stop
from ..evaluation import set_source
from ..model_setup import ModelSetup
from ..model_shape import ModelShape
from ..plan import N_CTX_PAD
from .policies import Policy, exact_full, may_share
from .questions import Answerer, Sample

if TYPE_CHECKING:
    from ..llama import Llama

VERSION = 1  # of the records
SUMS = ("n", "nll", "full_nll", "kl", "same")  # of the blocks of a window of perplexity
BESIDE = 256 << 20  # a guess for the bytes of a context besides its cache and logits


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
    if profile is None or policy.is_full:
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
    """Return the fields of a header that must match before a run may be resumed."""
    names = ("version", "eval", "model", "setup", "policies", "settings", "code")
    cpu = (head.get("machine") or {}).get("cpu")  # the load may differ
    return {name: head.get(name) for name in names} | {"machine": cpu}


def open_journal(path: Path | None, head: dict[str, Any]) -> Journal:
    """Open the journal of an evaluation. Raises RazorError for a file of another run, OSError."""

    def check(head: dict[str, Any], records: list[dict[str, Any]]) -> None:
        """Format the records as at the end of a run, which fails if they are malformed."""
        from . import perplexity_report, report

        if head["eval"] == "perplexity":
            for record in records:
                sums = [record[name] for name in SUMS] if record["kind"] == "window" else []
                if not np.isfinite(np.array(sums, float)).all():
                    raise ValueError(f"window {record['window']} has sums that are not finite")
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
    shape: ModelShape,
    policies: Sequence[Policy],
    samples: Sequence[Sample],
    score: Callable[[Sample, list[str]], float],
    journal: Journal,
    head: dict[str, Any],
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> None:
    """Ask the questions that have no answer in the journal, by length.

    The context size equals the length, because the window depends on it. The contexts of as many
    policies as memory allows are open together, and answer each sample in turn. Those that read
    prompts with full attention take the prompt from one full cache. The journal gets a record of
    the cache for each policy and length, and one with the answers and their score for each sample.
    Raises RazorError if a context cannot be created, Stopped; finished answers are kept.
    """
    done = {
        (r["policy"], r["task"], r["length"], r["depth"], r["index"])
        for r in journal.records
        if r["kind"] == "answer"
    }

    def is_done(policy: Policy, sample: Sample) -> bool:
        return (policy.name, *sample.key().values()) in done

    lengths = dict.fromkeys(sample.length for sample in samples)
    rows = []
    for length in lengths:
        some = [s for s in samples if s.length == length]
        left = [p for p in policies if not all(is_done(p, s) for s in some)]
        for group in group_policies(
            setup, shape, left, length, prompt_sources(shape, left, length)
        ):
            rows.append((length, group, some))
    total = sum(
        cost
        for _, group, some in rows
        for policy in group
        for sample, cost in zip(some, _costs(some), strict=True)
        if not is_done(policy, sample)
    )
    clock = Clock(progress, total)
    if journal.head is None:
        journal.begin(head)
    for length, group, some in rows:
        with ExitStack() as stack:

            def load(policy: Policy, length: int = length, stack: ExitStack = stack) -> Llama:
                clock.show(f"{policy.name}, {length:,} tokens: loading")
                return stack.enter_context(closing(open_llama(setup, policy, length, stop)))

            answerers = {policy.name: Answerer(load(policy)) for policy in group}
            for source in prompt_sources(shape, group, length):
                llamas = {name: answerer.llama for name, answerer in answerers.items()}
                share_prompts(source, group, llamas, load)
            for policy in group:
                cache = {"kind": "cache", "policy": policy.name, "length": length}
                if not journal.has(cache):
                    journal.add(cache | describe_cache(answerers[policy.name].llama))
            for sample, cost in zip(some, _costs(some), strict=True):
                for policy in group:
                    if is_done(policy, sample):
                        continue
                    depth = "" if sample.depth is None else f" at {sample.depth:g} %"
                    label = f"{policy.name}, {length:,} tokens: {sample.task}{depth}"
                    clock.show(label)
                    answerer = answerers[policy.name]
                    answers = answerer.ask(sample, lambda *_, what=label: clock.show(what), stop)
                    journal.add(
                        {"kind": "answer", "policy": policy.name}
                        | sample.key()
                        | {
                            "n_prompt": sample.n_prompt,
                            "expected": [list(q.answers) for q in sample.questions],
                            "answers": answers,
                            "score": score(sample, answers),
                        }
                    )
                    clock.done(cost)


def group_policies(
    setup: ModelSetup,
    shape: ModelShape,
    policies: Sequence[Policy],
    n_ctx: int,
    beside: Sequence[Policy],
    n_bytes: int = 0,
) -> list[list[Policy]]:
    """Group policies, in their order, whose contexts fit in memory together.

    With layers on a GPU each group has one policy, because the memory there is not known here.

    Args:
        beside: policies whose contexts are open together with each group.
        n_bytes: bytes that each context needs in addition to its cache and BESIDE.
    """
    from llama_cpp import llama_cpp as C

    def size(policy: Policy) -> int:
        return policy.plan(shape, n_ctx).kv_bytes + n_bytes + BESIDE

    free = free_memory() // 2 - sum(map(size, beside))
    if setup.n_gpu_layers and C.llama_supports_gpu_offload():
        free = 0
    groups: list[list[Policy]] = []
    room = 0
    for policy in policies:
        if not groups or size(policy) > room:
            groups.append([])
            room = free
        groups[-1].append(policy)
        room -= size(policy)
    return groups


def prompt_sources(shape: ModelShape, policies: Sequence[Policy], n_ctx: int) -> list[Policy]:
    """Return the full caches from which other policies take their prompts.

    There is one for each KV type that at least two of the policies share. One sharing policy is
    enough if the full cache is itself among the policies.
    """
    active = [policy for policy in policies if policy.plan(shape, n_ctx).active]
    types = [policy.kv_type for policy in active if may_share(policy)]
    sources = [exact_full(shape, t) for t in dict.fromkeys(types)]
    names = {policy.name for policy in policies}
    return [s for s in sources if s.name in names or types.count(s.kv_type) > 1]


def share_prompts(
    source: Policy,
    policies: Sequence[Policy],
    llamas: dict[str, Llama],
    load: Callable[[Policy], Llama],
) -> None:
    """Make policies take their prompts from a full cache (see set_source()).

    Args:
        llamas: the open contexts by policy name; the source may be among them.
        load: opens a context for the source if it is not among them.
    """
    sharing = [llamas[p.name] for p in policies if may_share(p) and p.kv_type == source.kv_type]
    if any(llama._full_prefill for llama in sharing):
        full = llamas.get(source.name) or load(source)
        for llama in sharing:
            set_source(llama, full)


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
