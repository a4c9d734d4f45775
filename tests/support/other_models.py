"""Tiny random models of architectures that razor does not support.

They show that such a model runs as in stock without razor, and is refused by name with it.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType

from tests.support.tiny_models import write_gguf

N_VOCAB, N_EMBD, N_HEAD, N_FF, N_LAYER = 64, 64, 2, 96, 2
HEAD_DIM = N_EMBD // N_HEAD
U32, F32, STR = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING
ARRAY = GGUFValueType.ARRAY

Shapes = dict[str, tuple[int, ...]]


def _attention(blk: str, n_kv: int = N_HEAD) -> Shapes:
    return {
        f"{blk}.attn_norm.weight": (N_EMBD,),
        f"{blk}.attn_q.weight": (N_EMBD, N_EMBD),
        f"{blk}.attn_k.weight": (n_kv * HEAD_DIM, N_EMBD),
        f"{blk}.attn_v.weight": (n_kv * HEAD_DIM, N_EMBD),
        f"{blk}.attn_output.weight": (N_EMBD, N_EMBD),
    }


def _gated_ffn(blk: str) -> Shapes:
    return {
        f"{blk}.ffn_norm.weight": (N_EMBD,),
        f"{blk}.ffn_gate.weight": (N_FF, N_EMBD),
        f"{blk}.ffn_up.weight": (N_FF, N_EMBD),
        f"{blk}.ffn_down.weight": (N_EMBD, N_FF),
    }


def _gemma2(blk: str, il: int) -> Shapes:
    norms = {
        f"{blk}.post_attention_norm.weight": (N_EMBD,),
        f"{blk}.post_ffw_norm.weight": (N_EMBD,),
    }
    return _attention(blk) | _gated_ffn(blk) | norms


def _qwen2vl(blk: str, il: int) -> Shapes:
    return _attention(blk) | _gated_ffn(blk)


def _mpt(blk: str, il: int) -> Shapes:
    return {
        f"{blk}.attn_norm.weight": (N_EMBD,),
        f"{blk}.attn_qkv.weight": (3 * N_EMBD, N_EMBD),
        f"{blk}.attn_output.weight": (N_EMBD, N_EMBD),
        f"{blk}.ffn_norm.weight": (N_EMBD,),
        f"{blk}.ffn_up.weight": (N_FF, N_EMBD),
        f"{blk}.ffn_down.weight": (N_EMBD, N_FF),
    }


def _mamba(blk: str, il: int) -> Shapes:
    inner, state, conv, rank = 2 * N_EMBD, 8, 4, 4
    return {
        f"{blk}.attn_norm.weight": (N_EMBD,),
        f"{blk}.ssm_in.weight": (2 * inner, N_EMBD),
        f"{blk}.ssm_conv1d.weight": (inner, conv),
        f"{blk}.ssm_conv1d.bias": (inner,),
        f"{blk}.ssm_x.weight": (rank + 2 * state, inner),
        f"{blk}.ssm_dt.weight": (inner, rank),
        f"{blk}.ssm_dt.bias": (inner,),
        f"{blk}.ssm_a": (inner, state),
        f"{blk}.ssm_d": (inner,),
        f"{blk}.ssm_out.weight": (N_EMBD, inner),
    }


def _lfm2(blk: str, il: int) -> Shapes:
    if il == 1:
        norms = {f"{blk}.attn_{x}_norm.weight": (HEAD_DIM,) for x in "qk"}
        return _attention(blk) | _gated_ffn(blk) | norms
    return {
        f"{blk}.attn_norm.weight": (N_EMBD,),
        f"{blk}.shortconv.conv.weight": (N_EMBD, 3),
        f"{blk}.shortconv.in_proj.weight": (3 * N_EMBD, N_EMBD),
        f"{blk}.shortconv.out_proj.weight": (N_EMBD, N_EMBD),
    } | _gated_ffn(blk)


def _deepseek2(blk: str, il: int) -> Shapes:
    rank, rope, nope, n_v, q_rank = 32, 16, 32, 32, 48
    return {
        f"{blk}.attn_norm.weight": (N_EMBD,),
        f"{blk}.attn_q_a_norm.weight": (q_rank,),
        f"{blk}.attn_kv_a_norm.weight": (rank,),
        f"{blk}.attn_q_a.weight": (q_rank, N_EMBD),
        f"{blk}.attn_q_b.weight": (N_HEAD * (nope + rope), q_rank),
        f"{blk}.attn_kv_a_mqa.weight": (rank + rope, N_EMBD),
        f"{blk}.attn_k_b.weight": (N_HEAD, rank, nope),
        f"{blk}.attn_v_b.weight": (N_HEAD, n_v, rank),
        f"{blk}.attn_output.weight": (N_EMBD, N_HEAD * n_v),
    } | _gated_ffn(blk)


def _falcon(blk: str, il: int) -> Shapes:
    return {
        f"{blk}.attn_norm.weight": (N_EMBD,),
        f"{blk}.attn_norm.bias": (N_EMBD,),
        f"{blk}.attn_qkv.weight": (N_EMBD + 2 * HEAD_DIM, N_EMBD),
        f"{blk}.attn_output.weight": (N_EMBD, N_EMBD),
        f"{blk}.ffn_up.weight": (N_FF, N_EMBD),
        f"{blk}.ffn_down.weight": (N_EMBD, N_FF),
    }


# arch -> (tensors of a layer, metadata without the arch's prefix)
MODELS: dict[str, tuple[Any, dict[str, tuple[Any, GGUFValueType]]]] = {
    "falcon": (
        _falcon,
        {"attention.layer_norm_epsilon": (1e-5, F32), "attention.head_count_kv": (1, U32)},
    ),
    "gemma2": (
        _gemma2,
        {
            "attention.layer_norm_rms_epsilon": (1e-5, F32),
            "attention.sliding_window": (32, U32),
        },
    ),
    "mpt": (
        _mpt,
        {
            "attention.layer_norm_epsilon": (1e-5, F32),
            "attention.max_alibi_bias": (8.0, F32),
        },
    ),
    "qwen2vl": (
        _qwen2vl,
        {
            "attention.layer_norm_rms_epsilon": (1e-5, F32),
            "rope.dimension_sections": (np.array([4, 6, 6, 0], np.int32), ARRAY),
        },
    ),
    "mamba": (
        _mamba,
        {
            "attention.layer_norm_rms_epsilon": (1e-5, F32),
            "attention.head_count": (0, U32),
            "ssm.conv_kernel": (4, U32),
            "ssm.inner_size": (2 * N_EMBD, U32),
            "ssm.state_size": (8, U32),
            "ssm.time_step_rank": (4, U32),
        },
    ),
    "lfm2": (
        _lfm2,
        {
            "attention.layer_norm_rms_epsilon": (1e-5, F32),
            "attention.head_count_kv": (np.array([0, 2], np.int32), ARRAY),
            "shortconv.l_cache": (3, U32),
        },
    ),
    "deepseek2": (
        _deepseek2,
        {
            "attention.layer_norm_rms_epsilon": (1e-5, F32),
            "attention.head_count_kv": (1, U32),
            "attention.q_lora_rank": (48, U32),
            "attention.kv_lora_rank": (32, U32),
            "attention.key_length": (48, U32),
            "attention.value_length": (32, U32),
            "attention.key_length_mla": (48, U32),
            "attention.value_length_mla": (32, U32),
            "rope.dimension_count": (16, U32),
            "leading_dense_block_count": (N_LAYER, U32),
            "expert_feed_forward_length": (N_FF, U32),
            "expert_shared_count": (1, U32),
        },
    ),
}


def make_other(
    path: str | Path, arch: str, extra_kv: dict[str, tuple[Any, GGUFValueType]] | None = None
) -> Path:
    """Write a tiny model of an arch in MODELS."""
    layer, own_kv = MODELS[arch]
    kv: dict[str, tuple[Any, GGUFValueType]] = {
        "general.name": (f"tiny {arch}", STR),
        f"{arch}.block_count": (N_LAYER, U32),
        f"{arch}.context_length": (512, U32),
        f"{arch}.embedding_length": (N_EMBD, U32),
        f"{arch}.feed_forward_length": (N_FF, U32),
        f"{arch}.attention.head_count": (N_HEAD, U32),
        f"{arch}.vocab_size": (N_VOCAB, U32),
        "tokenizer.ggml.model": ("none", STR),
    } | {f"{arch}.{key}": value for key, value in own_kv.items()}

    shapes: Shapes = {
        "token_embd.weight": (N_VOCAB, N_EMBD),
        # lfm2's output norm bears this name
        ("token_embd_norm" if arch == "lfm2" else "output_norm") + ".weight": (N_EMBD,),
    }
    if arch == "falcon":
        shapes["output_norm.bias"] = (N_EMBD,)
    for il in range(N_LAYER):
        shapes |= layer(f"blk.{il}", il)
    if arch == "qwen2vl":
        for il in range(N_LAYER):
            for name in "qkv":
                shapes[f"blk.{il}.attn_{name}.bias"] = (N_EMBD,)

    tensors = []
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        data = rng.standard_normal(shape)
        if "norm" in name and name.endswith("weight"):
            data = 1 + 0.1 * data
        elif len(shape) > 1 and "embd" not in name:
            data *= 1.5 / shape[-1] ** 0.5
        if "ssm_a" in name:
            data = -np.abs(data)
        tensors.append((name, data.astype(np.float32), None))
    return write_gguf(path, arch, kv | (extra_kv or {}), tensors)
