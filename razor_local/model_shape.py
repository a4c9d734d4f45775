"""The attention shape of a model from its metadata, and the reasons why razor cannot run it.

Every key's type, count and range is checked here, before any library sees the file.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from .errors import ProfileError
from .gguf.header import ARRAY, F32, I32, U16, U32, Header
from .layer_caches import HYBRID, find_layer_caches, recurrent_state_size

MAX_LAYERS = 512  # llama.cpp's own limit
MAX_HEADS = 4096  # per layer
MAX_HEAD_DIM = 8192

UNSUPPORTED_KEYS = {
    "attention.key_length_mla": "multi-head latent attention (MLA)",
    "attention.indexer.key_length": "sparse attention with an indexer",
    "attention.causal": "non-causal attention (an encoder)",
    "wkv.head_size": "recurrent layers",
}
RECURRENT_KEYS = ("ssm.state_size", "shortconv.l_cache")  # hybrid models have them, too

DRAFT = "the layers of a draft model"
LOOP = "layers that run in a loop"
DIFFUSION = "non-causal attention (a diffusion model)"
OTHER = "an attention of its own"
UNSUPPORTED_ARCHS = {
    "cogvlm": OTHER,
    "dflash": DRAFT,
    "dream": DIFFUSION,
    "eagle3": DRAFT,
    "gemma4-assistant": DRAFT,
    "graniteswitch": OTHER,
    "hrm_text": LOOP,
    "llada": DIFFUSION,
    "llada-moe": DIFFUSION,
    "nanbeige": LOOP,
    "pockettts": OTHER,
    "rnd1": DIFFUSION,
}

# llama.cpp knows by these whether a model has ALiBi
ALIBI_ARCHS = ("bloom", "jina-bert-v2", "refact")  # always; baichuan with 40 layers (13B) too
ALIBI_KEY_ARCHS = ("jais", "mpt")  # if attention.max_alibi_bias says so

# architectures with ALiBi, by their norm before attention
LAYER_NORM = ("bloom", "jais", "mpt")  # normalizes to mean 0, and may have a bias
RMS_NORM = ("baichuan", "refact")


@dataclass(frozen=True)
class SlidingLayers:
    """The layers that keep a window of recent tokens, whatever razor does.

    n_head_kv: KV heads of these layers. head_dim_k, head_dim_v: elements. window: tokens.
    """

    n_head_kv: tuple[int, ...]
    head_dim_k: int
    head_dim_v: int
    window: int


@dataclass(frozen=True)
class ModelShape:
    """The attention shape of a model, as far as the KV cache depends on it.

    n_layer leaves out next-token-prediction layers, which the context's own cache does not hold.
    n_head, n_head_kv: query and KV heads per layer [n_layer], of full attention: layers with a
    sliding window, recurrent layers and layers that read the cache of an earlier layer have 0.
    head_dim_k, head_dim_v: elements. n_ctx_train: tokens. sliding: None where no layer has a
    sliding window. recurrent_bytes: state of all recurrent layers. shared: (layer, the layer whose
    cache it reads). v_width: elements of a token in the widest layer, 0: that of n_head_kv.
    parts: the headers of the model's files, () for a shape without a model.
    """

    arch: str
    n_layer: int
    n_head: tuple[int, ...]
    n_head_kv: tuple[int, ...]
    head_dim_k: int
    head_dim_v: int
    n_ctx_train: int
    name: str = ""
    sliding: SlidingLayers | None = None
    recurrent_bytes: int = 0
    shared: tuple[tuple[int, int], ...] = ()
    v_width: int = 0
    parts: tuple[Header, ...] = field(default=(), repr=False, compare=False)

    @property
    def path(self) -> Path | None:
        """The model file, or the first of its files."""
        return self.parts[0].path if self.parts else None

    @cached_property
    def max_alibi_bias(self) -> float:
        """The model's ALiBi bias, see alibi_max_bias(). 0 without a model."""
        return alibi_max_bias(self.parts[0], self) if self.parts else 0.0

    @cached_property
    def fingerprint(self) -> str:
        """See model_fingerprint(). It is computed on first use; "" without a model."""
        return model_fingerprint(self.parts) if self.parts else ""


