"""The process in which a benchmark runs: one model, several contexts on it, driven by JSON lines.

All contexts share one model in one process: two copies of the weights would lie differently in
memory, which alone was seen to cost one side 10 %. Only another build of llama.cpp needs a process
of its own, with that uncertainty.

Deep caches are not prefilled but loaded as a state with random rows, which takes seconds instead
of hours; how long a token takes does not depend on what the rows hold. Where a cache already holds
more random rows than are wanted, the newest are taken out instead, and a worker whose model is on a
GPU keeps the last state in the host's memory, to load it again.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ctypes import c_char_p, c_int, c_int64, c_size_t, c_void_p
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..common.child import python_command
from ..common.machine import free_memory
from ..errors import RazorError
from ..model_setup import ModelSetup
from ..native.structs import InitParams

if TYPE_CHECKING:
    import numpy as np

    from ..model_shape import ModelShape
    from ..plan import Plan
    from ..profile import Profile


@dataclass(frozen=True)
class Side:
    """One of the contexts that are compared. window: instead of the profile's, 0: the profile's."""

    name: str  # razor, full, full_f16
    razor: bool
    type_k: str
    type_v: str
    n_ctx: int
    window: int = 0

    def plan(self, shape: ModelShape, profile: Profile) -> Plan:
        """Return the plan of the context.

        With a retrieval share of 1 the razor side is a full cache with our attention.

        Raises:
            RazorError: a razor context would run a full cache though it has local heads.
        """
        from ..plan import make_plan

        plan = make_plan(
            shape,
            profile if self.razor else None,
            self.n_ctx,
            self.type_k,
            self.type_v,
            window=self.window or None,
        )
        if self.razor and not plan.active and not profile.flat().all():
            raise RazorError(
                f"razor does nothing at {plan.n_ctx} tokens ({plan.why_inactive});"
                " raise -c or set a smaller window with --window-min"
            )
        return plan


# -- the process that drives


class Worker:
    """A running worker process. Raises RazorError where it fails, in ask() or on creation.

    beside_another: two of them take turns.
    """

    def __init__(self, setup: ModelSetup, beside_another: bool = False) -> None:
        env = dict(os.environ)
        if beside_another:  # its threads must not spin on the cores of the other's
            env.setdefault("OMP_WAIT_POLICY", "passive")
        self._process = subprocess.Popen(
            python_command(
                "from razor_local.bench.worker import main; main()", json.dumps(asdict(setup))
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def ask(self, command: str, *args: Any) -> Any:
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended: _read says why
            print(json.dumps([command, *args]), file=self._process.stdin, flush=True)
        return self._read()

    def open(self, side: Side) -> Context:
        return Context(self, side, self.ask("open", asdict(side)))

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            why = "what it said last stands above"
            if code == -getattr(signal, "SIGKILL", 9):  # as a system that runs out of memory does
                why = "is there enough memory for all contexts? leave out depths or types"
            raise RazorError(f"the process of the benchmark ended with exit code {code}; {why}")
        answer = json.loads(line)
        if "error" in answer:
            raise RazorError(answer["error"])
        return answer["ok"]

    def close(self) -> None:
        # it has nothing to save, and may be in the middle of a step of minutes
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()


@dataclass
class Context:
    """A context in a worker. depth: tokens in its cache."""

    worker: Worker
    side: Side
    key: int
    depth: int = 0

    def fill(self, depth: int) -> None:
        """Leaves depth tokens in the cache, with random rows: loads them, or removes the newest of
        a cache that has them."""
        self.worker.ask("fill", self.key, depth)
        self.depth = depth

    def step(self) -> float:
        """Seconds of one decode at the current depth; the token is taken out again."""
        return self.worker.ask("step", self.key)

    def steps(self, n: int) -> list[float]:
        """Seconds of each of n such decodes in a row."""
        return self.worker.ask("steps", self.key, n)

    def append(self, n_tokens: int) -> float:
        """Seconds of a batch of n_tokens, which stay in the cache."""
        seconds = self.worker.ask("append", self.key, n_tokens)
        self.depth += n_tokens
        return seconds

    def run(self, n_tokens: int) -> list[float]:
        """Seconds of each of n_tokens decodes in a row, which stay in the cache."""
        seconds = self.worker.ask("run", self.key, n_tokens)
        self.depth += n_tokens
        return seconds

    def rewind(self, depth: int) -> None:
        """Back to depth tokens: by removing the newest, or by filling again."""
        if self.depth != depth:
            self.worker.ask("rewind", self.key, depth)
            self.depth = depth

    def kv_bytes(self) -> int | None:
        """Bytes in the backends' KV buffers. Of a build that does not report them: what its log
        says, to 0.01 MiB; None if it says nothing."""
        return self.worker.ask("kv_bytes", self.key)

    def device_bytes(self) -> int | None:
        """Bytes of the model's and the context's buffers on devices that are no CPU, None without
        any. Of a build that does not report them: what its log says, to 0.01 MiB."""
        return self.worker.ask("device_bytes", self.key)

    def close(self) -> None:
        self.worker.ask("close", self.key)


# -- what runs in the worker process


class Session:
    """A model on the low-level bindings, which a stock build has too, and the contexts on it."""

    def __init__(self, setup: ModelSetup) -> None:
        self.setup = setup
        self.logged: dict[str, dict[str, int]] = {}  # bytes, by what they are for and by device
        self.shape, self.profile = setup.read()
        self.native = None
        if setup.lib:
            os.environ["LLAMA_CPP_LIB_PATH"] = setup.lib
        else:
            from ..native import load

            self.native = load()
        import llama_cpp

        self.api = llama_cpp
        if self.native is None:
            self._on_log = llama_cpp.llama_log_callback(self._read_log)
            llama_cpp.llama_log_set(self._on_log, None)
        llama_cpp.llama_backend_init()
        self.ggml = _Ggml(llama_cpp.llama_cpp._lib)
        self.devices = list(self.ggml.free_memory())

        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = setup.n_gpu_layers
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(setup.model), params)
        if not self.model:
            raise RazorError(f"{setup.model} could not be loaded ({self.reason()})")
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        self._contexts: dict[int, SessionContext] = {}
        self._n_opened = 0
        self._state: tuple[Plan, int, np.ndarray] | None = None  # plan, depth, what was loaded

    def _read_log(self, level: int, text: bytes | None, data: int | None) -> None:
        """What a build without our functions tells of its buffers."""
        match = BUFFER_SIZE.search((text or b"").decode("utf-8", "replace"))
        if match:  # a compute buffer that is made anew replaces the one before
            device, what, mebibytes = match.groups()
            self.logged.setdefault(what, {})[device] = round(float(mebibytes) * 2**20)

    def reason(self) -> str:
        return self.native.reason() if self.native else "llama.cpp gives no reason"

    def answer(self, command: str, *args: Any) -> Any:
        """The answer to one command of Worker or Context."""
        if command in ("describe", "open", "peak_rss", "read_seconds"):
            return getattr(self, command)(*args)
        key, *rest = args
        if command == "close":
            return self._contexts.pop(key).close()
        return getattr(self._contexts[key], command)(*rest)

    def describe(self) -> dict[str, Any]:
        """The build, its backends and devices."""
        info = self.api.llama_print_system_info().decode("utf-8", "replace").strip()
        build = None if self.native is None else asdict(self.native.build)
        return {"build": build, "cpu_features": info} | self.ggml.describe()

    def open(self, side: dict[str, Any]) -> int:
        self._n_opened += 1
        self._contexts[self._n_opened] = SessionContext(self, Side(**side))
        return self._n_opened

    def peak_rss(self, reset: bool = False) -> int | None:
        """Bytes since the last reset; None where the system does not tell, or cannot reset."""
        if reset:
            self._state = None  # it is no part of what a context takes
        if reset and not _reset_peak_rss():
            return None
        return _peak_rss()

    def random_state(self, plan: Plan, depth: int, saved: bytes) -> np.ndarray:
        """random_state(), which is kept for the next time if the host's memory is free anyway."""
        if self._state is None or self._state[:2] != (plan, depth):
            self._state = None  # before there is another
            self._state = (plan, depth, random_state(plan, depth, saved, self.setup.n_threads))
        state = self._state[2]
        free = free_memory()
        if not self.setup.n_gpu_layers or (free is not None and free < state.nbytes):
            self._state = None
        return state

    def read_seconds(self, n_bytes: int) -> float:
        return self.ggml.read_seconds(n_bytes, self.setup.n_threads, self.setup.n_gpu_layers != 0)


