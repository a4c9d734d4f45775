"""Figures, tables and plots of a benchmark's records (bench.py makes them)."""

from __future__ import annotations

import json
import os
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..common.compact_json import compact_json
from ..common.inputs import open_input
from ..common.markdown import markdown_table, one_line, short_tokens
from ..errors import RazorError
from .run import SHORT_PROMPT, SHORT_STEP, VERSION, median_ratio

FORMATS = ("md", "json")
MAX_REPORT_BYTES = 64 << 20
SIDES = ("razor", "full", "full_f16")


@dataclass(frozen=True)
class Report:
    """A run: what was measured on what (head), the raw records, and the figures made of them.

    rows: one dict per KV types and depth; None where nothing was measured. folds, checks, energy:
    dicts in the order of the records.
    """

    head: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def rows(self) -> list[dict[str, Any]]:
        found = [r for r in self.records if r["kind"] == "decode"]
        order = [tuple(types) for types in self.head["settings"]["types"]]
        found.sort(key=lambda r: (order.index((r["type_k"], r["type_v"])), r["depth"]))
        return [self._row(record) for record in found]

    def _row(self, decode: dict[str, Any]) -> dict[str, Any]:
        same = [r for r in self.records if _types(r) == _types(decode)]
        ms = decode["ms"]
        row: dict[str, Any] = {
            name: decode[name] for name in ("type_k", "type_v", "depth", "n_ctx")
        }
        row["pairs"] = len(ms["razor"])
        for side in SIDES:
            row[f"{side}_ms"] = statistics.median(ms[side]) if side in ms else None
            row[f"{side}_tok_s"] = 1e3 / row[f"{side}_ms"] if side in ms else None
        for side in SIDES[1:]:
            ratio = median_ratio(ms[side], ms["razor"]) if side in ms else (None,) * 3
            for name, value in zip(("", "_q1", "_q3"), ratio, strict=True):
                row[f"decode_ratio_{side}{name}"] = value
        for side in SIDES:
            read = decode["read_ms"].get(side)
            row[f"{side}_over_read"] = row[f"{side}_ms"] / read if read else None
        row |= self._prompt(decode, same)
        for side in SIDES:
            memory = _find(same, kind="memory", n_ctx=decode["n_ctx"], side=side) or {}
            for name in ("kv_bytes", "peak_rss", "device"):
                row[f"{side}_{name}"] = memory.get(name)
        return row

    def _prompt(self, decode: dict[str, Any], same: list[dict[str, Any]]) -> dict[str, Any]:
        """Prefill at the depth, and the time to the first token of a prompt of that length."""
        depth, n_ctx = decode["depth"], decode["n_ctx"]
        row: dict[str, Any] = {"prefill_at": None, "prefill_batch": None}
        points = _points(same, n_ctx)
        # the batch that is nearest: it has to fit between the depth and the end of the context
        near = [r for r in points if r["depth"] <= depth]
        batch = max(near, key=lambda r: r["depth"], default=None)
        prompt, real = (
            _find(same, kind=kind, n_ctx=n_ctx, depth=depth) for kind in ("prompt", "real_prefill")
        )
        if prompt is not None:
            batch = prompt
        if batch is not None:
            row["prefill_at"] = 0 if batch is prompt else batch["depth"]
            row["prefill_batch"] = batch["tokens"]
        for side in SIDES[:2]:
            row[f"{side}_prefill_tok_s"] = (
                None
                if batch is None
                else batch["tokens"] / statistics.median(batch["ms"][side]) * 1e3
            )
        ratio: tuple[float | None, ...] = (None,) * 3
        if batch is not None:
            ratio = median_ratio(batch["ms"]["full"], batch["ms"]["razor"])
        for name, value in zip(("", "_q1", "_q3"), ratio, strict=True):
            row[f"prefill_ratio{name}"] = value
        how: str | None = None
        seconds: dict[str, Any] = dict.fromkeys(SIDES[:2])
        if depth == 0:
            how = "measured"  # a prompt of one token
            seconds = {side: row_ms / 1e3 for side, row_ms in _medians(decode["ms"]).items()}
        elif prompt is not None:
            how = "measured"
            seconds = {side: row_ms / 1e3 for side, row_ms in _medians(prompt["ms"]).items()}
        elif real is not None:
            how, seconds = "measured", real["seconds"]
        elif len(points) > 1:
            how = "integrated"
            seconds = {side: prompt_seconds(points, side, depth) for side in SIDES[:2]}
        row["first_token"] = how
        for side in SIDES[:2]:
            row[f"{side}_first_token_s"] = seconds[side]
        row["first_token_ratio"] = seconds["full"] / seconds["razor"] if how else None
        return row

    @property
    def folds(self) -> list[dict[str, Any]]:
        """Razor's decodes in a row across folds: the longest step against the median step."""
        found = []
        for record in self.records:
            if record["kind"] != "fold":
                continue
            ms = record["ms"]["razor"]
            median, longest = statistics.median(ms), max(ms)
            at_folds = [ms[i] for i in record["folds_at"]]
            found.append(
                {name: record[name] for name in ("type_k", "type_v", "n_ctx")}
                | {
                    "tokens": len(ms),
                    "folds": len(at_folds),
                    "median_ms": median,
                    "longest_ms": longest,
                    "longest_ratio": longest / median,
                    "longest_fold_ms": max(at_folds),
                    "longest_fold_ratio": max(at_folds) / median,
                }
            )
        return found

    @property
    def checks(self) -> list[dict[str, Any]]:
        """Real prefills: the full cache's time over the side's, their time under the integrated
        one, and decode times on random caches over those on real ones (medians)."""
        found = []
        for record in self.records:
            if record["kind"] != "real_prefill":
                continue
            same = [r for r in self.records if _types(r) == _types(record)]
            points = _points(same, record["n_ctx"])
            for side in SIDES[:2]:
                integrated = prompt_seconds(points, side, record["depth"]) if points else None
                real, random = _medians(record["ms"])[side], _medians(record["random_ms"])[side]
                found.append(
                    {name: record[name] for name in ("type_k", "type_v", "n_ctx")}
                    | {
                        "side": side,
                        "tokens": record["depth"],
                        "real_s": record["seconds"][side],
                        "full_over_real": record["seconds"]["full"] / record["seconds"][side],
                        "integrated_s": integrated,
                        "integrated_over_real": integrated and integrated / record["seconds"][side],
                        "real_cache_ms": real,
                        "random_cache_ms": random,
                        "random_over_real": random / real,
                    }
                )
        return found

    @property
    def energy(self) -> list[dict[str, Any]]:
        """Joules per decoded token and watts of what the meters see."""
        return [
            {name: record[name] for name in ("type_k", "type_v", "n_ctx", "depth")}
            | {
                "side": side,
                "joules_per_token": e["joules"] / e["tokens"],
                "watts": e["joules"] / e["seconds"],
            }
            for record in self.records
            if record["kind"] == "energy"
            for side, e in record["energy"].items()
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": "razor-local bench",
            "head": self.head,
            "rows": self.rows,
            "folds": self.folds,
            "checks": self.checks,
            "energy": self.energy,
            "records": self.records,
        }


