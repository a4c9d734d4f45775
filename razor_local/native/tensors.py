"""Read tensors of the library by their addresses."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_char_p, c_size_t, c_void_p
from typing import Any

import numpy as np

from ..errors import LibraryError, RazorError
from .library import REINSTALL
from .structs import Tensor

F32, I32, I64 = 0, 26, 27  # enum ggml_type
_DTYPES: dict[int, np.dtype[Any]] = {
    F32: np.dtype(np.float32),
    I32: np.dtype(np.int32),
    I64: np.dtype(np.int64),
}


def bind(lib: ctypes.CDLL) -> None:
    """Declare the functions of ggml that read tensors."""
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
    """Raise LibraryError if the struct Tensor does not match the library's tensors."""
    tensor = Tensor.from_address(pointer)
    if tensor.name != lib.ggml_get_name(pointer) or tensor.data != lib.ggml_get_data(pointer):
        raise LibraryError(
            f"struct ggml_tensor of the library differs from this Python code's; {REINSTALL}"
        )


def read(lib: ctypes.CDLL, pointer: int) -> np.ndarray:
    """Copy a computed F32, I32 or I64 tensor of any strides, with the innermost dimension last."""
    tensor = Tensor.from_address(pointer)
    dtype = _DTYPES.get(tensor.type)
    if dtype is None:
        raise RazorError(
            f"{tensor.name.decode()} has ggml type {tensor.type}, expected f32, i32 or i64"
        )
    size = lib.ggml_nbytes(pointer)
    data = np.empty(size, np.uint8)
    lib.ggml_backend_tensor_get(pointer, data.ctypes.data, 0, size)
    values: np.ndarray = np.lib.stride_tricks.as_strided(
        data.view(dtype), tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    ).copy()
    return values
