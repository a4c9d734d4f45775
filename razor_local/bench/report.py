"""Format a benchmark as Markdown tables or as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

from ..common.compact_json import compact_json
from ..common.markdown import markdown_table, one_line
from .batches import SHORT_PROMPT
from .cells import count, kv, mib, number, ratio, seconds, times
from .figures import SIDES, Report, types_of
from .measure import SHORT_STEP

FORMATS = ("md", "json")


def format_report(report: Report, kind: str) -> str:
    """Format the report as one of FORMATS, with a final newline."""
    if kind == "json":
        return compact_json(report.to_dict())
    return "\n".join(_markdown(report)) + "\n"


def _markdown(report: Report) -> Iterable[str]:
    head, model, machine = report.head, report.head["model"], report.head["machine"]
    yield f"# razor-local bench: {one_line(model['name'] or model['file'])}"
    yield ""
    yield from (f"- {line}" for line in describe_lines(report))
    if any(r["razor_tok_s"] or r["full_tok_s"] for r in report.rows):
        yield ""
        yield "## Decoding"
        yield ""
        yield from markdown_table(
            ["KV type", "tokens in cache", "context", "razor tok/s", "full tok/s", "faster by",
             "full f16 tok/s", "faster by", "razor ms", "razor time / reading its bytes", "full"],
            [
                [
                    kv(r), f"{r['depth']:,}", f"{r['n_ctx']:,}", number(r["razor_tok_s"]),
                    number(r["full_tok_s"]), ratio(r, "decode_ratio_full"),
                    number(r["full_f16_tok_s"]), ratio(r, "decode_ratio_full_f16"),
                    number(r["razor_ms"]), times(r["razor_over_read"]), times(r["full_over_read"]),
                ]
                for r in report.rows
            ],
        )  # fmt: skip
    timed = ("razor_prefill_tok_s", "full_prefill_tok_s", "razor_first_token_s",
             "full_first_token_s")  # fmt: skip
    if any(r[name] for r in report.rows for name in timed):
        yield ""
        yield "## Prefill"
        yield ""
        yield from markdown_table(
            ["KV type", "prompt", "batch of", "at", "razor tok/s", "full tok/s", "faster by",
             "first token after: razor", "full", "faster by", ""],
            [
                [
                    kv(r), f"{max(r['depth'], 1):,}", count(r["prefill_batch"]),
                    count(r["prefill_at"]), number(r["razor_prefill_tok_s"]),
                    number(r["full_prefill_tok_s"]), ratio(r, "prefill_ratio"),
                    seconds(r["razor_first_token_s"]), seconds(r["full_first_token_s"]),
                    times(r["first_token_ratio"]), r["first_token"] or "",
                ]
                for r in report.rows
            ],
        )  # fmt: skip
    if any(r["kind"] == "memory" for r in report.records):
        yield ""
        yield "## Memory"
        yield ""
        yield from _memory_table(report)
    if report.folds:
        yield ""
        yield "## Steps across folds"
        yield ""
        yield from markdown_table(
            ["KV type", "context", "decodes in a row", "folds", "median ms", "longest ms",
             "longest / median", "longest at a fold / median"],
            [
                [
                    kv(f), f"{f['n_ctx']:,}", str(f["tokens"]), str(f["folds"]),
                    number(f["median_ms"]), number(f["longest_ms"]), times(f["longest_ratio"]),
                    times(f["longest_fold_ratio"]),
                ]
                for f in report.folds
            ],
        )  # fmt: skip
    if report.checks:
        yield ""
        yield "## Check against a real prefill"
        yield ""
        yield from markdown_table(
            ["KV type", "cache", "tokens", "context", "real prefill", "faster by", "integrated",
             "/ real", "decode ms on the real cache", "on a random one", "/ real"],
            [
                [
                    kv(c), c["side"], f"{c['tokens']:,}", f"{c['n_ctx']:,}", seconds(c["real_s"]),
                    "" if c["side"] == "full" else times(c["full_over_real"]),
                    seconds(c["integrated_s"]), times(c["integrated_over_real"]),
                    number(c["real_cache_ms"]), number(c["random_cache_ms"]),
                    times(c["random_over_real"]),
                ]
                for c in report.checks
            ],
        )  # fmt: skip
    if report.energy:
        yield ""
        yield f"## Energy ({', '.join(machine['energy_meters'])}; idle power included)"
        yield ""
        yield from markdown_table(
            ["KV type", "tokens in cache", "cache", "J per token", "W"],
            [
                [
                    kv(e),
                    f"{e['depth']:,}",
                    e["side"],
                    number(e["joules_per_token"]),
                    number(e["watts"]),
                ]
                for e in report.energy
            ],
        )
    yield ""
    yield f"Measured {head['date']}."


def describe_lines(report: Report) -> Iterable[str]:
    """Yield sentences that describe the model, the machine and the method."""
    head, model, machine = report.head, report.head["model"], report.head["machine"]
    if model["random_weights"]:
        yield "The weights are random: only the speed is meaningful, not the answers."
    share = model["retrieval_kv_heads"] / model["kv_heads"]
    window = f"window: {model['window_min']:,} tokens"
    if model["window_divisor"]:
        window += f" or 1/{model['window_divisor']} of the context, whichever is larger"
    yield (
        f"{model['retrieval_kv_heads']} of {model['kv_heads']} KV heads are retrieval heads"
        f" ({share:.1%}); {window}; {model['sink_tokens']} sinks;"
        f" weights read per token: {model['weights_bytes'] / 2**20:,.0f} MiB."
    )
    local = [
        f"{name} {head['settings'][key]}"
        for name, key in (("K", "type_k_local"), ("V", "type_v_local"))
        if head["settings"].get(key)
    ]
    if local:
        yield f"KV types of razor's local heads: {', '.join(local)}."
    if head.get("profile"):
        yield f"Profile: {one_line(head['profile'])}."
    memory = machine["memory_total"]
    yield (
        f"{machine['cpu']}, {_number(machine['cores'], 'core')},"
        f" {_number(head['setup']['n_threads'], 'thread')},"
        + (f" {memory / 2**30:.0f} GiB," if memory else "")
        + f" {machine['system']}"
        + (
            ""
            if machine["load_average"] is None
            else f"; load average before: {machine['load_average']:.1f}"
        )
        + "."
    )
    for gpu in machine.get("gpus", ()):
        yield f"{_gpu(gpu)}."
    library = head["library"]
    devices = ", ".join(f"{d['name']} ({d['description']})" for d in library["devices"])
    yield f"Backends: {', '.join(library['backends'])}; devices: {devices}."
    build, code = library["build"], head["code"]
    yield (
        f"llama.cpp of llama-cpp-python {build['version']} ({build['options']}), razor-local"
        f" {code['version'] or 'not installed'}, commit {code['commit'] or 'unknown'}; full caches:"
        f" {head['setup']['full_cache']}."
    )
    where = "two processes" if head["setup"]["full_cache"] == "another build" else "one process"
    timed = any(r["kind"] != "memory" for r in report.records)
    yield f"Flash attention is on. The sides run in {where}" + (
        ' and take turns; "faster by" is the median of the paired ratios, with quartiles.'
        if timed
        else "."
    )
    steps = max((r.get("steps", 1) for r in report.records if r["kind"] == "decode"), default=1)
    if steps > 1:
        yield (
            f"Where a step takes less than {SHORT_STEP * 1e3:.0f} ms, a turn is one warm-up step"
            f" and {steps} more, whose median counts."
        )
    if timed:
        yield "Caches were filled with random rows, not by a prefill."
    if any(row["first_token"] == "integrated" for row in report.rows):
        yield (
            'An "integrated" time to the first token was not measured: it is integrated over'
            f" batches at several depths, for prompts of more than {SHORT_PROMPT} tokens."
        )


def _memory_table(report: Report) -> Iterable[str]:
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in report.records:
        if record["kind"] == "memory":
            key = (*types_of(record), record["n_ctx"])
            groups.setdefault(key, {})[record["side"]] = record
    order = [tuple(types) for types in report.head["settings"]["types"]]
    groups = dict(sorted(groups.items(), key=lambda item: (item[0][2], order.index(item[0][:2]))))
    rows = []
    with_device = any(r["device"] is not None for g in groups.values() for r in g.values())
    for (type_k, type_v, n_ctx), sides in groups.items():
        cells = [kv({"type_k": type_k, "type_v": type_v}), f"{n_ctx:,}"]
        cells += [mib(sides.get(side, {}).get("kv_bytes")) for side in SIDES]
        razor, full = (sides.get(side, {}).get("kv_bytes") for side in SIDES[:2])
        cells.append(f"{razor / full:.1%}" if razor and full else "")
        for name in ("peak_rss", "device") if with_device else ("peak_rss",):
            cells += [mib(sides.get(side, {}).get(name)) for side in SIDES[:2]]
        rows.append(cells)
    titles = ["KV type", "context", "razor KV MiB", "full KV MiB", "full f16 KV MiB", "share"]
    titles += ["peak RSS MiB decoding: razor", "full"]
    titles += ["device MiB: razor", "full"] if with_device else []
    return markdown_table(titles, rows)


def _number(n: int, what: str) -> str:
    return f"{n} {what}" + "s" * (n != 1)


def _gpu(gpu: dict[str, Any]) -> str:
    memory = gpu["memory_total"]
    return (
        f"{one_line(gpu['name'] or 'a GPU')}"
        + (f", {memory / 2**30:.0f} GiB" if memory else "")
        + (f", driver {one_line(gpu['driver'])}" if gpu["driver"] else "")
        + (f", CUDA {one_line(gpu['cuda'])}" if gpu["cuda"] else "")
    )


def readme_block(report: Report) -> str:
    """Return a sentence and a short table of a run for a README, in Markdown."""
    model, machine, setup = (report.head[name] for name in ("model", "machine", "setup"))
    where = f"{one_line(machine['cpu'])}, {setup['n_threads']} threads"
    if setup["n_gpu_layers"]:
        where = "; ".join(_gpu(gpu) for gpu in machine.get("gpus") or ()) or where
    window = f"a window of {model['window_min']:,} tokens"
    if model["window_divisor"]:
        window += f" or 1/{model['window_divisor']} of the context, whichever is more"
    text = (
        f"{one_line(model['name'] or model['file'])};"
        f" {model['retrieval_kv_heads']} of {model['kv_heads']} KV heads are retrieval heads,"
        f" {window}; {where};"
        ' caches filled with random rows. "Faster by": the median of paired decodes.'
    )
    table = markdown_table(
        ["KV type", "tokens in the cache", "KV MiB: razor", "full", "decode tok/s: razor", "full",
         "faster by", "than full f16", "first token after: razor", "full"],
        [
            [
                kv(r), f"{r['depth']:,}", mib(r["razor_kv_bytes"]), mib(r["full_kv_bytes"]),
                number(r["razor_tok_s"]), number(r["full_tok_s"]),
                times(r["decode_ratio_full"]),
                times(r["decode_ratio_full_f16"] or r["decode_ratio_full"]),
                seconds(r["razor_first_token_s"]), seconds(r["full_first_token_s"]),
            ]
            for r in report.rows
        ],
    )  # fmt: skip
    return "\n".join([*textwrap.wrap(text, 100), "", *table])
