"""Compare razor with other rules for what each head keeps of a prompt, in a simulation.

    python models/neighbor_study.py NOVELS MODEL.gguf --sidecar PROFILE.gguf -o study.json

The model (of llama architecture) reads a prompt with full attention, in numpy and F32. Each policy
then keeps a part of the keys and values of each KV head, and everything after the prompt attends
to this part. Each policy is a variant of razor or the rule of a paper, which POLICIES cites. Each
novel (NOVELS/*.txt) gives two prompts, which end within a context of -c tokens:

- a piece of the novel: KL(full || policy) of the next token over the TAIL tokens after it, in nats;
- a piece with planted facts (razor_local/evals/facts.py): the values that are found, and the
  change of their log probability.

Bytes count the kept rows, the compensation rows and the matrices of covariances, as a share of the
full f16 cache. The basis of values of lower rank is not counted: it can be merged into the weights.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from compression_study import TAIL, Array, Model, interval

SINKS = 4
CHUNK = 512  # queries of the prompt that are computed at once
LAST = 32  # queries at the end of the prompt that policies may use

# ---- the prompt --------------------------------------------------------------------------------


@dataclass
class Prompt:
    """A prompt that was read with full attention.

    Attributes:
        k, v: f32 [layers][n_head_kv, n, d].
        q: f32 [layers][n_head, LAST, d], the last queries, with 1/sqrt(d) in them.
        similarity: f64 [layers], cosine similarity of the states before and after attention,
            averaged over tokens (SqueezeAttention).
        mass: f64 [layers, n_head_kv], attention of the last queries to tokens that are neither
            sinks nor within the window, averaged. Tokens after a query are not masked.
    """

    n: int
    k: list[Array] = field(default_factory=list)
    v: list[Array] = field(default_factory=list)
    q: list[Array] = field(default_factory=list)
    similarity: list[float] = field(default_factory=list)
    mass: list[Array] = field(default_factory=list)


class Reader(Model):
    def read(self, tokens: Array, window: int) -> Prompt:
        """Read a prompt with full attention."""
        n, group = len(tokens), self.n_head // self.n_head_kv
        prompt = Prompt(n)

        def attention(layer: int, q: Array, k: Array, v: Array) -> Array:
            out = np.empty_like(q)
            for head in range(self.n_head):
                keys, values = k[head // group], v[head // group]
                for i in range(0, n, CHUNK):
                    stop = min(n, i + CHUNK)
                    logits = q[head, i:stop] @ keys[:stop].T
                    logits[np.arange(stop) > np.arange(i, stop)[:, None]] = -np.inf
                    out[head, i:stop] = softmax(logits) @ values[:stop]
            last = q[:, -LAST:]
            weights = softmax(np.einsum("hqd,hnd->hqn", last, np.repeat(k, group, 0)))
            far = weights[:, :, SINKS : n - window].sum(2).mean(1)
            prompt.mass.append(far.reshape(-1, group).mean(1))
            prompt.k.append(k)
            prompt.v.append(v)
            prompt.q.append(last.copy())
            return out

        def compare(before: Array, after: Array) -> None:
            norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
            prompt.similarity.append(float(((before * after).sum(1) / norms).mean()))

        self.forward(tokens, np.arange(n), attention, compare)
        return prompt

    def go_on(self, parts: Sequence[Array], prompt: Prompt, kept: Cache) -> list[Array]:
        """Return the next-token log probabilities at every token of each part.

        The parts are alternative continuations of the prompt, and do not attend to one another.
        """
        tokens = np.concatenate(parts)
        own = np.concatenate([np.full(len(part), i) for i, part in enumerate(parts)])
        order = np.concatenate([np.arange(len(part)) for part in parts])
        hidden = (own[:, None] != own) | (order > order[:, None])
        group = self.n_head // self.n_head_kv

        def attention(layer: int, q: Array, k: Array, v: Array) -> Array:
            out = np.empty_like(q)
            for head in range(self.n_head_kv):
                rows = q[head * group : (head + 1) * group]
                logits = rows @ k[head].T
                logits[:, hidden] = -np.inf
                flat = rows.reshape(-1, rows.shape[2])
                out[head * group : (head + 1) * group] = (
                    kept[layer][head]
                    .attend(flat, logits.reshape(len(flat), -1), v[head])
                    .reshape(rows.shape)
                )
            return out

        states = self.forward(tokens, prompt.n + order, attention)
        return [self.log_probs(states[own == i]) for i in range(len(parts))]


def softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


# ---- what a head keeps -------------------------------------------------------------------------


@dataclass
class Head:
    """The rows that one KV head keeps.

    Attributes:
        k, v: f32 [n, d], rows; weights: f32 [n], how many tokens each stands for.
        n_bytes: of all that the head keeps.
        tilt: f32 [d, d] or None, covariance of the dropped values and keys: the value of the last
            row, the compensation token, becomes v + clamp(tilt q) (MomentKV).
        limit: the norm to which tilt q is clamped.
        spread: f32 [d] or None, variance of each component of the dropped keys: half the variance
            of the logit, at most 1, is added to the logit of the compensation token.
    """

    k: Array
    v: Array
    weights: Array
    n_bytes: float
    tilt: Array | None = None
    limit: float = 0.0
    spread: Array | None = None

    def attend(self, q: Array, logits: Array, values: Array) -> Array:
        """Attend to what is kept, and to later tokens. q [n, d], logits [n, later]."""
        kept = q @ self.k.T + np.log(self.weights)
        if self.spread is not None:
            kept[:, -1] += np.minimum(0.5 * q**2 @ self.spread, 1)
        weights = softmax(np.concatenate([kept, logits], 1))
        out = weights[:, : len(self.k)] @ self.v + weights[:, len(self.k) :] @ values
        if self.tilt is not None:
            change = q @ self.tilt.T
            norm = np.linalg.norm(change, axis=1, keepdims=True)
            change *= np.minimum(1, self.limit / np.maximum(norm, 1e-9))
            out += weights[:, len(self.k) - 1, None] * change
        return out


Cache = list[list[Head]]

BITS = {"f16": 16, "q8_0": 8.5, "q4_0": 4.5}


def rotation(n: int) -> Array:
    """Return a Hadamard matrix, by which llama.cpp rotates rows before it quantizes them."""
    made = np.ones((1, 1), np.float32)
    while len(made) < n:
        made = np.block([[made, made], [made, -made]])
    return made / np.sqrt(np.float32(n))


def stored(x: Array, kv_type: str) -> Array:
    """Return rows as they are read from a cache of this type."""
    if kv_type == "f16":
        return x.astype(np.float16).astype(np.float32)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    turn = rotation(x.shape[-1])
    qtype = GGMLQuantizationType[kv_type.upper()]
    return dequantize(quantize(np.ascontiguousarray(x @ turn), qtype), qtype) @ turn.T


@dataclass(frozen=True)
class Options:
    """How a head stores what it keeps.

    compensation: "none", "mean", "moment", "variance", "moment variance" or "subset".
    rank: principal components that are kept of each value, 0 for all.
    """

    type_k: str = "f16"
    type_v: str = "f16"
    compensation: str = "mean"
    sinks: int = SINKS
    rank: int = 0


def keep(prompt: Prompt, layer: int, head: int, rows: Array, options: Options) -> Head:
    """Keep rows of the prompt, and what the options keep of all others."""
    k, v = prompt.k[layer][head], prompt.v[layer][head]
    d = k.shape[1]
    dropped = np.setdiff1d(np.arange(options.sinks, prompt.n), rows)
    kept_v, n_bytes_v = stored(v[rows], options.type_v), d * BITS[options.type_v] / 8
    if options.rank:
        basis = np.linalg.svd(v - v.mean(0), full_matrices=False)[2][: options.rank]
        kept_v = (kept_v - v.mean(0)) @ basis.T @ basis + v.mean(0)
        n_bytes_v *= options.rank / d
    n_bytes = len(rows) * (d * BITS[options.type_k] / 8 + n_bytes_v)
    made = Head(stored(k[rows], options.type_k), kept_v, np.ones(len(rows), np.float32), n_bytes)
    if not len(dropped) or options.compensation == "none":
        return made
    if options.compensation == "subset":
        chosen, weight = balanced_subset(k[dropped], v[dropped])
        means, mean_values = k[dropped][chosen], v[dropped][chosen]
        counts = np.full(len(chosen), weight, np.float32)
    else:
        means, mean_values = k[dropped].mean(0)[None], v[dropped].mean(0)[None]
        counts = np.array([len(dropped)], np.float32)
        centered_k, centered_v = k[dropped] - means, v[dropped] - mean_values
        if "moment" in options.compensation:
            made.tilt = centered_v.T @ centered_k / len(dropped)
            made.limit = float(np.sqrt((centered_v**2).sum(1).mean()))
            made.n_bytes += 4 * d * d
        if "variance" in options.compensation:
            made.spread = centered_k.var(0)
            made.n_bytes += 4 * d
    made.k = np.concatenate([made.k, stored(means, options.type_k)])
    made.v = np.concatenate([made.v, stored(mean_values, options.type_v)])
    made.weights = np.concatenate([made.weights, counts])
    made.n_bytes += len(means) * d * (BITS[options.type_k] + BITS[options.type_v]) / 8
    return made


SUBSET = 64  # the subset is halved until it has fewer than twice as many tokens


def balanced_subset(k: Array, v: Array) -> tuple[Array, float]:
    """Choose SUBSET to 2 * SUBSET - 1 tokens that stand for all (BalanceKV, 2502.07861).

    A self-balancing walk gives each token a sign so that both halves have nearly the same sum of
    exp(q k) v for all q. It compares the tokens within blocks of 256, by a Gaussian kernel of the
    keys times the cosine similarity of the values. The larger half is kept.
    """
    rng = np.random.default_rng(0)
    chosen, weight = np.arange(len(k)), 1.0
    scale = k.std() * np.sqrt(k.shape[1])
    while len(chosen) >= 2 * SUBSET:
        signs = np.zeros(len(chosen), np.float32)
        for start in range(0, len(chosen), 256):
            rows = chosen[start : start + 256]
            near = np.exp(-((k[rows, None] - k[rows]) ** 2).sum(2) / (2 * scale**2))
            both = near * (v[rows] @ v[rows].T)
            both /= np.sqrt(np.outer(np.diag(both), np.diag(both)))
            walk = signs[start : start + 256]
            for i in range(len(rows)):
                bias = np.clip(walk[:i] @ both[i, :i] / max(np.log(len(rows)), 1), -1, 1)
                walk[i] = 1 if rng.random() < 0.5 - bias / 2 else -1
        keep_plus = (signs > 0).sum() >= len(signs) / 2
        found = chosen[signs > 0] if keep_plus else chosen[signs < 0]
        weight *= len(chosen) / len(found)
        chosen = found
    return chosen, weight


# ---- policies ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Facts about the model that every policy gets.

    Attributes:
        retrieval: bool [layers, n_head_kv], the profile's heads.
        strength: f64 [layers, n_head_kv], the larger of echo and induction score.
        window: tokens of the window of the policies.
        mass: f64 [layers, n_head_kv], Prompt.mass of the first novel, used for all prompts.
    """

    retrieval: Array
    strength: Array
    window: int
    mass: Array


