"""Looking into a running model: models loaded for it, and tensors read in the eval callback.

llama.cpp calls the eval callback twice for the nodes of a graph: it asks whether the data of a node
are wanted, and hands the computed node over if they are. Nothing may be raised in there.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_bool, c_char, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import native
from ..common.progress import Progress, Stop, silent
from ..errors import LibraryError, RazorError, Stopped, UnsupportedError
from .callbacks import Callback

if TYPE_CHECKING:
    from ..profile import ModelShape

ATTENTION = b"kq_soft_max-"  # tensor name before the layer index; only without flash attention
F32, I32, I64 = 0, 26, 27  # enum ggml_type
_DTYPES: dict[int, np.dtype[Any]] = {
    F32: np.dtype(np.float32),
    I32: np.dtype(np.int32),
    I64: np.dtype(np.int64),
}


class Tensor(ctypes.Structure):
    """struct ggml_tensor"""

    _fields_ = [
        ("type", c_int32),
        ("buffer", c_void_p),
        ("ne", c_int64 * 4),  # elements, the innermost dimension first
        ("nb", c_size_t * 4),  # bytes from one to the next
        ("op", c_int32),
        ("op_params", c_int32 * 16),
        ("flags", c_int32),
        ("src", c_void_p * 10),
        ("view_src", c_void_p),
        ("view_offs", c_size_t),
        ("data", c_void_p),
        ("name", c_char * 64),
    ]


class CustomParams(ctypes.Structure):
    """struct ggml_custom_op_params, in op_params of an operation that ggml does not know."""

    _fields_ = [("function", c_void_p), ("n_tasks", c_int32), ("data", c_void_p)]


def bind(lib: ctypes.CDLL) -> None:
    """Declares the functions of ggml that read tensors."""
    for name, args, result in (
        ("ggml_get_name", [c_void_p], c_char_p),
        ("ggml_get_data", [c_void_p], c_void_p),
        ("ggml_op_desc", [c_void_p], c_char_p),
        ("ggml_nbytes", [c_void_p], c_size_t),
        ("ggml_backend_buffer_is_host", [c_void_p], c_bool),
        ("ggml_backend_tensor_get", [c_void_p, c_void_p, c_size_t, c_size_t], None),
    ):
        function = getattr(lib, name)
        function.argtypes, function.restype = args, result


def check_layout(lib: ctypes.CDLL, pointer: int) -> None:
    """Raises LibraryError where Tensor does not describe the library's tensors."""
    tensor = Tensor.from_address(pointer)
    if tensor.name != lib.ggml_get_name(pointer) or tensor.data != lib.ggml_get_data(pointer):
        raise LibraryError(
            "struct ggml_tensor of the library is not the one this Python code knows;"
            f" {native.REINSTALL}"
        )


def read(lib: ctypes.CDLL, pointer: int) -> np.ndarray:
    """A copy of a computed F32, I32 or I64 tensor of any strides, the innermost dimension last."""
    tensor = Tensor.from_address(pointer)
    dtype = _DTYPES.get(tensor.type)
    if dtype is None:
        raise RazorError(
            f"{tensor.name.decode()} has ggml type {tensor.type}, expected f32, i32 or i64"
        )
    size = lib.ggml_nbytes(pointer)
    data = np.empty(size, np.uint8)
    lib.ggml_backend_tensor_get(pointer, data.ctypes.data, 0, size)
    return np.lib.stride_tricks.as_strided(
        data.view(dtype), tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    ).copy()


class Control:
    """The callbacks of a model and its contexts, which end what it does if stop() is true.

    Nothing may be raised into native code: what a callback raises ends it too, and is kept.

    Attributes:
        progress: reports the loading of the model, too.
        load_callback, abort_callback: for the parameters of the model and of its contexts.
    """

    def __init__(self, C: Any, progress: Progress | None, stop: Stop | None) -> None:
        self.C, self.progress, self._stop = C, progress or silent, stop
        self._stopped = False
        self._callbacks: list[tuple[Callback, Any]] = []  # and what native code calls
        self.load_callback = self._make(
            C.llama_progress_callback, c_float, self._on_load, on_error=False
        )
        self.abort_callback = self._make(
            C.ggml_abort_callback, c_void_p, lambda _data: self.stopped, on_error=True
        )

    @property
    def stopped(self) -> bool:
        """True once stop() was true or a callback has raised."""
        if not self._stopped:
            asked = self._stop is not None and self._stop()
            self._stopped = asked or any(callback.error for callback, _ in self._callbacks)
        return self._stopped

    def check(self) -> None:
        """Raise what a callback has raised, Stopped if stop() is or was true."""
        for callback, _ in self._callbacks:
            callback.check()
        if self.stopped:
            raise Stopped

    def watch(self, wanted: Callable[[int], bool], computed: Callable[[int], None]) -> Any:
        """Return the eval callback of a context.

        Args:
            wanted: whether the data of a tensor (a pointer) are.
            computed: takes a tensor that was wanted.
        """
        asked: int | None = None

        def on_eval(pointer: int) -> bool:
            # llama.cpp asks for one tensor after the other until one is wanted. It computes them,
            # and the next call is that tensor's: the second argument would say so, but see Callback
            nonlocal asked
            if self.stopped:
                return False
            if pointer == asked:
                asked = None
                computed(pointer)
                return True
            is_wanted = wanted(pointer)
            asked = pointer if is_wanted else None
            return is_wanted

        return self._make(
            self.C.ggml_backend_sched_eval_callback, c_void_p, on_eval, on_error=False
        )

    def _make(
        self, kind: Any, argument: Any, function: Callable[[Any], bool], on_error: bool
    ) -> Any:
        """A native callback of a kind, which calls function with its first argument."""
        callback = Callback(function, on_error)
        first = ctypes.CFUNCTYPE(c_bool, argument)(callback.call)
        self._callbacks.append((callback, first))
        return ctypes.cast(first, kind)

    def _on_load(self, part: float) -> bool:
        self.progress(part, 1.0, "loading the model")
        return not self.stopped