def _types(record: dict[str, Any]) -> tuple[str, str]:
    return record["type_k"], record["type_v"]


def _find(records: Iterable[dict[str, Any]], **fields: Any) -> dict[str, Any] | None:
    return next((r for r in records if all(r[k] == v for k, v in fields.items())), None)


def _medians(ms: dict[str, list[float]]) -> dict[str, float]:
    return {side: statistics.median(values) for side, values in ms.items()}


def _points(records: list[dict[str, Any]], n_ctx: int) -> list[dict[str, Any]]:
    """Batches of prefill in a context of n_ctx, and the one at depth 0, which any context has."""
    found = [r for r in records if r["kind"] == "prefill" and n_ctx == r["n_ctx"]]
    if not any(r["depth"] == 0 for r in found):
        found += [r for r in records if r["kind"] == "prefill" and r["depth"] == 0][:1]
    return sorted(found, key=lambda r: r["depth"])


def prompt_seconds(points: Sequence[dict[str, Any]], side: str, n_tokens: int) -> float:
    """Seconds of a prefill of n_tokens, integrated over batches at some depths.

    The seconds per token are taken to be straight between the middles of the batches, which they
    are as long as the work per token grows by the same for each token before it.
    """
    known = [
        (r["depth"] + r["tokens"] / 2, statistics.median(r["ms"][side]) / 1e3 / r["tokens"])
        for r in points
    ]

    def at(depth: float) -> float:
        if len(known) == 1:
            return known[0][1]
        # before the first and behind the last middle the line goes on
        pairs = list(pairwise(known))
        (x, y), (x2, y2) = next((p for p in pairs if depth <= p[1][0]), pairs[-1])
        return y + (y2 - y) * (depth - x) / (x2 - x)

    corners = sorted({0.0, float(n_tokens), *(x for x, _ in known if x < n_tokens)})
    return sum((b - a) * (at(a) + at(b)) / 2 for a, b in pairwise(corners))


