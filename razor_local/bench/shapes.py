"""Write random-weight GGUF models in well-known shapes, for timing without downloads.

The time of a token depends on the shape and the types of the tensors, not on their content. The
weights are therefore a few random rows repeated: the amount of work is right, and the text is
meaningless. The files are marked as random (KEY_RANDOM), and every report says so.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..common.files import cache_folder, new_file
from ..common.progress import Progress, silent
from ..converters.encode import encode, profile_keys
from ..errors import UnsupportedError
from ..gguf.header import BOOL, F32, MAGIC, STRING, U32, Header, read_header
from ..profile import Profile, split_heads

VERSION = 2  # of the files in the cache; files of other versions are ignored
KEY_RANDOM = "razor_local.random_weights"
N_ROWS = 64  # random rows of each matrix, repeated
PIECE_BYTES = 4 << 20  # bytes of a matrix per write
QUANTS = {"q4_0": (2, 32, 18), "q8_0": (8, 32, 34), "f16": (1, 1, 2)}  # ggml type, block, bytes


@dataclass(frozen=True)
class Shape:
    """The shape of a dense transformer, in elements (n_ctx_train in tokens).

    Attributes:
        tied: whether the output head is the token embedding.
        qk_norm: whether queries and keys pass an RMS norm (qwen3).
    """

    arch: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    rope_base: float
    tied: bool = False
    qk_norm: bool = False


SHAPES = {
    "30m": Shape("llama", 8, 512, 8, 4, 64, 1536, 8192, 131072, 500000.0, tied=True),
    "llama-3.2-1b": Shape("llama", 16, 2048, 32, 8, 64, 8192, 128256, 131072, 500000.0, tied=True),
    "llama-3.2-3b": Shape("llama", 28, 3072, 24, 8, 128, 8192, 128256, 131072, 500000.0, tied=True),
    "llama-3.1-8b": Shape("llama", 32, 4096, 32, 8, 128, 14336, 128256, 131072, 500000.0),
    "llama-2-7b": Shape("llama", 32, 4096, 32, 32, 128, 11008, 32000, 4096, 10000.0),
    "mistral-7b-v0.3": Shape("llama", 32, 4096, 32, 8, 128, 14336, 32768, 32768, 1000000.0),
    "qwen3-0.6b": Shape(
        "qwen3", 28, 1024, 16, 8, 128, 3072, 151936, 40960, 1000000.0, tied=True, qk_norm=True
    ),
    "qwen3-4b": Shape(
        "qwen3", 36, 2560, 32, 8, 128, 9728, 151936, 40960, 1000000.0, tied=True, qk_norm=True
    ),
    "qwen3-8b": Shape("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, 40960, 1000000.0, qk_norm=True),
}


def cached_shape_model(
    name: str,
    *,
    quant: str = "q4_0",
    retrieval: float = 0.15,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Return the model of a shape in the user's cache folder, and write it first if needed.

    The arguments and errors are those of write_shape_model().
    """
    shape = find_shape(name)
    label = f"{name}-{quant}-{round(retrieval * shape.n_layer * shape.n_head_kv)}heads-seed{seed}"
    path = cache_folder() / f"shapes-{VERSION}" / f"{label}.gguf"
    if path.exists() and is_random(read_header(path)):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_shape_model(
        path, name, quant=quant, retrieval=retrieval, seed=seed, progress=progress
    )


def find_shape(name: str) -> Shape:
    """Return the shape of that name. Raises UnsupportedError if there is none."""
    if name not in SHAPES:
        raise UnsupportedError(f"{name!r} is not a known shape; expected {', '.join(SHAPES)}")
    return SHAPES[name]