class SessionContext:
    """The context of one side."""

    def __init__(self, session: Session, side: Side) -> None:
        from ..plan import KV_TYPES

        self.session, self.api, self.native = session, session.api, session.native
        self.plan = side.plan(session.shape, session.profile)
        self.depth = 0
        self.n_random = 0  # tokens at the beginning of the cache that have random rows
        self._saved = b""
        params = self.api.llama_context_default_params()
        params.n_ctx = self.plan.n_ctx
        params.n_threads = params.n_threads_batch = session.setup.n_threads
        params.type_k = KV_TYPES[side.type_k].ggml_id
        params.type_v = KV_TYPES[side.type_v].ggml_id
        params.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if self.native is None:
            session.logged = {k: v for k, v in session.logged.items() if k == "model"}
            self.ctx = self.api.llama_init_from_model(session.model, params)
            self.logged = session.logged
        else:
            from ..native import make_params

            profile = session.profile if side.razor else None
            if profile is not None and side.window:
                profile = profile.with_options(side.window, None, None)
            with self.native.override(make_params(profile)):
                self.ctx = self.api.llama_init_from_model(session.model, params)
        if not self.ctx:
            raise RazorError(
                f"a {side.type_k}/{side.type_v} context of {self.plan.n_ctx:,} tokens could not be"
                f" created ({session.reason()}); is there enough memory?"
            )
        self.memory = self.api.llama_get_memory(self.ctx)

    def close(self) -> None:
        self.api.llama_free(self.ctx)

    def _decode(self, tokens: Sequence[int]) -> None:
        ids = (ctypes.c_int32 * len(tokens))(*tokens)  # the batch only points to them
        batch = self.api.llama_batch_get_one(ids, len(tokens))
        if self.api.llama_decode(self.ctx, batch):
            raise RazorError(f"{len(tokens)} tokens could not be decoded ({self.session.reason()})")
        self.api.llama_synchronize(self.ctx)

    def _timed(self, tokens: Sequence[int]) -> float:
        start = time.perf_counter()
        self._decode(tokens)
        return time.perf_counter() - start

    def _tokens(self, n: int) -> list[int]:
        import numpy as np

        rng = np.random.default_rng(self.depth)
        return rng.integers(0, self.session.n_vocab, n).tolist()

    def fill(self, depth: int) -> None:
        """Leaves depth tokens in the cache, with random rows."""
        # a full cache is the same whatever was behind its rows; razor's goes back over its newest
        # tokens alone
        kept = self.n_random == depth if self.plan.active else self.n_random >= depth
        if depth and kept and self._remove_from(depth):
            return
        # not its data: rows that no token has are not attended to, and what they hold is finite
        self.api.llama_memory_clear(self.memory, False)
        self.depth = self.n_random = 0
        if depth == 0:
            return
        if not self._saved:
            self._decode([0])
            size = self.api.llama_state_seq_get_size(self.ctx, 0)
            saved = (ctypes.c_uint8 * size)()
            self.api.llama_state_seq_get_data(self.ctx, saved, size, 0)
            self._saved = bytes(saved)
        state = self.session.random_state(self.plan, depth, self._saved)
        data = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if not self.api.llama_state_seq_set_data(self.ctx, data, state.nbytes, 0):
            raise RazorError(f"the random cache was refused ({self.session.reason()})")
        self.depth = self.n_random = depth

    def _remove_from(self, depth: int) -> bool:
        """Takes the tokens from depth on out of the cache; False: it cannot do that."""
        if not self.api.llama_memory_seq_rm(self.memory, 0, depth, -1):
            return False
        self.depth, self.n_random = depth, min(self.n_random, depth)
        return True

    def step(self) -> float:
        seconds = self._timed([1])
        if not self.api.llama_memory_seq_rm(self.memory, 0, self.depth, -1):
            raise RazorError("the last token could not be removed from the cache")
        return seconds

    def steps(self, n: int) -> list[float]:
        return [self.step() for _ in range(n)]

    def append(self, n_tokens: int) -> float:
        seconds = self._timed(self._tokens(n_tokens))
        self.depth += n_tokens
        return seconds

    def run(self, n_tokens: int) -> list[float]:
        seconds = [self._timed([token]) for token in self._tokens(n_tokens)]
        self.depth += n_tokens
        return seconds

    def rewind(self, depth: int) -> None:
        if depth == 0 or not self._remove_from(depth):
            self.fill(depth)

    def kv_bytes(self) -> int | None:
        if self.native is not None:
            return int(self.native.stats(self.ctx).kv_bytes)
        told = self.logged.get("KV")
        return sum(told.values()) if told else None

    def device_bytes(self) -> int | None:
        devices = self.session.devices
        if not devices:
            return None
        if self.native is None:
            told = [self.session.logged.get("model"), self.logged.get("KV"),
                    self.logged.get("compute")]  # fmt: skip
            if None in told:
                return None
            return sum(found.get(name, 0) for found in told if found for name in devices)
        buffers = [m for m in self.native.memory(self.ctx) if not m.is_host]
        return sum(m.weights + m.cache + m.compute for m in buffers)


