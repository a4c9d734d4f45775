"""Tiny models of all architectures with ALiBi, and their attention in float64 numpy.

attention() and forward() are written from the models' definition and share no code with the
converter. adversary() finds inputs that bring a head to the edge of its bound.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.quants import dequantize, quantize

from tests.support.reference import Razor, gelu_f16_table
from tests.support.tiny_models import write_gguf

U32, F32, STR = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING
RMS = ("baichuan", "refact")
BIASED = ("bloom", "jais")
HAS_KEY = ("jais", "mpt")
EPS = 1e-6


@dataclass(frozen=True)
class AlibiSpec:
    """The shape of a tiny ALiBi model.

    Attributes:
        gain: standard deviation of query and key entries.
        max_bias: always 8, except for mpt and jais.
        fused: whether there is one attn_qkv tensor, as bloom, jais and mpt always have.
        bias: whether the normalization and the projections have a bias (optional for mpt).
    """

    arch: str = "bloom"
    n_layer: int = 1
    n_head: int = 4
    n_head_kv: int = 4
    head_dim: int = 16
    n_vocab: int = 32
    n_ctx_train: int = 1024
    max_bias: float = 8.0
    gain: float = 0.7
    bias: float = 0.3
    fused: bool = True
    clamp: float = 0.0
    qk_norm: bool = False
    kind: GGMLQuantizationType = GGMLQuantizationType.F32
    seed: int = 0

    @property
    def n_embd(self) -> int:
        return self.n_head * self.head_dim


def make_weights(spec: AlibiSpec) -> dict[str, np.ndarray]:
    """Make the tensors by GGUF name: f32, rows = outputs."""
    d, ff = spec.n_embd, 64
    n_kv = spec.n_head_kv * spec.head_dim
    biased = spec.bias and (spec.arch in (*BIASED, "mpt"))
    weights: dict[str, np.ndarray] = {}

    def tensor(name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> None:
        rng = np.random.default_rng([spec.seed, zlib.crc32(name.encode())])
        weights[name] = (mean + std * rng.standard_normal(shape)).astype(np.float32)

    def linear(name: str, n_out: int, n_in: int, gain: float = 1.0) -> None:
        tensor(f"{name}.weight", (n_out, n_in), gain / n_in**0.5)
        if biased:
            tensor(f"{name}.bias", (n_out,), spec.bias)

    def norm(name: str, size: int) -> None:
        tensor(f"{name}.weight", (size,), 0.3, 1.0)
        if biased:
            tensor(f"{name}.bias", (size,), spec.bias)

    tensor("token_embd.weight", (spec.n_vocab, d), 1.0)
    if spec.arch == "bloom":
        weights["token_embd_norm.weight"] = np.ones(d, np.float32)
        weights["token_embd_norm.bias"] = np.zeros(d, np.float32)
    norm("output_norm", d)
    tensor("output.weight", (spec.n_vocab, d), 1.0)
    for il in range(spec.n_layer):
        blk = f"blk.{il}"
        norm(f"{blk}.attn_norm", d)
        linear(f"{blk}.attn_q", d, d, spec.gain)
        linear(f"{blk}.attn_k", n_kv, d, spec.gain)
        linear(f"{blk}.attn_v", n_kv, d)
        if spec.fused:
            for end in ("weight", "bias") if biased else ("weight",):
                parts = [weights.pop(f"{blk}.attn_{x}.{end}") for x in "qkv"]
                weights[f"{blk}.attn_qkv.{end}"] = np.concatenate(parts)
        if spec.qk_norm:
            norm(f"{blk}.attn_q_norm", d)
            norm(f"{blk}.attn_k_norm", n_kv)
        linear(f"{blk}.attn_output", d, d)
        norm(f"{blk}.ffn_norm", d)
        for name in ("gate", "up") if spec.arch in ("jais", *RMS) else ("up",):
            linear(f"{blk}.ffn_{name}", ff, d)
        linear(f"{blk}.ffn_down", d, ff)
    return weights


def write(
    path: str | Path,
    spec: AlibiSpec,
    weights: dict[str, np.ndarray] | None = None,
    extra_kv: dict[str, tuple[Any, GGUFValueType]] | None = None,
    **split: Any,
) -> Path:
    """Write the model of a spec, with random or given weights. Matrices have the spec's type."""
    a = spec.arch
    kv: dict[str, tuple[Any, GGUFValueType]] = {
        "general.name": (f"tiny {a}", STR),
        f"{a}.block_count": (spec.n_layer, U32),
        f"{a}.context_length": (spec.n_ctx_train, U32),
        f"{a}.embedding_length": (spec.n_embd, U32),
        f"{a}.feed_forward_length": (64, U32),
        f"{a}.attention.head_count": (spec.n_head, U32),
        f"{a}.attention.head_count_kv": (spec.n_head_kv, U32),
        f"{a}.attention.layer_norm{'_rms' if a in RMS else ''}_epsilon": (EPS, F32),
        f"{a}.vocab_size": (spec.n_vocab, U32),
        "tokenizer.ggml.model": ("none", STR),
    }
    if a in HAS_KEY:
        kv[f"{a}.attention.max_alibi_bias"] = (spec.max_bias, F32)
    if spec.clamp:
        kv[f"{a}.attention.clamp_kqv"] = (spec.clamp, F32)
    tensors = []
    for name, data in (weights or make_weights(spec)).items():
        if spec.kind != GGMLQuantizationType.F32 and "blk" in name and data.ndim == 2:
            tensors.append((name, quantize(data, spec.kind), spec.kind))
        else:
            tensors.append((name, data, None))
    return write_gguf(path, a, kv | (extra_kv or {}), tensors, **split)


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Read the weights of a file, dequantized to float64."""
    return {
        t.name: dequantize(t.data, t.tensor_type).astype(np.float64)
        for t in GGUFReader(path).tensors
    }


def slopes(spec: AlibiSpec) -> np.ndarray:
    """Compute the slopes of Press et al. (2022): 2^(-8/n), 2^(-16/n), ...

    If n is not a power of two, these are the slopes of the next smaller power of two, followed by
    every second slope of its double.
    """

    def powers(n: int) -> list[float]:
        return [2 ** (-spec.max_bias * (i + 1) / n) for i in range(n)]

    n = 2 ** int(np.log2(spec.n_head))
    return np.array(powers(n) + powers(2 * n)[::2][: spec.n_head - n])


def normalize(x: np.ndarray, rms: bool) -> np.ndarray:
    x = x if rms else x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS)


def queries_and_keys(
    spec: AlibiSpec, weights: dict[str, np.ndarray], il: int, residual: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compute q and k of the query heads: [n_head, n, head_dim], scaled; residual: [n, n_embd]."""
    q, k, _ = projections(spec, weights, il, residual)
    return q, k


