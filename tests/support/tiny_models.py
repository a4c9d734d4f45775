"""Small random-weight GGUF models, written by the tests that need them.

The weights depend only on the spec, including its seed. They are scaled so that attention is far
from uniform and logits are of order 1 to 10. A wrong mask, a lost token or a wrong compensation
token then shows up in the logits instead of disappearing in an average.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

ARCHS = ("llama", "qwen2", "qwen3", "gpt2", "deci")


@dataclass(frozen=True)
class TinySpec:
    """The shape of a tiny model.

    gpt2 and qwen2 ignore n_embd, which is n_head * head_dim there. deci is llama with a KV head
    count per layer; a layer with 0 is linear and has no attention.
    """

    arch: str = "llama"
    n_layer: int = 3
    n_head: int = 4
    n_head_kv: int | tuple[int, ...] = 2
    head_dim: int = 32
    n_embd: int = 64
    n_ff: int = 96
    n_vocab: int = 128
    n_ctx_train: int = 1024
    tied: bool = False  # output head = token embedding
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    still: bool = False  # the slower half of the pairs does not turn: rope_freqs.weight (llama)
    sharpness: float = 1.5  # standard deviation of the query and of the key entries
    seed: int = 0

    def __post_init__(self) -> None:
        if self.arch not in ARCHS:
            raise ValueError(f"unknown arch {self.arch!r}")
        if any(n > 0 and self.n_head % n for n in self.kv_heads):
            raise ValueError("n_head must be a multiple of n_head_kv")
        if isinstance(self.n_head_kv, tuple) != (self.arch == "deci"):
            raise ValueError("only deci has a KV head count per layer")
        if self.arch in ("gpt2", "qwen2"):
            object.__setattr__(self, "n_embd", self.n_head * self.head_dim)
        if self.arch == "gpt2" and self.n_head != self.n_head_kv:
            raise ValueError("gpt2 has as many KV heads as query heads")

    @property
    def kv_heads(self) -> tuple[int, ...]:
        """KV heads of each layer."""
        if isinstance(self.n_head_kv, tuple):
            return self.n_head_kv
        return (self.n_head_kv,) * self.n_layer


def make_weights(spec: TinySpec) -> dict[str, np.ndarray]:
    """Tensors of the model by GGUF name: f32, shapes in numpy order (rows = outputs)."""
    weights: dict[str, np.ndarray] = {}
    d, n_q = spec.n_embd, spec.n_head * spec.head_dim

    def normal(name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> np.ndarray:
        # one generator per tensor: adding a tensor does not change the others
        rng = np.random.default_rng([spec.seed, zlib.crc32(name.encode())])
        return (mean + std * rng.standard_normal(shape)).astype(np.float32)

    def tensor(name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> None:
        weights[name] = normal(name, shape, std, mean)

    def linear(name: str, n_out: int, n_in: int, gain: float) -> None:
        tensor(name, (n_out, n_in), gain / n_in**0.5)

    def norm(name: str, size: int, mean: float = 1.0) -> None:
        tensor(f"{name}.weight", (size,), 0.1 * mean, mean)
        if spec.arch == "gpt2":
            tensor(f"{name}.bias", (size,), 0.1 * mean)

    # a direction all tokens share: the mean of keys and values (the compensation token) is not ~0
    tensor("token_embd.weight", (spec.n_vocab, d), 1.0)
    weights["token_embd.weight"] += normal("shared direction", (d,), 0.7)
    if spec.arch == "gpt2":
        tensor("position_embd.weight", (spec.n_ctx_train, d), 0.5)

    for il in range(spec.n_layer):
        blk, n_kv = f"blk.{il}", spec.kv_heads[il] * spec.head_dim
        norm(f"{blk}.attn_norm", d)
        if n_kv:
            linear(f"{blk}.attn_q.weight", n_q, d, spec.sharpness)
            linear(f"{blk}.attn_k.weight", n_kv, d, spec.sharpness)
            linear(f"{blk}.attn_v.weight", n_kv, d, 1.0)
        if spec.arch in ("qwen2", "gpt2"):
            tensor(f"{blk}.attn_q.bias", (n_q,), 0.3)
            tensor(f"{blk}.attn_k.bias", (n_kv,), 0.5)
            tensor(f"{blk}.attn_v.bias", (n_kv,), 0.3)
        if spec.arch == "gpt2":
            for kind in ("weight", "bias"):
                parts = [weights.pop(f"{blk}.attn_{x}.{kind}") for x in "qkv"]
                weights[f"{blk}.attn_qkv.{kind}"] = np.concatenate(parts)
        if spec.arch == "qwen3":
            tensor(f"{blk}.attn_q_norm.weight", (spec.head_dim,), 0.1, spec.sharpness)
            tensor(f"{blk}.attn_k_norm.weight", (spec.head_dim,), 0.1, spec.sharpness)
        linear(f"{blk}.attn_output.weight", d, n_q if n_kv else d, 2.0 if n_kv else 0.5)
        if spec.arch == "gpt2":
            tensor(f"{blk}.attn_output.bias", (d,), 0.1)
        norm(f"{blk}.ffn_norm", d)
        if spec.arch == "gpt2":
            # llama.cpp's CPU GELU is a table of F16 values: a small gain keeps its rounding from
            # hiding errors of the cache
            linear(f"{blk}.ffn_up.weight", spec.n_ff, d, 1.0)
            tensor(f"{blk}.ffn_up.bias", (spec.n_ff,), 0.1)
            linear(f"{blk}.ffn_down.weight", d, spec.n_ff, 0.01)
            tensor(f"{blk}.ffn_down.bias", (d,), 0.1)
        else:
            linear(f"{blk}.ffn_gate.weight", spec.n_ff, d, 1.0)
            linear(f"{blk}.ffn_up.weight", spec.n_ff, d, 1.0)
            linear(f"{blk}.ffn_down.weight", d, spec.n_ff, 1.0)

    if spec.still:
        factors = np.repeat(np.float32([1, 1e20]), spec.head_dim // 4)
        weights["rope_freqs.weight"] = factors
    if spec.tied:
        norm("output_norm", d, 3 / d**0.5)
    else:
        norm("output_norm", d)
        linear("output.weight", spec.n_vocab, d, 3.0)
    return weights


def model_kv(spec: TinySpec) -> dict[str, tuple[Any, GGUFValueType]]:
    """Metadata that llama.cpp needs to load the model: key -> (value, GGUF type)."""
    u32, f32, string = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING
    eps_key = "layer_norm_epsilon" if spec.arch == "gpt2" else "layer_norm_rms_epsilon"
    a = spec.arch
    kv: dict[str, tuple[Any, GGUFValueType]] = {
        "general.name": (f"tiny {a}", string),
        f"{a}.block_count": (spec.n_layer, u32),
        f"{a}.context_length": (spec.n_ctx_train, u32),
        f"{a}.embedding_length": (spec.n_embd, u32),
        f"{a}.feed_forward_length": (spec.n_ff, u32),
        f"{a}.attention.head_count": (spec.n_head, u32),
        f"{a}.attention.head_count_kv": (
            (np.array(spec.n_head_kv, np.int32), GGUFValueType.ARRAY)
            if isinstance(spec.n_head_kv, tuple)
            else (spec.n_head_kv, u32)
        ),
        f"{a}.attention.{eps_key}": (spec.norm_eps, f32),
        f"{a}.vocab_size": (spec.n_vocab, u32),
        "tokenizer.ggml.model": ("none", string),
    }
    if spec.arch != "gpt2":
        kv[f"{a}.rope.freq_base"] = (spec.rope_base, f32)
    if spec.arch in ("llama", "qwen3", "deci"):  # head_dim is free there
        kv[f"{a}.attention.key_length"] = (spec.head_dim, u32)
        kv[f"{a}.attention.value_length"] = (spec.head_dim, u32)
        kv[f"{a}.rope.dimension_count"] = (spec.head_dim, u32)
    return kv


def razor_kv(
    mask: Sequence[Sequence[int]],
    *,
    sink_tokens: int = 4,
    window_min: int = 4000,
    window_divisor: int = 5,
    compensation: bool = True,
    scopes: Sequence[Sequence[int]] | None = None,
    version: int = 1,
) -> dict[str, tuple[Any, GGUFValueType]]:
    """Return the razor.* metadata of a profile with this mask (one row of 0/1 per layer)."""
    u32 = GGUFValueType.UINT32
    extra = {}
    if scopes is not None:
        flat = np.array([x for row in scopes for x in row], np.uint32)
        extra["razor.head.scope"] = (flat, GGUFValueType.ARRAY)
    return {
        "razor.version": (version, u32),
        "razor.method": ("rope", GGUFValueType.STRING),
        "razor.sink_tokens": (sink_tokens, u32),
        "razor.window_min": (window_min, u32),
        "razor.window_divisor": (window_divisor, u32),
        "razor.compensation": (compensation, GGUFValueType.BOOL),
        "razor.head.retrieval": (flat_mask(mask).tobytes(), GGUFValueType.ARRAY),
        **extra,
    }


def flat_mask(mask: Sequence[Sequence[int]]) -> np.ndarray:
    """Flatten a mask of one row per layer into a layer-major uint8 array."""
    return np.concatenate([np.asarray(row, np.uint8) for row in mask])


def write_gguf(
    path: str | Path,
    arch: str,
    kv: dict[str, tuple[Any, GGUFValueType]],
    tensors: Iterable[tuple[str, np.ndarray, GGMLQuantizationType | None]],
    **split: Any,
) -> Path:
    """Write a GGUF file.

    A value of type ARRAY may be bytes (uint8[]), a numpy array of a supported type, or a list.
    split: options of GGUFWriter that write several files.
    """
    path = Path(path)
    writer = GGUFWriter(path, arch, **split)
    for key, (value, vtype) in kv.items():
        sub_type = None
        if vtype == GGUFValueType.ARRAY and isinstance(value, np.ndarray):
            sub_type = _ARRAY_TYPES[value.dtype.name]
            value = value.tolist()
        writer.add_key_value(key, value, vtype, sub_type=sub_type)
    for name, data, raw_dtype in tensors:
        writer.add_tensor(name, data, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_ARRAY_TYPES = {
    "uint8": GGUFValueType.UINT8,
    "int8": GGUFValueType.INT8,
    "bool": GGUFValueType.BOOL,
    "uint16": GGUFValueType.UINT16,
    "int32": GGUFValueType.INT32,
    "uint32": GGUFValueType.UINT32,
    "float32": GGUFValueType.FLOAT32,
    "float64": GGUFValueType.FLOAT64,
    "uint64": GGUFValueType.UINT64,
}


def make_model(
    path: str | Path,
    spec: TinySpec,
    extra_kv: dict[str, tuple[Any, GGUFValueType]] | None = None,
) -> Path:
    """Write the model of a spec, F32, with extra metadata (for example razor_kv())."""
    kv = model_kv(spec) | (extra_kv or {})
    tensors = [(name, data, None) for name, data in make_weights(spec).items()]
    return write_gguf(path, spec.arch, kv, tensors)


def make_split_model(
    folder: Path, spec: TinySpec, max_tensors: int = 12, tensors_in_first: bool = True
) -> Path:
    """Write the model of a spec in files of at most max_tensors tensors. Return the first path."""
    tensors = [(name, data, None) for name, data in make_weights(spec).items()]
    write_gguf(
        folder / "split.gguf",
        spec.arch,
        model_kv(spec),
        tensors,
        split_max_tensors=max_tensors,
        small_first_shard=not tensors_in_first,
    )
    (first,) = folder.glob("split-00001-of-*.gguf")
    return first


def with_kv_heads(spec: TinySpec, grouping: str) -> TinySpec:
    """Set the number of KV heads to that of query heads (mha), half of it (gqa), or 1 (mqa)."""
    n_head_kv = {"mha": spec.n_head, "gqa": max(1, spec.n_head // 2), "mqa": 1}[grouping]
    return replace(spec, n_head_kv=n_head_kv)