# "llama_kv_cache:      CUDA0 KV buffer size =   512.00 MiB"
BUFFER_SIZE = re.compile(r": +(\S+) +(model|KV|compute) buffer size = +([\d.]+) MiB")
_DEVICE_TYPES = ("CPU", "GPU", "integrated GPU", "accelerator", "meta device")
_CPU, _GPU = 0, 1
READ_CAP = 1 << 30  # bytes that read_seconds() really reads; more take in proportion


class _Ggml:
    """The functions of ggml that a benchmark needs beside llama.cpp's own."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.lib = lib
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
        return [self.lib.ggml_backend_dev_get(i) for i in range(self.lib.ggml_backend_dev_count())]

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
        """Free bytes of each device that is no CPU, by name."""
        return {
            self.lib.ggml_backend_dev_name(device).decode("utf-8", "replace"): self._memory(device)[
                0
            ]
            for device in self._devices()
            if self.lib.ggml_backend_dev_type(device) != _CPU
        }

    def read_seconds(self, n_bytes: int, n_threads: int, gpu: bool) -> float:
        """Seconds that a product of an F32 matrix of n_bytes and a vector takes: its threads have
        to read every byte once, and do little else. The median of five, after one to warm up."""
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
                raise RazorError(f"there is no memory to read {n_bytes:,} bytes; leave out depths")
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


def _peak_rss() -> int | None:
    """Linux tells, and lets the peak start anew; elsewhere it would hold what filling took."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def _reset_peak_rss() -> bool:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