def describe_heads(heads: tuple[int, ...], kind: str = "KV") -> str:
    """Return a text such as "32 layers x 8 KV heads". heads: number of heads per layer."""
    low, high = min(heads, default=0), max(heads, default=0)
    count = str(low) if low == high else f"{low} to {high}"
    return f"{len(heads)} layers x {count} {kind} heads"


def shape_from_parts(parts: tuple[Header, ...]) -> ModelShape:
    """Return the shape of a model from the headers of its files. Raises GGUFError, ProfileError."""
    header = parts[0]

    def bad(text: str) -> ProfileError:
        return ProfileError(f"{header.path}: {text}")

    arch = header.string("general.architecture", 256)
    if not arch or not arch.isprintable():
        raise bad("has no general.architecture; it is not a language model")

    def size(key: str, default: int | None, low: int, high: int) -> int:
        value = header.number(f"{arch}.{key}", (U32, I32, U16))
        if value is None:
            if default is None:
                raise bad(f"has no {arch}.{key}; it is not a language model")
            return default
        if not low <= value <= high:
            raise bad(f"{arch}.{key} is {value}, expected {low} to {high}")
        return int(value)

    n_layer_all = size("block_count", None, 1, MAX_LAYERS)
    n_nextn = size("nextn_predict_layers", 0, 0, n_layer_all)
    # upstream keeps such layers where a model consists of nothing else
    n_layer = n_layer_all - n_nextn or n_layer_all

    def heads(key: str) -> tuple[int, ...] | None:
        key = f"{arch}.{key}"
        entry = header.entries.get(key)
        if entry is None:
            return None
        if entry.kind == ARRAY:
            if entry.count != n_layer_all:
                raise bad(f"{key} has {entry.count} elements for {n_layer_all} layers")
            element = I32 if entry.element == I32 else U32
            array = header.array(key, element, MAX_LAYERS)
            assert array is not None  # the key is there
            values = [int(n) for n in array]
        else:
            number = header.number(key, (U32, I32, U16))
            assert number is not None
            values = [int(number)] * n_layer_all
        for n in values:
            if not 0 <= n <= MAX_HEADS:
                raise bad(f"{key} holds {n}, expected 0 to {MAX_HEADS}")
        return tuple(values)

    n_head = heads("attention.head_count")
    if n_head is None or not any(n_head):
        raise bad(f"has no {arch}.attention.head_count: a model without attention has no KV cache")
    n_head_kv = heads("attention.head_count_kv") or n_head
    for il, (q, kv) in enumerate(zip(n_head, n_head_kv, strict=True)):
        if kv and (not q or q % kv):
            raise bad(f"layer {il} has {q} query heads, not a multiple of its {kv} KV heads")
    n_embd = size("embedding_length", None, 1, 2**24)
    head_dim = n_embd // n_head[0] if n_head[0] else 0
    dim_k = size("attention.key_length", head_dim, 1, MAX_HEAD_DIM)
    dim_v = size("attention.value_length", head_dim, 1, MAX_HEAD_DIM)
    dim_k_swa = size("attention.key_length_swa", dim_k, 1, MAX_HEAD_DIM)
    dim_v_swa = size("attention.value_length_swa", dim_v, 1, MAX_HEAD_DIM)
    caches = find_layer_caches(header, arch, n_layer, n_layer_all, n_head_kv[:n_layer])
    if arch in HYBRID:
        state = sum(recurrent_state_size(header, arch, n_embd, n_head[0]))
    else:
        state = 0
    swa = [*caches.sliding, *([False] * (n_layer_all - n_layer))]
    return ModelShape(
        arch=arch,
        n_layer=n_layer,
        n_head=tuple(n * full for n, full in zip(n_head, caches.full, strict=False)),
        n_head_kv=tuple(n * full for n, full in zip(n_head_kv, caches.full, strict=False)),
        head_dim_k=dim_k,
        head_dim_v=dim_v,
        n_ctx_train=size("context_length", 0, 0, 2**31 - 1),
        name=header.string("general.name") or "",
        sliding=SlidingLayers(
            tuple(n for n, slides in zip(n_head_kv, caches.sliding, strict=False) if slides),
            dim_k_swa,
            dim_v_swa,
            caches.window,
        )
        if any(caches.sliding)
        else None,
        recurrent_bytes=4 * state * sum(caches.recurrent),
        shared=tuple(caches.shared.items()),
        v_width=max(
            n * (dim_v_swa if slides else dim_v) for n, slides in zip(n_head_kv, swa, strict=True)
        ),
        parts=parts,
    )