# -- files


def load_report(path: str | os.PathLike[str]) -> Report:
    """A run that was saved as JSON. Raises RazorError for another file, OSError."""
    path = Path(path)
    with open_input(path, "a saved run of bench") as file:
        raw = file.read(MAX_REPORT_BYTES + 1)
    try:
        if len(raw) > MAX_REPORT_BYTES:
            raise ValueError
        found = json.loads(raw)
        if found["format"] != "razor-local bench" or not isinstance(found["records"], list):
            raise ValueError
        version = found["head"]["version"]
        report = Report(found["head"], found["records"])
        if version == VERSION:  # every field that is needed is there and makes sense
            for kind in FORMATS:
                format_report(report, kind)
            compare_rows(report, report)
            differences(report, report)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, ArithmeticError):
        raise RazorError(
            f"{path} is no report of a benchmark; make one with 'razor-local bench -o {path.name}'"
        ) from None
    if version != VERSION:
        raise RazorError(
            f"{path} is a report of version {version}, this razor-local reads {VERSION}; run the"
            " benchmark again"
        )
    return report


def format_report(report: Report, kind: str) -> str:
    """The report as one of FORMATS, with a line end."""
    if kind == "json":
        return compact_json(report.to_dict())
    return "\n".join(_markdown(report)) + "\n"


# -- Markdown


