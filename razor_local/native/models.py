"""Open models and contexts with the low-level bindings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RazorError
from .callbacks import Control
from .library import Native
from .structs import Params


@contextmanager
def load_model(
    lib: Native, C: Any, path: Path, n_gpu_layers: int, control: Control
) -> Iterator[int]:
    """Load a model and yield its pointer. Raises RazorError, and what control.check() raises."""
    params = C.llama_model_default_params()
    params.n_gpu_layers = 0x7FFFFFFF if n_gpu_layers < 0 else n_gpu_layers
    params.progress_callback = control.load_callback
    lib.clear_errors()
    model = C.llama_model_load_from_file(os.fsencode(path), params)
    try:
        control.check()
        if not model:
            raise RazorError(f"{path} could not be loaded ({lib.reason()})")
        yield model
    finally:
        if model:
            C.llama_model_free(model)


@contextmanager
def new_context(
    lib: Native,
    C: Any,
    model: int,
    params: Any,
    override: Params | None,
    failed: Callable[[str], RazorError],
) -> Iterator[int]:
    """Create a context of a model and yield its pointer.

    Args:
        params: a llama_context_params.
        override: the razor parameters. None uses the profile in the model file.
        failed: makes the exception for a context that could not be created, from the reason.
    """
    lib.clear_errors()
    with ExitStack() as stack:
        if override is not None:
            stack.enter_context(lib.override(override))
        ctx = C.llama_init_from_model(model, params)
        if not ctx:
            raise failed(lib.reason())
    try:
        yield ctx
    finally:
        C.llama_free(ctx)


def vocabulary(C: Any, model: int) -> tuple[np.ndarray, np.ndarray]:
    """Return [BOS] or [], and the ordinary tokens, both as int32."""
    vocab = C.llama_model_get_vocab(model)
    ids = np.arange(C.llama_vocab_n_tokens(vocab), dtype=np.int32)
    if C.llama_vocab_type(vocab) == C.LLAMA_VOCAB_TYPE_NONE:
        return ids[:0], ids
    bos = C.llama_vocab_bos(vocab) if C.llama_vocab_get_add_bos(vocab) else -1
    not_ordinary = (
        C.LLAMA_TOKEN_ATTR_UNKNOWN
        | C.LLAMA_TOKEN_ATTR_UNUSED
        | C.LLAMA_TOKEN_ATTR_CONTROL
        | C.LLAMA_TOKEN_ATTR_USER_DEFINED
        | C.LLAMA_TOKEN_ATTR_BYTE
    )
    ordinary = [
        not C.llama_vocab_get_attr(vocab, i) & not_ordinary and not C.llama_vocab_is_eog(vocab, i)
        for i in ids.tolist()
    ]
    return np.array([bos] if bos >= 0 else [], np.int32), ids[ordinary]
