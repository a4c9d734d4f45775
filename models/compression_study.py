"""Compare ways of compressing the tokens that local heads drop, in a simulation of whole models.

    python models/compression_study.py BOOK.txt [MODEL.gguf] -c 2k -o study.json

The study covers methods that the runtime does not have: compressing after prefill instead of
folding during it, and other compensation tokens than the mean of eq. 4 (arXiv 2407.15891). The
model (of llama architecture, with a profile) runs in numpy, in F32, one text at a time. A local
head attends to sinks, compensation tokens and the window, as in razor_local/verify/reference.py.

There are two measures, both relative to the full cache of the same simulation:

- KL(full || policy) of the next token over the last TAIL tokens of slices of BOOK, in nats;
- answers kept: the share of needle questions (those of `razor-local eval needle`) answered
  correctly by the full cache for which the policy gives the same answer, token by token.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # one process per core, each with one thread
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

Array = np.ndarray
TAIL = 256  # tokens at the end of a text over which KL is averaged
CHUNK = 128  # queries of a full cache that are computed at once


# ---- compensation tokens -----------------------------------------------------------------------


class Folded(NamedTuple):
    """Compensation tokens: logits [n, c] of n queries, and values [c, d] or [n, c, d]."""

    logits: Array
    values: Array


Compensation = Callable[[Array, Array, Array, int], Folded]
# q [n, d] with 1/sqrt(d) in it, the folded k and v [N_d, d], tokens of the context


def parts_of(k: Array, v: Array, parts: Sequence[Array], q: Array) -> Folded:
    """Make one mean for each set of rows, weighted by their number, by eq. 4 and 5."""
    parts = [rows for rows in parts if len(rows)]
    keys = np.stack([k[rows].mean(0) for rows in parts])
    values = np.stack([v[rows].mean(0) for rows in parts])
    counts = np.array([len(rows) for rows in parts], np.float32)
    return Folded(q @ keys.T + np.log(counts), values)


def mean(q: Array, k: Array, v: Array, n_ctx: int) -> Folded:
    """Make the paper's token: the mean of all folded keys and values, with log N_d on its logit."""
    return parts_of(k, v, [np.arange(len(k))], q)


