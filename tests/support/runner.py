"""Drive libllama through the low-level llama_cpp bindings, for all native tests.

A process loads one library: the package's own (found by razor_local.native), or the one in the
folder LLAMA_CPP_LIB_PATH. `Worker` runs the same code in a child process: on a stock build to
compare with, or on the same library for code that must work in another process or may crash.
"""

from __future__ import annotations

import ctypes
import functools
import os
import pickle
import random
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from razor_local.native.structs import REWIND, BufferStats, LayerStats, Params, SeqStats, Stats
from tests.support.native_build import ROOT

KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "bf16": 30}


def _gpu_layers() -> int:
    text = os.environ.get("RAZOR_TEST_GPU_LAYERS", "") or "0"
    if text != "all" and not text.isdecimal():
        raise ValueError(f"RAZOR_TEST_GPU_LAYERS is {text!r}, expected a number of layers or 'all'")
    return 9999 if text == "all" else int(text)


# layers on a device with their KV cache (tests/tools/other_backend.py); 0: all on the CPU
GPU_LAYERS = _gpu_layers()


class LoadError(Exception):
    """A model or context was refused; the text is llama_razor_last_error(), "" in stock."""


@dataclass(frozen=True)
class Override:
    """Arguments of llama_razor_set_override. retrieval: flat 0/1 mask, None for the model's."""

    retrieval: bytes | None = None
    window: int = 0
    sink_tokens: int = 4
    window_min: int = 4000
    window_divisor: int = 5
    compensation: bool = True
    enabled: bool = True
    own_attention: bool = False  # with llama.cpp's own cache
    scope: tuple[int, ...] | None = None  # one per head of the mask
    type_k_local: str | None = None  # of local heads
    type_v_local: str | None = None
    rewind: str = "off"  # or "ram" or "disk"
    rewind_limit: int = 0  # bytes, 0: unlimited
    rewind_folder: str = ""


OFF = Override(enabled=False)


def override(razor: Any, **changes: Any) -> Override:
    """Return the Override that corresponds to a reference.Razor."""
    args: dict[str, Any] = {
        "retrieval": bytes(x for row in razor.mask for x in row),
        "window": razor.window if razor.scopes is None else 0,
        "sink_tokens": razor.sink_tokens,
        "compensation": razor.compensation,
    }
    if razor.scopes is not None:
        args["scope"] = tuple(x for row in razor.scopes for x in row)
    if razor.types is not None:
        args["type_k_local"], args["type_v_local"] = razor.types[1]
    return Override(**(args | changes))


# the library


@functools.cache
def bindings() -> ModuleType:
    """Return the low-level bindings on this process's library, with its log switched off."""
    if "LLAMA_CPP_LIB_PATH" in os.environ:
        import llama_cpp.llama_cpp as llama

        llama.llama_log_set(_log, None)
    else:
        from razor_local import native

        native.load()
        import llama_cpp.llama_cpp as llama
    llama.llama_backend_init()
    return llama


_graphs: list[str] = []  # what the library logged last about the graphs of a context


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _log(level: int, text: bytes, data: Any) -> None:
    if b" splits = " in text:
        _graphs[:] = [text.decode()]
    if os.environ.get("RAZOR_TEST_LOG"):
        sys.stderr.write(text.decode(errors="replace"))


@functools.cache
def razor_api() -> ctypes.CDLL:
    """Return the library with the prototypes of llama-razor.h.

    Raises AttributeError for a stock library.
    """
    lib = bindings()._lib
    ctx, u32 = ctypes.c_void_p, ctypes.c_uint32
    for name, args, result in (
        ("api_version", [], u32),
        ("build_info", [], ctypes.c_char_p),
        ("set_override", [ctypes.POINTER(Params)], ctypes.c_bool),
        ("last_error", [], ctypes.c_char_p),
        ("model_layers", [ctypes.c_void_p, ctypes.POINTER(u32), u32], u32),
        ("get_stats", [ctx, ctypes.POINTER(Stats)], ctypes.c_bool),
        ("get_layer", [ctx, u32, ctypes.POINTER(LayerStats)], ctypes.c_bool),
        ("get_seq", [ctx, ctypes.c_int32, ctypes.POINTER(SeqStats)], ctypes.c_bool),
        ("get_buffer", [ctx, u32, ctypes.POINTER(BufferStats)], ctypes.c_bool),
        ("set_full_prefill", [ctx, ctypes.c_bool], ctypes.c_bool),
        ("set_source", [ctx, ctx], ctypes.c_bool),
    ):
        func = getattr(lib, f"llama_razor_{name}")
        func.argtypes, func.restype = args, result
    return lib


