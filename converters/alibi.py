"""Compute the scopes of the heads of ALiBi models from their weights.

ALiBi subtracts slope * distance from every attention logit, and a normalization bounds the rest of
the logit. Each head therefore has a distance, its *scope*, from which on no token of any text can
get more than epsilon of the attention. This is theorem 1 of RazorAttention (arXiv 2407.15891,
section 3.1). docs/alibi.md derives the bounds below with the same names, and explains how they
differ from the printed formula.

Weights are read and dequantized one group of heads at a time. Memory is bounded by a few matrices
of [head_dim, n_embd] for every model.
"""

from __future__ import annotations

import math
import os
from importlib.metadata import version
from typing import Any

import numpy as np

from ..common.progress import Progress, silent
from ..errors import ConvertError, GGUFError, UnsupportedError
from ..gguf.header import F32, TENSOR_TYPES, Header, Tensor
from ..model_file import open_model
from ..model_shape import LAYER_NORM, RMS_NORM, ModelShape
from ..profile import MAX_WINDOW, Profile

DEFAULT_EPSILON = 0.001
SEARCH_STEPS = 8
GOLDEN = (math.sqrt(5) - 1) / 2


def profile_from_weights(
    model_path: str | os.PathLike[str],
    *,
    epsilon: float = DEFAULT_EPSILON,
    progress: Progress | None = None,
) -> Profile:
    """Compute the profile of an ALiBi model: the scope of every KV head, from the weights.

    The scope of a KV head is the largest of its group of query heads, in tokens, including the
    query's own. It is 0 (the whole context, a retrieval head) where it would exceed 2^30 tokens.

    Args:
        model_path: the model file.
        epsilon: maximum attention to a token outside of the scope, between 0 and 1.
        progress: called after each KV head.

    Raises:
        ConvertError: epsilon is out of range, or the model has no ALiBi.
        UnsupportedError: the architecture or a tensor type cannot be handled.
        GGUFError, ProfileError, OSError: the model cannot be read.
    """
    if not 0 < epsilon < 1:
        raise ConvertError(f"epsilon is {epsilon:g}, expected a number between 0 and 1")
    model = open_model(model_path)
    header, shape = model.header, model.shape
    max_bias = shape.max_alibi_bias
    if not max_bias:
        raise ConvertError(
            f"{header.path} ({shape.arch}) does not use ALiBi; measure its heads instead"
        )
    attention = _Attention(shape)
    report = progress or silent
    scopes, done = [], 0
    for il, n_kv in enumerate(shape.n_head_kv):
        slopes = alibi_slopes(shape.n_head[il], max_bias)
        layer = np.zeros(n_kv, np.uint32)
        for ih, group in enumerate(slopes.reshape(n_kv, -1) if n_kv else ()):
            ranges = attention.logit_ranges(il, ih)
            found = [head_scope(r, s, epsilon) for r, s in zip(ranges, group, strict=True)]
            layer[ih] = max(found) if all(found) else 0
            done += 1
            report(done, sum(shape.n_head_kv), "computing the scopes")
        scopes.append(layer)
    return Profile(
        retrieval=tuple((layer == 0).astype(np.uint8) for layer in scopes),
        method="alibi",
        scope=tuple(scopes),
        # a head keeps its scope and nothing else
        sink_tokens=0,
        window_min=1,
        window_divisor=0,
        compensation=False,
        calibration={
            "source": "ALiBi scopes computed from the weights",
            "epsilon": f"{epsilon:g}",
            "tool_version": f"razor-local {version('razor-local')}",
            "model_fingerprint": shape.fingerprint,
        },
    )


def alibi_slopes(n_head: int, max_bias: float) -> np.ndarray:
    """Compute the slopes of a layer's query heads, f32 [n_head], as ggml's soft_max does."""
    if n_head == 0:
        return np.zeros(0, np.float32)
    n = 1 << (n_head.bit_length() - 1)  # the largest power of two <= n_head
    m0: np.float32 = np.power(np.float32(2), np.float32(-max_bias / n))
    m1: np.float32 = np.power(np.float32(2), np.float32(-max_bias / 2 / n))
    h = np.arange(n_head)
    exponents = np.where(h < n, h + 1, 2 * (h - n) + 1).astype(np.float32)
    return np.power(np.where(h < n, m0, m1).astype(np.float32), exponents)


