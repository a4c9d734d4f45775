"""Decode speed of a razor context against a full cache, token by token in turn.

Both contexts share one model in one process: two copies of the weights would lie differently in
memory, which alone was seen to cost one side 10 %. Only another build of llama.cpp needs a process
of its own, with that uncertainty. The two decode alternately, never at once, and what counts is the
median of the paired ratios: a machine that is slow for a second is slow for both. After each token
the cache is rolled back, so that all of them are decoded at the same depth.

Deep caches are not prefilled but loaded as a state with random rows, which takes seconds instead
of hours; how long a token takes does not depend on what the rows hold.
"""

from __future__ import annotations

import json
import os
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .errors import RazorError

if TYPE_CHECKING:
    from .plan import Plan

N_WARMUP = 3  # tokens per side and depth that do not count


@dataclass(frozen=True)
class Side:
    """One of the two contexts. lib: folder of the library, None for the package's own."""

    name: str
    razor: bool
    type_k: str
    type_v: str
    lib: str | None = None


@dataclass(frozen=True)
class DecodeResult:
    """Medians over pairs of single-token decodes at one depth. ratio > 1: razor is faster."""

    depth: int
    pairs: int
    razor_ms: float
    full_ms: float
    ratio: float
    ratio_low: float  # quartiles of the paired ratios
    ratio_high: float
    razor_kv_bytes: int
    full_kv_bytes: int | None  # None: a build that does not report them