def is_patched() -> bool:
    """Return True if this process's library has the razor API."""
    return hasattr(bindings()._lib, "llama_razor_api_version")


def last_error() -> str:
    """Return llama_razor_last_error() of this thread, "" for a stock library."""
    return razor_api().llama_razor_last_error().decode() if is_patched() else ""


def raw_params(value: Override) -> Params:
    """Return the C struct of an Override, which keeps its mask alive."""
    params = Params(
        ctypes.sizeof(Params),
        value.enabled,
        value.sink_tokens,
        value.window,
        value.window_min,
        value.window_divisor,
        value.compensation,
    )
    if value.retrieval is not None:
        mask = (ctypes.c_uint8 * max(1, len(value.retrieval))).from_buffer_copy(
            value.retrieval or b"\0"
        )
        params.n_retrieval = len(value.retrieval)
        params.retrieval = mask
    params.own_attention = value.own_attention
    params.type_k_local, params.type_v_local = (
        -1 if name is None else KV_TYPES[name] for name in (value.type_k_local, value.type_v_local)
    )
    if value.scope is not None:
        params.scope = (ctypes.c_uint32 * max(1, len(value.scope)))(*value.scope)
    params.rewind, params.rewind_limit = REWIND[value.rewind], value.rewind_limit
    params.rewind_folder = value.rewind_folder.encode() or None
    return params


def set_override(value: Override | None) -> None:
    """Call llama_razor_set_override. Raises LoadError if the library refuses the values."""
    api = razor_api()
    ok = api.llama_razor_set_override(None if value is None else ctypes.byref(raw_params(value)))
    if not ok:
        raise LoadError(last_error())