def segments(count: int) -> Compensation:
    """Make a mean for each of `count` equal parts of the context. It can be updated online."""

    def fold(q: Array, k: Array, v: Array, n_ctx: int) -> Folded:
        size = -(-n_ctx // count)
        rows = np.arange(len(k))
        return parts_of(k, v, [rows[i : i + size] for i in range(0, len(k), size)], q)

    return fold


def buckets(bits: int) -> Compensation:
    """Make a mean for each of 2^bits sets of similar keys.

    A set has the same signs of key - center along `bits` random directions. The center is the mean
    of the first 64 folded keys, which are known when folding begins.
    """
    directions = np.random.default_rng(0).standard_normal((4096, bits)).astype(np.float32)

    def fold(q: Array, k: Array, v: Array, n_ctx: int) -> Folded:
        signs = (k - k[:64].mean(0)) @ directions[: k.shape[1]] > 0
        code = signs @ (1 << np.arange(bits))
        return parts_of(k, v, [np.flatnonzero(code == i) for i in range(1 << bits)], q)

    return fold


def clusters(count: int, first: int | None = None) -> Compensation:
    """Make a mean for each cluster of keys, by k-means over the `first` folded keys.

    The centers then stay fixed, so later rows can be folded into the nearest one. With None, all
    folded keys are clustered again at every fold. No cache could do that: it is an upper bound of
    what `count` means can achieve.
    """

    def fold(q: Array, k: Array, v: Array, n_ctx: int) -> Folded:
        known = k[:first]
        centres = known[np.linspace(0, len(known) - 1, count).astype(int)]
        for _ in range(4):
            near = zip(nearest(known, centres), centres, strict=True)
            centres = np.stack([known[s].mean(0) if len(s) else c for s, c in near])
        return parts_of(k, v, nearest(k, centres), q)

    return fold


def nearest(k: Array, centres: Array) -> list[Array]:
    """Return the indices of the keys nearest to each center."""
    which = (k @ centres.T - 0.5 * (centres**2).sum(1)).argmax(1)
    return [np.flatnonzero(which == i) for i in range(len(centres))]


def by_norm(q: Array, k: Array, v: Array, n_ctx: int) -> Folded:
    """Make means weighted by the norms of the keys."""
    weight = np.linalg.norm(k, axis=1)
    weight = weight / weight.sum()
    return Folded((q @ (weight @ k) + np.log(len(k)))[:, None], (weight @ v)[None])


def by_variance(most: float) -> Compensation:
    """Make the mean, with half the variance of the logits, at most `most`, added to its logit.

    The variance is that of each component of the keys: log sum exp to second order, without
    covariances.
    """

    def fold(q: Array, k: Array, v: Array, n_ctx: int) -> Folded:
        correction = np.minimum(0.5 * q**2 @ k.var(0), most)
        logits = q @ k.mean(0) + np.log(len(k)) + correction
        return Folded(logits[:, None], v.mean(0)[None])

    return fold


def by_covariance(q: Array, k: Array, v: Array, n_ctx: int) -> Folded:
    """Make the mean to second order, with all covariances, and the value v^ + Cov(v, k) q.

    This is exact for normally distributed keys, and takes d^2 numbers per head.
    """
    centred_k, centred_v = k - k.mean(0), v - v.mean(0)
    covariance = centred_k.T @ centred_k / len(k)
    logits = q @ k.mean(0) + np.log(len(k)) + 0.5 * np.einsum("nd,de,ne->n", q, covariance, q)
    tilt = centred_v.T @ centred_k / len(k)
    return Folded(logits[:, None], (v.mean(0) + q @ tilt.T)[:, None])


COMPENSATIONS: dict[str, Compensation | None] = {
    "none": None,
    "mean": mean,
    "2 segments": segments(2),
    "4 segments": segments(4),
    "8 segments": segments(8),
    "16 segments": segments(16),
    "4 buckets": buckets(2),
    "16 buckets": buckets(4),
    "16 clusters": clusters(16),
    "4 first clusters": clusters(4, 128),
    "16 first clusters": clusters(16, 128),
    "mean by norm": by_norm,
    "variance": by_variance(np.inf),
    "variance, at most 1": by_variance(1),
    "covariance": by_covariance,
}


# ---- policies ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """A policy of local heads.

    Attributes:
        window: tokens of the window, None for the profile's.
        begin: tokens before the end of the text (or the answer) from which on local heads are
            compressed, while earlier tokens attend to everything. With None they fold from the
            start, as in the runtime.
    """

    name: str
    compensation: str = "mean"
    begin: int | None = None
    window: int | None = None
    block: int | None = None
    sinks: int = 4
    all_local: bool = False
    only: tuple[int, int] | None = None  # layer and KV head that is local; the rest keeps all

    def keeps_all(self, layer: int, head: int, chosen: bool) -> bool:
        """Return True if a head keeps all tokens. chosen: whether it is a retrieval head."""
        if self.only is not None:
            return self.only != (layer, head)
        return chosen and not self.all_local


def ablation(retrieval: Sequence[Array]) -> list[Policy]:
    """Make a policy for each KV head in which only this head is local."""
    return [
        Policy(
            f"{layer}.{head} local{', chosen as a retrieval head' if chosen else ''}",
            only=(layer, head),
        )
        for layer, row in enumerate(retrieval)
        for head, chosen in enumerate(row)
    ]


def comparison(window: int, block: int) -> list[Policy]:
    """Make the policies to compare.

    Those with several compensation tokens have a smaller window, so that all take the same bytes.
    """
    made = [Policy("as the runtime"), Policy("as the runtime, all heads local", all_local=True)]
    for begin, when in ((0, "after the prompt"), (32, "before the question")):
        made += [
            Policy(f"compressed {when}", begin=begin),
            Policy(f"compressed {when}, all heads local", begin=begin, all_local=True),
            Policy(f"compressed {when}, no compensation", "none", begin=begin),
        ]
    for name in COMPENSATIONS:
        if name != "mean":
            count = int(name.split()[0]) if name[0].isdigit() else 1
            made.append(Policy(f"compensation: {name}", name, window=window - (count - 1)))
            if name in ("none", "16 segments", "16 clusters"):
                made.append(
                    Policy(
                        f"compensation: {name}, all heads local",
                        name,
                        window=window - (count - 1),
                        all_local=True,
                    )
                )
    for factor in (0.25, 0.5, 2):
        made.append(Policy(f"window {int(window * factor)}", window=int(window * factor)))
    made += [Policy(f"{n} sinks", sinks=n) for n in (0, 1, 16)]
    made += [Policy(f"blocks of {b}", block=b) for b in (16, 64, 128, 256) if b != block]
    return made


# ---- the model ---------------------------------------------------------------------------------

Attention = Callable[[int, Array, Array, Array], Array]
# attention(layer, q, k, v): q [n_head, n, d] is already scaled by 1/sqrt(d), k and v
# [n_head_kv, n, d]; returns [n_head, n, d]


@dataclass
class Cache:
    """k, v [layers][n_head_kv, n, d] of the first n tokens of a text."""

    k: list[Array] = field(default_factory=list)
    v: list[Array] = field(default_factory=list)


class Model:
    """A GGUF of llama architecture in F32."""

    def __init__(self, path: Path):
        from gguf import GGUFReader
        from gguf.quants import dequantize

        reader = GGUFReader(path)

        def meta(key: str, default: float | None = None):
            found = reader.get_field(f"llama.{key}")
            if found is None and default is None:
                raise SystemExit(f"{path}: no llama.{key}, expected a model of llama architecture")
            return default if found is None else found.contents()

        self.w = {
            t.name: dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors
        }
        self.n_layer = int(meta("block_count"))
        self.n_head = int(meta("attention.head_count"))
        self.n_head_kv = int(meta("attention.head_count_kv", self.n_head))
        self.eps = float(meta("attention.layer_norm_rms_epsilon"))
        self.head_dim = len(self.w["blk.0.attn_q.weight"]) // self.n_head
        self.frequency = float(meta("rope.freq_base", 10000.0)) ** (
            -np.arange(0, self.head_dim, 2) / self.head_dim
        )
        if "rope_freqs.weight" in self.w:
            self.frequency = self.frequency / self.w["rope_freqs.weight"]
        for key in ("rope.scaling.type", "rope.dimension_sections", "attention.sliding_window"):
            if reader.get_field(f"llama.{key}") is not None:
                raise SystemExit(f"{path} has llama.{key}, which the simulation does not support")

    def run(
        self,
        tokens: Array,
        policy: Policy | None,
        retrieval: Array,
        window: int,
        block: int,
        n_ctx: int,
        past: Cache | None = None,
        keep: Cache | None = None,
    ) -> Array:
        """Compute the states after the last norm of the tokens after past, f32 [n, n_embd].

        With policy None the cache is full. keep receives k and v of all tokens.
        """
        n_past = past.k[0].shape[1] if past else 0
        group = self.n_head // self.n_head_kv

        def attention(layer: int, q: Array, k: Array, v: Array) -> Array:
            if past:
                k = np.concatenate([past.k[layer], k], 1)
                v = np.concatenate([past.v[layer], v], 1)
            if keep is not None:
                keep.k.append(k)
                keep.v.append(v)
            out = np.empty_like(q)
            for head in range(self.n_head_kv):
                heads = slice(head * group, (head + 1) * group)
                chosen = bool(retrieval[layer][head])
                full = policy is None or policy.keeps_all(layer, head, chosen)
                seen = None if full else Seen(policy, window, block, n_ctx)
                out[heads] = attend(q[heads], k[head], v[head], n_past, seen)
            return out

        return self.forward(tokens, np.arange(n_past, n_past + len(tokens)), attention)

    def forward(
        self,
        tokens: Array,
        positions: Array,
        attention: Attention,
        on_attention: Callable[[Array, Array], object] | None = None,
    ) -> Array:
        """Compute the states after the last norm, f32 [n, n_embd].

        on_attention gets the states before and after the attention of each layer.
        """
        x = self.w["token_embd.weight"][tokens]
        for layer in range(self.n_layer):
            h = self._norm(f"blk.{layer}.attn_norm", x)
            q, k, v = (self._heads(layer, name, h) for name in "qkv")
            q, k = self._rope(q, positions) / np.sqrt(self.head_dim), self._rope(k, positions)
            out = attention(layer, q, k, v).transpose(1, 0, 2).reshape(len(x), -1)
            before, x = x, x + out @ self.w[f"blk.{layer}.attn_output.weight"].T
            if on_attention:
                on_attention(before, x)
            h = self._norm(f"blk.{layer}.ffn_norm", x)
            gate, up = (h @ self.w[f"blk.{layer}.ffn_{name}.weight"].T for name in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.w[f"blk.{layer}.ffn_down.weight"].T
        return self._norm("output_norm", x)

    def logits(self, states: Array) -> Array:
        """Return the logits of the next token, f32 [n, n_vocab]."""
        return states @ self.w.get("output.weight", self.w["token_embd.weight"]).T

    def log_probs(self, states: Array) -> Array:
        """Return the log probabilities of the next token, f64 [n, n_vocab]."""
        logits = self.logits(states).astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    def _norm(self, name: str, x: Array) -> Array:
        scale = 1 / np.sqrt((x * x).mean(1, keepdims=True) + self.eps)
        return x * scale * self.w[f"{name}.weight"]

    def _heads(self, layer: int, name: str, h: Array) -> Array:
        """[heads, n, d]"""
        x = h @ self.w[f"blk.{layer}.attn_{name}.weight"].T
        return x.reshape(len(h), -1, self.head_dim).transpose(1, 0, 2)

    def _rope(self, x: Array, positions: Array) -> Array:
        """Rotate pairs of neighbors by their frequency times the position."""
        angle = positions[:, None] * self.frequency
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        y = np.empty_like(x)
        y[..., ::2] = x[..., ::2] * cos - x[..., 1::2] * sin
        y[..., 1::2] = x[..., ::2] * sin + x[..., 1::2] * cos
        return y


class Seen:
    """The tokens to which the queries of a local head attend."""

    def __init__(self, policy: Policy, window: int, block: int, n_ctx: int):
        self.window = policy.window or window
        self.block = policy.block or block
        self.sinks, self.n_ctx = policy.sinks, n_ctx
        self.fold = COMPENSATIONS[policy.compensation]

    def frontier(self, position: int) -> int:
        return max(self.sinks, position // self.block * self.block - self.window)


def attend(q: Array, k: Array, v: Array, n_past: int, seen: Seen | None) -> Array:
    """Compute the query heads of one KV head: q [group, n, d], k and v [n_past + n, d]."""
    group, n, d = q.shape
    out = np.empty_like(q)
    step = seen.block if seen else CHUNK
    start = n_past
    while start < n_past + n:
        stop = min(start // step * step + step, n_past + n)
        rows = q[:, start - n_past : stop - n_past].reshape(-1, d)
        front = seen.frontier(start) if seen else 0
        sinks = min(seen.sinks, front) if seen else 0
        kept = np.concatenate([np.arange(sinks), np.arange(front, stop)])
        keys, values = k[kept], v[kept]
        logits = (rows @ keys.T).reshape(group, stop - start, -1)
        logits[:, kept > np.arange(start, stop)[:, None]] = -np.inf
        logits = logits.reshape(len(rows), -1)
        if seen and seen.fold and front > sinks:
            folded = seen.fold(rows, k[sinks:front], v[sinks:front], seen.n_ctx)
            logits = np.concatenate([logits, folded.logits], 1)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        result = weights[:, : len(keys)] @ values
        if weights.shape[1] > len(keys):
            extra = weights[:, len(keys) :]
            if folded.values.ndim == 2:
                result += extra @ folded.values
            else:
                result += np.einsum("nc,ncd->nd", extra, folded.values)
        out[:, start - n_past : stop - n_past] = result.reshape(group, stop - start, d)
        start = stop
    return out


# ---- measuring ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A text to measure.

    Attributes:
        tokens: tokens of the whole text.
        n_prompt: number of tokens before the answer, or before the tail.
        answer: whether the tail is an answer.
    """

    tokens: Array
    n_prompt: int
    answer: bool


@dataclass(frozen=True)
class Setting:
    model: str
    retrieval: Array  # [layers, n_head_kv]
    window: int
    block: int
    n_ctx: int
    ablation: bool = False

    def policies(self) -> list[Policy]:
        if self.ablation:
            return ablation(self.retrieval)
        return comparison(self.window, self.block)


_model: Model
_setting: Setting


def _start(setting: Setting) -> None:
    global _model, _setting
    _model, _setting = Model(Path(setting.model)), setting


class Result(NamedTuple):
    """The result of a text.

    Attributes:
        full: whether the full cache predicts all tokens of the tail.
        policies: the mean KL over the tail, and whether the policy predicts all its tokens.
    """

    full: bool
    policies: list[tuple[float, bool]]


def measure(text: Text) -> Result:
    """Measure one text, in a worker process."""
    s, model = _setting, _model
    fixed = (s.retrieval, s.window, s.block, s.n_ctx)
    full_cache = Cache()
    full_states = model.run(text.tokens, None, *fixed, keep=full_cache)
    first, target = text.n_prompt - 1, text.tokens[text.n_prompt :]
    full = model.log_probs(full_states[first:-1])
    own = full.argmax(1) == target
    results = []
    for policy in s.policies():
        n_past = 0 if policy.begin is None else text.n_prompt - policy.begin
        past = None
        if n_past:
            k, v = ([x[:, :n_past] for x in part] for part in (full_cache.k, full_cache.v))
            past = Cache(k, v)
        states = model.run(text.tokens[n_past:], policy, *fixed, past=past)
        states = np.concatenate([full_states[:n_past], states])[first:-1]
        probs = model.log_probs(states)
        kl = float((np.exp(full) * (full - probs)).sum(1).mean())
        results.append((kl, bool((probs.argmax(1) == target).all())))
    return Result(bool(own.all()), results)


def needle_texts(setting: Setting, samples: int, seed: int) -> Iterator[Text]:
    """Yield needle prompts with the correct answers of the full cache."""
    from razor_local import Llama
    from razor_local.evals.haystack import MadeText
    from razor_local.evals.needle import NeedleSettings, make_samples, score
    from razor_local.evals.questions import Answerer, Prompts, message, renderer

    kinds = ("single", "reworded", "keys", "values")
    settings = NeedleSettings((setting.n_ctx,), kinds=kinds, samples=samples, seed=seed)
    llama = Llama(setting.model, n_ctx=setting.n_ctx, razor=False)
    answerer, render = Answerer(llama), renderer(llama)
    end = llama.detokenize([llama.token_eos()], special=True).decode()
    for sample in make_samples(settings, MadeText(), Prompts(setting.model)):
        answers = answerer.ask(sample)
        if score(sample, answers) < 1:
            continue
        prompt = render(
            [{"role": "user", "content": message(sample.text, sample.questions[0].text)}]
        )
        n_prompt = len(llama.tokenize(prompt.encode(), add_bos=False, special=True))
        tokens = llama.tokenize((prompt + answers[0] + end).encode(), add_bos=False, special=True)
        yield Text(np.array(tokens), n_prompt, True)


def book_texts(setting: Setting, book: Path, count: int) -> Iterator[Text]:
    """Yield slices of a book as long as the context."""
    from razor_local.evals.questions import load_vocabulary

    llama = load_vocabulary(setting.model)
    tokens = np.array(llama.tokenize(book.read_bytes(), add_bos=False, special=False))
    n = setting.n_ctx
    if len(tokens) < n:
        raise SystemExit(f"{book} has {len(tokens):,} tokens, expected {n:,} or more")
    for start in np.linspace(0, len(tokens) - n, count).astype(int):
        yield Text(tokens[start : start + n], n - TAIL, False)


def read_setting(model: Path, n_ctx: int, ablation: bool = False) -> Setting:
    from razor_local.errors import UnsupportedError
    from razor_local.model_file import read_model_shape, read_profile
    from razor_local.plan import make_plan

    shape, profile = read_model_shape(model), read_profile(model)
    if shape.arch != "llama":
        raise UnsupportedError(f"{model} is of architecture {shape.arch}, expected llama")
    if profile is None:
        raise UnsupportedError(f"{model} has no profile, add one with 'razor-local convert'")
    plan = make_plan(shape, profile, n_ctx, "f16", "f16")
    if not plan.active:
        raise UnsupportedError(f"nothing is compressed at {n_ctx:,} tokens: {plan.why_inactive}")
    return Setting(str(model), profile.retrieval, plan.window, plan.block, n_ctx, ablation)


# ---- report ------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and its 95 % bootstrap interval."""
    x = np.asarray(values)
    rng = np.random.default_rng(0)
    means = x[rng.integers(0, len(x), (2000, len(x)))].mean(1)
    return float(x.mean()), *(float(p) for p in np.quantile(means, (0.025, 0.975)))


def report(setting: Setting, texts: Sequence[Text], results: Sequence[Result]) -> dict:
    """Return the KL on books, the KL on answers and the answers kept, for each policy.

    Only answers that the simulated full cache gives count.
    """
    from razor_local.evals.intervals import wilson

    pairs = list(zip(texts, results, strict=True))
    books = [result for text, result in pairs if not text.answer]
    answers = [result for text, result in pairs if text.answer and result.full]
    rows = []
    for i, policy in enumerate(setting.policies()):
        row: dict = {"policy": asdict(policy)}
        if books:
            row["kl_books"] = interval([result.policies[i][0] for result in books])
        if answers:
            kept = sum(result.policies[i][1] for result in answers)
            row["kl_answers"] = interval([result.policies[i][0] for result in answers])
            row["kept"] = [kept, len(answers), *wilson(kept / len(answers), len(answers))]
        rows.append(row)
    return {
        "model": Path(setting.model).name,
        "n_ctx": setting.n_ctx,
        "window": setting.window,
        "block": setting.block,
        "retrieval_heads": int(sum(np.sum(x) for x in setting.retrieval)),
        "kv_heads": int(sum(len(x) for x in setting.retrieval)),
        "books": len(books),
        "answers": len(answers),
        "rows": rows,
    }


def table(found: dict) -> str:
    lines = [
        f"# Simulated compression of {found['model']}",
        "",
        "This report shows how much the model's predictions and answers change when its cache is"
        " compressed in a simulation.",
        "",
        f"- {found['retrieval_heads']} of {found['kv_heads']} KV heads are retrieval heads;"
        f" {found['n_ctx']:,} tokens, window {found['window']:,}, blocks of {found['block']}",
        f"- {found['books']} slices of a book, KL over their last {TAIL} tokens;"
        f" {found['answers']} correct answers of the full cache; KL in nats with 95 % bootstrap"
        " intervals",
        "",
    ]
    lines += ["| policy | KL on the book | KL on answers | answers kept |", "|---|---|---|---|"]
    for row in found["rows"]:
        cells = [row["policy"]["name"]]
        for name in ("kl_books", "kl_answers"):
            mean_, low, high = row.get(name, (float("nan"),) * 3)
            cells.append(f"{mean_:.4f} ({low:.4f} to {high:.4f})")
        kept, n, low, high = row.get("kept", (0, 0, 0, 0))
        cells.append(f"{kept}/{n} ({low:.0%} to {high:.0%})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    import click
    from rich.console import Console
    from rich.progress import track

    from razor_local.cli.params import DEFAULT_MODEL, Tokens
    from razor_local.common.compact_json import compact_json
    from razor_local.errors import RazorError

    existing = click.Path(exists=True, dir_okay=False, path_type=Path)

    @click.command(help=__doc__.split("\n")[0])
    @click.argument("book", type=existing)
    @click.argument("model", type=existing, default=DEFAULT_MODEL)
    @click.option("-c", "--ctx-size", type=Tokens(), default="2k", show_default=True)
    @click.option("--slices", default=24, show_default=True, help="Texts cut from the book.")
    @click.option("--samples", default=5, show_default=True, help="Needles per depth and kind.")
    @click.option("--seed", default=0, show_default=True)
    @click.option("--ablation", is_flag=True, help="Make one KV head local at a time instead.")
    @click.option("-j", "--jobs", default=os.cpu_count(), show_default=True, help="Processes.")
    @click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
    def run(
        book: Path,
        model: Path,
        ctx_size: int,
        slices: int,
        samples: int,
        seed: int,
        ablation: bool,
        jobs: int,
        output: Path,
    ) -> None:
        if not output.absolute().parent.is_dir():  # fail now instead of after hours
            raise click.ClickException(f"{output.parent} is not a folder; choose an output in one")
        try:
            setting = read_setting(model, ctx_size, ablation)
            texts = [*book_texts(setting, book, slices), *needle_texts(setting, samples, seed)]
        except (RazorError, OSError) as error:
            raise click.ClickException(str(error)) from error
        with ProcessPoolExecutor(jobs, get_context("spawn"), _start, (setting,)) as pool:
            done = pool.map(measure, texts)
            progress = track(done, "simulating", len(texts), console=Console(stderr=True))
            found = report(setting, texts, list(progress))
        output.write_text(compact_json(found), encoding="utf-8")
        print(table(found))

    run()


if __name__ == "__main__":
    main()
