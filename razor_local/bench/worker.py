"""The worker process of a benchmark: one model and several contexts on it, driven by JSON lines.

All contexts share one model in one process. Two copies of the weights would have different places
in memory, which can cost one side 10 %. Only another build of llama.cpp runs in a process of its
own, and accepts this uncertainty.

Deep caches are loaded as a state with random rows, which takes seconds instead of the hours of a
prefill. The time of a token does not depend on the content of the rows. If a cache already holds
more random rows than needed, the newest are removed instead. A worker with a model on a GPU keeps
the last state in host memory and loads it again from there.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..common.child import python_command
from ..common.machine import free_memory
from ..errors import RazorError
from ..model_setup import ModelSetup
from ..native.rpc import Servers
from .batches import Side
from .ggml import Ggml
from .random_cache import random_state

if TYPE_CHECKING:
    import numpy as np

    from ..plan import Plan

# "llama_kv_cache:      CUDA0 KV buffer size =   512.00 MiB"
BUFFER_SIZE = re.compile(r": +(\S+) +(model|KV|compute) buffer size = +([\d.]+) MiB")


# -- the parent process


class Worker:
    """A running worker process. The constructor and ask() raise RazorError if it fails.

    Args:
        setup: the model to load.
        beside_another: whether it takes turns with a second worker.
    """

    def __init__(self, setup: ModelSetup, beside_another: bool = False) -> None:
        env = dict(os.environ)
        if beside_another:  # idle threads must not spin on the cores of the other worker
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
        """Send a command to the worker and return its answer."""
        assert self._process.stdin is not None
        with suppress(OSError):  # the worker has ended: _read() reports why
            print(json.dumps([command, *args]), file=self._process.stdin, flush=True)
        return self._read()

    def open(self, side: Side) -> Context:
        return Context(self, side, self.ask("open", asdict(side)))

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            why = "see its last message above"
            if code == -getattr(signal, "SIGKILL", 9):  # what the out-of-memory killer sends
                why = "is there enough memory for all contexts? leave out depths or types"
            raise RazorError(f"the process of the benchmark ended with exit code {code}; {why}")
        answer = json.loads(line)
        if "error" in answer:
            raise RazorError(answer["error"])
        return answer["ok"]

    def close(self) -> None:
        # Kill it: it has nothing to save, and a step can take minutes.
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()


@dataclass
class Context:
    """A context in a worker."""

    worker: Worker
    side: Side
    key: int
    depth: int = 0  # tokens in the cache

    def fill(self, depth: int) -> None:
        """Fill the cache with depth tokens of random rows.

        If the cache already holds more such tokens, the newest are removed instead.
        """
        self.worker.ask("fill", self.key, depth)
        self.depth = depth

    def step(self) -> float:
        """Decode one token, remove it from the cache again, and return the seconds."""
        seconds: float = self.worker.ask("step", self.key)
        return seconds

    def steps(self, n: int) -> list[float]:
        """Repeat step() n times and return the seconds of each."""
        seconds: list[float] = self.worker.ask("steps", self.key, n)
        return seconds

    def append(self, n_tokens: int) -> float:
        """Decode a batch of n_tokens, keep them in the cache, and return the seconds."""
        seconds: float = self.worker.ask("append", self.key, n_tokens)
        self.depth += n_tokens
        return seconds

    def run(self, n_tokens: int) -> list[float]:
        """Decode n_tokens one by one, keep them in the cache, and return the seconds of each."""
        seconds: list[float] = self.worker.ask("run", self.key, n_tokens)
        self.depth += n_tokens
        return seconds

    def rewind(self, depth: int) -> None:
        """Go back to depth tokens by removing the newest, or by filling the cache again."""
        if self.depth != depth:
            self.worker.ask("rewind", self.key, depth)
            self.depth = depth

    def kv_bytes(self) -> int | None:
        """Return the bytes of the backends' KV buffers.

        For a stock build they are read from its log, to 0.01 MiB, or None if the log has no such
        line.
        """
        n_bytes: int | None = self.worker.ask("kv_bytes", self.key)
        return n_bytes

    def device_bytes(self) -> int | None:
        """Return the bytes of the model's and the context's buffers on GPUs and other devices.

        Return None without such a device. For a stock build the bytes are read from its log, to
        0.01 MiB.
        """
        n_bytes: int | None = self.worker.ask("device_bytes", self.key)
        return n_bytes

    def close(self) -> None:
        self.worker.ask("close", self.key)


# -- the worker process


class Session:
    """A model and the contexts on it, through the low-level bindings that stock builds share."""

    def __init__(self, setup: ModelSetup) -> None:
        self.setup = setup
        self.logged: dict[str, dict[str, int]] = {}  # bytes by purpose and device
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
        self._servers = Servers(setup.rpc)
        self.ggml = Ggml(llama_cpp.llama_cpp._lib, self._servers.devices)
        self.devices = list(self.ggml.free_memory())

        with self._servers.in_use():
            params = llama_cpp.llama_model_default_params()
            params.n_gpu_layers = setup.n_gpu_layers
            self.model = llama_cpp.llama_model_load_from_file(os.fsencode(setup.model), params)
        if not self.model:
            raise RazorError(f"{setup.model} could not be loaded ({self.reason()})")
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        rope_type = llama_cpp.llama_model_rope_type(self.model)
        self.mrope = bool(rope_type & llama_cpp.LLAMA_ROPE_TYPE_MROPE)
        self._contexts: dict[int, SessionContext] = {}
        self._n_opened = 0
        self._state: tuple[Plan, int, np.ndarray] | None = None  # plan, depth, state

    def _read_log(self, level: int, text: bytes | None, data: int | None) -> None:
        """Read the buffer sizes that a stock build logs."""
        match = BUFFER_SIZE.search((text or b"").decode("utf-8", "replace"))
        if match:  # a compute buffer that is allocated again replaces the earlier one
            device, what, mebibytes = match.groups()
            self.logged.setdefault(what, {})[device] = round(float(mebibytes) * 2**20)

    def reason(self) -> str:
        return self.native.reason() if self.native else "llama.cpp gives no reason"

    def answer(self, command: str, *args: Any) -> Any:
        """Run one command of Worker or Context and return its result."""
        if command in ("describe", "open", "peak_rss", "read_seconds"):
            return getattr(self, command)(*args)
        key, *rest = args
        if command == "close":
            return self._contexts.pop(key).close()
        return getattr(self._contexts[key], command)(*rest)

    def describe(self) -> dict[str, Any]:
        """Describe the build, its backends and devices."""
        info = self.api.llama_print_system_info().decode("utf-8", "replace").strip()
        build = None if self.native is None else asdict(self.native.build)
        return {"build": build, "cpu_features": info} | self.ggml.describe()

    def open(self, side: dict[str, Any]) -> int:
        self._n_opened += 1
        self._contexts[self._n_opened] = SessionContext(self, Side(**side))
        return self._n_opened

    def peak_rss(self, reset: bool = False) -> int | None:
        """Return the peak of resident bytes since the last reset; None where it is unknown."""
        if reset:
            self._state = None  # not part of a context's memory
        if reset and not _reset_peak_rss():
            return None
        return _peak_rss()

    def random_state(self, plan: Plan, depth: int, saved: bytes) -> np.ndarray:
        """Return random_state(), kept for the next call while the host has memory to spare."""
        if self._state is None or self._state[:2] != (plan, depth):
            self._state = None  # free the old one first
            state = random_state(
                plan, depth, saved, mrope=self.mrope, n_threads=self.setup.n_threads
            )
            self._state = (plan, depth, state)
        state = self._state[2]
        if not self.setup.n_gpu_layers or free_memory() < state.nbytes:
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
        self.n_random = 0  # tokens at the start of the cache that have random rows
        self._saved = b""
        self._recurrent = b""  # the states of recurrent layers at n_random tokens
        params = self.api.llama_context_default_params()
        params.n_ctx = self.plan.n_ctx
        params.n_threads = params.n_threads_batch = session.setup.n_threads
        params.type_k = KV_TYPES[side.type_k].ggml_id
        params.type_v = KV_TYPES[side.type_v].ggml_id
        params.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.swa_full = False
        if self.native is None:
            session.logged = {k: v for k, v in session.logged.items() if k == "model"}
            self.ctx = self.api.llama_init_from_model(session.model, params)
            self.logged = session.logged
        else:
            from ..native import make_params

            override = make_params(
                session.profile if side.razor else None,
                type_k_local=side.type_k_local,
                type_v_local=side.type_v_local,
            )
            with self.native.override(override):
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
        tokens: list[int] = rng.integers(0, self.session.n_vocab, n).tolist()
        return tokens

    def fill(self, depth: int) -> None:
        """Fill the cache with depth tokens of random rows."""
        # 1. Reuse the rows that are there. A full cache can drop any number of tokens, a razor
        #    cache can only go back over its newest ones.
        kept = self.n_random == depth if self.plan.active else self.n_random >= depth
        if depth and kept and self._remove_from(depth):
            return
        # 2. Clear the cells but not the data: unused rows hold finite values and are never read.
        self.api.llama_memory_clear(self.memory, False)
        self.depth = self.n_random = 0
        if depth == 0:
            return
        # 3. Save a state of one token for its head, once.
        if not self._saved:
            self._decode([0])
            self._saved = self._save(0)
        # 4. Load a state with random rows.
        state = self.session.random_state(self.plan, depth, self._saved)
        data = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if not self.api.llama_state_seq_set_data(self.ctx, data, state.nbytes, 0):
            raise RazorError(f"the random cache was refused ({self.session.reason()})")
        if self.plan.recurrent_bytes:
            self._recurrent = self._save(self.api.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)
        self.depth = self.n_random = depth

    def _save(self, flags: int) -> bytes:
        size = self.api.llama_state_seq_get_size_ext(self.ctx, 0, flags)
        saved = (ctypes.c_uint8 * size)()
        self.api.llama_state_seq_get_data_ext(self.ctx, saved, size, 0, flags)
        return bytes(saved)

    def _remove_from(self, depth: int) -> bool:
        """Remove the tokens from depth on. Return False where the cache cannot do that."""
        if not self.api.llama_memory_seq_rm(self.memory, 0, depth, -1):
            return False
        self.depth, self.n_random = depth, min(self.n_random, depth)
        return True

    def step(self) -> float:
        seconds = self._timed([1])
        if self._recurrent and self.depth:  # these states cannot go back by a token
            data = (ctypes.c_uint8 * len(self._recurrent)).from_buffer_copy(self._recurrent)
            flags = self.api.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
            self.api.llama_state_seq_set_data_ext(self.ctx, data, len(data), 0, flags)
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
        logged = self.logged.get("KV")
        return sum(logged.values()) if logged else None

    def device_bytes(self) -> int | None:
        devices = self.session.devices
        if not devices:
            return None
        if self.native is None:
            logged = [
                self.session.logged.get("model"),
                self.logged.get("KV"),
                self.logged.get("compute"),
            ]
            if None in logged:
                return None
            return sum(found.get(name, 0) for found in logged if found for name in devices)
        buffers = [m for m in self.native.memory(self.ctx) if not m.is_host]
        return sum(int(m.weights + m.cache + m.compute) for m in buffers)


def _peak_rss() -> int | None:
    """Return the peak of this process's resident bytes since the last reset, None if unknown.

    psutil cannot reset the peak, so its value would include the memory that filling takes.
    """
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
    """Answer the commands of the parent process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep what libraries print out of the answers
    _serve(ModelSetup(**json.loads(sys.argv[1])), sys.stdin, answers)