def bench_decode(
    model: Path,
    depths: Sequence[int],
    *,
    n_ctx: int,
    pairs: int = 40,
    n_threads: int = 1,
    n_gpu_layers: int = 0,
    type_k: str = "f16",
    type_v: str = "f16",
    full_type_k: str = "f16",
    full_type_v: str = "f16",
    sidecar: Path | None = None,
    stock_lib: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[DecodeResult]:
    """Time single-token decodes at each depth (tokens already in the cache), flash attention on.

    stock_lib: folder of a stock build for the full cache, None: the package's own library with
    razor off. Raises RazorError if a side cannot be set up.
    """
    deepest = max(depths)
    if deepest + 1 > n_ctx:
        raise RazorError(f"depth {deepest} does not fit into a context of {n_ctx} tokens; raise -c")
    common = {
        "model": str(model),
        "n_ctx": n_ctx,
        "n_threads": n_threads,
        "n_gpu_layers": n_gpu_layers,
        "sidecar": None if sidecar is None else str(sidecar),
    }
    sides = [
        Side("razor", True, type_k, type_v),
        Side(
            "full", False, full_type_k, full_type_v, None if stock_lib is None else str(stock_lib)
        ),
    ]
    groups = [sides] if stock_lib is None else [sides[:1], sides[1:]]
    workers: list[_Worker] = []
    try:
        for group in groups:
            progress("loading the model")
            workers.append(_Worker(group, common))
        contexts = [_Context(w, i) for w in workers for i in range(len(w.sides))]
        return [_bench_depth(contexts, depth, pairs, progress) for depth in depths]
    finally:
        for worker in workers:
            worker.close()


def _bench_depth(
    contexts: list[_Context], depth: int, pairs: int, progress: Callable[[str], None]
) -> DecodeResult:
    razor, full = contexts
    for context in contexts:
        progress(f"filling {depth} tokens ({context.side.name})")
        context.ask("fill", depth)
    for _ in range(N_WARMUP):
        for context in contexts:
            context.ask("step")
    times: list[tuple[float, float]] = []
    for i in range(pairs):
        progress(f"depth {depth}: pair {i + 1} of {pairs}")
        # whoever comes second finds the machine warmer: take turns
        first, second = (razor, full) if i % 2 == 0 else (full, razor)
        a, b = first.ask("step"), second.ask("step")
        times.append((a, b) if i % 2 == 0 else (b, a))
    ratios = [b / a for a, b in times]
    quartiles = statistics.quantiles(ratios, n=4) if pairs > 1 else [ratios[0]] * 3
    return DecodeResult(
        depth=depth,
        pairs=pairs,
        razor_ms=statistics.median(a for a, _ in times) * 1e3,
        full_ms=statistics.median(b for _, b in times) * 1e3,
        ratio=statistics.median(ratios),
        ratio_low=quartiles[0],
        ratio_high=quartiles[2],
        razor_kv_bytes=razor.ask("kv_bytes"),
        full_kv_bytes=full.ask("kv_bytes"),
    )


class _Worker:
    """A process with a model and the contexts of some sides, driven by JSON lines."""

    def __init__(self, sides: list[Side], common: dict[str, Any]) -> None:
        self.sides = sides
        env = dict(os.environ)
        # a thread that waits for its turn must not spin on the core of the other side
        env.setdefault("OMP_WAIT_POLICY", "passive")
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "razor_local.bench",
                json.dumps([asdict(s) | common for s in sides]),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self._read()

    def ask(self, index: int, command: str, *args: Any) -> Any:
        assert self._process.stdin is not None
        try:
            print(json.dumps([index, command, *args]), file=self._process.stdin, flush=True)
        except OSError:
            pass  # it has ended: _read says why
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RazorError(
                f"the process of the benchmark ({self._names()}) ended with exit code"
                f" {self._process.wait()}; is there enough memory for both contexts?"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise RazorError(f"{self._names()}: {answer['error']}")
        return answer["ok"]

    def _names(self) -> str:
        return " and ".join(side.name for side in self.sides)

    def close(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except OSError:
            pass
        self._process.wait()


@dataclass(frozen=True)
class _Context:
    """One side's context in its worker."""

    worker: _Worker
    index: int

    @property
    def side(self) -> Side:
        return self.worker.sides[self.index]

    def ask(self, command: str, *args: Any) -> Any:
        return self.worker.ask(self.index, command, *args)


# what runs in a worker's process


class _Bindings:
    """The context of one side on the low-level bindings, which a stock build has too."""

    def __init__(self, task: dict[str, Any], first: _Bindings | None = None) -> None:
        """first: a side whose library and model are used again."""
        from .plan import KV_TYPES, make_plan
        from .profile import read_model_shape, read_profile, read_sidecar

        shape = read_model_shape(task["model"])
        profile = None
        if task["razor"]:
            profile = (
                read_sidecar(task["sidecar"], shape)
                if task["sidecar"]
                else read_profile(task["model"])
            )
            if profile is None:
                raise RazorError(
                    f"{task['model']} has no razor profile; make one with 'razor-local convert' or"
                    " name one with --sidecar"
                )
        self.plan = make_plan(shape, profile, task["n_ctx"], task["type_k"], task["type_v"])
        if task["razor"] and not self.plan.active:
            raise RazorError(
                f"razor does nothing at {self.plan.n_ctx} tokens ({self.plan.why_inactive});"
                " raise -c or convert the model with a smaller window"
            )

        if first is None:
            self._load(task)
        else:
            self.native, self.api, self.model = first.native, first.api, first.model
        llama_cpp = self.api

        ctx_params = llama_cpp.llama_context_default_params()
        ctx_params.n_ctx = self.plan.n_ctx
        ctx_params.n_threads = ctx_params.n_threads_batch = task["n_threads"]
        ctx_params.type_k = KV_TYPES[task["type_k"]].ggml_id
        ctx_params.type_v = KV_TYPES[task["type_v"]].ggml_id
        ctx_params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if self.native is None:
            self.ctx = llama_cpp.llama_init_from_model(self.model, ctx_params)
        else:
            from .native import make_params

            with self.native.override(make_params(profile)):
                self.ctx = llama_cpp.llama_init_from_model(self.model, ctx_params)
        if not self.ctx:
            raise RazorError(f"the context could not be created ({self._reason()})")
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self.depth = 0

    def _load(self, task: dict[str, Any]) -> None:
        self.native = None
        if task["lib"]:
            os.environ["LLAMA_CPP_LIB_PATH"] = task["lib"]
        else:
            from .native import load

            self.native = load()
        import llama_cpp

        self.api = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        if self.native is None:
            llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()

        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = task["n_gpu_layers"]
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(task["model"]), params)
        if not self.model:
            raise RazorError(f"{task['model']} could not be loaded ({self._reason()})")

    def _reason(self) -> str:
        return (self.native and self.native.last_error()) or "llama.cpp gave no reason"

    def decode(self, token: int) -> None:
        import ctypes

        ids = (ctypes.c_int32 * 1)(token)  # the batch only points to it
        batch = self.api.llama_batch_get_one(ids, 1)
        if self.api.llama_decode(self.ctx, batch):
            raise RazorError(f"a token could not be decoded ({self._reason()})")
        self.api.llama_synchronize(self.ctx)

    def fill(self, depth: int) -> None:
        """Leave depth tokens in the cache, with random rows."""
        import ctypes

        self.api.llama_memory_clear(self.memory, True)
        self.depth = depth
        if depth == 0:
            return
        self.decode(0)
        size = self.api.llama_state_seq_get_size(self.ctx, 0)
        saved = (ctypes.c_uint8 * size)()
        self.api.llama_state_seq_get_data(self.ctx, saved, size, 0)
        state = random_state(self.plan, depth, bytes(saved))
        data = (ctypes.c_uint8 * len(state)).from_buffer(state)
        if not self.api.llama_state_seq_set_data(self.ctx, data, len(state), 0):
            raise RazorError(f"the random cache was refused ({self._reason()})")

    def step(self) -> float:
        """Seconds of one decode at the current depth; the token is taken out again."""
        start = time.perf_counter()
        self.decode(1)
        seconds = time.perf_counter() - start
        if not self.api.llama_memory_seq_rm(self.memory, 0, self.depth, -1):
            raise RazorError("the last token could not be removed from the cache")
        return seconds

    def kv_bytes(self) -> int | None:
        return None if self.native is None else int(self.native.stats(self.ctx).kv_bytes)


_STATE_HEAD = struct.Struct("<Ii")  # llama_context: magic, sequence
_RAZOR_HEAD = struct.Struct("<IIQ")  # llama_kv_cache_razor: magic, version, fingerprint of the plan


def random_state(plan: Plan, n_tokens: int, saved: bytes) -> bytearray:
    """A saved sequence of n_tokens with random rows, as llama_state_seq_set_data takes it.

    plan: one with flash attention. saved: a state that a context of the plan saved, its head is
    taken over. The layout is that of state_write() of llama_kv_cache and llama_kv_cache_razor.
    """
    import numpy as np

    from .plan import KV_TYPES, row_size

    rng = np.random.default_rng(n_tokens)

    def rows(kv_type: str, n_elements: int, n: int) -> bytes:
        """n rows; one random row repeated, with small finite values whatever the type."""
        if kv_type in ("f32", "f16"):
            values = rng.standard_normal(n_elements) / 8
            row = values.astype(np.float32 if kv_type == "f32" else np.float16).tobytes()
        elif kv_type == "bf16":
            bits = (rng.standard_normal(n_elements) / 8).astype(np.float32).view(np.uint32)
            row = (bits >> 16).astype(np.uint16).tobytes()
        else:
            info = KV_TYPES[kv_type]
            blocks = rng.integers(0, 256, (n_elements // info.block, info.block_bytes), np.uint8)
            scale = np.float16(2.0**-9).tobytes()
            blocks[:, :2] = np.frombuffer(scale, np.uint8)
            if kv_type in ("q4_1", "q5_1"):  # scale and minimum
                blocks[:, 2:4] = np.frombuffer(scale, np.uint8)
            row = blocks.tobytes()
        return row * n

    shape, out = plan.shape, bytearray(saved[: _STATE_HEAD.size])
    dims = ((plan.type_k, shape.head_dim_k), (plan.type_v, shape.head_dim_v))
    if plan.active:
        start = (n_tokens - 1) // plan.block * plan.block
        frontier = max(plan.sink_tokens, start - plan.window)
        out += saved[_STATE_HEAD.size :][: _RAZOR_HEAD.size]
        out += struct.pack("<IIIqI", n_tokens, n_tokens, frontier, -1, 0)
    full = [layer.n_retrieval if plan.active else layer.n_head_kv for layer in plan.layers]
    full = [n for n in full if n > 0]
    out += struct.pack("<II", 1, n_tokens)  # streams, cells
    cells = np.zeros((n_tokens, 3), np.int32)  # position, number of sequences, sequence 0
    cells[:, 0] = np.arange(n_tokens)
    cells[:, 1] = 1
    out += cells.tobytes()
    out += struct.pack("<II", 0, len(full))  # V is not transposed, layers
    for kv_type, head_dim in dims:
        for n_heads in full:
            out += struct.pack(
                "<iQ", KV_TYPES[kv_type].ggml_id, n_heads * row_size(kv_type, head_dim)
            )
            out += rows(kv_type, n_heads * head_dim, n_tokens)
    if plan.active:
        ring = n_tokens - plan.sink_tokens
        extra = 4 if plan.compensation else 0
        used = n_tokens if ring <= 0 else plan.sink_tokens + extra + ring
        used = min(used, plan.cells)
        for layer in plan.layers:
            if layer.n_local == 0:
                continue
            for kv_type, head_dim in dims:
                out += rows(kv_type, layer.n_local * head_dim, used)
            for _, head_dim in dims if plan.compensation else ():
                out += rows("f32", layer.n_local * head_dim, 2)
    return out


def _serve(tasks: list[dict[str, Any]], commands: IO[str], answers: IO[str]) -> None:
    def answer(**what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    try:
        sides: list[_Bindings] = []
        for task in tasks:
            sides.append(_Bindings(task, sides[0] if sides else None))
        answer(ok=None)
        for line in commands:
            index, command, *args = json.loads(line)
            answer(ok=getattr(sides[index], command)(*args))
    except (RazorError, OSError) as error:
        answer(error=str(error))


if __name__ == "__main__":
    _out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing a library prints may get between the answers
    _serve(json.loads(sys.argv[1]), sys.stdin, _out)