def _markdown(report: Report) -> Iterable[str]:
    head, model, machine = report.head, report.head["model"], report.head["machine"]
    yield f"# razor-local bench: {one_line(model['name'] or model['file'])}"
    yield ""
    yield from (f"- {line}" for line in describe_lines(report))
    yield ""
    yield "## Decoding"
    yield ""
    yield from markdown_table(
        ["KV type", "tokens in cache", "context", "razor tok/s", "full tok/s", "faster by",
         "full f16 tok/s", "faster by", "razor ms", "razor time / reading its bytes", "full"],
        [
            [
                _kv(r), f"{r['depth']:,}", f"{r['n_ctx']:,}", _number(r["razor_tok_s"]),
                _number(r["full_tok_s"]), _ratio(r, "decode_ratio_full"),
                _number(r["full_f16_tok_s"]), _ratio(r, "decode_ratio_full_f16"),
                _number(r["razor_ms"]), _times(r["razor_over_read"]), _times(r["full_over_read"]),
            ]
            for r in report.rows
        ],
    )  # fmt: skip
    yield ""
    yield "## Prefill"
    yield ""
    yield from markdown_table(
        ["KV type", "prompt", "batch of", "at", "razor tok/s", "full tok/s", "faster by",
         "first token after: razor", "full", "faster by", ""],
        [
            [
                _kv(r), f"{max(r['depth'], 1):,}", _count(r["prefill_batch"]),
                _count(r["prefill_at"]), _number(r["razor_prefill_tok_s"]),
                _number(r["full_prefill_tok_s"]), _ratio(r, "prefill_ratio"),
                _seconds(r["razor_first_token_s"]), _seconds(r["full_first_token_s"]),
                _times(r["first_token_ratio"]), r["first_token"] or "",
            ]
            for r in report.rows
        ],
    )  # fmt: skip
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
                    _kv(f), f"{f['n_ctx']:,}", str(f["tokens"]), str(f["folds"]),
                    _number(f["median_ms"]), _number(f["longest_ms"]), _times(f["longest_ratio"]),
                    _times(f["longest_fold_ratio"]),
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
                    _kv(c), c["side"], f"{c['tokens']:,}", f"{c['n_ctx']:,}", _seconds(c["real_s"]),
                    "" if c["side"] == "full" else _times(c["full_over_real"]),
                    _seconds(c["integrated_s"]), _times(c["integrated_over_real"]),
                    _number(c["real_cache_ms"]), _number(c["random_cache_ms"]),
                    _times(c["random_over_real"]),
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
                    _kv(e), f"{e['depth']:,}", e["side"], _number(e["joules_per_token"]),
                    _number(e["watts"]),
                ]
                for e in report.energy
            ],
        )  # fmt: skip
    yield ""
    yield f"Measured {head['date']}."


def describe_lines(report: Report) -> Iterable[str]:
    """What was measured on what, one sentence a line."""
    head, model, machine = report.head, report.head["model"], report.head["machine"]
    if model["random_weights"]:
        yield "The weights are random: the speed of the shape, its answers mean nothing."
    share = model["retrieval_kv_heads"] / model["kv_heads"]
    window = f"window: {model['window_min']:,} tokens"
    if model["window_divisor"]:
        window += f" or 1/{model['window_divisor']} of the context, whichever is more"
    yield (
        f"{model['retrieval_kv_heads']} of {model['kv_heads']} KV heads are retrieval heads"
        f" ({share:.1%}); {window}; {model['sink_tokens']} sinks;"
        f" weights read per token: {model['weights_bytes'] / 2**20:,.0f} MiB."
    )
    memory = machine["memory_total"]
    yield (
        f"{machine['cpu']}, {machine['cores']} cores, {head['setup']['n_threads']} threads,"
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
    yield (
        f'Flash attention on. The sides in {where}, in turn; "faster by" is the median of the'
        " paired ratios with its quartiles."
    )
    steps = max((r.get("steps", 1) for r in report.records if r["kind"] == "decode"), default=1)
    if steps > 1:
        yield (
            f"Where a step takes less than {SHORT_STEP * 1e3:.0f} ms, a turn is one that does not"
            f" count and {steps} more, of which the median does."
        )
    yield "Caches were filled with random rows, not by a prefill."
    if any(row["first_token"] == "integrated" for row in report.rows):
        yield (
            f"Prompts of more than {SHORT_PROMPT} tokens were not prefilled where the time to the"
            ' first token is called "integrated": it is, over batches at several depths.'
        )


def _memory_table(report: Report) -> Iterable[str]:
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in report.records:
        if record["kind"] == "memory":
            key = (*_types(record), record["n_ctx"])
            groups.setdefault(key, {})[record["side"]] = record
    order = [tuple(types) for types in report.head["settings"]["types"]]
    groups = dict(sorted(groups.items(), key=lambda item: (item[0][2], order.index(item[0][:2]))))
    rows = []
    with_device = any(r["device"] is not None for g in groups.values() for r in g.values())
    for (type_k, type_v, n_ctx), sides in groups.items():
        cells = [_kv({"type_k": type_k, "type_v": type_v}), f"{n_ctx:,}"]
        cells += [_mib(sides.get(side, {}).get("kv_bytes")) for side in SIDES]
        razor, full = (sides.get(side, {}).get("kv_bytes") for side in SIDES[:2])
        cells.append(f"{razor / full:.1%}" if razor and full else "")
        for name in ("peak_rss", "device") if with_device else ("peak_rss",):
            cells += [_mib(sides.get(side, {}).get(name)) for side in SIDES[:2]]
        rows.append(cells)
    titles = ["KV type", "context", "razor KV MiB", "full KV MiB", "full f16 KV MiB", "share"]
    titles += ["peak RSS MiB decoding: razor", "full"]
    titles += ["device MiB: razor", "full"] if with_device else []
    return markdown_table(titles, rows)


def _gpu(gpu: dict[str, Any]) -> str:
    memory = gpu["memory_total"]
    return (
        f"{one_line(gpu['name'] or 'a GPU')}"
        + (f", {memory / 2**30:.0f} GiB" if memory else "")
        + (f", driver {one_line(gpu['driver'])}" if gpu["driver"] else "")
        + (f", CUDA {one_line(gpu['cuda'])}" if gpu["cuda"] else "")
    )


def readme_block(report: Report) -> str:
    """What a README shows of a run: a sentence and a short table, Markdown."""
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
                _kv(r), f"{r['depth']:,}", _mib(r["razor_kv_bytes"]), _mib(r["full_kv_bytes"]),
                _number(r["razor_tok_s"]), _number(r["full_tok_s"]),
                _times(r["decode_ratio_full"]),
                _times(r["decode_ratio_full_f16"] or r["decode_ratio_full"]),
                _seconds(r["razor_first_token_s"]), _seconds(r["full_first_token_s"]),
            ]
            for r in report.rows
        ],
    )  # fmt: skip
    return "\n".join([*textwrap.wrap(text, 100), "", *table])