def head_scope(logit_range: float, slope: float, epsilon: float) -> int:
    """Return the smallest distance in tokens from which on attention is at most epsilon.

    Args:
        logit_range: how far a query's logit of another token can exceed that of its own token,
            before slope * distance is subtracted.
        slope: the head's slope.
        epsilon: the bound of the attention.

    Returns:
        The distance, or 0 if there is none.
    """
    if not slope > 0:
        return 0
    distance = (logit_range - math.log(epsilon)) / float(slope)
    if distance > 2**11:  # flash attention reads distances from an F16 mask
        distance /= 1 - 2**-11
    return math.ceil(distance) if distance <= MAX_WINDOW else 0


# -- bounds of the distance between logits, for one query head
#
# q = u z_m + f and k = v z_n + g, where z is the normalized input before its weight. The squared
# length of z is at most radius2, its number of elements. u, v: f64 [head_dim, n_embd]; f, g:
# f64 [head_dim]. Each function returns a bound of q_m . (k_n - k_m) over all such z_m and z_n.


def linear_range(u: np.ndarray, v: np.ndarray, f: np.ndarray, radius2: float) -> float:
    """Return the bound for plain projections: their maximum, up to the search. g cancels out."""
    # u, v in an orthonormal basis of both; numpy's types do not know that this is an array
    r: Any = np.linalg.qr(np.concatenate([u, v]).T, mode="r")
    r_u, r_v = r[:, : len(u)], r[:, len(u) :]
    return _largest_difference(radius2 * (r_u @ r_v.T), math.sqrt(radius2) * (r_v @ f))


def _largest_difference(a: np.ndarray, c: np.ndarray) -> float:
    """Return a bound of (x . a + c) . (y - x) over vectors x and y of length at most 1.

    Every mu > 0 and every lambda >= 0 above the eigenvalues of the quadratic form below give a
    bound (docs/alibi.md). The search finds a good one. a: f64 [n, n], c: f64 [n].
    """
    square, symmetric = a @ a.T, (a + a.T) / 2
    norm = math.sqrt(max(np.linalg.eigvalsh(square)[-1], 0.0))
    longest = norm + float(np.linalg.norm(c))  # of x . a + c
    if norm == 0:
        return 2 * longest

    def bound(log_mu: float) -> float:  # convex in mu
        mu = math.exp(log_mu)
        values, vectors = np.linalg.eigh(square / (2 * mu) - symmetric)
        h = (a @ c / mu - c) @ vectors
        low, width = max(values[-1], 0.0), np.linalg.norm(h) / 2 + 1e-9 * norm
        multiplier = low + width * np.geomspace(1e-9, 1, 100)
        with np.errstate(divide="ignore", invalid="ignore"):
            linear = (h**2 / (4 * (multiplier[:, None] - values))).sum(axis=1)
        return float(mu / 2 + c @ c / (2 * mu) + np.nanmin(multiplier + linear))

    low, high = math.log(longest / 16), math.log(longest)
    x1, x2 = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    y1, y2 = bound(x1), bound(x2)
    best = min(bound(high), y1, y2)
    for _ in range(SEARCH_STEPS):
        if y1 < y2:
            high, x2, y2 = x2, x1, y1
            x1 = high - GOLDEN * (high - low)
            y1 = bound(x1)
        else:
            low, x1, y1 = x1, x2, y2
            x2 = low + GOLDEN * (high - low)
            y2 = bound(x2)
        best = min(best, y1, y2)
    return float(best)


