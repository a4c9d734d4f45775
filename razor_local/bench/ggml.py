"""Bind the functions of ggml that a benchmark calls in addition to llama.cpp's."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Sequence
from ctypes import c_char_p, c_int, c_int64, c_size_t, c_void_p
from typing import Any

from ..errors import RazorError
from ..native.structs import InitParams

_DEVICE_TYPES = ("CPU", "GPU", "integrated GPU", "accelerator", "meta device")
_CPU, _GPU = 0, 1
READ_CAP = 1 << 30  # bytes that read_seconds() reads at most; larger times are extrapolated


class Ggml:
    """The ggml of a loaded library. remote: devices of RPC servers."""

    def __init__(self, lib: ctypes.CDLL, remote: Sequence[int] = ()) -> None:
        self.lib, self._remote = lib, list(remote)
        for name, args, result in (
            ("ggml_backend_reg_count", [], c_size_t),
            ("ggml_backend_reg_get", [c_size_t], c_void_p),
            ("ggml_backend_reg_name", [c_void_p], c_char_p),
            ("ggml_backend_reg_get_proc_address", [c_void_p, c_char_p], c_void_p),
            ("ggml_backend_dev_count", [], c_size_t),
            ("ggml_backend_dev_get", [c_size_t], c_void_p),
            ("ggml_backend_dev_name", [c_void_p], c_char_p),
            ("ggml_backend_dev_description", [c_void_p], c_char_p),
            ("ggml_backend_dev_type", [c_void_p], c_int),
            ("ggml_backend_dev_memory", [c_void_p, c_void_p, c_void_p], None),
            ("ggml_backend_dev_backend_reg", [c_void_p], c_void_p),
            ("ggml_backend_dev_init", [c_void_p, c_char_p], c_void_p),
            ("ggml_backend_free", [c_void_p], None),
            ("ggml_backend_alloc_ctx_tensors", [c_void_p, c_void_p], c_void_p),
            ("ggml_backend_buffer_clear", [c_void_p, ctypes.c_uint8], None),
            ("ggml_backend_buffer_free", [c_void_p], None),
            ("ggml_backend_graph_compute", [c_void_p, c_void_p], c_int),
            ("ggml_init", [InitParams], c_void_p),
            ("ggml_free", [c_void_p], None),
            ("ggml_new_tensor_2d", [c_void_p, c_int, c_int64, c_int64], c_void_p),
            ("ggml_mul_mat", [c_void_p, c_void_p, c_void_p], c_void_p),
            ("ggml_new_graph", [c_void_p], c_void_p),
            ("ggml_build_forward_expand", [c_void_p, c_void_p], None),
        ):
            function = getattr(lib, name)
            function.argtypes, function.restype = args, result

    def _devices(self) -> list[int]:
        local = range(self.lib.ggml_backend_dev_count())
        return [*self._remote, *(self.lib.ggml_backend_dev_get(i) for i in local)]

    def _memory(self, device: int) -> tuple[int, int]:
        free, total = c_size_t(), c_size_t()
        self.lib.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def describe(self) -> dict[str, Any]:
        lib = self.lib
        devices = []
        for device in self._devices():
            kind = lib.ggml_backend_dev_type(device)
            devices.append(
                {
                    "name": lib.ggml_backend_dev_name(device).decode("utf-8", "replace"),
                    "description": lib.ggml_backend_dev_description(device).decode(
                        "utf-8", "replace"
                    ),
                    "type": _DEVICE_TYPES[kind] if kind < len(_DEVICE_TYPES) else str(kind),
                    "memory_total": self._memory(device)[1],
                }
            )
        registered = range(lib.ggml_backend_reg_count())
        names = [lib.ggml_backend_reg_name(lib.ggml_backend_reg_get(i)) for i in registered]
        return {"backends": [n.decode("utf-8", "replace") for n in names], "devices": devices}

    def free_memory(self) -> dict[str, int]:
        """Return the free bytes of each device except the CPU, by name."""
        return {
            self.lib.ggml_backend_dev_name(device).decode("utf-8", "replace"): self._memory(device)[
                0
            ]
            for device in self._devices()
            if self.lib.ggml_backend_dev_type(device) != _CPU
        }

    def read_seconds(self, n_bytes: int, n_threads: int, gpu: bool) -> float:
        """Measure the seconds that reading n_bytes of memory takes.

        The backend multiplies an F32 matrix of that size with a vector, which is memory-bound.
        The result is the median of five products, after one to warm up.
        """
        lib, n_in = self.lib, 4096
        n_out = max(1, min(n_bytes, READ_CAP) // (4 * n_in))
        devices = {
            lib.ggml_backend_dev_type(device): device for device in reversed(self._devices())
        }
        device = devices.get(_GPU if gpu else _CPU, devices[_CPU])
        graph_bytes = 4 << 20
        backend = lib.ggml_backend_dev_init(device, None)
        ctx = lib.ggml_init(InitParams(graph_bytes, None, True))
        buffer = None
        try:
            set_threads = lib.ggml_backend_reg_get_proc_address(
                lib.ggml_backend_dev_backend_reg(device), b"ggml_backend_set_n_threads"
            )
            if set_threads:
                ctypes.CFUNCTYPE(None, c_void_p, c_int)(set_threads)(backend, n_threads)
            matrix = lib.ggml_new_tensor_2d(ctx, 0, n_in, n_out)
            vector = lib.ggml_new_tensor_2d(ctx, 0, n_in, 1)
            product = lib.ggml_mul_mat(ctx, matrix, vector)
            graph = lib.ggml_new_graph(ctx)
            lib.ggml_build_forward_expand(graph, product)
            buffer = lib.ggml_backend_alloc_ctx_tensors(ctx, backend)
            if not buffer:
                raise RazorError(
                    f"there is no memory to time a read of {n_bytes:,} bytes; leave out depths"
                )
            lib.ggml_backend_buffer_clear(buffer, 0)
            seconds = []
            for _ in range(6):
                start = time.perf_counter()
                if lib.ggml_backend_graph_compute(backend, graph):
                    raise RazorError("the backend could not read its own memory")
                seconds.append(time.perf_counter() - start)
        finally:
            if buffer:
                lib.ggml_backend_buffer_free(buffer)
            lib.ggml_free(ctx)
            lib.ggml_backend_free(backend)
        return statistics.median(seconds[1:]) * n_bytes / (n_out * n_in * 4)
