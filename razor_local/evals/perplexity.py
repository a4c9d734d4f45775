"""Perplexity of a text, and the distance of each policy's predictions from the full cache's.

The text is split into windows of one context each. All contexts read a window in step, batch by
batch. The logits of a batch are compared with those of the full f16 cache and then dropped. Only
sums over blocks of BLOCK tokens are kept, and the whole report is computed from them.

None of these figures shows whether a fact in the text is still found. Each policy is therefore also
asked for planted facts (facts.py), in a context of the same size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.compact_json import compact_json
from ..common.figure import make_figure, save_figure
from ..common.inputs import read_text_file
from ..common.journal import Journal
from ..common.machine import free_memory
from ..common.markdown import markdown_table
from ..common.progress import Clock, Progress, Stop, check_stop, silent
from ..errors import RazorError
from ..model_setup import ModelSetup
from ..model_shape import ModelShape
from ..plan import padded_n_ctx
from .facts import ROOM, Examiner, make_exam
from .haystack import MadeText
from .intervals import block_bootstrap
from .policies import Policy
from .questions import Prompts
from .report import INSTEAD, draw_curves, head_lines, share
from .run import describe_cache, open_llama

BLOCK = 128  # tokens
N_BATCH = 256  # tokens whose logits of one context exist at a time; a multiple of BLOCK
BESIDE = 256 << 20  # bytes of a context beside its cache and logits: a guess
REFERENCE = Policy("full-f16", "full-f16", None, "f16")


@dataclass(frozen=True)
class Window:
    """Tokens [start, end) of the text. Those from position first on count: the others were counted
    in an earlier window, or have nothing before them."""

    start: int
    end: int
    first: int


def make_windows(n_tokens: int, n_ctx: int, stride: int, most: int | None = None) -> list[Window]:
    """Windows of n_ctx tokens that begin every stride tokens; each token counts once.

    A rest of less than a window at the end is left out, unless it is all there is. Raises
    RazorError for a stride that is no multiple of BLOCK or longer than a window, or too short a
    text.
    """
    if not 0 < stride <= n_ctx or (stride < n_ctx and stride % BLOCK):
        raise RazorError(
            f"the stride is {stride} tokens, expected a multiple of {BLOCK} up to the context"
            f" ({n_ctx:,})"
        )
    if n_tokens < 2 * BLOCK:
        raise RazorError(f"the text has {n_tokens} tokens, expected at least {2 * BLOCK}")
    if n_tokens < n_ctx:
        return [Window(0, n_tokens, 1)]
    starts = range(0, n_tokens - n_ctx + 1, stride)
    windows = [
        Window(start, start + n_ctx, 1 if start == 0 or stride == n_ctx else n_ctx - stride)
        for start in starts
    ]
    return windows[:most]


@dataclass(frozen=True)
class Text:
    """tokens: int32, without BOS. bos: stands in place of the first token of every window, as the
    model was trained; None for models that have none."""

    tokens: np.ndarray
    bos: int | None
    n_vocab: int

    def window(self, window: Window) -> np.ndarray:
        tokens = self.tokens[window.start : window.end].copy()
        if self.bos is not None:
            tokens[0] = self.bos
        return tokens


def read_text(setup: ModelSetup, path: str | os.PathLike[str]) -> Text:
    """A UTF-8 text file as the model's tokens. Raises RazorError, OSError."""
    from .questions import load_vocabulary

    text = read_text_file(path)
    vocab = load_vocabulary(setup.file)
    plain, marked = (
        vocab.tokenize(text.encode(), add_bos=add_bos, special=False) for add_bos in (False, True)
    )
    bos = marked[0] if len(marked) > len(plain) else None
    return Text(np.array(plain, np.int32), bos, vocab.n_vocab())