def clamped_range(
    u: np.ndarray, v: np.ndarray, f: np.ndarray, g: np.ndarray, limit: float, radius2: float
) -> float:
    """Return the bound where every element of q and k is clamped to -limit..limit."""
    radius = math.sqrt(radius2)
    q = radius * np.linalg.norm(u, axis=1) + np.abs(f)  # largest elements
    k = radius * np.linalg.norm(v, axis=1)
    if q.max() <= limit and (k + np.abs(g)).max() <= limit:
        return linear_range(u, v, f, radius2)  # nothing is ever clamped
    q, k = np.minimum(q, limit), np.minimum(2 * k, 2 * limit)
    # Clamping lengthens neither vectors nor their differences.
    q_length = min(radius * np.linalg.norm(u, 2) + np.linalg.norm(f), np.linalg.norm(q))
    k_length = min(2 * radius * np.linalg.norm(v, 2), np.linalg.norm(k))
    return float(min(q @ k, q_length * k_length))


def normalized_range(
    q_weight: np.ndarray,
    q_bias: np.ndarray,
    k_weight: np.ndarray,
    q_radius2: float,
    k_radius2: float,
) -> float:
    """Return the bound where q and k of all heads of a layer are normalized after projection.

    q_weight, q_bias, k_weight: f64 [head_dim], this head's part of the normalization's weights.
    """
    product = math.sqrt(q_radius2 * k_radius2) * float(np.abs(q_weight * k_weight).max())
    constant = math.sqrt(k_radius2) * float(np.linalg.norm(q_bias * k_weight))
    return 2 * (product + constant)