# -- comparison


def compare_rows(here: Report, there: Report) -> list[dict[str, Any]]:
    """The rows that both runs have, with there / here of what they measured."""
    others = {(*_types(r), r["depth"]): r for r in there.rows}
    found = []
    for row in here.rows:
        other = others.get((*_types(row), row["depth"]))
        if other is None:
            continue
        entry = {name: row[name] for name in ("type_k", "type_v", "depth")}
        for name in (
            "razor_tok_s", "full_tok_s", "decode_ratio_full", "razor_prefill_tok_s",
            "full_prefill_tok_s", "razor_first_token_s", "razor_kv_bytes", "razor_peak_rss",
        ):  # fmt: skip
            a, b = row[name], other[name]
            entry |= {f"{name}_a": a, f"{name}_b": b, f"{name}_change": b / a if a and b else None}
        found.append(entry)
    return found


def differences(here: Report, there: Report) -> list[str]:
    """What of the two runs is not the same, apart from the figures: one sentence each."""
    found = []
    for path in (
        "model.name", "model.fingerprint", "model.retrieval_kv_heads", "model.window_min",
        "model.window_divisor", "machine.cpu", "machine.cores", "machine.gpus", "setup.n_threads",
        "setup.n_gpu_layers", "settings.n_ctx", "library.build", "code.commit",
    ):  # fmt: skip
        part, name = path.split(".")
        a, b = here.head[part].get(name), there.head[part].get(name)
        if a != b:
            found.append(f"{path}: {one_line(str(a))} in A, {one_line(str(b))} in B")
    return found


