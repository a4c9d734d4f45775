"""Independent float64 implementation of the tiny models, with a full cache or RazorAttention.

It follows the definitions position by position (vectorized with masks) and has none of the cache's
ubatches, ring or accumulators. In a local KV head, a token at position p attends to
  - the sink tokens [0, N0),
  - the compensation token: mean of the post-RoPE keys and of the values at [N0, F(p)), logit
    q.k / sqrt(d) + log(N_d), N_d = F(p) - N0 (eq. 4 and 5 of arXiv 2407.15891), if N_d > 0,
  - the window [F(p), p],
with F(p) = max(N0, B * floor(p / B) - L), L of the head. A retrieval head attends to [0, p].

With Razor.prompts, F of all tokens of a prompt is that of its first token.

With Razor.types, rows of K and V and means are rounded to the KV types of their heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from razor_local.verify.reference import rotate, rotation_sizes, round_rows
from tests.support.tiny_models import TinySpec

Types = tuple[str, str]  # of K and V

SLACK = 64  # LLAMA_RAZOR_SLACK


@dataclass(frozen=True)
class Razor:
    """Parameters of RazorAttention.

    Attributes:
        mask: a row of 0/1 per layer, 1 = retrieval.
        window: L, the largest if there are several.
        scopes: a row per layer, as in a profile. None if all local heads have the same window.
        windows: L of each head, 0 if it keeps everything. None if scopes is None.
        types: KV types of retrieval heads and of local heads. None: rows are not rounded.
        prompts: the first position and the end of each batch that is read with full attention.
            Its tokens see what its first one sees, and all of the batch up to themselves.
    """

    mask: tuple[tuple[int, ...], ...]
    window: int
    block: int
    sink_tokens: int = 4
    compensation: bool = True
    scopes: tuple[tuple[int, ...], ...] | None = None
    windows: tuple[tuple[int, ...], ...] | None = None
    types: tuple[Types, Types] | None = None
    prompts: tuple[tuple[int, int], ...] = ()

    def rounding(self, local: bool, part: int, head_dim: int) -> Callable[..., np.ndarray]:
        """Return the function that rounds rows of K (part 0) or V (part 1) of a head.

        Rows are rotated first if that part of any head is quantized.
        """
        if self.types is None:
            return lambda rows: rows
        sizes = [rotation_sizes(*pair, head_dim, head_dim)[part] for pair in self.types]
        size = sizes[0] or sizes[1]
        kv_type = self.types[local][part]

        def rounded(rows: np.ndarray) -> np.ndarray:
            if size is None:
                return round_rows(rows, kv_type).astype(np.float64)
            return rotate(round_rows(rotate(rows, size), kv_type), size).astype(np.float64)

        return rounded

    def window_of(self, il: int, kv: int) -> int:
        """Return L of a KV head, 0 if it keeps everything."""
        if self.windows is not None:
            return self.windows[il][kv]
        return 0 if self.mask[il][kv] else self.window

    def frontier(self, p: np.ndarray | int, window: int | None = None) -> np.ndarray:
        """Return the first position that is not folded when position p attends.

        Args:
            window: L of the head; None means the largest one.
        """
        p = np.array(p)
        for first, end in self.prompts:
            p = np.where((first <= p) & (p < end), first, p)
        start = self.block * (p // self.block)
        return np.maximum(self.sink_tokens, start - (self.window if window is None else window))


def window_of(n_ctx: int, window_min: int, window_divisor: int) -> int:
    """Return the default L: max(S0, n_ctx / C)."""
    return max(window_min, n_ctx // window_divisor if window_divisor > 0 else 0)


def block_of(window: int) -> int:
    """Return B: the largest power of two <= max(L/4, 1), clamped to [64, 512]."""
    block = 1
    while 2 * block <= max(window // 4, 1):
        block *= 2
    return min(max(block, 64), 512)


def cells_of(window: int, sink_tokens: int, compensation: bool, block: int | None = None) -> int:
    """Return the cells of a local head."""
    cells = sink_tokens + (4 if compensation else 0) + window + (block or block_of(window)) + SLACK
    return -(-cells // 256) * 256


def make_razor(
    mask: Sequence[Sequence[int]], window: int, sink_tokens: int = 4, compensation: bool = True
) -> Razor:
    """Make the Razor of a mask and a window, with the block size of the plan."""
    rows = tuple(tuple(int(x) for x in row) for row in mask)
    return Razor(rows, window, block_of(window), sink_tokens, compensation)


def make_scoped(
    scopes: Sequence[Sequence[int]],
    n_ctx: int,
    sink_tokens: int = 4,
    compensation: bool = True,
) -> Razor:
    """Make the Razor of heads with scopes in a context of n_ctx tokens, as in docs/format.md.

    At least one local head must save something.
    """
    rows = tuple(tuple(int(x) for x in row) for row in scopes)
    local = [x for row in rows for x in row if 0 < x < n_ctx]
    block = block_of(sum(local) // len(local))
    heads = [-(-x // block) * block for x in local]
    while len(set(heads)) > 4:
        steps = list(zip(sorted(set(heads)), sorted(set(heads))[1:], strict=False))
        low, high = min(steps, key=lambda s: (heads.count(s[0]) * (s[1] - s[0]), s[0]))
        heads = [high if x == low else x for x in heads]
    heads = [x if cells_of(x, sink_tokens, compensation, block) < n_ctx else 0 for x in heads]
    left = iter(heads)
    windows = tuple(tuple(next(left) if 0 < x < n_ctx else 0 for x in row) for row in rows)
    mask = tuple(tuple(int(x == 0) for x in row) for row in rows)
    return Razor(mask, max(heads), block, sink_tokens, compensation, rows, windows)


def forward(
    spec: TinySpec,
    weights: dict[str, np.ndarray],
    tokens: Sequence[int],
    razor: Razor | None = None,
    probe: dict | None = None,
    see: Callable[[int, int, np.ndarray], None] | None = None,
) -> np.ndarray:
    """Compute the logits of every position, f64 [n_tokens, n_vocab].

    Args:
        probe: receives, for each layer, the effective number of tokens to which each query attends
            (from the entropy): f64 [n_head, n_tokens].
        see: called as see(layer, query head, attention) with every attention matrix, f64
            [n_tokens, n_tokens]. In a local head the last column is the compensation token.
    """
    w = {name: data.astype(np.float64) for name, data in weights.items()}
    tokens = np.asarray(tokens)
    n = len(tokens)

    x = w["token_embd.weight"][tokens]
    if spec.arch == "gpt2":
        x = x + w["position_embd.weight"][:n]

    for il in range(spec.n_layer):
        blk = f"blk.{il}"
        h = _norm(spec, w, f"{blk}.attn_norm", x)
        if spec.kv_heads[il] > 0:
            h = _attention(spec, w, il, h, razor, probe, see)
        x = x + _linear(w, f"{blk}.attn_output", h)

        h = _norm(spec, w, f"{blk}.ffn_norm", x)
        if spec.arch == "gpt2":
            h = gelu_f16_table(_linear(w, f"{blk}.ffn_up", h))
        else:
            gate = _linear(w, f"{blk}.ffn_gate", h)
            h = gate / (1 + np.exp(-gate)) * _linear(w, f"{blk}.ffn_up", h)
        x = x + _linear(w, f"{blk}.ffn_down", h)

    x = _norm(spec, w, "output_norm", x)
    return x @ w["token_embd.weight" if spec.tied else "output.weight"].T


def _attention(
    spec: TinySpec,
    w: dict[str, np.ndarray],
    il: int,
    h: np.ndarray,
    razor: Razor | None,
    probe: dict | None,
    see: Callable[[int, int, np.ndarray], None] | None,
) -> np.ndarray:
    """Compute the heads of layer il, f64 [n, n_head * d], from its normed input h [n, n_embd]."""
    blk, n, d, n_kv = f"blk.{il}", len(h), spec.head_dim, spec.kv_heads[il]
    if spec.arch == "gpt2":
        q, k, v = np.split(_linear(w, f"{blk}.attn_qkv", h), 3, axis=1)
    else:
        q, k, v = (_linear(w, f"{blk}.attn_{name}", h) for name in "qkv")
    q, k, v = q.reshape(n, spec.n_head, d), k.reshape(n, n_kv, d), v.reshape(n, n_kv, d)
    if spec.arch == "qwen3":
        q = _rms(q, spec.norm_eps) * w[f"{blk}.attn_q_norm.weight"]
        k = _rms(k, spec.norm_eps) * w[f"{blk}.attn_k_norm.weight"]
    if spec.arch != "gpt2":
        q, k = rope(spec, w, q), rope(spec, w, k)

    out = np.empty_like(q)
    for ih in range(spec.n_head):
        kv = ih // (spec.n_head // n_kv)
        window = razor.window_of(il, kv) if razor is not None else 0
        rows_k, rows_v = k[:, kv], v[:, kv]
        if razor is not None:
            rows_k = razor.rounding(window > 0, 0, d)(rows_k)
            rows_v = razor.rounding(window > 0, 1, d)(rows_v)
        out[:, ih], prob = attend(q[:, ih], rows_k, rows_v, razor if window else None, window)
        if probe is not None:
            probe.setdefault(il, []).append(1 / (prob**2).sum(axis=1))
        if see is not None:
            see(il, ih, prob)
    return out.reshape(n, -1)


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, razor: Razor | None, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compute one head over a sequence, from q, k, v f64 [n, d].

    Returns the output [n, d] and the attention [n, n], or [n, n + 1] with compensation.
    """
    n, d = q.shape
    pos = np.arange(n)
    logits = q @ k.T / np.sqrt(d)
    seen = pos[None, :] <= pos[:, None]

    if razor is not None:
        n0, front = razor.sink_tokens, razor.frontier(pos, window)
        seen &= (pos[None, :] < n0) | (pos[None, :] >= front[:, None])
    logits = np.where(seen, logits, -np.inf)

    if razor is not None and razor.compensation:
        n_d = front - n0
        folded = n_d > 0
        k_mean, v_mean = np.zeros_like(k), np.zeros_like(v)
        for f in np.unique(front[folded]):
            at = front == f
            k_mean[at] = k[n0:f].mean(axis=0)
            v_mean[at] = v[n0:f].mean(axis=0)
        k_mean, v_mean = (razor.rounding(True, i, d)(x) for i, x in enumerate((k_mean, v_mean)))
        comp = np.einsum("pd,pd->p", q, k_mean) / np.sqrt(d) + np.log(np.maximum(n_d, 1))
        logits = np.concatenate([logits, np.where(folded, comp, -np.inf)[:, None]], axis=1)

    prob = np.exp(logits - logits.max(axis=1, keepdims=True))
    prob /= prob.sum(axis=1, keepdims=True)
    out = prob[:, :n] @ v
    if prob.shape[1] > n:
        out = out + prob[:, n:] * v_mean
    return out, prob


