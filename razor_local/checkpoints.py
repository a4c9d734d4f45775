"""Keep earlier states of layers that cannot drop tokens: sliding windows and recurrent states.

llama.cpp and the rewind log can only take back layers with full attention. For the other layers,
a checkpoint restores an earlier state, and the tokens after it are evaluated again.
"""

from __future__ import annotations

import hashlib
from collections import deque
from ctypes import c_uint8
from dataclasses import dataclass
from typing import Any

import numpy as np

from .native.loaded import C

MAX_COUNT = 16
MARGIN = 4  # distance of the last checkpoint from the end of a prompt, whose last tokens may change
MIN_NEW_TOKENS = 16  # fewer new tokens are not worth a checkpoint before them


@dataclass(frozen=True)
class _Checkpoint:
    n_tokens: int
    digest: bytes  # of the tokens
    state: Any  # u8 [n_bytes]


class Checkpoints:
    """The checkpoints of a context with one sequence, the oldest first.

    Args:
        ctx: llama_context pointer.
        limit: maximum size of all of them in bytes; the oldest are dropped.
    """

    def __init__(self, ctx: Any, limit: int) -> None:
        self._ctx, self._limit = ctx, limit
        self._held: deque[_Checkpoint] = deque()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def n_bytes(self) -> int:
        """Return the size of all checkpoints."""
        return sum(len(one.state) for one in self._held)

    def save(self, tokens: np.ndarray) -> None:
        """Keep the state of the cache, which holds exactly these tokens: i32 [n_tokens]."""
        digest = _digest(tokens)
        if any(one.digest == digest for one in self._held):
            return
        flags = C.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        size = C.llama_state_seq_get_size_ext(self._ctx, 0, flags)
        if size > self._limit:
            return
        state = (c_uint8 * size)()
        if C.llama_state_seq_get_data_ext(self._ctx, state, size, 0, flags) == size:
            self._held.append(_Checkpoint(len(tokens), digest, state))
        while len(self._held) > MAX_COUNT or self.n_bytes > self._limit:
            self._held.popleft()

    def restore(self, tokens: np.ndarray) -> int:
        """Restore the checkpoint of the longest prefix of tokens, with which the cache begins.

        Layers with full attention are not changed: the caller must remove their later tokens.

        Returns:
            The number of tokens of the state, 0 if there is none.
        """
        fitting = [one for one in self._held if one.n_tokens <= len(tokens)]
        for one in sorted(fitting, key=lambda one: -one.n_tokens):
            if one.digest == _digest(tokens[: one.n_tokens]):
                size, flags = len(one.state), C.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
                read = C.llama_state_seq_set_data_ext(self._ctx, one.state, size, 0, flags)
                return one.n_tokens if read == size else 0
        return 0


def _digest(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.astype(np.int32).tobytes(), digest_size=16).digest()
