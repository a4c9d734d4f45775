"""Measure how strongly each attention head of a running model attends to repetitions.

The method is that of RazorAttention (arXiv 2407.15891, sections 3.2 and 3.3). The text is K random
tokens, repeated several times: it has no meaning, so only the repetition can draw attention to
distant tokens. For a query at position i, the *echo tokens* are the earlier positions with the same
token as i, and the *induction tokens* are the positions one after them. With A[h, i, j] the
attention after softmax of query head h from i to j,

    echo(h)      = mean over i of the sum of A[h, i, j] over the echo tokens j of i
    induction(h) = mean over i of the sum of A[h, i, j] over the induction tokens j of i

where i runs over all positions from the second repetition on (K to repeats * K - 1, counted from
the first random token). Both are between 0 and 1.

The model runs unchanged, quantized or not, on any backend. llama.cpp's eval callback provides
`kq_soft_max-<layer>`, which exists only without flash attention. Only a few numbers per query are
kept, so memory is bounded by one ubatch of attention for every model.
"""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np

from .. import native
from ..common.progress import Progress, Stop
from ..errors import ConvertError, RazorError, UnsupportedError
from ..gguf.header import Tensor
from ..gguf.hyper_parameters import MAX_N_CTX
from ..model_file import open_model
from ..model_shape import ModelShape
from ..native.models import load_model, vocabulary
from ..native.probe import AttentionProbe, attention_context
from ..plan import make_plan
from ..profile import Profile
from ..scores import MIN_TOKENS, Scores

DEFAULT_TOKENS = 2500
DEFAULT_REPEATS = 4
DEFAULT_MAX_MEMORY = 3 << 30
MAX_UBATCH = 512  # more is not faster
# Tokens that measure_pace() reads: the first part pages in the weights, and the second part shows
# whether it is worth reading more.
PACE_TOKENS = (16, 64, 256)


@dataclass(frozen=True)
class Memory:
    """The bytes that a measurement needs in addition to the model."""

    n_ubatch: int
    kv_cache: int
    attention: int
    activations: int

    @property
    def total(self) -> int:
        return self.kv_cache + self.attention + self.activations