class _Attention:
    """The attention weights of a model in a file, as llama.cpp's build_qkv() uses them."""

    def __init__(self, shape: ModelShape) -> None:
        header = shape.parts[0]
        if shape.arch not in LAYER_NORM + RMS_NORM:
            raise UnsupportedError(
                f"{header.path}: the scopes of {shape.arch} models cannot be computed, only those"
                f" of {', '.join(sorted(LAYER_NORM + RMS_NORM))}; razor stays off for this model"
            )
        self.path, self.shape = header.path, shape
        n_embd = header.entries[f"{shape.arch}.embedding_length"].value
        assert isinstance(n_embd, int)  # shape_from_parts() has checked it
        self.n_embd = n_embd
        self.tensors = {t.name: (part, t) for part in shape.parts for t in part.tensors}
        # jais was trained with another scale
        self.scale = shape.head_dim_k ** (-1 if shape.arch == "jais" else -0.5)
        clamp = header.number("mpt.attention.clamp_kqv", (F32,)) if shape.arch == "mpt" else None
        self.clamp = float(clamp) if clamp is not None and clamp > 0 else None

    def logit_ranges(self, il: int, ih: int) -> list[float]:
        """Return the bounds for the query heads of KV head ih in layer il, scaled like logits."""
        size, n_q, n_kv = self.shape.head_dim_k, self.shape.n_head[il], self.shape.n_head_kv[il]
        group = n_q // n_kv
        queries = [slice(i * size, (i + 1) * size) for i in range(ih * group, (ih + 1) * group)]
        keys = slice(ih * size, (ih + 1) * size)
        blk = f"blk.{il}.attn"
        if self.shape.arch == "mpt" and f"{blk}_q_norm.weight" in self.tensors:
            q_weight = self.vector(f"{blk}_q_norm.weight", n_q * size)
            q_bias = self.vector(f"{blk}_q_norm.bias", n_q * size, optional=True)
            k_weight = self.vector(f"{blk}_k_norm.weight", n_kv * size)[keys]
            return [
                self.scale
                * normalized_range(q_weight[q], q_bias[q], k_weight, n_q * size, n_kv * size)
                for q in queries
            ]
        gamma = self.vector(f"{blk}_norm.weight", self.n_embd)
        b = self.vector(f"{blk}_norm.bias", self.n_embd, optional=True)
        w_k, c_k = self.projection(il, "k", keys)
        v, g = self.folded(w_k, gamma), w_k @ b + c_k
        ranges = []
        for q in queries:
            w_q, c_q = self.projection(il, "q", q)
            u, f = self.folded(w_q, gamma), w_q @ b + c_q
            if self.clamp is None:
                bound = linear_range(u, v, f, self.n_embd)
            else:
                bound = clamped_range(u, v, f, g, self.clamp, self.n_embd)
            ranges.append(self.scale * bound)
        return ranges

    def folded(self, weight: np.ndarray, gamma: np.ndarray) -> np.ndarray:
        """Multiply weight by the normalization's weight. The z of a LayerNorm has mean 0."""
        folded: np.ndarray = weight * gamma
        if self.shape.arch in LAYER_NORM:
            folded -= folded.mean(axis=1, keepdims=True)
        return folded

    def projection(self, il: int, which: str, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return rows of the q or k projection: weight f64 [rows, n_embd], bias f64 [rows]."""
        size, blk = self.shape.head_dim_k, f"blk.{il}.attn"
        n_q, n_k = self.shape.n_head[il] * size, self.shape.n_head_kv[il] * size
        n = n_q if which == "q" else n_k
        fused = f"{blk}_qkv.weight" in self.tensors
        name = f"{blk}_qkv" if fused else f"{blk}_{which}"
        if fused:
            n_all = n_q + n_k + self.shape.n_head_kv[il] * self.shape.head_dim_v
            start = rows.start + (n_q if which == "k" else 0)
        else:
            n_all, start = n, rows.start
        count = rows.stop - rows.start
        weight = self.rows(f"{name}.weight", (self.n_embd, n_all), start, count)
        if f"{name}.scale" in self.tensors:
            weight = weight * self.vector(f"{name}.scale", 1)
        if f"{name}.bias" in self.tensors or not fused:
            bias = self.vector(f"{name}.bias", n_all, optional=True)[start : start + count]
        elif all(f"{blk}_{x}.bias" in self.tensors for x in "qkv"):
            bias = self.vector(f"{blk}_{which}.bias", n)[rows]
        else:
            bias = np.zeros(count)
        return weight, bias

    def vector(self, name: str, size: int, optional: bool = False) -> np.ndarray:
        """Return a vector, f64 [size]; zeros for an optional one that is missing."""
        if optional and name not in self.tensors:
            return np.zeros(size)
        row: np.ndarray = self.rows(name, (size,), 0, 1)[0]
        return row

    def rows(self, name: str, dims: tuple[int, ...], start: int, count: int) -> np.ndarray:
        """Return some rows of a tensor, dequantized: f64 [count, dims[0]]."""
        part, tensor = self.find(name, dims)
        block, block_bytes = TENSOR_TYPES[tensor.kind]
        row_bytes = dims[0] // block * block_bytes
        with open(part.path, "rb") as file:
            file.seek(part.data_start + tensor.offset + start * row_bytes)
            raw = file.read(count * row_bytes)
        if len(raw) != count * row_bytes:
            raise GGUFError(f"{part.path}: the file shrank while it was being read")
        values = self.dequantize(np.frombuffer(raw, np.uint8).reshape(count, row_bytes), tensor)
        if not np.isfinite(values).all():
            raise GGUFError(
                f"{part.path}: tensor '{name}' holds values that are not finite numbers; the file"
                " may be damaged"
            )
        return values

    def find(self, name: str, dims: tuple[int, ...]) -> tuple[Header, Tensor]:
        if name not in self.tensors:
            raise GGUFError(
                f"{self.path}: has no tensor '{name}', which {self.shape.arch} models have"
            )
        part, tensor = self.tensors[name]
        if tensor.dims != dims:
            raise GGUFError(
                f"{part.path}: tensor '{name}' has the shape {list(tensor.dims)}, expected"
                f" {list(dims)}"
            )
        return part, tensor

    def dequantize(self, raw: np.ndarray, tensor: Tensor) -> np.ndarray:
        """Dequantize rows of bytes to f64."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        try:
            return dequantize(raw, GGMLQuantizationType(tensor.kind)).astype(np.float64)
        except (ValueError, NotImplementedError):
            raise UnsupportedError(
                f"{self.path}: tensor '{tensor.name}' has the type {tensor.kind}, which gguf cannot"
                " dequantize; use another quantization of the model"
            ) from None
