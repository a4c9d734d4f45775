"""Read the attention of a running model in the eval callback.

llama.cpp calls the eval callback twice for a node of a graph. The first call asks whether the data
of the node are wanted, and if so the second one passes the computed node. The callback must not
raise exceptions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import AbstractContextManager
from ctypes import c_int8, c_int32
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.machine import n_cores
from ..common.progress import Progress, Stop
from ..errors import RazorError, UnsupportedError
from . import errors
from .callbacks import Control
from .library import Native, make_params
from .models import new_context
from .structs import Tensor
from .tensors import F32, bind

if TYPE_CHECKING:
    from ..model_shape import ModelShape

ATTENTION = b"kq_soft_max-"  # tensor name before the layer index; only without flash attention


class AttentionProbe(Control):
    """Read the attention of a running model head by head.

    A subclass overrides on_head() and optionally on_layer().

    Attributes:
        wanted: whether the attention of the next decode() is read.
        position, n_part: first position and number of tokens of the current decode().
    """

    def __init__(
        self,
        lib: ctypes.CDLL,
        C: Any,
        shape: ModelShape,
        progress: Progress | None = None,
        stop: Stop | None = None,
    ) -> None:
        super().__init__(C, progress, stop)
        self.lib, self.shape = lib, shape
        self.n_head = list(shape.n_head)  # of the layers whose attention is read
        for il, source in shape.shared:
            self.n_head[il] = shape.n_head[source]
        self.wanted = False
        self.position = self.n_part = 0
        self.eval_callback = self.watch(self._is_wanted, self._take)
        bind(lib)

    def on_head(self, il: int, ih: int, attention: np.ndarray) -> None:
        """Take the attention of one query head: f32 [n_part, n_kv], valid during the call."""

    def on_layer(self, il: int) -> None:
        """Override to act after the last head of a layer."""

    def flat(self, layers: Sequence[np.ndarray]) -> np.ndarray:
        """Values of query heads [n_head[il]] per layer as one array [sum of shape.n_head].

        Where layers share a cache, each head gets the largest value of these layers.
        """
        largest = list(layers)
        for il, source in self.shape.shared:
            largest[source] = np.maximum(largest[source], layers[il])
        return np.concatenate([x[:n] for x, n in zip(largest, self.shape.n_head, strict=True)])

    def decode(
        self, ctx: int, start: int, part: np.ndarray, outputs: np.ndarray | None = None
    ) -> int:
        """Decode the next tokens and return the result of llama_decode.

        Args:
            ctx: pointer of the context.
            start: position of the first token, which is the number of tokens in the context.
            part: the tokens.
            outputs: i8 [len(part)], 1 where the logits of a token are wanted. None wants those of
                the last one.
        """
        self.position, self.n_part = start, len(part)
        errors.clear(self.lib)
        ids = (c_int32 * len(part))(*part.tolist())  # the batch only points to it
        batch = self.C.llama_batch_get_one(ids, len(part))
        if outputs is not None:
            flags = (c_int8 * len(part))(*outputs.tolist())
            batch.logits = flags
        code: int = self.C.llama_decode(ctx, batch)
        self.C.llama_synchronize(ctx)
        return code

    def _is_wanted(self, tensor: int) -> bool:
        if not self.wanted:
            return False
        name = self.lib.ggml_get_name(tensor)
        layer = name[len(ATTENTION) :]
        if not name.startswith(ATTENTION) or not layer.isdigit():
            return False
        return int(layer) < self.shape.n_layer and self.n_head[int(layer)] > 0

    def _take(self, tensor: int) -> None:
        il = int(self.lib.ggml_get_name(tensor)[len(ATTENTION) :])
        self._read_layer(tensor, il)
        self.on_layer(il)

    def _read_layer(self, pointer: int, il: int) -> None:
        """Read the attention of one layer in this ubatch: f32 [n_head, n_tokens, n_kv]."""
        tensor = Tensor.from_address(pointer)
        n_kv, n_rows, n_head, n_stream = tensor.ne
        size = n_kv * n_rows * 4
        fits = (
            (tensor.type, n_rows, n_head) == (F32, self.n_part, self.n_head[il])
            and n_stream == 1
            and n_kv >= self.position + self.n_part
            and tuple(tensor.nb) == (4, n_kv * 4, size, size * n_head)
        )
        if not fits:
            raise UnsupportedError(
                f"the attention of layer {il} of this model ({self.shape.arch}) has the shape"
                f" {list(tensor.ne)}, expected one row for each of {self.n_part} tokens in"
                f" {self.n_head[il]} heads over all earlier tokens"
            )
        on_host = tensor.buffer and self.lib.ggml_backend_buffer_is_host(tensor.buffer)
        data = self.lib.ggml_get_data(pointer)
        buffer = None if on_host else np.empty((n_rows, n_kv), np.float32)
        for ih in range(n_head):
            if buffer is None:
                raw = (ctypes.c_float * (n_kv * n_rows)).from_address(data + ih * size)
                head: np.ndarray = np.ctypeslib.as_array(raw).reshape(n_rows, n_kv)
            else:
                head = buffer
                self.lib.ggml_backend_tensor_get(pointer, head.ctypes.data, ih * size, size)
            self.on_head(il, ih, head)


def attention_context(
    lib: Native,
    C: Any,
    model: int,
    path: Path,
    n_tokens: int,
    n_ubatch: int,
    n_threads: int | None,
    probe: AttentionProbe,
    n_outputs: int = 1,
) -> AbstractContextManager[int]:
    """Create a context (a pointer) that shows its attention: razor and flash attention are off."""
    params = C.llama_context_default_params()
    params.n_ctx = n_tokens
    params.n_batch = params.n_ubatch = n_ubatch
    params.n_threads = params.n_threads_batch = n_threads or n_cores()
    params.n_outputs_max = n_outputs
    params.flash_attn_type = C.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cb_eval = probe.eval_callback
    params.abort_callback = probe.abort_callback
    params.no_perf = True

    def failed(why: str) -> RazorError:
        return RazorError(f"no context of {n_tokens} tokens could be created for {path} ({why})")

    return new_context(lib, C, model, params, make_params(None), failed)
