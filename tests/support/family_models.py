"""A tiny model with sliding windows (gemma3) and a hybrid one (lfm2), also in float64 numpy.

The attention of layers without a sliding window is that of reference.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType

from tests.support import reference
from tests.support.reference import Razor
from tests.support.tiny_models import TinySpec, write_gguf

N_EMBD, N_HEAD, N_KV, HEAD_DIM, N_FF, N_VOCAB = 128, 4, 2, 32, 96, 128
EPS = 1e-5
SLIDING_WINDOW = 48
ROPE_BASE, ROPE_BASE_SLIDING = 100000.0, 10000.0
N_CONV = 3  # width of lfm2's convolution in tokens
# whether each layer has full attention; the others slide (gemma3) or are recurrent (lfm2)
FULL = {"gemma3": (False, True, False, True), "lfm2": (False, True, True, False)}

U32, F32, STR = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING
ARRAY = GGUFValueType.ARRAY
Weights = dict[str, np.ndarray]


def make_weights(arch: str) -> Weights:
    """Return the tensors by GGUF name: f32, shapes in numpy order (rows = outputs)."""
    weights: Weights = {}

    def tensor(name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> None:
        rng = np.random.default_rng(zlib.crc32(f"{arch} {name}".encode()))
        weights[f"{name}.weight"] = (mean + std * rng.standard_normal(shape)).astype(np.float32)

    def linear(name: str, n_out: int, n_in: int, gain: float = 1.0) -> None:
        tensor(name, (n_out, n_in), gain / n_in**0.5)

    tensor("token_embd", (N_VOCAB, N_EMBD), 1.0)
    for il, full in enumerate(FULL[arch]):
        blk = f"blk.{il}"
        tensor(f"{blk}.attn_norm", (N_EMBD,), 0.1, 1.0)
        if full or arch == "gemma3":
            linear(f"{blk}.attn_q", N_HEAD * HEAD_DIM, N_EMBD)
            linear(f"{blk}.attn_k", N_KV * HEAD_DIM, N_EMBD)
            linear(f"{blk}.attn_v", N_KV * HEAD_DIM, N_EMBD)
            linear(f"{blk}.attn_output", N_EMBD, N_HEAD * HEAD_DIM, 2.0)
            tensor(f"{blk}.attn_q_norm", (HEAD_DIM,), 0.1, 1.5)
            tensor(f"{blk}.attn_k_norm", (HEAD_DIM,), 0.1, 1.5)
        else:
            linear(f"{blk}.shortconv.in_proj", 3 * N_EMBD, N_EMBD)
            linear(f"{blk}.shortconv.conv", N_EMBD, N_CONV)
            linear(f"{blk}.shortconv.out_proj", N_EMBD, N_EMBD)
        tensor(f"{blk}.ffn_norm", (N_EMBD,), 0.1, 1.0)
        linear(f"{blk}.ffn_gate", N_FF, N_EMBD)
        linear(f"{blk}.ffn_up", N_FF, N_EMBD)
        linear(f"{blk}.ffn_down", N_EMBD, N_FF)
        if arch == "gemma3":
            tensor(f"{blk}.post_attention_norm", (N_EMBD,), 0.1, 1.0)
            # llama.cpp's CPU GELU rounds to F16; a small weight keeps that from hiding errors
            tensor(f"{blk}.post_ffw_norm", (N_EMBD,), 0.001, 0.01)
    name = "token_embd_norm" if arch == "lfm2" else "output_norm"
    tensor(name, (N_EMBD,), 0.1, 0.3)
    return weights


def make_model(path: Path, arch: str) -> Path:
    kv: dict[str, tuple[Any, GGUFValueType]] = {
        "block_count": (len(FULL[arch]), U32),
        "context_length": (2048, U32),
        "embedding_length": (N_EMBD, U32),
        "feed_forward_length": (N_FF, U32),
        "attention.head_count": (N_HEAD, U32),
        "attention.layer_norm_rms_epsilon": (EPS, F32),
        "rope.freq_base": (ROPE_BASE, F32),
        "vocab_size": (N_VOCAB, U32),
    }
    if arch == "gemma3":
        kv |= {
            "attention.head_count_kv": (N_KV, U32),
            "attention.key_length": (HEAD_DIM, U32),
            "attention.value_length": (HEAD_DIM, U32),
            "attention.sliding_window": (SLIDING_WINDOW, U32),
            "attention.sliding_window_pattern": (2, U32),
            "rope.freq_base_swa": (ROPE_BASE_SLIDING, F32),
        }
    else:
        heads = np.array([N_KV if full else 0 for full in FULL[arch]], np.int32)
        kv |= {"attention.head_count_kv": (heads, ARRAY), "shortconv.l_cache": (N_CONV, U32)}
    metadata = {f"{arch}.{key}": value for key, value in kv.items()}
    metadata |= {"general.name": (f"tiny {arch}", STR), "tokenizer.ggml.model": ("none", STR)}
    tensors = [(name, data, None) for name, data in make_weights(arch).items()]
    return write_gguf(path, arch, metadata, tensors)


def forward(arch: str, tokens: Sequence[int], razor: Razor | None = None) -> np.ndarray:
    """Compute the logits of every position, f64 [n_tokens, n_vocab].

    razor.mask has a row for every layer; layers without full attention ignore theirs.
    """
    w = {name: data.astype(np.float64) for name, data in make_weights(arch).items()}
    x = w["token_embd.weight"][np.asarray(tokens)]
    if arch == "gemma3":
        x = x * np.sqrt(N_EMBD)
    for il, full in enumerate(FULL[arch]):
        blk = f"blk.{il}"
        h = _norm(w, f"{blk}.attn_norm", x)
        if full or arch == "gemma3":
            h = _attention(arch, w, il, full, h, razor)
        else:
            h = _short_convolution(w, blk, h)
        if arch == "gemma3":
            h = _norm(w, f"{blk}.post_attention_norm", h)
        x = x + h
        h = _norm(w, f"{blk}.ffn_norm", x)
        gate, up = _linear(w, f"{blk}.ffn_gate", h), _linear(w, f"{blk}.ffn_up", h)
        act = reference.gelu_f16_table(gate) if arch == "gemma3" else gate / (1 + np.exp(-gate))
        h = _linear(w, f"{blk}.ffn_down", act * up)
        x = x + (_norm(w, f"{blk}.post_ffw_norm", h) if arch == "gemma3" else h)
    x = _norm(w, "token_embd_norm" if arch == "lfm2" else "output_norm", x)
    return x @ w["token_embd.weight"].T


def _attention(
    arch: str, w: Weights, il: int, full: bool, h: np.ndarray, razor: Razor | None
) -> np.ndarray:
    n, blk = len(h), f"blk.{il}"
    base = ROPE_BASE if full else ROPE_BASE_SLIDING
    spec = TinySpec("qwen3", head_dim=HEAD_DIM, rope_base=base)  # pairs are halves of a head
    q, k, v = (
        _linear(w, f"{blk}.attn_{name}", h).reshape(n, -1, HEAD_DIM) for name in ("q", "k", "v")
    )
    q = reference.rope(spec, {}, _norm(w, f"{blk}.attn_q_norm", q))
    k = reference.rope(spec, {}, _norm(w, f"{blk}.attn_k_norm", k))
    out = np.empty_like(q)
    for ih in range(N_HEAD):
        kv = ih // (N_HEAD // N_KV)
        if full:
            window = razor.window_of(il, kv) if razor is not None else 0
            local = razor if window else None
            out[:, ih], _ = reference.attend(q[:, ih], k[:, kv], v[:, kv], local, window)
        else:
            out[:, ih] = _slide(q[:, ih], k[:, kv], v[:, kv])
    return _linear(w, f"{blk}.attn_output", out.reshape(n, -1))


def _slide(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attend to the newest SLIDING_WINDOW tokens, f64 [n, d]."""
    back = np.arange(len(q))[:, None] - np.arange(len(q))[None, :]
    logits = np.where((back >= 0) & (back < SLIDING_WINDOW), q @ k.T / np.sqrt(HEAD_DIM), -np.inf)
    prob = np.exp(logits - logits.max(axis=1, keepdims=True))
    return prob / prob.sum(axis=1, keepdims=True) @ v


def _short_convolution(w: Weights, blk: str, h: np.ndarray) -> np.ndarray:
    b, c, x = np.split(_linear(w, f"{blk}.shortconv.in_proj", h), 3, axis=1)
    bx = np.concatenate([np.zeros((N_CONV - 1, N_EMBD)), b * x])
    kernel = w[f"{blk}.shortconv.conv.weight"]
    conv = sum(bx[j : j + len(h)] * kernel[:, j] for j in range(N_CONV))
    return _linear(w, f"{blk}.shortconv.out_proj", c * conv)


def _linear(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[f"{name}.weight"].T


def _norm(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * w[f"{name}.weight"]
