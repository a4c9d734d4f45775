"""The C structs that Python shares with the native library."""

from __future__ import annotations

import ctypes
from ctypes import (
    c_bool,
    c_char,
    c_char_p,
    c_float,
    c_int32,
    c_int64,
    c_size_t,
    c_uint8,
    c_uint32,
    c_uint64,
    c_void_p,
)

# llama-razor.h

MAX_WINDOWS = 4  # LLAMA_RAZOR_MAX_WINDOWS
REWIND = {"off": 0, "ram": 1, "disk": 2}  # LLAMA_RAZOR_REWIND_*


class Params(ctypes.Structure):
    """struct llama_razor_params"""

    _fields_ = [
        ("size", c_uint32),
        ("enabled", c_uint32),
        ("sink_tokens", c_uint32),
        ("window", c_uint32),
        ("window_min", c_uint32),
        ("window_divisor", c_uint32),
        ("compensation", c_uint32),
        ("n_retrieval", c_uint32),
        ("retrieval", ctypes.POINTER(c_uint8)),
        ("own_attention", c_uint32),
        ("scope", ctypes.POINTER(c_uint32)),
        ("type_k_local", c_int32),
        ("type_v_local", c_int32),
        ("rewind", c_uint32),
        ("rewind_limit", c_uint64),
        ("rewind_folder", c_char_p),
    ]


class Stats(ctypes.Structure):
    """struct llama_razor_stats"""

    _fields_ = [
        ("size", c_uint32),
        ("active", c_uint32),
        ("n_ctx", c_uint32),
        ("n_layer", c_uint32),
        ("n_stream", c_uint32),
        ("sink_tokens", c_uint32),
        ("window", c_uint32),
        ("block", c_uint32),
        ("cells", c_uint32),
        ("compensation", c_uint32),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("type_k_local", c_int32),
        ("type_v_local", c_int32),
        ("kv_bytes", c_uint64),
        ("kv_bytes_retrieval", c_uint64),
        ("kv_bytes_local", c_uint64),
        ("kv_bytes_sliding", c_uint64),
        ("kv_bytes_recurrent", c_uint64),
        ("n_buffers", c_uint32),
        ("own_attention", c_uint32),
        ("n_windows", c_uint32),
        ("windows", c_uint32 * MAX_WINDOWS),
        ("device_attention", c_uint32),
        ("rewind", c_uint32),
        ("rewind_limit", c_uint64),
        ("rewind_bytes", c_uint64),
        ("rewind_failure", c_char * 64),
        ("full_prefill", c_uint32),
        ("prefill_done", c_float),
        ("prefill_count", c_uint64),
        ("prefill_bytes", c_uint64),
    ]


class LayerStats(ctypes.Structure):
    """struct llama_razor_layer_stats"""

    _fields_ = [
        ("size", c_uint32),
        ("n_head_kv", c_uint32),
        ("n_retrieval", c_uint32),
        ("n_local", c_uint32),
        ("bytes_k", c_uint64),
        ("bytes_v", c_uint64),
        ("bytes_sums", c_uint64),
    ]


class SeqStats(ctypes.Structure):
    """struct llama_razor_seq_stats"""

    _fields_ = [
        ("size", c_uint32),
        ("n_tokens", c_uint32),
        ("frontier", c_uint32),
        ("n_folded", c_uint32),
        ("n_rollback", c_uint32),
        ("reserved", c_uint32),
    ]


class BufferStats(ctypes.Structure):
    """struct llama_razor_buffer_stats"""

    _fields_ = [
        ("size", c_uint32),
        ("reserved", c_uint32),
        ("bytes", c_uint64),
        ("name", c_char * 64),
    ]


class Memory(ctypes.Structure):
    """struct llama_razor_memory"""

    _fields_ = [
        ("size", c_uint32),
        ("is_host", c_uint32),
        ("weights", c_uint64),
        ("cache", c_uint64),
        ("compute", c_uint64),
        ("name", c_char * 64),
        ("device", c_char * 64),
    ]


# ggml.h


class InitParams(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


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