Windows = Callable[[Setting, Prompt], Array]  # int [layers, n_head_kv], 0: everything


def razor(setting: Setting, prompt: Prompt) -> Array:
    return np.where(setting.retrieval, 0, setting.window)


def wide(setting: Setting, prompt: Prompt) -> Array:
    return np.where(setting.retrieval, 0, 2 * setting.window)


def full(setting: Setting, prompt: Prompt) -> Array:
    return np.zeros_like(setting.retrieval, int)


def by_mass(setting: Setting, prompt: Prompt) -> Array:
    """Choose as many retrieval heads as the profile, by attention beyond the window."""
    order = np.argsort(-setting.mass, axis=None)[: setting.retrieval.sum()]
    chosen = np.zeros(setting.retrieval.size, bool)
    chosen[order] = True
    return np.where(chosen.reshape(setting.retrieval.shape), 0, setting.window)


def random_heads(setting: Setting, prompt: Prompt) -> Array:
    chosen = np.random.default_rng(0).permutation(setting.retrieval.ravel())
    return np.where(chosen.reshape(setting.retrieval.shape), 0, setting.window)


def all_local(setting: Setting, prompt: Prompt) -> Array:
    """Give every head the same window, with razor's total budget."""
    return np.full(setting.retrieval.shape, mean_budget(setting, prompt))