def run_perplexity(
    setup: ModelSetup,
    shape: ModelShape,
    policies: Sequence[Policy],
    text: Text,
    windows: Sequence[Window],
    n_ctx: int,
    journal: Journal,
    head: dict[str, Any],
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> None:
    """Adds a record for each policy and window that the journal does not hold yet.

    As many policies as have room in memory read each window together, beside a full f16 cache.
    Raises RazorError where a context cannot be created, Stopped between two batches.
    """
    done = {(r["policy"], r["window"]) for r in journal.records if r["kind"] == "window"}
    groups = _groups(shape, policies, n_ctx, text.n_vocab, setup.n_gpu_layers)
    work = [
        (group, [w for w in windows if any((p.name, w.start) not in done for p in group)])
        for group in groups
    ]
    total = sum((len(group) + 1) * (w.end - w.start) for group, some in work for w in some)
    clock = Clock(progress, total)
    if journal.head is None:
        journal.begin(head)
    for group, some in work:
        if not some:
            continue
        clock.show("loading")
        with ExitStack() as stack:
            sides: dict[str, Any] = {}
            for policy in (REFERENCE, *group):
                if policy.name not in sides:
                    llama = open_llama(setup, policy, n_ctx, stop, n_batch=N_BATCH)
                    stack.callback(llama.close)
                    sides[policy.name] = llama
            for policy in group:
                cache = {"kind": "cache", "policy": policy.name}
                if not journal.has(cache):
                    journal.add(cache | describe_cache(sides[policy.name]))
            for window in some:
                found = _read_window(sides, text.window(window), window.first, clock, stop)
                sums = [found[policy.name] for policy in group]
                for policy, blocks in zip(group, sums, strict=True):
                    if (policy.name, window.start) not in done:
                        journal.add(
                            {"kind": "window", "policy": policy.name, "window": window.start}
                            | {name: np.round(v, 9).tolist() for name, v in blocks.items()}
                        )


def run_facts(
    setup: ModelSetup,
    shape: ModelShape,
    policies: Sequence[Policy],
    n_ctx: int,
    journal: Journal,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> None:
    """Add a record of the planted facts that each policy finds, where the journal has none.

    All facts are placed where the local heads of every policy have folded them. If no policy has
    local heads, the last third of the text is left free. Raises UnsupportedError where a context is
    too short for that, Stopped.
    """
    some = [p for p in policies if not journal.has({"kind": "facts", "policy": p.name})]
    if not some:
        return
    n_tokens = n_ctx - ROOM
    plans = [policy.plan(shape, n_ctx) for policy in policies]
    reach = max((p.window + p.block for p in plans if p.active), default=n_tokens // 3)
    sinks = max((p.sink_tokens for p in plans if p.active), default=0)
    (progress or silent)(0, 1, "planting facts")
    exam = make_exam(Prompts(setup.file), MadeText(), n_tokens, reach, sinks)
    with Examiner(
        Path(setup.model), shape, exam, setup.n_threads, setup.n_gpu_layers, progress, stop
    ) as examiner:
        for policy in some:
            outcome = examiner.ask(
                policy.profile, policy.kv_type, policy.kv_type, f"planting facts: {policy.name}"
            )
            journal.add(
                {
                    "kind": "facts",
                    "policy": policy.name,
                    "found": outcome.n_found,
                    "asked": len(outcome.found),
                    "logprob": round(float(outcome.logprob.mean()), 6),
                }
            )


def _groups(
    shape: ModelShape, policies: Sequence[Policy], n_ctx: int, n_vocab: int, n_gpu_layers: int
) -> list[list[Policy]]:
    """Policies whose contexts have room in memory together, in their order; one at a time on a
    device, whose memory is not known here."""
    from llama_cpp import llama_cpp as C

    def size(policy: Policy) -> int:
        return policy.plan(shape, n_ctx).kv_bytes + N_BATCH * n_vocab * 4 + BESIDE

    free = free_memory()
    if n_gpu_layers and C.llama_supports_gpu_offload():
        free = 0
    groups: list[list[Policy]] = [[]]
    room = free // 2 - size(REFERENCE)
    for policy in policies:
        if groups[-1] and size(policy) > room:
            groups.append([])
            room = free // 2 - size(REFERENCE)
        groups[-1].append(policy)
        room -= size(policy)
    return groups


def _read_window(
    sides: dict[str, Any], tokens: np.ndarray, first: int, clock: Clock, stop: Stop | None
) -> dict[str, dict[str, np.ndarray]]:
    """For each side sums over the blocks of a window, see _compare(). The first is the reference.

    tokens: of the window; first: the first position whose prediction counts.
    """
    n = len(tokens)
    names = ("n", "nll", "full_nll", "kl", "same")
    sums = {side: {name: np.zeros(-(-n // BLOCK)) for name in names} for side in sides}
    for llama in sides.values():
        llama.reset()
    for start in range(0, n, N_BATCH):
        batch = tokens[start : start + N_BATCH]
        positions = np.arange(start, start + len(batch)) + 1  # a row predicts the next token
        counted = (positions >= first) & (positions < n)
        targets = tokens[positions[counted]]
        full: np.ndarray | None = None
        for side, llama in sides.items():
            check_stop(stop)
            clock.show(f"{side}, {start:,} of {n:,} tokens")
            for logits in llama.eval_logits(batch.tolist(), counted):  # one batch, or no row of it
                ours = log_softmax(logits)
                if not np.isfinite(ours.max()):  # nan, if any of them is
                    raise RazorError(
                        f"{side} computes logits that are not numbers within tokens {start:,} to"
                        f" {start + len(batch):,} of a window; the model file is damaged, or its"
                        " values are too large for their types"
                    )
                full = ours if full is None else full
                _compare(sums[side], full, ours, targets, positions[counted])
            clock.done(len(batch))
    return sums


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """[n, n_vocab], a new array in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


def _compare(
    sums: dict[str, np.ndarray],
    full: np.ndarray,
    ours: np.ndarray,
    targets: np.ndarray,
    positions: np.ndarray,
) -> None:
    """Adds what some rows of log probabilities say to the sums of their blocks.

    positions: of the predicted tokens in the window. n: tokens; nll, full_nll: negative log
    likelihood of the text; kl: KL(full || ours), nats; same: the same token is most likely.
    """
    rows, blocks = np.arange(len(targets)), positions // BLOCK
    values = {
        "n": np.ones(len(targets)),
        "nll": -ours[rows, targets],
        "full_nll": -full[rows, targets],
        "kl": (np.exp(full) * (full - ours)).sum(axis=1),
        "same": (full.argmax(axis=1) == ours.argmax(axis=1)).astype(float),
    }
    for name, value in values.items():
        np.add.at(sums[name], blocks, value)


# -- report


@dataclass(frozen=True)
class PerplexityReport:
    """A run: what was read by what (head), and the records of run_perplexity."""

    head: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row per policy over all positions; intervals by a bootstrap over blocks.

        perplexity; ratio: to the full f16 cache's; kl: mean, nats; same_top: share of the tokens
        where both find the same one most likely; facts_found of facts_asked planted facts, None
        where no facts were planted.
        """
        return list(self._rows([(0, 1 << 62)]))

    @property
    def by_position(self) -> list[dict[str, Any]]:
        """The same by policy and position in the window, [from_position, to_position)."""
        return list(self._rows(position_buckets(self.head["settings"]["n_ctx"])))

    @property
    def missing(self) -> int:
        """Windows that were not read by a policy yet, an interrupted run."""
        wanted = self.head["settings"]["n_windows"] * len(self.head["policies"])
        return wanted - sum(r["kind"] == "window" for r in self.records)

    def _rows(self, buckets: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        caches = {r["policy"]: r for r in self.records if r["kind"] == "cache"}
        facts = {r["policy"]: r for r in self.records if r["kind"] == "facts"}
        for policy in self.head["policies"]:
            windows = [
                r for r in self.records if r["kind"] == "window" and r["policy"] == policy["name"]
            ]
            windows.sort(key=lambda r: r["window"])
            for low, high in buckets if windows else ():
                found = _figures(windows, low, high, self.head["settings"]["seed"])
                if found is not None:
                    cache = caches[policy["name"]]
                    full = cache["kv_bytes_full_f16"]
                    yield {
                        "policy": policy["name"],
                        "from_position": low,
                        "to_position": min(high, self.head["settings"]["n_ctx"]),
                        "active": cache["active"],
                        "kv_bytes": cache["kv_bytes"],
                        "share": cache["kv_bytes"] / full if full else None,
                        "facts_found": facts.get(policy["name"], {}).get("found"),
                        "facts_asked": facts.get(policy["name"], {}).get("asked"),
                    } | found

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": "razor-local eval perplexity",
            "head": self.head,
            "missing": self.missing,
            "rows": self.rows,
            "by_position": self.by_position,
            "records": sorted(
                (r for r in self.records if r["kind"] in ("window", "facts")),
                key=lambda r: (r["kind"], r["policy"], r.get("window", 0)),
            ),
        }


def position_buckets(n_ctx: int) -> list[tuple[int, int]]:
    """[0, 256), [256, 512), [512, 1024) and so on up to n_ctx."""
    edges = [0, 2 * BLOCK]
    while edges[-1] < n_ctx:
        edges.append(2 * edges[-1])
    edges[-1] = n_ctx
    return list(zip(edges, edges[1:], strict=False))


def _figures(
    windows: Sequence[dict[str, Any]], low: int, high: int, seed: int
) -> dict[str, Any] | None:
    chosen: dict[str, list[float]] = {name: [] for name in ("n", "nll", "full_nll", "kl", "same")}
    for window in windows:
        for name, values in chosen.items():
            values += window[name][low // BLOCK : -(-high // BLOCK)]
    arrays = {name: np.array(values) for name, values in chosen.items()}
    some = arrays["n"] > 0
    if not some.any():
        return None
    n = arrays["n"][some]
    excess = arrays["nll"] - arrays["full_nll"]
    sums = np.stack([a[some] for a in (arrays["nll"], excess, arrays["kl"], arrays["same"])], 1)
    means = sums.sum(axis=0) / n.sum()
    bounds = block_bootstrap(n, sums, seed)
    figures: dict[str, Any] = {"n": int(n.sum())}
    for i, (name, convert) in enumerate(
        (("perplexity", math.exp), ("ratio", math.exp), ("kl", float), ("same_top", float))
    ):
        figures[name] = convert(means[i])
        figures[f"{name}_low"], figures[f"{name}_high"] = (convert(b[i]) for b in bounds)
    return figures


def format_report(report: PerplexityReport, kind: str) -> str:
    """As "json" or "md", with a line end."""
    if kind == "json":
        return compact_json(report.to_dict())
    return "\n".join(_markdown(report)) + "\n"


def _markdown(report: PerplexityReport) -> Iterator[str]:
    settings = report.head["settings"]
    yield from head_lines(report.head)
    yield (
        f"- {settings['text']}: {settings['n_windows']:,} windows of {settings['n_ctx']:,} tokens,"
        f" one every {settings['stride']:,} tokens, from a text of {settings['n_tokens']:,} tokens"
    )
    yield "- compared with a full f16 cache; 95 % confidence intervals; KL divergence in nats"
    if any(r["kind"] == "facts" for r in report.records):
        yield (
            "- planted facts: 20 questions about a second text that fills the context, every fact"
            " outside the local windows; perplexity and KL divergence on plain text do not show"
            " whether facts are lost"
        )
    if report.missing:
        yield f"- **unfinished: {report.missing:,} windows were not read yet**"
    yield ""
    rows = report.rows
    yield from markdown_table(
        ["policy", "KV bytes", "share of full f16", "planted facts found", "perplexity",
         "ratio to full", "KL divergence", "same top token, %", "tokens"],
        [
            [
                r["policy"], f"{r['kv_bytes']:,}", share(r["share"]),
                "" if r["facts_found"] is None else f"{r['facts_found']} of {r['facts_asked']}",
                f"{r['perplexity']:.3f}",
                f"{r['ratio']:.4f} ({r['ratio_low']:.4f} to {r['ratio_high']:.4f})",
                f"{r['kl']:.5f} ({r['kl_low']:.5f} to {r['kl_high']:.5f})",
                f"{100 * r['same_top']:.2f} ({100 * r['same_top_low']:.2f} to"
                f" {100 * r['same_top_high']:.2f})",
                f"{r['n']:,}",
            ]
            for r in rows
        ],
    )  # fmt: skip
    found = {(r["policy"], r["from_position"]): r for r in report.by_position}
    buckets = position_buckets(settings["n_ctx"])
    yield ""
    yield "## KL divergence by position in the context"
    yield ""
    yield from markdown_table(
        ["policy", *(f"{low:,} to {high - 1:,}" for low, high in buckets)],
        [
            [r["policy"]]
            + [
                f"{found[r['policy'], low]['kl']:.5f}" if (r["policy"], low) in found else ""
                for low, _ in buckets
            ]
            for r in rows
        ],
    )
    yield ""
    yield f"Measured {report.head['date']}."


def plot_positions(report: PerplexityReport, path: str | os.PathLike[str]) -> Path:
    """KL divergence over the position in the context, a line per policy.

    Raises UnsupportedError where matplotlib is missing or the name is no picture's, OSError.
    """
    figure = make_figure(path, (8.5, 4.5), INSTEAD)
    figure.set_layout_engine("constrained")
    ax = figure.subplots()
    rows = report.by_position
    for i, policy in enumerate(dict.fromkeys(r["policy"] for r in rows)):
        some = [r for r in rows if r["policy"] == policy and r["kl"] > 0]
        x = [(r["from_position"] + r["to_position"]) / 2 for r in some]
        y = [r["kl"] for r in some]
        errors = [[r["kl"] - r["kl_low"] for r in some], [r["kl_high"] - r["kl"] for r in some]]
        if some:
            line = ("o-", "s--", "^:")[i // 10 % 3]  # there are ten colours
            ax.errorbar(x, y, np.maximum(errors, 0), fmt=line, color=f"C{i % 10}", label=policy,
                        capsize=2, markersize=3, linewidth=1)  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    ax.set(yscale="log", xlabel="position, tokens", ylabel="KL divergence, nats")
    ax.grid(alpha=0.3)
    figure.legend(fontsize="x-small", loc="outside right upper")
    return save_figure(figure, path)


def plot_curve(report: PerplexityReport, path: str | os.PathLike[str]) -> Path:
    """KL divergence over bytes of the KV cache. Raises as plot_positions()."""
    points = [
        (r["policy"], r["kv_bytes"], r["kl"], r["kl_low"], r["kl_high"])
        for r in report.rows
        if r["kl"] > 0
    ]
    title = f"{report.head['settings']['n_ctx']:,} tokens"
    return draw_curves(report.head, {title: points}, "KL divergence, nats", path, log=True)


def context_size(shape: ModelShape, n_ctx: int) -> int:
    """Tokens of a window: n_ctx, or the trained length up to 8,192, rounded up to 256."""
    return padded_n_ctx(shape, n_ctx or min(shape.n_ctx_train or 8192, 8192))
