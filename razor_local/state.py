"""Saved states with a seal, which is checked before the library reads one.

The library's state is followed by a seal: 8 bytes magic, 16 bytes fingerprint of the model and of
the options that determine the content of the cache, u32 tokens, 16 bytes digest of all this and the
tokens.
"""

from __future__ import annotations

import hashlib
import struct
from ctypes import c_uint8
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import StateError, option
from .evaluation import clear_cache, n_cached
from .gguf.header import Header
from .native.loaded import C, library, llama_cpp

if TYPE_CHECKING:
    from .llama import Llama

_MAGIC = b"rzrstat1"
_SEAL = struct.Struct("<8s16sI16s")
_N_SAMPLES, _SAMPLE_BYTES = 128, 4096  # of the weights of each file
# what changes nothing in the cache, or is compared by the library itself
_IGNORED_KEYS = ("general.", "tokenizer.", "razor.", "split.")


def save_state(llama: Llama) -> llama_cpp.LlamaState:
    """See Llama.save_state()."""
    state = llama_cpp.Llama.save_state(llama)
    input_ids = llama._input_ids
    state.llama_state = seal(state.llama_state, input_ids, _fingerprint_of(llama))
    state.llama_state_size = len(state.llama_state)
    return state


def load_state(llama: Llama, state: llama_cpp.LlamaState) -> None:
    """See Llama.load_state()."""
    n = state.n_tokens
    if n > llama._n_ctx:
        raise StateError(
            f"the state holds {n} tokens, the context only {llama._n_ctx}; use a larger"
            f" {option('n_ctx')}"
        )
    sealed = state.llama_state
    if len(sealed) != state.llama_state_size:
        raise StateError(
            f"the state cannot be loaded: it has {len(sealed)} of its"
            f" {state.llama_state_size} bytes"
        )
    content = unseal(sealed, n, state.input_ids, _fingerprint_of(llama))
    library.clear_errors()
    data = (c_uint8 * len(content)).from_buffer_copy(content)
    before = llama.n_tokens
    llama._requires_eval = True
    llama.n_tokens = 0  # until it is known what the cache holds
    if C.llama_state_set_data(llama._ctx.ctx, data, len(content)) != len(content):
        reason = library.reason()
        if n_cached(llama) == before:
            llama.n_tokens = before
        else:
            clear_cache(llama)
            reason += "; the context is empty now"
        raise StateError(f"the state cannot be loaded: {reason}")
    llama.input_ids[:n] = state.input_ids[:n]
    rows = min(len(llama.scores), len(state.scores))
    llama.scores[:rows] = state.scores[:rows]
    llama._seed = state.seed
    llama.n_tokens = n


def _fingerprint_of(llama: Llama) -> bytes:
    """Return the fingerprint of a Llama, which is computed once."""
    if llama._state_fingerprint is None:
        params = llama.context_params
        options = (
            params.rope_scaling_type, params.rope_freq_base, params.rope_freq_scale,
            params.yarn_ext_factor, params.yarn_attn_factor, params.yarn_beta_fast,
            params.yarn_beta_slow, params.yarn_orig_ctx, llama.lora_scale, llama.kv_overrides,
            llama.lora_path and hashlib.blake2b(Path(llama.lora_path).read_bytes()).digest(),
        )  # fmt: skip
        llama._state_fingerprint = fingerprint(llama._file.parts, options)
    return llama._state_fingerprint


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
            "the state cannot be loaded: it is truncated, or was not saved by razor_local"
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


def belongs_to(sealed: bytes, llama: Llama) -> bool:
    """Return whether a sealed state was saved with the model and the options of a Llama."""
    if len(sealed) < _SEAL.size:
        return False
    return bool(_SEAL.unpack(sealed[-_SEAL.size :])[1] == _fingerprint_of(llama))


def fingerprint(parts: tuple[Header, ...], options: tuple[Any, ...]) -> bytes:
    """Return 16 bytes that differ where weights, hyper-parameters or options do.

    Of the weights of each file, 128 samples of 4 KiB count, so that a large model is not read
    again. A profile and the texts in the metadata do not count.

    Args:
        parts: the headers of the model's files.

    Raises:
        OSError: a file cannot be read any more.
    """
    digest = hashlib.blake2b(repr(options).encode(), digest_size=16)
    for header in parts:
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