# -- random caches

PARALLEL_FROM = 64 << 20  # bytes of a state
_STATE_HEAD = struct.Struct("<Ii")  # llama_context: magic, sequence
_RAZOR_HEAD = struct.Struct("<IIQ")  # llama_kv_cache_razor: magic, version, fingerprint of the plan


def local_rows(plan: Plan, n_tokens: int) -> int:
    """Rows of a local head's store that n_tokens occupy."""
    from ..plan import COMPENSATION_CELLS

    if _frontier(plan, n_tokens) > plan.sink_tokens:
        return plan.cells
    return min(n_tokens, plan.cells - (COMPENSATION_CELLS if plan.compensation else 0))


def _frontier(plan: Plan, n_tokens: int) -> int:
    """The fold frontier once n_tokens are in the cache."""
    start = (n_tokens - 1) // plan.block * plan.block
    return max(plan.sink_tokens, start - plan.window)


def kept_bytes(plan: Plan, n_tokens: int) -> int:
    """Bytes of K and V that n_tokens occupy: what a decoded token's attention has to read."""
    from ..plan import row_size

    row = row_size(plan.type_k, plan.shape.head_dim_k) + row_size(
        plan.type_v, plan.shape.head_dim_v
    )
    if not plan.active:
        return sum(layer.n_head_kv for layer in plan.layers) * n_tokens * row
    local = local_rows(plan, n_tokens)
    return sum(layer.n_retrieval * n_tokens + layer.n_local * local for layer in plan.layers) * row