def write_shape_model(
    path: str | os.PathLike[str],
    name: str | Shape,
    *,
    quant: str = "q4_0",
    retrieval: float = 0.15,
    seed: int = 0,
    profile: Profile | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a random model with a razor profile. Memory use does not grow with the model.

    Args:
        path: the new file.
        name: one of SHAPES, or a shape.
        quant: type of the matrices, one of QUANTS.
        retrieval: share of retrieval heads, at random places, if there is no profile.
        seed: seed of the weights and of the places.
        profile: the profile to write.
        progress: called with the progress.

    Raises:
        UnsupportedError: the shape or the type is not known.
        RazorError: the disk has too little room.
        OSError: the file cannot be written. No part of it is left.
    """
    shape = find_shape(name) if isinstance(name, str) else name
    if quant not in QUANTS:
        raise UnsupportedError(
            f"{quant!r} is not a weight type for a shape; expected {', '.join(QUANTS)}"
        )
    if not 0 <= retrieval <= 1:
        raise UnsupportedError(f"the share of retrieval heads is {retrieval}, expected 0 to 1")
    path = Path(path)
    rng = np.random.default_rng(seed)
    heads = scattered_heads(shape.n_layer, shape.n_head_kv, retrieval, rng)
    if profile is None:
        profile = Profile(retrieval=split_heads(heads, (shape.n_head_kv,) * shape.n_layer))
    keys = _head(name if isinstance(name, str) else shape.arch, shape, quant, profile)
    tensors = list(_tensors(shape))
    table = _table(tensors, quant)
    total = sum(_padded(_nbytes(n_out, n_in, quant)) for _, n_out, n_in in tensors)
    report, label = progress or silent, f"writing {path.name}"
    with new_file(path, total + (1 << 20)) as file:
        file.write(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(keys)))
        file.write(b"".join(keys) + table)
        file.write(bytes(_padded(file.tell()) - file.tell()))
        done = 0
        for _, n_out, n_in in tensors:
            for rows in _data(n_out, n_in, quant, rng):
                file.write(rows)
                done += len(rows)
                report(done, total, label)
            file.write(bytes(_padded(file.tell()) - file.tell()))
    return path


def scattered_heads(
    n_layer: int, n_head_kv: int, share: float, rng: np.random.Generator
) -> np.ndarray:
    """Mark a share of the heads at random: uint8 [n_layer * n_head_kv], layer-major."""
    heads = np.zeros(n_layer * n_head_kv, np.uint8)
    heads[rng.choice(heads.size, round(share * heads.size), replace=False)] = 1
    return heads


def is_random(header: Header) -> bool:
    """Return True if the file is marked as having random weights."""
    return KEY_RANDOM in header.entries


# -- the file

ALIGNMENT = 32


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _padded(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _nbytes(n_out: int, n_in: int, quant: str) -> int:
    """Return the bytes of a tensor. Vectors (n_out = 0) are F32."""
    if not n_out:
        return n_in * 4
    _, block, block_bytes = QUANTS[quant]
    return n_out * n_in // block * block_bytes


def _tensors(shape: Shape) -> Iterator[tuple[str, int, int]]:
    """Yield the name, rows (0 for a vector) and columns of each tensor."""
    d, ff = shape.n_embd, shape.n_ff
    n_q, n_kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    yield "token_embd.weight", shape.n_vocab, d
    for il in range(shape.n_layer):
        for name, n_out, n_in in (
            ("attn_norm", 0, d),
            ("attn_q", n_q, d),
            ("attn_k", n_kv, d),
            ("attn_v", n_kv, d),
            ("attn_output", d, n_q),
            ("ffn_norm", 0, d),
            ("ffn_gate", ff, d),
            ("ffn_up", ff, d),
            ("ffn_down", d, ff),
        ):
            yield f"blk.{il}.{name}.weight", n_out, n_in
        if shape.qk_norm:
            yield f"blk.{il}.attn_q_norm.weight", 0, shape.head_dim
            yield f"blk.{il}.attn_k_norm.weight", 0, shape.head_dim
    yield "output_norm.weight", 0, d
    if not shape.tied:
        yield "output.weight", shape.n_vocab, d


def _head(name: str, shape: Shape, quant: str, profile: Profile) -> list[bytes]:
    """Encode the metadata, one item per key."""
    texts = {
        "general.architecture": shape.arch,
        "general.name": f"{name} shape, random weights",
        "general.description": f"Random weights in the shape of {name}, {quant}: only to time it",
        "tokenizer.ggml.model": "none",
    }
    numbers = {
        "block_count": shape.n_layer,
        "context_length": shape.n_ctx_train,
        "embedding_length": shape.n_embd,
        "feed_forward_length": shape.n_ff,
        "attention.head_count": shape.n_head,
        "attention.head_count_kv": shape.n_head_kv,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "rope.dimension_count": shape.head_dim,
        "vocab_size": shape.n_vocab,
    }
    floats = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": shape.rope_base}
    return [
        *(encode(key, STRING, value) for key, value in texts.items()),
        encode(KEY_RANDOM, BOOL, True),
        *(encode(f"{shape.arch}.{key}", U32, value) for key, value in numbers.items()),
        *(
            _string(f"{shape.arch}.{key}") + struct.pack("<If", F32, value)
            for key, value in floats.items()
        ),
        *profile_keys(profile),
    ]


def _table(tensors: list[tuple[str, int, int]], quant: str) -> bytes:
    """Encode the tensor table: name, dimensions (innermost first), type, offset in the data."""
    table, offset = b"", 0
    for name, n_out, n_in in tensors:
        dims = (n_in, n_out) if n_out else (n_in,)
        kind = QUANTS[quant][0] if n_out else 0  # F32
        table += _string(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        table += struct.pack("<IQ", kind, offset)
        offset += _padded(_nbytes(n_out, n_in, quant))
    return table


def _data(
    n_out: int, n_in: int, quant: str, rng: np.random.Generator
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a tensor: a vector of ones, or N_ROWS random rows repeated."""
    if not n_out:
        yield np.ones(n_in, "<f4").tobytes()
        return
    _, block, block_bytes = QUANTS[quant]
    if quant == "f16":
        rows = (rng.standard_normal((N_ROWS, n_in)) / n_in**0.5).astype("<f2")
    else:
        rows = rng.integers(0, 256, (N_ROWS, n_in // block, block_bytes), np.uint8)
        # Keep activations near 1: uniform q4_0 values deviate by 4.6 scales, q8_0 by 74.
        scale = (0.22 if quant == "q4_0" else 0.0135) / n_in**0.5
        # Draw the sign of each scale. The values of a block have a nonzero mean (-0.5 scales in
        # q4_0). If all weights shared it, logits would be so far apart that softmax gives denormal
        # numbers, which are slow.
        scales = rng.choice((-scale, scale), rows.shape[:2]).astype("<f2")
        rows[:, :, :2] = scales[:, :, None].view(np.uint8)
    row_bytes = rows.nbytes // N_ROWS
    several = max(1, PIECE_BYTES // rows.nbytes)  # thousands of small writes would take seconds
    chunk = memoryview(rows.tobytes() * min(several, -(-n_out // N_ROWS)))
    left = n_out * row_bytes
    while left:
        yield chunk[:left]
        left -= len(chunk[:left])
