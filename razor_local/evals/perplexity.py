"""Perplexity of a text, and the distance of each policy's predictions from the full cache's.

The text is split into windows of one context each. All contexts read a window in step, batch by
batch. The logits of a batch are compared with those of the full f16 cache and then dropped. Only
sums over blocks of BLOCK tokens are kept, and the whole report is computed from them.

The first tokens of a window can be a prompt. A context reads it like any prompt: with full
attention by default. Only the predictions after it count, which are made with the compressed cache,
like those of an answer. Without a prompt, the compressed cache reads everything.

These figures do not show whether a fact in the text is still found. Each policy therefore also
answers questions about planted facts (facts.py), in a context of the same size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.inputs import read_text_file
from ..common.journal import Journal
from ..common.markdown import one_line
from ..common.progress import Clock, Progress, Stop, check_stop, silent
from ..errors import RazorError
from ..model_setup import ModelSetup
from ..model_shape import ModelShape
from ..plan import padded_n_ctx
from .facts import ROOM, Examiner, make_exam
from .haystack import MadeText
from .policies import Policy, exact_full
from .questions import Prompts
from .run import SUMS, describe_cache, group_policies, open_llama, prompt_sources, share_prompts

if TYPE_CHECKING:
    from ..llama import Llama

BLOCK = 128  # tokens
MIN_PROMPT = 2  # tokens; the last one is evaluated with those that follow, because its logits count
N_BATCH = 256  # tokens of a context whose logits are in memory at a time; a multiple of BLOCK


@dataclass(frozen=True)
class Window:
    """Tokens [start, end) of the text, of which those from position first on count.

    The others belong to the prompt, were counted in an earlier window, or have no token before
    them.
    """

    start: int
    end: int
    first: int


def make_windows(
    n_tokens: int, n_ctx: int, stride: int, most: int | None = None, prompt: int = 0
) -> list[Window]:
    """Make windows of n_ctx tokens that begin every stride tokens. Each token counts at most once.

    Tokens at the end that do not fill a window are left out, unless the whole text is shorter than
    one.

    Args:
        most: maximum number of windows.
        prompt: tokens of each window that are read as a prompt and do not count.

    Raises:
        RazorError: the text is too short, the stride is longer than a window or not a multiple of
            BLOCK, or a prompt leaves no tokens to count.
    """
    if not 0 < stride <= n_ctx or (stride < n_ctx and stride % BLOCK):
        raise RazorError(
            f"the stride is {stride} tokens, expected a multiple of {BLOCK} up to the context"
            f" ({n_ctx:,})"
        )
    if n_tokens < 2 * BLOCK:
        raise RazorError(
            f"the text has {n_tokens} tokens, expected at least {2 * BLOCK}; use a longer one"
        )
    if prompt and not MIN_PROMPT <= prompt < min(n_ctx, n_tokens):
        raise RazorError(
            f"the prompt of a window has {prompt:,} tokens, expected {MIN_PROMPT} to"
            f" {min(n_ctx, n_tokens) - 1:,}, so that tokens of the window follow it"
        )
    if n_tokens < n_ctx:
        return [Window(0, n_tokens, max(prompt, 1))]
    starts = range(0, n_tokens - n_ctx + 1, stride)
    repeated = [1 if start == 0 or stride == n_ctx else n_ctx - stride for start in starts]
    windows = [
        Window(start, start + n_ctx, max(first, prompt))
        for start, first in zip(starts, repeated, strict=True)
    ]
    return windows[:most]


@dataclass(frozen=True)
class Text:
    """A text in tokens.

    Attributes:
        tokens: int32, without BOS.
        bos: the token that replaces the first one of every window, as in training. None for models
            without it.
        files: name and number of tokens of each file, in the order of tokens, if the text is a
            folder; otherwise empty.
    """

    tokens: np.ndarray
    bos: int | None
    n_vocab: int
    files: tuple[tuple[str, int], ...] = ()

    def windows(
        self, n_ctx: int, stride: int, most: int | None = None, prompt: int = 0
    ) -> list[Window]:
        """Make windows as make_windows() does, none of which spans two files.

        The files take turns: first the first window of every file, then the second, and so on.
        """
        columns, begin = [], 0
        for name, n_tokens in self.files or (("", len(self.tokens)),):
            try:
                some = make_windows(n_tokens, n_ctx, stride, most, prompt)
            except RazorError as error:
                raise RazorError(f"{name}: {error}" if name else str(error)) from None
            columns.append([Window(begin + w.start, begin + w.end, w.first) for w in some])
            begin += n_tokens
        rows = zip_longest(*columns)
        return [w for row in rows for w in row if w is not None][:most]

    def window(self, window: Window) -> np.ndarray:
        tokens: np.ndarray = self.tokens[window.start : window.end].copy()
        if self.bos is not None:
            tokens[0] = self.bos
        return tokens


def text_files(path: Path) -> list[Path]:
    """Return the files that read_text() reads: those of a folder without hidden ones, or path."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.glob("*.txt") if not file.name.startswith("."))