class AttentionProbe(Control):
    """Reads the attention of a running model head by head.

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
        self.wanted = False
        self.position = self.n_part = 0
        self.eval_callback = self.watch(self._is_wanted, self._take)
        bind(lib)

    def on_head(self, il: int, ih: int, attention: np.ndarray) -> None:
        """Take the attention of one query head: f32 [n_part, n_kv], valid during the call."""

    def on_layer(self, il: int) -> None:
        """Override to act after the last head of a layer."""

    def decode(
        self, ctx: int, start: int, part: np.ndarray, outputs: np.ndarray | None = None
    ) -> int:
        """Decode the next tokens and return the result of llama_decode.

        start: their first position, the number of tokens that the context holds already.
        outputs: i8 [len(part)], 1 where the logits of a token are wanted; None: the last one.
        """
        self.position, self.n_part = start, len(part)
        native.clear_errors()
        ids = (c_int32 * len(part))(*part.tolist())  # the batch only points to it
        batch = self.C.llama_batch_get_one(ids, len(part))
        if outputs is not None:
            flags = (c_int8 * len(part))(*outputs.tolist())
            batch.logits = flags
        code = self.C.llama_decode(ctx, batch)
        self.C.llama_synchronize(ctx)
        return code

    def _is_wanted(self, tensor: int) -> bool:
        if not self.wanted:
            return False
        name = self.lib.ggml_get_name(tensor)
        layer = name[len(ATTENTION) :]
        return name.startswith(ATTENTION) and layer.isdigit() and int(layer) < self.shape.n_layer

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
            (tensor.type, n_rows, n_head) == (F32, self.n_part, self.shape.n_head[il])
            and n_stream == 1
            and n_kv >= self.position + self.n_part
            and tuple(tensor.nb) == (4, n_kv * 4, size, size * n_head)
        )
        if not fits:
            raise UnsupportedError(
                f"the attention of layer {il} of this model ({self.shape.arch}) has the shape"
                f" {list(tensor.ne)}, expected one row for each of {self.n_part} tokens in"
                f" {self.shape.n_head[il]} heads over all earlier tokens"
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


@contextmanager
def load_model(
    lib: native.Native, C: Any, path: Path, n_gpu_layers: int, control: Control
) -> Iterator[int]:
    """The loaded model (a pointer). Raises RazorError, and what control.check() raises."""
    params = C.llama_model_default_params()
    params.n_gpu_layers = 0x7FFFFFFF if n_gpu_layers < 0 else n_gpu_layers
    params.progress_callback = control.load_callback
    native.clear_errors()
    model = C.llama_model_load_from_file(os.fsencode(path), params)
    try:
        control.check()
        if not model:
            raise RazorError(f"{path} could not be loaded ({reason(lib)})")
        yield model
    finally:
        if model:
            C.llama_model_free(model)


@contextmanager
def attention_context(
    lib: native.Native,
    C: Any,
    model: int,
    path: Path,
    n_tokens: int,
    n_ubatch: int,
    n_threads: int | None,
    probe: AttentionProbe,
    n_outputs: int = 1,
) -> Iterator[int]:
    """A context (a pointer) that shows its attention: razor and flash attention off."""
    params = C.llama_context_default_params()
    params.n_ctx = n_tokens
    params.n_batch = params.n_ubatch = n_ubatch
    params.n_threads = params.n_threads_batch = n_threads or n_cpus()
    params.n_outputs_max = n_outputs
    params.flash_attn_type = C.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cb_eval = probe.eval_callback
    params.abort_callback = probe.abort_callback
    params.no_perf = True
    native.clear_errors()
    with lib.override(native.make_params(None)):
        ctx = C.llama_init_from_model(model, params)
    if not ctx:
        raise RazorError(
            f"no context of {n_tokens} tokens could be created for {path} ({reason(lib)})"
        )
    try:
        yield ctx
    finally:
        C.llama_free(ctx)


def vocabulary(C: Any, model: int) -> tuple[np.ndarray, np.ndarray]:
    """[BOS] or [], and the ordinary tokens: int32."""
    vocab = C.llama_model_get_vocab(model)
    ids = np.arange(C.llama_vocab_n_tokens(vocab), dtype=np.int32)
    if C.llama_vocab_type(vocab) == C.LLAMA_VOCAB_TYPE_NONE:
        return ids[:0], ids
    bos = C.llama_vocab_bos(vocab) if C.llama_vocab_get_add_bos(vocab) else -1
    not_ordinary = (
        C.LLAMA_TOKEN_ATTR_UNKNOWN | C.LLAMA_TOKEN_ATTR_UNUSED | C.LLAMA_TOKEN_ATTR_CONTROL
        | C.LLAMA_TOKEN_ATTR_USER_DEFINED | C.LLAMA_TOKEN_ATTR_BYTE
    )  # fmt: skip
    ordinary = [
        not C.llama_vocab_get_attr(vocab, i) & not_ordinary and not C.llama_vocab_is_eog(vocab, i)
        for i in ids.tolist()
    ]
    return np.array([bos] if bos >= 0 else [], np.int32), ids[ordinary]


def n_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def reason(lib: native.Native) -> str:
    """Why the last native call failed."""
    return lib.last_error() or "; ".join(native.error_lines()[-2:]) or "llama.cpp gives no reason"