class Model:
    """A loaded model. Raises LoadError if the library refuses the file."""

    def __init__(self, path: str | Path, gpu_layers: int = GPU_LAYERS) -> None:
        llama = bindings()
        params = llama.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        if is_patched():
            set_override(None)  # resets last_error(), which a load that fails early does not
        self.ptr = llama.llama_model_load_from_file(str(path).encode(), params)
        if not self.ptr:
            raise LoadError(last_error())
        self.path = str(path)
        self.n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.ptr))

    def layers(self) -> list[int]:
        """Return the KV heads per layer of the mask (llama_razor_model_layers)."""
        heads = (ctypes.c_uint32 * 512)()
        n = razor_api().llama_razor_model_layers(self.ptr, heads, 512)
        return list(heads[:n])

    def close(self) -> None:
        if self.ptr:
            bindings().llama_model_free(self.ptr)
            self.ptr = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Context:
    """A context. Methods without a sequence id work on sequence 0.

    With razor=None the model's metadata decides. A stock library allows only None.
    """

    def __init__(
        self,
        model: Model,
        razor: Override | None = None,
        *,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        type_k: str = "f32",
        type_v: str = "f32",
        flash_attn: bool = False,
        offload_kqv: bool = True,
        n_threads: int = 1,
        n_seq_max: int = 1,
        kv_unified: bool = False,
        **fields: Any,
    ) -> None:
        llama = bindings()
        self.model, self.n_batch = model, n_batch
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_batch, n_ubatch
        params.type_k, params.type_v = KV_TYPES[type_k], KV_TYPES[type_v]
        params.flash_attn_type = int(flash_attn)
        params.offload_kqv = offload_kqv
        params.n_threads = params.n_threads_batch = n_threads
        params.n_seq_max, params.kv_unified = n_seq_max, kv_unified
        params.no_perf = True
        for name, value in fields.items():
            setattr(params, name, value)
        self._abort_after = -1
        self._abort = llama.ggml_abort_callback(self._should_abort)
        if razor is not None:
            set_override(razor)
        try:
            self.ptr = llama.llama_init_from_model(model.ptr, params)
        finally:
            error = last_error()
            if razor is not None:
                set_override(None)
        if not self.ptr:
            raise LoadError(error)
        self.memory = llama.llama_get_memory(self.ptr)
        self.n_past = 0

    def abort_after(self, n_nodes: int | None) -> None:
        """Abort computations after n_nodes more graph nodes, or never if it is None."""
        llama, self._abort_after = bindings(), -1 if n_nodes is None else n_nodes
        callback = llama.ggml_abort_callback() if n_nodes is None else self._abort
        llama.llama_set_abort_callback(self.ptr, callback, None)

    def _should_abort(self, data: Any) -> bool:
        self._abort_after -= 1
        return self._abort_after < 0

    def close(self) -> None:
        if self.ptr:
            bindings().llama_free(self.ptr)
            self.ptr = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # decoding

    def try_decode(
        self,
        tokens: Sequence[int],
        pos: int | None = None,
        last_only: bool = False,
        outputs: bool = True,
    ) -> tuple[int, np.ndarray]:
        """Call llama_decode. Return its status and, if it is 0, logits f32 [n_outputs, n_vocab]."""
        llama, n = bindings(), len(tokens)
        pos = self.n_past if pos is None else pos
        batch = llama.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = int(token), pos + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = outputs and (not last_only or i == n - 1)
            status = llama.llama_decode(self.ptr, batch)
        finally:
            llama.llama_batch_free(batch)
        if status != 0:
            return status, np.empty((0, self.model.n_vocab), np.float32)
        self.n_past = pos + n
        rows = 0 if not outputs else 1 if last_only else n
        if rows == 0:
            return 0, np.empty((0, self.model.n_vocab), np.float32)
        logits = llama.llama_get_logits(self.ptr)
        shape = (rows, self.model.n_vocab)
        return 0, np.ctypeslib.as_array(logits, shape).copy()

    def decode(
        self, tokens: Sequence[int], splits: Sequence[int] | int | None = None
    ) -> np.ndarray:
        """Decode tokens after those in the cache and return the logits, f32 [n, n_vocab].

        Args:
            tokens: the tokens.
            splits: the sizes of the calls: a list whose sum is the number of tokens, or one size,
                by default n_batch.
        """
        n = len(tokens)
        if splits is None or isinstance(splits, int):
            size = splits or self.n_batch
            splits = [min(size, n - i) for i in range(0, n, size)]
        assert sum(splits) == n, "splits do not add up to the number of tokens"
        parts, start = [np.empty((0, self.model.n_vocab), np.float32)], 0
        for size in splits:
            status, logits = self.try_decode(tokens[start : start + size])
            if status != 0:
                raise RuntimeError(f"llama_decode returned {status} at position {self.n_past}")
            parts.append(logits)
            start += size
        return np.concatenate(parts)

    def set_full_prefill(self, full: bool) -> bool:
        """Call llama_razor_set_full_prefill. The reason for False is in last_error()."""
        return bool(razor_api().llama_razor_set_full_prefill(self.ptr, full))

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """Decode tokens in one call with full attention. Returns logits f32 [n, n_vocab]."""
        if not self.set_full_prefill(True):
            raise RuntimeError(last_error())
        try:
            status, logits = self.try_decode(tokens)
        finally:
            self.set_full_prefill(False)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}: {last_error()}")
        return logits

    def set_source(self, source: Context | None) -> bool:
        """Call llama_razor_set_source. The reason for False is in last_error()."""
        return bool(razor_api().llama_razor_set_source(self.ptr, source and source.ptr))

    def take(self, tokens: Sequence[int], source: Context) -> None:
        """Decode tokens in one call with the keys and values of another context."""
        if not self.set_source(source):
            raise RuntimeError(last_error())
        try:
            status, _ = self.try_decode(tokens, outputs=False)
        finally:
            self.set_source(None)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}: {last_error()}")

    def decode_sequences(self, batch: Sequence[tuple[int, int, int]]) -> np.ndarray:
        """Decode tokens of several sequences in one call.

        Args:
            batch: (sequence id, position, token) of each token.

        Returns: logits f32 [n_tokens, n_vocab]. Raises RuntimeError if the call fails.
        """
        llama, n = bindings(), len(batch)
        raw = llama.llama_batch_init(n, 0, 1)
        try:
            raw.n_tokens = n
            for i, (seq_id, pos, token) in enumerate(batch):
                raw.token[i], raw.pos[i], raw.logits[i] = token, pos, True
                raw.n_seq_id[i], raw.seq_id[i][0] = 1, seq_id
            status = llama.llama_decode(self.ptr, raw)
        finally:
            llama.llama_batch_free(raw)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}: {last_error()}")
        self.n_past = self.pos_max() + 1
        logits = llama.llama_get_logits(self.ptr)
        return np.ctypeslib.as_array(logits, (n, self.model.n_vocab)).copy()

    # memory

    def seq_rm(self, p0: int, p1: int = -1, seq_id: int = 0) -> bool:
        """Call llama_memory_seq_rm, and update n_past if tokens were removed from the end."""
        ok = bool(bindings().llama_memory_seq_rm(self.memory, seq_id, p0, p1))
        if ok:
            self.n_past = self.pos_max() + 1
        return ok

    def seq_cp(self, source: int, target: int, p0: int = -1, p1: int = -1) -> None:
        bindings().llama_memory_seq_cp(self.memory, source, target, p0, p1)
        self.n_past = self.pos_max() + 1

    def seq_keep(self, seq_id: int) -> None:
        bindings().llama_memory_seq_keep(self.memory, seq_id)
        self.n_past = self.pos_max() + 1

    def clear(self, data: bool = True) -> None:
        bindings().llama_memory_clear(self.memory, data)
        self.n_past = 0

    def pos_max(self, seq_id: int = 0) -> int:
        """Return the largest position in the cache, -1 if it is empty."""
        return bindings().llama_memory_seq_pos_max(self.memory, seq_id)

    def pos_min(self, seq_id: int = 0) -> int:
        return bindings().llama_memory_seq_pos_min(self.memory, seq_id)

    # state

    def save(self, whole: bool = True, seq_id: int = 0) -> bytes:
        """Save the state of the context (whole) or of a sequence."""
        llama = bindings()
        if whole:
            size = llama.llama_state_get_size(self.ptr)
            buf = (ctypes.c_uint8 * size)()
            n = llama.llama_state_get_data(self.ptr, buf, size)
        else:
            size = llama.llama_state_seq_get_size(self.ptr, seq_id)
            buf = (ctypes.c_uint8 * size)()
            n = llama.llama_state_seq_get_data(self.ptr, buf, size, seq_id)
        assert 0 < n <= size, f"state of {size} bytes, {n} written"
        return ctypes.string_at(buf, n)

    def load(self, state: bytes, whole: bool = True, seq_id: int = 0) -> bool:
        """Load the result of save(), of any sequence. Return False if the library refused it."""
        llama = bindings()
        buf = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if whole:
            n = llama.llama_state_set_data(self.ptr, buf, len(state))
        else:
            n = llama.llama_state_seq_set_data(self.ptr, buf, len(state), seq_id)
        self.n_past = self.pos_max() + 1
        return n != 0

    # statistics

    def stats(self) -> Stats:
        return self._stats(Stats, "get_stats")

    def layer(self, il: int) -> LayerStats:
        return self._stats(LayerStats, "get_layer", il)

    def seq(self, seq_id: int = 0) -> SeqStats:
        return self._stats(SeqStats, "get_seq", seq_id)

    def buffers(self) -> list[BufferStats]:
        n = self.stats().n_buffers
        return [self._stats(BufferStats, "get_buffer", i) for i in range(n)]

    def _stats(self, struct: type, name: str, *args: int) -> Any:
        value = struct(ctypes.sizeof(struct))
        if not getattr(razor_api(), f"llama_razor_{name}")(self.ptr, *args, ctypes.byref(value)):
            raise ValueError(f"llama_razor_{name}{args} returned false: {last_error()}")
        return value