def projections(
    spec: AlibiSpec, weights: dict[str, np.ndarray], il: int, residual: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute q, k and v of the query heads: [n_head, n, head_dim], q scaled."""
    blk = f"blk.{il}.attn"

    def get(name: str, size: int) -> np.ndarray:
        return weights.get(f"{blk}{name}", np.zeros(size))

    x = normalize(residual, spec.arch in RMS) * weights[f"{blk}_norm.weight"]
    x = x + get("_norm.bias", spec.n_embd)
    parts = []
    d, n_kv = spec.n_embd, spec.n_head_kv * spec.head_dim
    for name, start, size in (("q", 0, d), ("k", d, n_kv), ("v", d + n_kv, n_kv)):
        if f"{blk}_qkv.weight" in weights:
            w = weights[f"{blk}_qkv.weight"][start : start + size]
            bias = get("_qkv.bias", d + 2 * n_kv)[start : start + size]
        else:
            w, bias = weights[f"{blk}_{name}.weight"], get(f"_{name}.bias", size)
        y = x @ w.T + bias
        if spec.clamp:
            y = y.clip(-spec.clamp, spec.clamp)
        if spec.qk_norm and name != "v":
            y = normalize(y, False) * weights[f"{blk}_{name}_norm.weight"]
            y = y + get(f"_{name}_norm.bias", size)
        y = y.reshape(len(x), -1, spec.head_dim).transpose(1, 0, 2)
        parts.append(np.repeat(y, spec.n_head // len(y), axis=0))
    q, k, v = parts
    return q / (spec.head_dim if spec.arch == "jais" else spec.head_dim**0.5), k, v


def forward(
    spec: AlibiSpec,
    weights: dict[str, np.ndarray],
    tokens: Sequence[int],
    razor: Razor | None = None,
) -> np.ndarray:
    """Compute the logits of every position, f64 [n_tokens, n_vocab], without compensation."""
    w = {name: data.astype(np.float64) for name, data in weights.items()}
    rms, n, pos = spec.arch in RMS, len(tokens), np.arange(len(tokens))
    distance = pos[:, None] - pos

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return normalize(x, rms) * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)

    x = w["token_embd.weight"][np.asarray(tokens)]
    if spec.arch == "bloom":
        x = norm("token_embd_norm", x)
    for il in range(spec.n_layer):
        blk = f"blk.{il}"
        q, k, v = projections(spec, w, il, x)
        out = np.empty((n, spec.n_head, spec.head_dim))
        for ih, slope in enumerate(slopes(spec)):
            window = razor.window_of(il, ih * spec.n_head_kv // spec.n_head) if razor else 0
            seen = distance >= 0
            if razor and window:
                first = razor.frontier(pos, window)
                seen &= (pos < razor.sink_tokens) | (pos >= first[:, None])
            logits = np.where(seen, q[ih] @ k[ih].T - slope * distance, -np.inf)
            p = np.exp(logits - logits.max(axis=1, keepdims=True))
            out[:, ih] = p / p.sum(axis=1, keepdims=True) @ v[ih]
        x = x + linear(f"{blk}.attn_output", out.reshape(n, -1))
        h = norm(f"{blk}.ffn_norm", x)
        up = linear(f"{blk}.ffn_up", h)
        if f"{blk}.ffn_gate.weight" in w:
            gate = linear(f"{blk}.ffn_gate", h)
            h = gate / (1 + np.exp(-gate)) * up
        else:
            h = gelu_f16_table(up)
        x = x + linear(f"{blk}.ffn_down", h)
    return norm("output_norm", x) @ w["output.weight"].T


def attention(
    spec: AlibiSpec, weights: dict[str, np.ndarray], il: int, residual: np.ndarray
) -> np.ndarray:
    """Compute the attention of the last position to all: [n_head, n]."""
    q, k = queries_and_keys(spec, weights, il, residual)
    distance = np.arange(len(residual))[::-1]
    logits = np.einsum("hd,hnd->hn", q[:, -1], k) - slopes(spec)[:, None] * distance
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class Adversary:
    """Inputs of a layer, [n_embd] each, at which a head reaches the edge of its bound.

    Attributes:
        query: the last token.
        target: the token to which the head attends most.
        filler: the token to which it attends least.
        difference: the logit of target minus that of query itself.
    """

    query: np.ndarray
    target: np.ndarray
    filler: np.ndarray
    difference: float

    def text(self, distance: int) -> np.ndarray:
        """Return target, filler ..., query: [distance + 1, n_embd]."""
        return np.stack([self.target, *[self.filler] * (distance - 1), self.query])


def adversary(
    spec: AlibiSpec, weights: dict[str, np.ndarray], il: int, ih: int, seed: int = 0
) -> Adversary:
    """Search by hill climbing, for a query head without clamp and q/k normalization.

    Normalized inputs always have the length sqrt(n_embd), so the search is over z itself.
    """
    rng, d = np.random.default_rng(seed), spec.n_embd
    # q and k are affine in z: evaluate the model to find the maps.
    center = np.eye(d) - (0 if spec.arch in RMS else 1 / d)
    blk = f"blk.{il}.attn"
    gamma, b = weights[f"{blk}_norm.weight"], weights.get(f"{blk}_norm.bias", np.zeros(d))
    if f"{blk}_qkv.weight" in weights:
        w_q, w_k = weights[f"{blk}_qkv.weight"][:d], weights[f"{blk}_qkv.weight"][d:]
        c_q = weights.get(f"{blk}_qkv.bias", np.zeros(d))[:d]
    else:
        w_q, w_k = weights[f"{blk}_q.weight"], weights[f"{blk}_k.weight"]
        c_q = weights.get(f"{blk}_q.bias", np.zeros(d))
    size, kv = spec.head_dim, ih * spec.n_head_kv // spec.n_head
    w_q, c_q = w_q[ih * size : (ih + 1) * size], c_q[ih * size : (ih + 1) * size]
    w_k = w_k[kv * size : (kv + 1) * size]
    scale = 1 / (size if spec.arch == "jais" else size**0.5)
    q_map, k_map = scale * w_q * gamma @ center, w_k * gamma @ center
    matrix, constant = q_map.T @ k_map, k_map.T @ (scale * (w_q @ b + c_q))
    radius, step = d**0.5, 0.3 / max(np.linalg.norm(matrix, 2), 1e-9)
    best = (-np.inf, np.zeros(d))
    for _ in range(3):
        z = rng.standard_normal(d)
        for _ in range(200):
            z *= min(1, radius / np.linalg.norm(z))
            wanted = z @ matrix + constant
            y = radius * wanted / max(np.linalg.norm(wanted), 1e-9)
            best = max(best, (float(wanted @ (y - z)), z.copy()), key=lambda pair: pair[0])
            z += step * (matrix @ (y - z) - wanted)
    z = best[1]
    wanted = z @ matrix + constant
    y = radius * wanted / np.linalg.norm(wanted)
    # A direction that changes neither q nor k gives the query the length of normalized vectors.
    seen = np.concatenate([q_map, k_map, np.ones((1, d))])
    _, s, rows = np.linalg.svd(seen)
    free = rows[(s > 1e-9).sum() :]
    if len(free):
        z = z + free[0] * np.sqrt(max(radius**2 - z @ z, 0))
    return Adversary(z, y, -y, best[0])