def mean_budget(setting: Setting, prompt: Prompt) -> int:
    """Return the window with which all heads together keep as many tokens as razor does."""
    return int(np.where(setting.retrieval, prompt.n - SINKS, setting.window).mean())


def headkv(setting: Setting, prompt: Prompt) -> Array:
    """HeadKV (2410.19258): each head gives 1/beta of its budget to a pool, shared by score."""
    budget, beta = mean_budget(setting, prompt), 1.2
    share = setting.strength / setting.strength.sum()
    return budgets(budget - budget / beta + share * budget / beta * share.size, prompt)


def by_score(setting: Setting, prompt: Prompt) -> Array:
    """Give each local head 64 tokens, and the rest in proportion to its score."""
    local = ~setting.retrieval
    share = setting.strength * local / (setting.strength * local).sum()
    windows = 64 + share * (setting.window - 64) * local.sum()
    return np.where(setting.retrieval, 0, budgets(windows, prompt))


def squeeze(setting: Setting, prompt: Prompt) -> Array:
    """SqueezeAttention (2404.04793): layers that change their input least get 0.3 of the budget.

    The layers are grouped by k-means into three by their similarity. The budget that the most
    similar group gives up is shared by the others.
    """
    budget, least = mean_budget(setting, prompt), 0.3
    low = most_similar(np.array(prompt.similarity))
    more = budget * (1 + (1 - least) * low.sum() / (~low).sum())
    windows = np.where(low, least * budget, more)
    return budgets(np.repeat(windows[:, None], setting.retrieval.shape[1], 1), prompt)


