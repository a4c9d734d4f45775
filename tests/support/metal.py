"""Find which operations of razor's graphs the Metal backend accepts, without a Mac.

accepts() repeats the rules of ggml_metal_device_supports_op() in the pinned source
(ggml-metal-device.m), for GPUs from the M1 on. It checks every node of the graphs that razor's
contexts build with upstream's operations, as they do on Metal. The scheduler moves a refused node,
with its inputs and its result, to the CPU.
"""

from __future__ import annotations

import ctypes
import tarfile
from dataclasses import dataclass
from pathlib import Path

from razor_local.native.structs import Tensor
from tests.support import arch_runs, runner
from tests.support.native_build import cache_dir, pin
from tests.support.runner import OFF, Context, Model, Override

RULES = "vendor/llama.cpp/ggml/src/ggml-metal/ggml-metal-device.m"
FREE = ("NONE", "RESHAPE", "VIEW", "TRANSPOSE", "PERMUTE")
ANY = ("REPEAT", "ROPE", "ARGSORT", "TOP_K", "ARANGE", "DIAG", "SSM_CONV", "SSM_SCAN")
ROWS = ("SUM_ROWS", "CUMSUM", "MEAN", "SOFT_MAX", "GROUP_NORM", "L2_NORM", "NORM", "RMS_NORM")
HEADS = (32, 40, 48, 64, 72, 80, 96, 112, 128, 192, 256, 320, 512, 576)
TYPES_COPIED_FROM = {
    "f32": ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "i32"),
    "f16": ("f32", "f16"),
    "bf16": ("f32", "bf16"),
    "i32": ("f32", "i32"),
}


@dataclass(frozen=True)
class Node:
    """A node of a graph: its operation and type, and the types and dimensions of its sources."""

    op: str
    kind: str
    sources: tuple[str, ...]
    dims: tuple[tuple[int, ...], ...]  # of the sources
    in_rows: tuple[bool, ...]  # whether the elements of a row are adjacent, for each source

    def __str__(self) -> str:
        return f"{self.op}({', '.join(self.sources)}) → {self.kind}"


def accepts(node: Node) -> bool:
    """Return whether ggml-metal computes the node."""
    first = node.sources[0] if node.sources else node.kind
    match node.op:
        case op if op in FREE or op in ANY:
            return True
        case op if op in ROWS:
            return node.in_rows[0]
        case "SCALE" | "CLAMP" | "SQR" | "SQRT" | "LOG" | "FILL" | "UNARY" | "GLU":
            return node.in_rows[0] and first in ("f32", "f16")
        case "ADD" | "SUB" | "MUL" | "DIV" | "ADD_ID":
            same = node.sources[1] == first
            return node.in_rows[0] and node.in_rows[1] and first in ("f32", "f16") and same
        case "CONCAT":
            return node.sources[1] == first == node.kind
        case "CPY" | "CONT" | "DUP" | "SET":
            if first.startswith("q"):
                return node.kind in ("f32", "f16")
            return node.kind in TYPES_COPIED_FROM.get(first, ())
        case "GET_ROWS":
            return True
        case "SET_ROWS":
            return node.kind == "f16" if first == "f16" else first == "f32"
        case "MUL_MAT" | "MUL_MAT_ID":
            return node.sources[1] != "f16" or (node.op == "MUL_MAT" and first == "f16")
        case "FLASH_ATTN_EXT":
            (d_k, *_), (d_v, *_) = node.dims[1], node.dims[2]
            return node.dims[0][0] in HEADS and d_k >= d_v and node.sources[1] == node.sources[2]
        case "GATED_DELTA_NET":
            return node.dims[2][0] % 32 == 0
        case "SOLVE_TRI" | "TRI" | "PAD":
            return first == "f32"
    return False


def supports_op() -> str:
    """Return the source of the function that accepts() repeats, from the pinned sdist."""
    version, _ = pin()
    with tarfile.open(cache_dir() / f"llama_cpp_python-{version}.tar.gz") as sdist:
        file = sdist.extractfile(f"llama_cpp_python-{version}/{RULES}")
        assert file is not None
        text = file.read().decode()
    start = text.index("static bool ggml_metal_supports_mul_mat_op(")
    return text[start : text.index("\n}", text.index("bool ggml_metal_device_supports_op("))]


def nodes_of(path: Path, razor: Override, kv_type: str, flash_attn: bool) -> set[Node]:
    """Return the nodes of a prefill that folds, and of decoding one token."""
    llama = runner.bindings()
    lib = llama._lib
    lib.ggml_op_name.argtypes, lib.ggml_op_name.restype = [ctypes.c_int], ctypes.c_char_p
    lib.ggml_type_name.argtypes, lib.ggml_type_name.restype = [ctypes.c_int], ctypes.c_char_p
    found: set[Node] = set()

    def kind(tensor: Tensor) -> str:
        name: bytes = lib.ggml_type_name(tensor.type)
        return name.decode()

    @llama.ggml_backend_sched_eval_callback
    def collect(pointer: int, ask: bool, data: object) -> bool:
        if ask:
            tensor = Tensor.from_address(pointer)
            sources = [Tensor.from_address(p) for p in tensor.src if p]
            op = lib.ggml_op_name(tensor.op).decode()
            rows = tuple(
                kind(s).startswith("q") or s.nb[0] == (2 if "16" in kind(s) else 4) for s in sources
            )
            dims = tuple(tuple(s.ne) for s in sources)
            found.add(Node(op, kind(tensor), tuple(map(kind, sources)), dims, rows))
        return False

    type_v = kv_type if flash_attn else "f16"  # a quantized V needs flash attention
    params = {"type_k": kv_type, "type_v": type_v, "flash_attn": flash_attn, "n_ctx": 1024}
    with (
        Model(path) as model,
        Context(model, razor, cb_eval=collect, swa_full=False, **params) as ctx,
    ):
        text = runner.random_tokens(401, min(model.n_vocab, 100), 3)
        ctx.decode(text[:400])
        ctx.decode(text[400:])
    return found


def refused(path: Path, kv_type: str, flash_attn: bool, compensation: bool = True) -> list[str]:
    """Return the nodes that ggml-metal refuses in razor's graph but not in a full cache's."""
    mask = arch_runs.mask_of(arch_runs.layers_of(path))
    razor = Override(mask, window=64, compensation=compensation)
    ours = nodes_of(path, razor, kv_type, flash_attn)
    stock = nodes_of(path, OFF, kv_type, flash_attn)
    assert ours - stock, "razor adds no node"
    moved = {str(n) for n in stock if not accepts(n)}
    return sorted({str(n) for n in ours if not accepts(n)} - moved)