# whole runs, callable by name in a worker


def logits(
    path: str | Path,
    tokens: Sequence[int],
    razor: Override | None = None,
    splits: Sequence[int] | int | None = None,
    gpu_layers: int = GPU_LAYERS,
    **params: Any,
) -> np.ndarray:
    """Return the logits of tokens in a new context, f32 [n_tokens, n_vocab]."""
    with Model(path, gpu_layers) as model, Context(model, razor, **params) as ctx:
        return ctx.decode(tokens, splits)


def save_state(
    path: str, tokens: Sequence[int], razor: Override | None, whole: bool, params: dict[str, Any]
) -> bytes:
    """Return the state of a new context after these tokens."""
    with Model(path) as model, Context(model, razor, **params) as ctx:
        ctx.decode(tokens)
        return ctx.save(whole)


def continue_state(
    path: str,
    state: bytes,
    tokens: Sequence[int],
    razor: Override | None,
    whole: bool,
    params: dict[str, Any],
) -> np.ndarray:
    """Load a state into a new context and decode tokens after it."""
    with Model(path) as model, Context(model, razor, **params) as ctx:
        if not ctx.load(state, whole):
            raise LoadError(f"state refused: {last_error()}")
        return ctx.decode(tokens)


def graph_splits(path: str | Path, razor: Override | None, gpu_layers: int, **params: Any) -> int:
    """Return the number of parts into which the scheduler splits a prefill's graph by device."""
    with Model(path, gpu_layers) as model, Context(model, razor, **params):
        match = re.search(r" splits = (\d+)", _graphs[-1])
        assert match
        return int(match[1])


