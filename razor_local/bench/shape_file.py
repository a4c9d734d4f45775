"""Write GGUF models with random weights in the shapes of bench/shapes.py, for timing.

The time of a token depends on the shape and the types of the tensors, not on their content. The
weights are therefore a few random rows repeated: the amount of work is right, and the text is
meaningless. The files are marked as random (KEY_RANDOM), and every report says so.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..common.files import cache_folder, new_file
from ..common.progress import Progress, silent
from ..converters.encode import encode, encode_array, encode_string, profile_keys
from ..errors import UnsupportedError
from ..gguf.header import BOOL, F32, I32, MAGIC, STRING, U32, Header, read_header
from ..profile import Profile, split_heads
from .shapes import Shape, Tensor, find_shape, metadata_of, tensors_of

VERSION = 2  # of the files in the cache; files of other versions are ignored
KEY_RANDOM = "razor_local.random_weights"
N_ROWS = 64  # random rows of each matrix, repeated
PIECE_BYTES = 4 << 20  # bytes of a matrix per write
QUANTS = {"q4_0": (2, 32, 18), "q8_0": (8, 32, 34), "f16": (1, 1, 2)}  # ggml type, block, bytes


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
    label = (
        f"{name}-{quant}-{n_of_share(sum(shape.heads_in_full_layers), retrieval)}heads-seed{seed}"
    )
    path = cache_folder() / f"shapes-{VERSION}" / f"{label}.gguf"
    if path.exists() and is_random(read_header(path)):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_shape_model(
        path, name, quant=quant, retrieval=retrieval, seed=seed, progress=progress
    )


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
        UnsupportedError: the shape or the type is unknown.
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
    n_head_kv = shape.heads_in_full_layers
    heads = scattered_heads(sum(n_head_kv), retrieval, rng)
    if profile is None:
        profile = Profile(retrieval=split_heads(heads, n_head_kv))
    keys = _head(name if isinstance(name, str) else shape.arch, shape, quant, profile)
    tensors = list(tensors_of(shape))
    table = _table(tensors, quant)
    total = sum(_padded(_nbytes(tensor, quant)) for tensor in tensors)
    report, label = progress or silent, f"writing {path.name}"
    with new_file(path, total + (1 << 20)) as file:
        file.write(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(keys)))
        file.write(b"".join(keys) + table)
        file.write(bytes(_padded(file.tell()) - file.tell()))
        done = 0
        for tensor in tensors:
            for rows in _data(tensor, quant, rng):
                file.write(rows)
                done += len(rows)
                report(done, total, label)
            file.write(bytes(_padded(file.tell()) - file.tell()))
    return path


def scattered_heads(n: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """Mark a share of n heads at random: uint8 [n]."""
    heads = np.zeros(n, np.uint8)
    heads[rng.choice(n, n_of_share(n, share), replace=False)] = 1
    return heads


def n_of_share(n: int, share: float) -> int:
    """Return the share of n heads, at least one unless it is 0."""
    return max(round(share * n), 1) if share > 0 else 0


def is_random(header: Header) -> bool:
    """Return True if the file is marked as having random weights."""
    return KEY_RANDOM in header.entries


# -- the file

ALIGNMENT = 32


def _padded(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _nbytes(tensor: Tensor, quant: str) -> int:
    """Return the bytes of a tensor. Tensors of one value are F32."""
    n = math.prod(tensor.dims)
    if tensor.value is not None:
        return n * 4
    _, block, block_bytes = QUANTS[quant]
    return n // block * block_bytes


def _head(name: str, shape: Shape, quant: str, profile: Profile) -> list[bytes]:
    """Encode the metadata, one item per key."""
    texts = {
        "general.architecture": shape.arch,
        "general.name": f"{name} shape, random weights",
        "general.description": f"Random weights in the shape of {name}, {quant}: only to time it",
        "tokenizer.ggml.model": "none",
    }
    keys = [encode(key, STRING, value) for key, value in texts.items()]
    keys.append(encode(KEY_RANDOM, BOOL, True))
    for key, value in metadata_of(shape).items():
        key = f"{shape.arch}.{key}"
        if isinstance(value, list):
            kind = BOOL if isinstance(value[0], bool) else I32
            keys.append(encode_array(key, kind, np.array(value)))
        else:
            keys.append(encode(key, F32 if isinstance(value, float) else U32, value))
    return [*keys, *profile_keys(profile)]


def _table(tensors: list[Tensor], quant: str) -> bytes:
    """Encode the tensor table: name, dimensions (innermost first), type, offset in the data."""
    table, offset = b"", 0
    for tensor in tensors:
        kind = QUANTS[quant][0] if tensor.value is None else 0  # F32
        table += encode_string(tensor.name)
        table += struct.pack(f"<I{len(tensor.dims)}Q", len(tensor.dims), *tensor.dims)
        table += struct.pack("<IQ", kind, offset)
        offset += _padded(_nbytes(tensor, quant))
    return table


def _data(tensor: Tensor, quant: str, rng: np.random.Generator) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a tensor: one value everywhere, or N_ROWS random rows repeated."""
    if tensor.value is not None:
        yield np.full(math.prod(tensor.dims), tensor.value, "<f4").tobytes()
        return
    n_in, n_out = tensor.dims[0], math.prod(tensor.dims[1:])
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