def alibi_max_bias(header: Header, shape: ModelShape) -> float:
    """Return the max_alibi_bias that llama.cpp sets for the model, 0 without ALiBi."""
    if shape.arch in ALIBI_KEY_ARCHS:
        bias = header.number(f"{shape.arch}.attention.max_alibi_bias", (F32,)) or 0.0
        return max(float(bias), 0.0)
    always = shape.arch in ALIBI_ARCHS or (shape.arch == "baichuan" and shape.n_layer == 40)
    return 8.0 if always else 0.0


def unsupported_feature(header: Header, shape: ModelShape) -> str | None:
    """Return the feature for which the native library refuses razor, None if there is none.

    The library decides by architecture when a context is created. This is for tools that never
    load it.
    """
    if shape.arch in UNSUPPORTED_ARCHS:
        return UNSUPPORTED_ARCHS[shape.arch]
    recurrent = {} if shape.arch in HYBRID else dict.fromkeys(RECURRENT_KEYS, "recurrent layers")
    for key, feature in (UNSUPPORTED_KEYS | recurrent).items():
        entry = header.entries.get(f"{shape.arch}.{key}")
        causal = key == "attention.causal"
        if entry is not None and (entry.value == 0 if causal else entry.value != 0):
            return feature
    return None if any(shape.n_head_kv) else "no layer with full attention"


def why_not_converted(header: Header, shape: ModelShape) -> str | None:
    """Return why `convert` makes no profile for this model, None if it makes one."""
    feature = unsupported_feature(header, shape)
    if feature:
        return f"the model has {feature}"
    if alibi_max_bias(header, shape) and shape.arch not in LAYER_NORM + RMS_NORM:
        return f"the scopes of {shape.arch} models cannot be computed"
    return None


def model_fingerprint(parts: Sequence[Header]) -> str:
    """Return the sha256 (hex) that identifies a model, for sidecars.

    parts: the headers of the model's files, usually one. Over the architecture and attention shape,
    the tensor tables (names, types, shapes, offsets relative to the data section) and a sample of
    the data: 1 KiB from the middle of up to 512 tensors. It does not depend on the files' names, on
    razor keys or on the metadata's size; another quantization or fine-tune of the same model has
    another fingerprint.
    """
    header = parts[0]
    digest = hashlib.sha256(b"razor fingerprint 1\0")
    arch = header.string("general.architecture", 256) or ""
    digest.update(arch.encode() + b"\0")
    for key in (
        "block_count", "nextn_predict_layers", "embedding_length", "attention.head_count",
        "attention.head_count_kv", "attention.key_length", "attention.value_length",
    ):  # fmt: skip
        entry = header.entries.get(f"{arch}.{key}")
        value: object = "" if entry is None else entry.value
        if entry is not None and entry.kind == ARRAY and entry.element in (U32, I32):
            array = header.array(entry.key, entry.element, MAX_LAYERS)
            assert array is not None  # the key is there
            value = array.tolist()
        digest.update(f"{key}={value}\0".encode())
    tensors = [(part, tensor) for part in parts for tensor in part.tensors]
    for _, tensor in tensors:
        name = tensor.name.encode()
        digest.update(struct.pack("<I", len(name)) + name)
        digest.update(struct.pack(f"<I{len(tensor.dims)}Q", len(tensor.dims), *tensor.dims))
        digest.update(struct.pack("<IQ", tensor.kind, tensor.offset))
    sampled = tensors[:: max(1, -(-len(tensors) // 512))]
    for part in parts:
        with open(part.path, "rb") as file:
            for owner, tensor in sampled:
                if owner is part:
                    n = min(tensor.nbytes, 1024)
                    file.seek(part.data_start + tensor.offset + (tensor.nbytes - n) // 2)
                    digest.update(file.read(n))
    return digest.hexdigest()