def calibrate(
    model_path: str | os.PathLike[str],
    *,
    tokens: int | None = None,
    repeats: int = DEFAULT_REPEATS,
    seed: int = 0,
    max_memory: int = DEFAULT_MAX_MEMORY,
    n_threads: int | None = None,
    n_gpu_layers: int = -1,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> Scores:
    """Measure the echo and induction score of every query head of a model.

    Special, control, unused and byte tokens are left out, and no token is drawn twice before all
    others were. A BOS token comes first if the model's tokenizer adds one.

    Args:
        model_path: the model file.
        tokens: K, by default 2,500 or as many as the trained context allows.
        repeats: how often the K tokens occur in the text.
        seed: seed of the random tokens.
        max_memory: bytes to use in addition to the model. It limits the size of the ubatches, on
            which the scores do not depend.
        n_threads: number of CPU threads, by default one per core.
        n_gpu_layers: number of layers on the GPU, -1 for all.
        progress: called with the progress.
        stop: asked between two operations of the computation.

    Raises:
        UnsupportedError: the model cannot have a razor cache.
        ConvertError: the text is too long, or the memory too small.
        Stopped: stop() returned True.
        GGUFError, ProfileError, RazorError, OSError: the model cannot be read or run.
    """
    file = open_model(model_path)
    model_path, shape = file.path, file.shape
    if repeats < 2:
        raise ConvertError(f"{repeats} is not a number of repeats; expected 2 or more")
    if not 0 <= seed < 2**32:
        raise ConvertError(f"the seed is {seed}, expected 0 to {2**32 - 1}")
    lib = native.load()
    from llama_cpp import llama_cpp as C

    C.llama_backend_init()
    probe = _Probe(lib.lib, C, shape, progress, stop)
    with ExitStack() as stack:
        model = stack.enter_context(load_model(lib, C, model_path, n_gpu_layers, probe))
        _check_supported(lib, C, model, shape)
        bos, usable = vocabulary(C, model)
        n_tokens = _n_tokens(tokens, repeats, len(bos), shape)
        text = np.concatenate([bos, np.tile(draw_tokens(usable, n_tokens, seed), repeats)])
        memory = plan_memory(shape, len(text), max_memory)
        probe.start(text, len(bos) + n_tokens, _work(file.header.tensors, shape))
        ctx = stack.enter_context(
            attention_context(
                lib, C, model, model_path, len(text), memory.n_ubatch, n_threads, probe
            )
        )
        for start in range(0, len(text), memory.n_ubatch):
            _read(probe, ctx, start, text[start : start + memory.n_ubatch])
    return Scores(
        **probe.scores(),
        n_head=shape.n_head,
        n_head_kv=shape.n_head_kv,
        calibration={
            "source": "measured on the model",
            "tokens": n_tokens,
            "repeats": repeats,
            "seed": seed,
            "bos": len(bos),
            "tool_version": f"razor-local {version('razor-local')}",
            "model_fingerprint": shape.fingerprint,
        },
    )


@dataclass(frozen=True)
class Pace:
    """The speed of a model, in seconds.

    Attributes:
        loading: time to load the model.
        calibration: estimated time for all tokens of calibrate().
        token: time per token of a short text.
    """

    loading: float
    calibration: float
    token: float


def measure_pace(
    model_path: str | os.PathLike[str],
    *,
    tokens: int | None = None,
    repeats: int = DEFAULT_REPEATS,
    max_memory: int = DEFAULT_MAX_MEMORY,
    n_threads: int | None = None,
    n_gpu_layers: int = -1,
    enough: float = math.inf,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> Pace:
    """Time the model on a few hundred tokens, and estimate what calibrate() takes.

    Args:
        enough: seconds; fewer tokens are read if calibrate() seems to take more than twice this.

    The other arguments and the errors are those of calibrate().
    """
    file = open_model(model_path)
    model_path, shape = file.path, file.shape
    lib = native.load()
    from llama_cpp import llama_cpp as C

    C.llama_backend_init()
    probe = _Probe(lib.lib, C, shape, progress, stop, "timing the model")
    began = time.monotonic()
    with ExitStack() as stack:
        model = stack.enter_context(load_model(lib, C, model_path, n_gpu_layers, probe))
        loading = time.monotonic() - began
        _check_supported(lib, C, model, shape)
        bos, usable = vocabulary(C, model)
        n_text = len(bos) + repeats * _n_tokens(tokens, repeats, len(bos), shape)
        memory = plan_memory(shape, n_text, max_memory)
        work = _work(file.header.tensors, shape)
        text = draw_tokens(usable, min(sum(PACE_TOKENS), n_text), 0)
        probe.start(text, 0, work)
        ctx = stack.enter_context(
            attention_context(
                lib, C, model, model_path, len(text), min(memory.n_ubatch, len(text)), n_threads,
                probe,
            )
        )  # fmt: skip
        start = 0
        for n in PACE_TOKENS:
            part = text[start : start + n]
            if not len(part):
                break
            began = time.monotonic()
            for i in range(0, len(part), memory.n_ubatch):
                _read(probe, ctx, start + i, part[i : i + memory.n_ubatch])
            seconds = time.monotonic() - began
            end = start + len(part)
            calibration = seconds * work(0, n_text) / work(start, end)
            token, start = seconds / len(part), end
            if start > PACE_TOKENS[0] and calibration > 2 * enough:
                break
    return Pace(loading, calibration, token)


def draw_tokens(usable: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Draw n of the usable tokens at random, int32, each equally often up to a difference of one.

    No two neighbors are equal, not even where two repetitions meet: the echo token of the second
    would be its induction token as well.
    """
    if len(usable) < 3:
        raise ConvertError(
            f"the vocabulary has only {len(usable)} ordinary tokens, which are too few to repeat"
        )
    rng = np.random.default_rng(seed)
    text: np.ndarray = np.empty(0, np.int32)
    while len(text) < n:
        block = rng.permutation(usable)[: n - len(text)].astype(np.int32)
        seam = len(text) and block[0] == text[-1]
        end = len(text) + len(block) == n and block[-1] == (text[0] if len(text) else -1)
        if not seam and not end:
            text = np.concatenate([text, block])
    return text


def plan_memory(shape: ModelShape, n_tokens: int, max_memory: int) -> Memory:
    """Find the largest ubatch that fits max_memory bytes, and its memory. Raises ConvertError."""
    n_ctx = -(-n_tokens // 256) * 256
    n_head = max(shape.n_head)
    kv_cache = make_plan(shape, None, n_ctx, flash_attn=False).kv_bytes
    n_ubatch = min(MAX_UBATCH, 1 << (n_tokens - 1).bit_length())
    while True:
        memory = Memory(
            n_ubatch,
            kv_cache,
            # f32 attention of all heads, and as much again for work buffers and the mask
            2 * 4 * n_head * n_ubatch * n_ctx,
            # a bound for feed-forward layers of up to 8 times the embedding
            4 * 32 * n_head * shape.head_dim_k * n_ubatch,
        )
        if memory.total <= max_memory:
            return memory
        if n_ubatch == 1:
            raise ConvertError(
                f"{n_tokens:,} tokens need {_mib(memory.total)} beside the model"
                f" ({_mib(kv_cache)} of it for the KV cache), but {_mib(max_memory)} are allowed;"
                " allow more with --max-memory or take fewer --tokens"
            )
        n_ubatch //= 2


def _read(probe: _Probe, ctx: int, start: int, part: np.ndarray) -> None:
    """Read the tokens at positions start and up. Raises RazorError, and what probe.check() does."""
    code = probe.read(ctx, start, part)
    probe.check()
    if code != 0:
        reason = native.load().reason(f"llama_decode {code}")
        raise RazorError(
            f"computing tokens {start} to {start + len(part)} of {probe.shape.path} failed"
            f" ({reason})"
        )


class _Probe(AttentionProbe):
    """Sum the attention to repetitions. label: the label for progress()."""

    def __init__(
        self,
        lib: ctypes.CDLL,
        C: Any,
        shape: ModelShape,
        progress: Progress | None,
        stop: Stop | None,
        label: str = "measuring the heads",
    ) -> None:
        super().__init__(lib, C, shape, progress, stop)
        self.label = label
        self.kernel = _kernel()
        self.echo = [np.zeros(n) for n in self.n_head]  # f64 sums
        self.induction = [np.zeros(n) for n in self.n_head]
        self.n_seen = np.zeros(shape.n_layer, np.int64)  # queries per layer

    def start(self, text: np.ndarray, first_query: int, work: Callable[[int, int], float]) -> None:
        """Begin a text of int32 tokens whose queries count from position first_query on."""
        self.text, self.first_query, self.work = text, first_query, work
        self.starts, self.copies = find_copies(text, first_query)
        self.total_work = work(0, len(text))

    def read(self, ctx: int, start: int, part: np.ndarray) -> int:
        """Decode tokens from position start on and return the result of llama_decode."""
        self.wanted = start + len(part) > self.first_query
        code = self.decode(ctx, start, part)
        if code == 0 and not self.stopped:
            self._report(1.0)
        return code

    def scores(self) -> dict[str, np.ndarray]:
        """Return the means over all queries, f32 [sum of n_head].

        Raises:
            UnsupportedError: the model does not show the attention of all queries.
            RazorError: a value is not finite.
        """
        n_queries = len(self.text) - self.first_query
        for il, n_kv in enumerate(self.shape.n_head_kv):
            if n_kv and self.n_seen[il] != n_queries:
                raise UnsupportedError(
                    f"layer {il} of this model ({self.shape.arch}) shows its attention for"
                    f" {self.n_seen[il]} of {n_queries} queries; its heads cannot be measured"
                )
        means = {}
        for name in ("echo", "induction"):
            sums = self.flat(getattr(self, name))
            if not np.isfinite(sums).all():
                raise RazorError("the model's attention is not a number; the file may be damaged")
            means[name] = (sums / n_queries).astype(np.float32)
        return means

    def on_head(self, il: int, ih: int, attention: np.ndarray) -> None:
        skip = max(self.first_query - self.position, 0)  # rows before the first query
        first = self.position + skip - self.first_query
        starts = self.starts[first : first + self.n_part - skip + 1]
        echo, induction = self.kernel(attention[skip:], starts, self.copies)
        self.echo[il][ih] += echo
        self.induction[il][ih] += induction

    def on_layer(self, il: int) -> None:
        self.n_seen[il] += self.n_part - max(self.first_query - self.position, 0)
        self._report((il + 1) / self.shape.n_layer)

    def _report(self, part: float) -> None:
        before = self.work(0, self.position)
        done = before + part * self.work(self.position, self.position + self.n_part)
        self.progress(min(done, self.total_work), self.total_work, self.label)


def find_copies(text: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the earlier positions of the same token for each position of text from first on.

    Returns starts i64 [len(text) - first + 1] and copies i64. The earlier positions for position
    first + q are copies[starts[q]:starts[q + 1]].
    """
    seen: dict[int, list[int]] = {}
    starts, copies = [0], []
    for i, token in enumerate(text.tolist()):
        earlier = seen.setdefault(token, [])
        if i >= first:
            copies += earlier
            starts.append(len(copies))
        earlier.append(i)
    return np.array(starts, np.int64), np.array(copies, np.int64)


def _add_up(attention: np.ndarray, starts: np.ndarray, copies: np.ndarray) -> tuple[float, float]:
    """Sum the attention of all queries to copies, and to the positions after them.

    attention: f32 [n_queries, n_kv] of one head. starts, copies: the result of find_copies().
    """
    echo = induction = 0.0
    for q in range(len(starts) - 1):
        for j in range(starts[q], starts[q + 1]):
            echo += attention[q, copies[j]]
            induction += attention[q, copies[j] + 1]
    return echo, induction


@cache
def _kernel() -> Callable[..., tuple[float, float]]:
    """Compile _add_up(). It reads a few numbers per row, so one thread is enough."""
    try:
        from numba import njit
    except ImportError as error:
        raise UnsupportedError(
            f"measuring heads needs numba ({error}); install it, or import it in the application"
            " that PyInstaller bundles"
        ) from error

    try:
        kernel = njit(cache=True, nogil=True)(_add_up)
    except RuntimeError:  # numba found no folder to cache the code in
        kernel = njit(nogil=True)(_add_up)
    none = np.zeros(0, np.int64)
    kernel(np.zeros((0, 1), np.float32), np.zeros(1, np.int64), none)  # compile now
    return kernel


def _check_supported(lib: native.Native, C: Any, model: int, shape: ModelShape) -> None:
    """Raise UnsupportedError if this model can never run with a razor cache."""
    if shape.max_alibi_bias:
        raise UnsupportedError(
            f"the heads of {shape.path} are not measured: the scopes of ALiBi heads are computed"
            " from the weights"
        )
    local = Profile(tuple(np.zeros(n, np.uint8) for n in shape.n_head_kv), window_min=64)
    params = C.llama_context_default_params()
    params.n_ctx = params.n_batch = 1024
    params.n_ubatch = 64
    params.flash_attn_type = C.LLAMA_FLASH_ATTN_TYPE_DISABLED
    with lib.override(native.make_params(local)):
        ctx = C.llama_init_from_model(model, params)
        error = lib.last_error()
    if ctx:
        C.llama_free(ctx)
    elif error:
        raise UnsupportedError(f"the heads of {shape.path} are not measured: {error}")


def _n_tokens(tokens: int | None, repeats: int, n_bos: int, shape: ModelShape) -> int:
    """Return K. Raises ConvertError if the text would not fit the model's context."""
    most = (shape.n_ctx_train or MAX_N_CTX) - n_bos
    n = min(DEFAULT_TOKENS, most // repeats) if tokens is None else tokens
    if n < MIN_TOKENS:
        raise ConvertError(
            f"{n} tokens are too few to measure heads, expected {MIN_TOKENS} or more"
            + (f"; {repeats} repeats of them do not fit into {most:,}" if tokens is None else "")
        )
    if n * repeats > most:
        raise ConvertError(
            f"{repeats} x {n:,} tokens are more than the {most:,} that the model was trained for;"
            f" take at most {most // repeats:,} --tokens"
        )
    return n


def _work(tensors: Iterable[Tensor], shape: ModelShape) -> Callable[[int, int], float]:
    """Return a function that counts the multiplications for the positions [start, end)."""
    per_token = sum(math.prod(t.dims) for t in tensors if len(t.dims) > 1)
    heads = sum(q for q, kv in zip(shape.n_head, shape.n_head_kv, strict=True) if kv)
    # A multiplication of attention takes about twice as long as one with weights.
    per_pair = 2 * heads * (shape.head_dim_k + shape.head_dim_v)

    def work(start: int, end: int) -> float:
        return per_token * (end - start) + per_pair * (end**2 - start**2) / 2

    return work


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"