def describe_text(text: Text, path: Path) -> dict[str, Any]:
    """Return settings of a run that identify a text, and how it is divided into files."""
    settings: dict[str, Any] = {
        "text": one_line(path.resolve().name),
        "text_sha256": hashlib.sha256(text.tokens.tobytes()).hexdigest()[:16],
        "n_tokens": len(text.tokens),
    }
    return settings | ({"files": [list(file) for file in text.files]} if text.files else {})


def read_text(setup: ModelSetup, path: str | os.PathLike[str]) -> Text:
    """Read a UTF-8 text file, or the .txt files of a folder, as the model's tokens.

    Raises RazorError, OSError.
    """
    from .questions import load_vocabulary

    path = Path(path)
    files = text_files(path)
    if not files:
        raise RazorError(f"{path} has no .txt files, expected a text file or a folder with some")
    texts = [read_text_file(file).encode() for file in files]
    vocab = load_vocabulary(setup.file)
    plain = [vocab.tokenize(text, add_bos=False, special=False) for text in texts]
    a, marked = (vocab.tokenize(b"a", add_bos=bos, special=False) for bos in (False, True))
    bos = marked[0] if len(marked) > len(a) else None
    lengths = tuple((file.name, len(some)) for file, some in zip(files, plain, strict=True))
    return Text(
        np.array([token for some in plain for token in some], np.int32),
        bos,
        vocab.n_vocab(),
        lengths if path.is_dir() else (),
    )


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
    prompt: int = 0,
) -> None:
    """Add a record for each policy and window that is not in the journal yet.

    Each window is read by a full f16 cache and as many policies at once as memory allows. The full
    cache uses razor_local's attention, which is exact on CPUs. With llama.cpp's attention, which
    sums in f16, even policies that drop nothing would have a divergence of 0.001 to 0.005.

    Args:
        prompt: number of tokens of each window that are read as a prompt.

    Raises:
        RazorError: a context cannot be created.
        Stopped: stop() returned True between two batches.
    """
    done = {(r["policy"], r["window"]) for r in journal.records if r["kind"] == "window"}
    reference = exact_full(shape, "f16")
    logits = N_BATCH * text.n_vocab * 4
    sources = prompt_sources(shape, (reference, *policies), n_ctx) if prompt else []
    beside = {p.name: p for p in (reference, *sources)}
    groups = group_policies(setup, shape, policies, n_ctx, list(beside.values()), logits)
    work = [
        (group, [w for w in windows if any((p.name, w.start) not in done for p in group)])
        for group in groups
    ]
    total = sum(
        len({reference.name, *(p.name for p in group)}) * (w.end - w.start)
        for group, some in work
        for w in some
    )
    clock = Clock(progress, total)
    if journal.head is None:
        journal.begin(head)
    for group, some in work:
        if not some:
            continue
        clock.show("loading")
        with ExitStack() as stack:

            def load(policy: Policy, stack: ExitStack = stack) -> Llama:
                llama = open_llama(setup, policy, n_ctx, stop, n_batch=N_BATCH)
                return stack.enter_context(closing(llama))

            sides = {p.name: load(p) for p in {p.name: p for p in (reference, *group)}.values()}
            for source in sources:
                share_prompts(source, group, sides, load)
            for policy in group:
                cache = {"kind": "cache", "policy": policy.name}
                if not journal.has(cache):
                    journal.add(cache | describe_cache(sides[policy.name]))
            for window in some:
                found = _read_window(sides, text.window(window), window.first, prompt, clock, stop)
                for policy in group:
                    if (policy.name, window.start) in done:
                        continue
                    record = {"kind": "window", "policy": policy.name, "window": window.start}
                    if prompt:
                        record["prefill"] = sides[policy.name].memory().prefill
                    blocks = found[policy.name].items()
                    journal.add(record | {name: np.round(v, 9).tolist() for name, v in blocks})


