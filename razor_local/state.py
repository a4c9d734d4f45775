"""Saved states: what load_state() checks before the library reads one.

The library's state is followed by a seal: 8 bytes magic, 16 bytes fingerprint of the model and the
options that decide what the cache holds, u32 tokens, 16 bytes digest of all this and the tokens.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from .errors import StateError
from .gguf.header import Header, read_header
from .gguf.split import read_parts

_MAGIC = b"rzrstat1"
_SEAL = struct.Struct("<8s16sI16s")
_N_SAMPLES, _SAMPLE_BYTES = 128, 4096  # of the weights of each file
# what changes nothing in the cache, or is compared by the library itself
_IGNORED_KEYS = ("general.", "tokenizer.", "razor.", "split.")


def seal(data: bytes, input_ids: np.ndarray, fingerprint: bytes) -> bytes:
    """Return the library's state with a seal behind it.

    Args:
        input_ids: i32 [n_tokens], the tokens in the cache.
        fingerprint: see fingerprint().
    """
    n_tokens = len(input_ids)
    return data + _SEAL.pack(_MAGIC, fingerprint, n_tokens, _digest(data, input_ids, fingerprint))


def unseal(sealed: bytes, n_tokens: int, input_ids: np.ndarray, fingerprint: bytes) -> bytes:
    """Return the library's state.

    Raises:
        StateError: the state is damaged, or belongs to another model.
    """
    if len(sealed) < _SEAL.size or not sealed[-_SEAL.size :].startswith(_MAGIC):
        raise StateError(
            "the state cannot be loaded: it has no seal of razor_local at its end; it is cut off,"
            " or save_state() of another program made it"
        )
    _, theirs, n_sealed, digest = _SEAL.unpack(sealed[-_SEAL.size :])
    data = sealed[: -_SEAL.size]
    if n_sealed != n_tokens or len(input_ids) < n_tokens:
        raise StateError(
            f"the state cannot be loaded: it says {n_tokens} tokens, {n_sealed} were saved"
        )
    if _digest(data, input_ids[:n_tokens], theirs) != digest:
        raise StateError(
            "the state cannot be loaded: its bytes are not those that were saved; it is damaged"
        )
    if theirs != fingerprint:
        raise StateError(
            "the state cannot be loaded: it was saved with other weights, another adapter or"
            " another RoPE; load it with the model and options that it was saved with"
        )
    return data


def belongs_to(sealed: bytes, fingerprint: bytes) -> bool:
    """Return whether a sealed state is of a model and its options, see fingerprint()."""
    return len(sealed) >= _SEAL.size and _SEAL.unpack(sealed[-_SEAL.size :])[1] == fingerprint


def fingerprint(model_path: str | os.PathLike[str], options: tuple[Any, ...]) -> bytes:
    """Return 16 bytes that differ where weights, hyper-parameters or options do.

    Of the weights of each file, 128 samples of 4 KiB count, so that a large model is not read
    again. A profile and the texts in the metadata do not count.

    Raises:
        GGUFError, OSError: the file cannot be read any more.
    """
    digest = hashlib.blake2b(repr(options).encode(), digest_size=16)
    first = read_header(model_path)
    for header in read_parts(first):
        _add_file(digest, header)
    return digest.digest()


def _add_file(digest: Any, header: Header) -> None:
    for key, entry in sorted(header.entries.items()):
        if not key.startswith(_IGNORED_KEYS):
            digest.update(f"{key}={entry.value}/{entry.count};".encode("utf-8", "surrogateescape"))
    for tensor in header.tensors:
        digest.update(f"{tensor.name}:{tensor.dims}:{tensor.kind};".encode())
    size = header.data_end - header.data_start
    with open(Path(header.path), "rb") as file:
        for i in range(_N_SAMPLES):
            file.seek(header.data_start + max(size - _SAMPLE_BYTES, 0) * i // (_N_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))


def _digest(data: bytes, input_ids: np.ndarray, fingerprint: bytes) -> bytes:
    digest = hashlib.blake2b(data, digest_size=16)
    digest.update(fingerprint)
    digest.update(np.asarray(input_ids, "<i4").tobytes())
    return digest.digest()