def squeezed_razor(setting: Setting, prompt: Prompt) -> Array:
    """The windows of SqueezeAttention for local heads; retrieval heads keep everything."""
    low = most_similar(np.array(prompt.similarity))
    local = (~setting.retrieval).sum(1)
    more = setting.window * (1 + 0.7 * local[low].sum() / local[~low].sum())
    windows = np.where(low, 0.3 * setting.window, more)
    return np.where(
        setting.retrieval,
        0,
        budgets(np.repeat(windows[:, None], setting.retrieval.shape[1], 1), prompt),
    )


def most_similar(x: Array) -> Array:
    """Return which values are in the highest of three groups (k-means)."""
    centers = np.quantile(x, [0.1, 0.5, 0.9])
    for _ in range(20):
        group = np.abs(x[:, None] - centers).argmin(1)
        centers = np.array(
            [x[group == i].mean() if (group == i).any() else centers[i] for i in range(3)]
        )
    return group == centers.argmax()


def budgets(windows: Array, prompt: Prompt) -> Array:
    """Round down, to at least one token. A window that covers the prompt becomes 0 (everything)."""
    found = np.maximum(windows, 1).astype(int)
    return np.where(found >= prompt.n - SINKS, 0, found)


@dataclass(frozen=True)
class Policy:
    """A rule.

    Attributes:
        idea: what it is, with the paper.
        rows: which rows a local head keeps. "newest", or "attended": those with the largest product
            of the last query's attention and the norm of the value (LongFlow, 2603.11504).
    """

    name: str
    idea: str
    windows: Windows = razor
    options: Options = Options()
    local: Options | None = None  # of local heads, if they differ
    rows: str = "newest"

    def cache(self, setting: Setting, prompt: Prompt) -> Cache:
        windows = self.windows(setting, prompt)
        group = len(prompt.q[0]) // windows.shape[1]
        made: Cache = []
        for layer, row in enumerate(windows):
            made.append([])
            for head, window in enumerate(row):
                options = self.options if window == 0 else self.local or self.options
                n, sinks = prompt.n, options.sinks
                kept = np.arange(n)
                if window:
                    newest = np.arange(max(sinks, n - window), n)
                    if self.rows == "attended":
                        q = prompt.q[layer][head * group : (head + 1) * group, -1]
                        weights = softmax(q @ prompt.k[layer][head].T).mean(0)
                        weights = weights * np.linalg.norm(prompt.v[layer][head], axis=1)
                        weights[:sinks] = -1
                        newest = np.sort(np.argsort(-weights)[:window])
                    kept = np.concatenate([np.arange(sinks), newest])
                made[-1].append(keep(prompt, layer, head, kept, options))
        return made