def run_facts(
    setup: ModelSetup,
    shape: ModelShape,
    policies: Sequence[Policy],
    n_ctx: int,
    journal: Journal,
    progress: Progress | None = None,
    stop: Stop | None = None,
    prefill: str = "razor",
) -> None:
    """Add a record of the planted facts that each policy finds, unless the journal has it.

    All facts are in the part that the local heads of every policy have folded. If no policy has
    local heads, the last third of the text has no facts.

    Args:
        prefill: how to read the text, as in Llama.

    Raises:
        UnsupportedError: the context is too short for this.
        Stopped: stop() returned True.
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
        Path(setup.model), shape, exam, setup.n_threads, setup.n_gpu_layers, progress, stop, prefill
    ) as examiner:
        for policy in some:
            what = f"planting facts: {policy.name}"
            outcome = examiner.ask(policy.profile, **policy.types, what=what)
            journal.add(
                {
                    "kind": "facts",
                    "policy": policy.name,
                    "found": outcome.n_found,
                    "asked": len(outcome.found),
                    "logprob": round(float(outcome.logprob.mean()), 6),
                }
            )


def _read_window(
    sides: dict[str, Any],
    tokens: np.ndarray,
    first: int,
    prompt: int,
    clock: Clock,
    stop: Stop | None,
) -> dict[str, dict[str, np.ndarray]]:
    """Sum over the blocks of a window, for each side (see _compare()).

    Args:
        sides: the contexts, with the reference first.
        tokens: the tokens of the window.
        first: the first position whose prediction counts.
        prompt: number of tokens that are read as a prompt.
    """
    n = len(tokens)
    sums = {side: {name: np.zeros(-(-n // BLOCK)) for name in SUMS} for side in sides}
    begin = max(prompt - 1, 0)  # the last token of the prompt predicts the first one that counts
    for side, llama in sides.items():
        llama.reset()
        if begin:
            clock.show(f"{side}, a prompt of {prompt:,} tokens")
            llama.prefill(tokens[:begin].tolist(), stop=stop)
            check_stop(stop)
            clock.done(begin)
    for start in range(begin, n, N_BATCH):
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
                if not np.isfinite(ours.max()):  # the maximum is NaN if any element is
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
    """Return log softmax of [n, n_vocab] as a new float64 array."""
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
    """Add some rows of log probabilities to the sums of their blocks.

    Args:
        sums: n: number of tokens; nll, full_nll: negative log likelihood of the text; kl:
            KL(full || ours) in nats; same: how often both predict the same token.
        full, ours: log probabilities of the reference and of this side.
        targets: the tokens of the text.
        positions: their positions in the window.
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


def context_size(shape: ModelShape, n_ctx: int) -> int:
    """Return the tokens of a window: n_ctx, or the trained length up to 8,192, in steps of 256."""
    return padded_n_ctx(shape, n_ctx or min(shape.n_ctx_train or 8192, 8192))
