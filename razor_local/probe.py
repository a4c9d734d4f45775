"""Looking into a running model: models loaded for it, and tensors read in the eval callback.

llama.cpp calls the eval callback twice for the nodes of a graph: it asks whether the data of a node
are wanted, and hands the computed node over if they are. Nothing may be raised in there.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_bool, c_char, c_char_p, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from . import native
from .errors import LibraryError, RazorError

F32, I32, I64 = 0, 26, 27  # enum ggml_type
_DTYPES = {F32: np.dtype(np.float32), I32: np.dtype(np.int32), I64: np.dtype(np.int64)}


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


@contextmanager
def load_model(
    lib: native.Native,
    C: Any,
    path: Path,
    n_gpu_layers: int,
    load_callback: Any,
    check: Callable[[], None],
) -> Iterator[int]:
    """The loaded model (a pointer). Raises RazorError, and what check() raises."""
    params = C.llama_model_default_params()
    params.n_gpu_layers = 0x7FFFFFFF if n_gpu_layers < 0 else n_gpu_layers
    params.progress_callback = load_callback
    native.clear_errors()
    model = C.llama_model_load_from_file(os.fsencode(path), params)
    try:
        check()
        if not model:
            raise RazorError(f"{path} could not be loaded ({reason(lib)})")
        yield model
    finally:
        if model:
            C.llama_model_free(model)


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