Q8 = Options("q8_0", "q8_0")
POLICIES = (
    Policy("full f16", "everything", full),
    Policy("full q8_0", "everything", full, Q8),
    Policy("full q4_0", "everything", full, Options("q4_0", "q4_0")),
    Policy("razor", "the retrieval heads of the profile"),
    Policy("razor, twice the window", "the same with twice the window", wide),
    Policy("no compensation", "razor without compensation tokens",
           options=Options(compensation="none")),
    Policy("covariance", "value-key covariance, clamped (MomentKV, 2606.01563)",
           options=Options(compensation="moment")),
    Policy("variance", "half the variance of the logit, at most 1",
           options=Options(compensation="variance")),
    Policy("covariance and variance",
           "the last two together", options=Options(compensation="moment variance")),
    Policy("subset",
           "64 to 127 of the dropped tokens, by a self-balancing walk (BalanceKV, 2502.07861)",
           options=Options(compensation="subset")),
    Policy("16 sinks", "16 sink tokens", options=Options(sinks=16)),
    Policy("no sinks", "no sink tokens", options=Options(sinks=0)),
    Policy("q8_0", "all heads q8_0", options=Q8),
    Policy("q8_0, V q4_0", "keys q8_0, values q4_0", options=Options("q8_0", "q4_0")),
    Policy("q8_0, K q4_0", "keys q4_0, values q8_0", options=Options("q4_0", "q8_0")),
    Policy("q8_0, local q4_0", "retrieval heads q8_0, local heads q4_0", options=Q8,
           local=Options("q4_0", "q4_0")),
    Policy("windows by score", "windows of local heads in proportion to their score", by_score),
    Policy("heads by mass", "as many retrieval heads, by attention beyond the window", by_mass),
    Policy("random heads", "as many retrieval heads, at random", random_heads),
    Policy("all local", "no retrieval heads, one window", all_local),
    Policy("HeadKV", "budgets by score, no retrieval heads (2410.19258)", headkv),
    Policy("SqueezeAttention", "budgets by layer, no retrieval heads (2404.04793)", squeeze),
    Policy("squeezed windows", "razor with SqueezeAttention's windows", squeezed_razor),
    Policy("LongFlow", "local heads keep what the last query weights most (2603.11504)",
           rows="attended"),
    Policy("low rank", "razor with values of half the rank (Eigen Attention, 2408.05646)",
           options=Options(rank=32)),
    Policy("full, low rank", "everything, with values of half the rank", full, Options(rank=32)),
)  # fmt: skip


# ---- measuring ---------------------------------------------------------------------------------


def measure(
    model: Reader, setting: Setting, prompt: Prompt, parts: list[Array], policy: Policy
) -> tuple[list[Array], float]:
    """Return the log probabilities of the parts, and the bytes as a share of the full f16 cache."""
    cache = policy.cache(setting, prompt)
    n_bytes = sum(head.n_bytes for row in cache for head in row)
    d = prompt.k[0].shape[2]
    return model.go_on(parts, prompt, cache), n_bytes / (setting.retrieval.size * prompt.n * d * 4)


def values_of(
    parts: list[Array], n_values: list[int], log_probs: list[Array]
) -> tuple[Array, Array]:
    """Return for each question whether the value is found, and its log probability."""
    found, sums = [], []
    for part, n, logs in zip(parts, n_values, log_probs, strict=True):
        rows, want = logs[-n - 1 : -1], part[-n:]
        found.append(bool((rows.argmax(1) == want).all()))
        sums.append(float(rows[np.arange(n), want].sum()))
    return np.array(found), np.array(sums)