def refusal(path: str, razor: Override | None = None, **params: Any) -> str | None:
    """Load a model, create a context and decode a token. Return the error, None if it worked."""
    try:
        logits(path, [1], razor, **params)
    except LoadError as e:
        return str(e)
    return None


def rss_growth(path: str, razor: Override | None, params: dict[str, Any]) -> int:
    """Return the bytes of resident memory that a new context adds (Linux)."""
    with Model(path) as model:
        before = _rss()
        with Context(model, razor, **params):
            return _rss() - before


def log_file() -> int:
    """Return the descriptor of the rewind log's file, which has no name (Linux)."""
    for fd in os.listdir("/proc/self/fd"):
        try:
            if "razor-rewind" in os.readlink(f"/proc/self/fd/{fd}"):
                return int(fd)
        except OSError:
            continue
    raise AssertionError("no log file is open")


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def ping() -> bool:
    """Return True if the worker's library is patched."""
    return is_patched()


_SERVE = """import sys
sys.path.insert(0, sys.argv[1])
from tests.support import runner
runner.serve()
"""


class Worker:
    """A child process, possibly on another library: worker(function of a module, arguments)."""

    def __init__(
        self,
        lib_dir: str | Path | None,
        env: dict[str, str] | None = None,
    ) -> None:
        child_env = dict(os.environ) | (env or {})
        if lib_dir is not None:
            child_env["LLAMA_CPP_LIB_PATH"] = str(lib_dir)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(ROOT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_env,
        )

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        pickle.dump((function, args, kwargs), self.process.stdin)
        self.process.stdin.flush()
        try:
            ok, value = pickle.load(self.process.stdout)
        except EOFError:
            raise RuntimeError(f"the worker died with status {self.process.wait()}") from None
        if not ok:
            raise RuntimeError(value)
        return value

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(30)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def serve() -> None:
    """Answer the requests of a Worker until it closes stdin."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keep what libraries print out of the answers
    while True:
        try:
            function, args, kwargs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = (True, function(*args, **kwargs))
        except Exception as e:  # the parent raises it
            answer = (False, f"{type(e).__name__}: {e}")
        pickle.dump(answer, out)
        out.flush()


NO_WORK = {b"NONE", b"RESHAPE", b"VIEW", b"PERMUTE", b"TRANSPOSE"}


def count_nodes(path: str | Path, razor: Override, n_past: int, **params: object) -> int:
    """Count the compute nodes of decoding one token after n_past others."""
    llama = bindings()
    lib = llama._lib
    lib.ggml_op_desc.argtypes, lib.ggml_op_desc.restype = [ctypes.c_void_p], ctypes.c_char_p
    n_nodes = 0

    @llama.ggml_backend_sched_eval_callback
    def count(pointer: int, ask: bool, data: object) -> bool:
        nonlocal n_nodes
        n_nodes += ask and lib.ggml_op_desc(pointer) not in NO_WORK
        return False

    tokens = random_tokens(n_past + 1, 64, 3)
    with Model(path) as model:
        with Context(model, razor, cb_eval=count, **params) as ctx:
            ctx.decode(tokens[:-1])
            assert bool(ctx.stats().active) == razor.enabled
            n_nodes = 0
            ctx.decode(tokens[-1:])
    return n_nodes


def random_tokens(n: int, n_vocab: int, seed: int = 0) -> list[int]:
    """Draw n random token ids."""
    return np.random.default_rng(seed).integers(0, n_vocab, n).tolist()


def random_splits(n: int, largest: int, seed: int) -> list[int]:
    """Draw random sizes in [1, largest] that add up to n."""
    rng, sizes = random.Random(seed), []
    while n > 0:
        sizes.append(min(n, rng.randint(1, largest)))
        n -= sizes[-1]
    return sizes