def _linear(w: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def _rms(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def _norm(spec: TinySpec, w: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    if spec.arch != "gpt2":
        return _rms(x, spec.norm_eps) * w[f"{name}.weight"]
    x = x - x.mean(axis=-1, keepdims=True)
    return _rms(x, spec.norm_eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def rope(spec: TinySpec, w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Rotate pairs of x [n, heads, d], which are neighbors (llama) or halves (qwen).

    The angle is p * base^(-2i/d), divided by the factor of the pair if the model has any. It is
    multiplied up in F32 as in llama.cpp: exact angles differ by up to 1e-4 at position 500, more
    than the tolerance of the tests. The power is computed in F64 and rounded like libm's powf,
    because numpy's F32 power is an ulp off on CPUs with AVX-512.
    """
    n, _, d = x.shape
    angle = np.empty((n, d // 2))
    factors = w.get("rope_freqs.weight", np.ones(d // 2)).astype(np.float32)
    theta = np.arange(n, dtype=np.float32)
    scale = np.float32(np.float64(np.float32(spec.rope_base)) ** np.float64(np.float32(-2.0 / d)))
    for i in range(d // 2):
        angle[:, i] = theta / factors[i]
        theta = theta * scale
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    y = np.empty_like(x)
    if spec.arch in ("llama", "deci"):
        first, second = slice(0, d, 2), slice(1, d, 2)
    else:
        first, second = slice(0, d // 2), slice(d // 2, d)
    a, b = x[..., first], x[..., second]
    y[..., first] = a * cos - b * sin
    y[..., second] = a * sin + b * cos
    return y


def gelu_f16_table(x: np.ndarray) -> np.ndarray:
    """Compute GELU (tanh form) as llama.cpp's CPU backend does.

    x and the result are rounded to F16; beyond +-10 the result is exact.
    """
    r = x.astype(np.float16).astype(np.float64)
    y = 0.5 * r * (1 + np.tanh(np.sqrt(2 / np.pi) * r * (1 + 0.044715 * r * r)))
    y = y.astype(np.float16).astype(np.float64)
    return np.where(x <= -10, 0.0, np.where(x >= 10, x, y))
