"""Tiny random models of Gemma 3n and Gemma 4, whose later layers read caches of earlier ones."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType

from tests.support.tiny_models import write_gguf

U32, F32, STR = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING
ARRAY = GGUFValueType.ARRAY
Metadata = dict[str, tuple[Any, GGUFValueType]]


def write_gemma(path: Path, arch: str, tokenizer: Metadata) -> None:
    """A Gemma whose later layers read the caches of earlier ones."""
    n_embd, n_ff = 64, 96
    per_layer = 256 if arch == "gemma3n" else 16  # llama.cpp knows no other number for gemma3n
    n_head, n_kv = 4, 2
    n_layer = 25 if arch == "gemma3n" else 10
    slides = [il % 5 != 4 for il in range(n_layer)]
    dims = [32 if arch == "gemma4" and s else 64 if arch == "gemma4" else 32 for s in slides]
    kv: dict[str, tuple[Any, GGUFValueType]] = {
        "block_count": (n_layer, U32),
        "context_length": (512, U32),
        "embedding_length": (n_embd, U32),
        "feed_forward_length": (n_ff, U32),
        "attention.head_count": (n_head, U32),
        "attention.head_count_kv": (n_kv, U32),
        "attention.key_length": (dims[-1], U32),
        "attention.value_length": (dims[-1], U32),
        "attention.layer_norm_rms_epsilon": (1e-5, F32),
        "attention.sliding_window": (48, U32),
        "embedding_length_per_layer_input": (per_layer, U32),
    }
    own = n_layer
    n_vocab = len(tokenizer["tokenizer.ggml.tokens"][0])
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (n_vocab, n_embd),
        "per_layer_token_embd.weight": (n_vocab, per_layer * n_layer),
        "per_layer_model_proj.weight": (per_layer * n_layer, n_embd),
        "per_layer_proj_norm.weight": (per_layer,),
        "output_norm.weight": (n_embd,),
    }
    if arch == "gemma3n":
        n_altup = 4
        shapes |= {
            "altup_proj.weight": (n_altup - 1, n_embd, n_embd),
            "altup_unembd_proj.weight": (n_altup - 1, n_embd, n_embd),
        }
    else:
        own = n_layer - 5
        kv |= {
            "attention.sliding_window_pattern": (np.array(slides, np.uint32), ARRAY),
            "attention.shared_kv_layers": (n_layer - own, U32),
            "attention.key_length_swa": (dims[0], U32),
            "attention.value_length_swa": (dims[0], U32),
            "rope.dimension_count": (dims[-1], U32),
            "rope.dimension_count_swa": (dims[0], U32),
        }
        shapes["rope_freqs.weight"] = (dims[-1] // 2,)
    for il in range(n_layer):
        blk, dim = f"blk.{il}", dims[il]
        shapes |= {
            f"{blk}.attn_norm.weight": (n_embd,),
            f"{blk}.attn_q.weight": (n_head * dim, n_embd),
            f"{blk}.attn_k.weight": (n_kv * dim, n_embd),
            f"{blk}.attn_v.weight": (n_kv * dim, n_embd),
            f"{blk}.attn_output.weight": (n_embd, n_head * dim),
            f"{blk}.attn_q_norm.weight": (dim,),
            f"{blk}.attn_k_norm.weight": (dim,),
            f"{blk}.post_attention_norm.weight": (n_embd,),
            f"{blk}.ffn_norm.weight": (n_embd,),
            f"{blk}.ffn_gate.weight": (n_ff, n_embd),
            f"{blk}.ffn_up.weight": (n_ff, n_embd),
            f"{blk}.ffn_down.weight": (n_embd, n_ff),
            f"{blk}.post_ffw_norm.weight": (n_embd,),
            f"{blk}.inp_gate.weight": (per_layer, n_embd),
            f"{blk}.proj.weight": (n_embd, per_layer),
            f"{blk}.post_norm.weight": (n_embd,),
        }
        if arch == "gemma3n":
            rank = 64
            shapes |= {
                f"{blk}.altup_correct_coef.weight": (n_altup, n_altup),
                f"{blk}.altup_correct_scale.weight": (n_embd,),
                f"{blk}.altup_predict_coef.weight": (n_altup * n_altup, n_altup),
                f"{blk}.altup_router.weight": (n_altup, n_embd),
                f"{blk}.altup_router_norm.weight": (n_embd,),
                f"{blk}.laurel_l.weight": (rank, n_embd),
                f"{blk}.laurel_r.weight": (n_embd, rank),
                f"{blk}.laurel_post_norm.weight": (n_embd,),
            }
    tensors = []
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        data = rng.standard_normal(shape)
        if "norm" in name or "rope" in name:
            data = 1 + 0.1 * data
        elif len(shape) > 1:
            data *= 0.5 / shape[-1] ** 0.5
        tensors.append((name, data.astype(np.float32), None))
    metadata = {f"{arch}.{key}": value for key, value in kv.items()} | tokenizer
    write_gguf(path, arch, {"general.name": (f"tiny {arch}", STR)} | metadata, tensors)