def format_comparison(here: Report, there: Report, kind: str) -> str:
    """compare_rows() as one of FORMATS. Raises RazorError where the runs have no row in common."""
    rows = compare_rows(here, there)
    if not rows:
        raise RazorError("the two runs have no KV type and depth in common to compare")
    if kind == "json":
        return compact_json({"differences": differences(here, there), "rows": rows})
    columns = {
        "razor decode tok/s": "razor_tok_s",
        "full decode tok/s": "full_tok_s",
        "razor / full": "decode_ratio_full",
        "razor prefill tok/s": "razor_prefill_tok_s",
        "razor first token s": "razor_first_token_s",
    }
    titles = ["KV type", "tokens in cache"]
    for title in columns:
        titles += [f"{title}: A", "B", "B / A"]
    lines = markdown_table(
        [*titles, "razor KV MiB: A", "B"],
        [
            [
                _kv(row), f"{row['depth']:,}",
                *(
                    cell
                    for name in columns.values()
                    for cell in (
                        _number(row[f"{name}_a"]), _number(row[f"{name}_b"]),
                        _times(row[f"{name}_change"]),
                    )
                ),
                _mib(row["razor_kv_bytes_a"]), _mib(row["razor_kv_bytes_b"]),
            ]
            for row in rows
        ],
    )  # fmt: skip
    notes = [f"- {line}" for line in differences(here, there)]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


# -- cells


def _kv(row: dict[str, Any]) -> str:
    return row["type_k"] if row["type_k"] == row["type_v"] else f"{row['type_k']}/{row['type_v']}"


def _number(value: float | None) -> str:
    """About four significant digits."""
    if value is None:
        return ""
    digits = next((n for limit, n in ((1, 3), (100, 2), (1000, 1)) if abs(value) < limit), 0)
    return f"{value:,.{digits}f}"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _ratio(row: dict[str, Any], name: str) -> str:
    if row[name] is None:
        return ""
    return f"{row[name]:.2f}x ({row[f'{name}_q1']:.2f}-{row[f'{name}_q3']:.2f})"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{_number(value)} s"


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:,.1f}"


# -- plots


def plot_report(report: Report, path: str | os.PathLike[str]) -> Path:
    """KV memory, decode speed and time to the first token over the context.

    Raises UnsupportedError where matplotlib is missing or the name is no picture's, OSError.
    """
    from ..common.figure import make_figure, save_figure

    figure = make_figure(path, (15.0, 4.5), "look at the tables in the Markdown report")
    from matplotlib.ticker import NullLocator

    axes = figure.subplots(1, 3)
    name = report.head["model"]["name"] or report.head["model"]["file"]
    figure.suptitle(f"{one_line(name)}, {one_line(report.head['machine']['cpu'])}")
    rows = report.rows
    kinds = list(dict.fromkeys(map(_types, rows)))
    for i, types in enumerate(kinds):
        some = [row for row in rows if _types(row) == types]
        for side, style in (("razor", "o-"), ("full", "x--")):
            for ax, x, y, scale in (
                (axes[0], "n_ctx", f"{side}_kv_bytes", 2**-20),
                (axes[1], "depth", f"{side}_tok_s", 1),
                (axes[2], "depth", f"{side}_first_token_s", 1),
            ):
                known = {row[x]: row[y] * scale for row in some if row[y] is not None}
                ax.plot(
                    list(known), list(known.values()), style, color=f"C{i}",
                    label=f"{side} {_kv(some[0])}",
                )  # fmt: skip
    for ax, x, title, label in zip(
        axes,
        ("n_ctx", "depth", "depth"),
        ("KV cache", "decoding", "time to the first token"),
        ("MiB", "tokens/s", "s"),
        strict=True,
    ):
        ticks = sorted({row[x] for row in rows})
        ax.set(title=title, xlabel="context" if x == "n_ctx" else "tokens", ylabel=label)
        ax.set(yscale="log")
        ax.set_xscale("symlog", linthresh=512, base=2)  # linear from 0 to 512
        ax.set_xticks(ticks, [short_tokens(tick) for tick in ticks], rotation=45)
        ax.xaxis.set_minor_locator(NullLocator())
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    figure.tight_layout()
    return save_figure(figure, path)