def run(
    model: Reader,
    setting: Setting,
    novels: Sequence[tuple[Array, Array, list[Array], list[int]]],
    names: Sequence[str],
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Measure all policies; the first one is the reference.

    Args:
        novels: for each, the tokens of a piece, those of a piece with planted facts, those of each
            question with its answer, and how many tokens each value has.
    """
    policies = [p for p in POLICIES if not names or p.name in names]
    kl: dict[str, list[float]] = {p.name: [] for p in policies}
    shares: dict[str, list[float]] = {p.name: [] for p in policies}
    found: dict[str, list[Array]] = {p.name: [] for p in policies}
    logprob: dict[str, list[Array]] = {p.name: [] for p in policies}
    for i, (text, prefix, questions, n_values) in enumerate(novels):
        report(f"reading novel {i + 1}")
        for tokens, parts in ((text[:-TAIL], [text[-TAIL:]]), (prefix, questions)):
            prompt = model.read(tokens, setting.window)
            if i == 0 and parts is not questions:
                setting = Setting(
                    setting.retrieval, setting.strength, setting.window, np.array(prompt.mass)
                )
            reference = None
            for policy in policies:
                report(policy.name)
                logs, share = measure(model, setting, prompt, parts, policy)
                if parts is questions:
                    values = values_of(parts, n_values, logs)
                    found[policy.name].append(values[0])
                    logprob[policy.name].append(values[1])
                    shares[policy.name].append(share)
                    continue
                if reference is None:
                    reference = logs[0]  # of the full f16 cache
                each = (np.exp(reference) * (reference - logs[0])).sum(1)
                kl[policy.name] += each.reshape(-1, 32).mean(1).tolist()
    rows = []
    for policy in policies:
        finds, logs = np.concatenate(found[policy.name]), np.concatenate(logprob[policy.name])
        whole = np.concatenate(found[policies[0].name])
        rows.append(
            {
                "policy": policy.name,
                "idea": policy.idea,
                "share": float(np.mean(shares[policy.name])),
                "kl": interval(kl[policy.name]),
                "found": int(finds.sum()),
                "lost": int((whole & ~finds).sum()),
                "won": int((finds & ~whole).sum()),
                "questions": len(finds),
                "logprob": float(logs.mean() - np.concatenate(logprob[policies[0].name]).mean()),
            }
        )
    return {
        "window": setting.window,
        "retrieval_heads": int(setting.retrieval.sum()),
        "kv_heads": setting.retrieval.size,
        "novels": len(novels),
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        f"# Rules for what each head keeps, simulated on {result['model']}",
        "",
        "This report compares razor with the rules of other papers.",
        "",
        f"- {result['retrieval_heads']} of {result['kv_heads']} KV heads are retrieval heads with"
        f" razor; {result['n_ctx']:,} tokens, window {result['window']}, prompts read with full"
        " attention",
        f"- {result['novels']} novels; KL over {TAIL} tokens after a prompt, in nats, with 95 %"
        " bootstrap intervals; found: values of planted facts, in answers begun for the model;"
        " lost, won: compared with the full cache; log probability of the value: difference from"
        " the full cache, in nats",
        "",
        "| policy | what it is | share of full f16 | KL divergence, nats | found of"
        f" {result['rows'][0]['questions']} | lost, won | log probability |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        mean, low, high = row["kl"]
        lines.append(
            f"| {row['policy']} | {row['idea']} | {row['share']:.3f} | {mean:.4f} ({low:.4f} to"
            f" {high:.4f}) | {row['found']} | {row['lost']}, {row['won']} | {row['logprob']:+.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    import click

    from razor_local.cli.params import Tokens
    from razor_local.common.compact_json import compact_json
    from razor_local.errors import RazorError
    from razor_local.evals.facts import make_exam
    from razor_local.evals.haystack import FolderText
    from razor_local.evals.questions import Prompts, load_vocabulary
    from razor_local.model_setup import ModelSetup
    from razor_local.scores import head_strength, profile_scores

    existing = click.Path(exists=True, path_type=Path)

    @click.command(help=__doc__.split("\n")[0])
    @click.argument("novels", type=existing)
    @click.argument("model", type=existing)
    @click.option("--sidecar", type=existing, required=True)
    @click.option("-c", "--ctx-size", type=Tokens(), default="4k", show_default=True)
    @click.option("--window", default=512, show_default=True)
    @click.option(
        "--policies",
        default="",
        help="Names, separated by ';'; the first one is the reference. [default: all]",
    )
    @click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
    def study(
        novels: Path,
        model: Path,
        sidecar: Path,
        ctx_size: int,
        window: int,
        policies: str,
        output: Path,
    ) -> None:
        def report(what: str) -> None:
            print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr)

        try:
            setup = ModelSetup(str(model), sidecar=str(sidecar))
            shape, profile = setup.read()
            strength = head_strength(profile_scores(profile, shape))
            retrieval = np.array(profile.retrieval, bool)
            setting = Setting(
                retrieval, strength.reshape(retrieval.shape), window, np.zeros(retrieval.shape)
            )
            prompts, vocabulary = Prompts(str(model)), load_vocabulary(str(model))
            texts = []
            for book in sorted(novels.glob("*.txt")):
                tokens = vocabulary.tokenize(book.read_bytes(), add_bos=False, special=False)
                start = len(tokens) // 3
                with TemporaryDirectory() as folder:
                    shutil.copy(book, folder)
                    exam = make_exam(prompts, FolderText(folder), ctx_size, window + 64, SINKS)
                questions = [question.tokens for question in exam.questions]
                n_values = [question.n_value for question in exam.questions]
                slice_ = np.array(tokens[start : start + ctx_size])
                texts.append((slice_, exam.prefix, questions, n_values))
        except (RazorError, OSError) as error:
            raise click.ClickException(str(error)) from error
        names = [name.strip() for name in policies.split(";") if name.strip()]
        result = run(Reader(model), setting, texts, names, report)
        result |= {"model": model.name, "n_ctx": ctx_size}
        output.write_text(compact_json(result), encoding="utf-8")
        print(table(result))

    study()


if __name__ == "__main__":
    main()