def random_state(plan: Plan, n_tokens: int, saved: bytes, n_threads: int = 1) -> np.ndarray:
    """A saved sequence of n_tokens with random rows, as llama_state_seq_set_data takes it (uint8).

    plan: one with flash attention. saved: a state that a context of the plan saved, its head is
    taken over. The layout is that of state_write() of llama_kv_cache and llama_kv_cache_razor.
    """
    import numpy as np

    from ..plan import KV_TYPES, row_size

    rng = np.random.default_rng(n_tokens)

    def random_row(kv_type: str, n_elements: int) -> bytes:
        """With small finite values whatever the type."""
        if kv_type in ("f32", "f16"):
            values = rng.standard_normal(n_elements) / 8
            return values.astype(np.float32 if kv_type == "f32" else np.float16).tobytes()
        if kv_type == "bf16":
            bits = (rng.standard_normal(n_elements) / 8).astype(np.float32).view(np.uint32)
            return (bits >> 16).astype(np.uint16).tobytes()
        info = KV_TYPES[kv_type]
        blocks = rng.integers(0, 256, (n_elements // info.block, info.block_bytes), np.uint8)
        scale = np.float16(2.0**-9).tobytes()
        blocks[:, :2] = np.frombuffer(scale, np.uint8)
        if kv_type in ("q4_1", "q5_1"):  # scale and minimum
            blocks[:, 2:4] = np.frombuffer(scale, np.uint8)
        return blocks.tobytes()

    shape = plan.shape
    parts: list[tuple[bytes, int]] = [(saved[: _STATE_HEAD.size], 1)]  # bytes, how often
    dims = ((plan.type_k, shape.head_dim_k), (plan.type_v, shape.head_dim_v))
    if plan.active:
        parts.append((saved[_STATE_HEAD.size :][: _RAZOR_HEAD.size], 1))
        head = struct.pack("<IIIqI", n_tokens, n_tokens, _frontier(plan, n_tokens), -1, 0)
        parts.append((head, 1))
    if plan.active:  # each retrieval head is saved like a layer
        full = [1] * sum(layer.n_retrieval for layer in plan.layers)
    else:
        full = [layer.n_head_kv for layer in plan.layers if layer.n_head_kv > 0]
    parts.append((struct.pack("<II", 1, n_tokens), 1))  # streams, cells
    cells = np.zeros((n_tokens, 3), np.int32)  # position, number of sequences, sequence 0
    cells[:, 0] = np.arange(n_tokens)
    cells[:, 1] = 1
    parts.append((cells.tobytes(), 1))
    parts.append((struct.pack("<II", 0, len(full)), 1))  # V is not transposed, layers
    for kv_type, head_dim in dims:
        for n_heads in full:
            row_bytes = n_heads * row_size(kv_type, head_dim)
            parts.append((struct.pack("<iQ", KV_TYPES[kv_type].ggml_id, row_bytes), 1))
            parts.append((random_row(kv_type, n_heads * head_dim), n_tokens))
    if plan.active:
        used = local_rows(plan, n_tokens)
        for layer in plan.layers:
            if layer.n_local == 0:
                continue
            for kv_type, head_dim in dims:
                parts.append((random_row(kv_type, layer.n_local * head_dim), used))
            for _, head_dim in dims if plan.compensation else ():
                parts.append((random_row("f32", layer.n_local * head_dim), 2))
    return _repeated(parts, n_threads)


def _repeated(parts: Sequence[tuple[bytes, int]], n_threads: int) -> np.ndarray:
    """The parts one after the other, each as often as it says. What is large is written by several
    threads: most of the time goes into the memory's first use."""
    import numpy as np

    ends = np.cumsum([len(what) * n for what, n in parts])
    out = np.empty(int(ends[-1]), np.uint8)

    def write(part: tuple[tuple[bytes, int], int]) -> None:
        (what, n), end = part
        to = out[end - len(what) * n : end]
        # in pieces, because copying a short row costs as much as copying a long one
        several = min(n, max(1, 65536 // len(what)))
        piece = np.frombuffer(what * several, np.uint8)
        whole = to.size // piece.size
        to[: whole * piece.size].reshape(whole, piece.size)[:] = piece
        rest = to[whole * piece.size :]
        rest[:] = piece[: rest.size]

    work = zip(parts, ends.tolist(), strict=True)
    if n_threads == 1 or out.size < PARALLEL_FROM:
        for part in work:
            write(part)
    else:
        with ThreadPoolExecutor(min(n_threads, 16)) as pool:
            list(pool.map(write, work))
    return out


def _serve(setup: ModelSetup, commands: IO[str], answers: IO[str]) -> None:
    def answer(**what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    try:
        session = Session(setup)
        answer(ok=None)
        for line in commands:
            answer(ok=session.answer(*json.loads(line)))
    except (RazorError, OSError) as error:
        answer(error=str(error))
    except MemoryError:
        answer(error="there is not enough memory to fill the cache; leave out depths or types")


def main() -> None:
    """Serve the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this one ends it
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing a library prints may get between the answers
    _serve(ModelSetup(**json.loads(sys.argv[1])), sys.stdin, answers)
