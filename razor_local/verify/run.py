"""Compare the attention of every layer of a running model with the reference.

The model runs as usual, with the native cache, on any backend and with any KV type. The eval
callback passes the inputs of each layer's attention (queries, keys and values, after RoPE) and its
output. reference.py computes the same output from the paper, with the heads that Python reads from
the file. Nothing that the library reports is trusted. Even the choice of KV heads whose keys it
stores for the whole context is measured: the keys of all heads are compared with the rows written
into each cache.

A second context with a full cache reads the same tokens. Its error against the reference shows how
precise the arithmetic of this backend is, and the KL divergence of the logits shows what
RazorAttention costs on this text. If local heads have other KV types, a third context with a full
cache of these types shows how precise the arithmetic is with them.

docs/verification.md explains what is checked, with which bounds, and what is not.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np

from .. import native
from ..common.machine import n_cores
from ..common.progress import Progress, Stop
from ..errors import ProfileError, RazorError, UnsupportedError
from ..model_file import open_model
from ..model_shape import ModelShape
from ..native.callbacks import Control
from ..native.models import load_model, new_context, vocabulary
from ..native.tensors import bind
from ..plan import KV_TYPES, Plan, make_plan, padded_n_ctx
from ..profile import Profile
from . import reference
from .capture import Capture
from .compare import compare_layer, kl_divergence, with_full_types
from .result import Divergence, GroupResult, Verification

DEFAULT_N_CTX = 8192
DEFAULT_ROWS = 1024
SINGLE = 64  # tokens at the end that are decoded one by one
MORE_FOLDS = 3  # after the first, where the number of tokens is free


def verify(
    model_path: str | os.PathLike[str],
    *,
    n_ctx: int = 0,
    n_tokens: int = 0,
    text: str | None = None,
    seed: int = 0,
    rows: int = DEFAULT_ROWS,
    sidecar: str | os.PathLike[str] | None = None,
    type_k: str = "f16",
    type_v: str = "f16",
    flash_attn: bool = True,
    n_batch: int = 512,
    n_ubatch: int = 512,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
    type_k_local: str | None = None,
    type_v_local: str | None = None,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> Verification:
    """Run a model and compare each layer's attention with the reference.

    The last 64 tokens are decoded one by one.

    Args:
        model_path: the model file.
        n_ctx: context in tokens. 0 means 8,192, or the trained length if that is less.
        n_tokens: tokens to run. 0 means enough for a few folds, or all of text.
        text: the text to run, by default random ordinary tokens.
        seed: seed of the random tokens and of the choice of rows.
        rows: queries to compare in each layer, spread over the text, including the last 64. 0
            compares all.
        sidecar: the profile, if not the one in the model.
        type_k, type_v: KV types.
        type_k_local, type_v_local: KV types of local heads, by default type_k and type_v.
        flash_attn: whether to use flash attention.
        n_batch, n_ubatch: tokens per batch and per ubatch.
        n_threads: number of CPU threads, by default one per core.
        n_gpu_layers: number of layers on the GPU, -1 for all.
        progress: called with the progress.
        stop: asked between two operations of the computation.

    Raises:
        UnsupportedError: the model does not show its attention.
        ProfileError: there is no profile, its plan is not active, or nothing would be folded.
        Stopped: stop() returned True.
        GGUFError, RazorError, OSError: the model cannot be read or run.
    """
    # 1. Read the model and plan the cache.
    file = open_model(model_path)
    model_path, shape = file.path, file.shape
    found = file.find_profile(sidecar)
    if found is None:
        raise file.no_profile()
    profile = found.profile
    plan = _plan(
        shape, profile, n_ctx, type_k, type_v, flash_attn, min(n_ubatch, n_batch), type_k_local,
        type_v_local,
    )  # fmt: skip
    if n_ubatch > n_batch or n_batch < 1 or n_ubatch < 1:
        raise RazorError(
            f"the batch has {n_batch} tokens and the ubatch {n_ubatch}; expected an ubatch from 1"
            " to the size of the batch"
        )
    lib = native.load()
    from llama_cpp import llama_cpp as C

    C.llama_backend_init()
    bind(lib.lib)
    control = Control(C, progress, stop)
    with ExitStack() as stack:
        # 2. Load the model, and create a razor context and one with a full cache,
        #    and another one if local heads have other types.
        model = stack.enter_context(load_model(lib, C, model_path, n_gpu_layers, control))
        tokens, n_text = _tokens(C, model, plan, n_tokens, text, seed)
        positions = sample_positions(len(tokens), rows, seed)
        sides = []
        # The library reads a profile in the file itself.
        local_types: dict[str, Any] = {"type_k_local": type_k_local, "type_v_local": type_v_local}
        in_file = found.source == "file" and not any(local_types.values())
        own = None if in_file else native.make_params(profile, **local_types)
        planned = [(own, plan), (native.make_params(None), with_full_types(plan))]
        if plan.has_local_types:  # to compare local heads with
            planned.append((native.make_params(None), with_full_types(plan, local=True)))
        for params, its_plan in planned:
            capture = Capture(lib.lib, shape, its_plan, positions, control)
            ctx = stack.enter_context(
                _context(
                    lib,
                    C,
                    model,
                    its_plan,
                    params,
                    capture,
                    n_batch,
                    n_ubatch,
                    n_threads or n_cores(),
                )
            )
            sides.append((ctx, capture))
        active = [bool(lib.stats(ctx).active) for ctx, _ in sides]
        if active[:2] != [True, False]:
            raise RazorError(
                f"the library runs {'razor' if active[1] else 'a full cache'} instead of"
                f" {'a full cache' if active[1] else 'razor'}; unset"
                f" {native.DISABLE_ENV}, or reinstall razor-local"
            )
        buffers = {buffer.name.decode() for buffer in lib.buffers(sides[0][0])}
        # 3. Run both, and compare each layer with the reference.
        kl = _run(C, lib, model, sides, tokens, positions, n_batch, plan.block, control)
        misplaced = sides[0][1].misplaced([layer.windows for layer in plan.layers])
        groups: list[GroupResult] = []
        layers = [il for il, n in enumerate(shape.n_head_kv) if n]
        for i, il in enumerate(layers):
            control.progress(i, len(layers), "checking")
            control.check()
            razor_layer, full_layer, *other = (capture.layer(il) for _, capture in sides)
            windows = plan.layers[il].windows
            groups += compare_layer(il, razor_layer, full_layer, windows, plan, *other)
    last = reference.frontier(
        np.array([len(tokens) - 1]), plan.sink_tokens, plan.groups[-1].window, plan.block
    )
    return Verification(
        model=str(model_path),
        profile=str(found),
        plan=plan,
        buffers=tuple(sorted(buffers)),
        n_tokens=len(tokens),
        n_text=n_text,
        n_rows=len(positions),
        n_folded=int(last[0]) - plan.sink_tokens,
        groups=tuple(groups),
        misplaced=misplaced,
        kl=kl,
    )


def sample_positions(n: int, rows: int, seed: int) -> np.ndarray:
    """Choose rows of n positions to check, ascending; all of them if rows is 0 or at least n.

    The last SINGLE positions are always chosen. The others are drawn one from each of equal parts
    of the rest.
    """
    if rows == 0 or n <= rows:
        return np.arange(n)
    singles = min(SINGLE, rows)
    edges = np.linspace(0, n - singles, rows - singles + 1).astype(np.int64)
    rng = np.random.default_rng(seed)
    spread = [int(rng.integers(a, b)) for a, b in zip(edges, edges[1:], strict=False)]
    return np.array([*spread, *range(n - singles, n)], np.int64)


def first_fold(plan: Plan) -> int:
    """Return the position at which the first tokens of the largest window are folded."""
    return ((plan.sink_tokens + plan.window) // plan.block + 1) * plan.block


def _plan(
    shape: ModelShape,
    profile: Profile,
    n_ctx: int,
    type_k: str,
    type_v: str,
    flash_attn: bool,
    n_ubatch: int,
    type_k_local: str | None,
    type_v_local: str | None,
) -> Plan:
    """Make a plan. Raises ProfileError if it is not active."""
    n_ctx = n_ctx or min(DEFAULT_N_CTX, shape.n_ctx_train or DEFAULT_N_CTX)
    n_ctx = padded_n_ctx(shape, n_ctx)
    plan = make_plan(
        shape, profile, n_ctx, type_k, type_v, flash_attn, n_ubatch=min(n_ubatch, n_ctx),
        type_k_local=type_k_local, type_v_local=type_v_local,
    )  # fmt: skip
    if not plan.active:
        raise ProfileError(
            f"razor would not be active in a context of {plan.n_ctx} tokens ({plan.why_inactive}),"
            " so there is nothing to verify; use another -c"
        )
    return plan


def _tokens(
    C: Any, model: int, plan: Plan, n_tokens: int, text: str | None, seed: int
) -> tuple[np.ndarray, int]:
    """Return the tokens to run, int32, and the number of tokens in the text.

    Raises ProfileError if nothing would be folded.
    """
    least = first_fold(plan) + 1
    if text is not None:
        tokens = _tokenize(C, model, text)
        n_text = len(tokens)
        wanted = n_tokens or min(n_text, plan.n_ctx)
        if n_text < wanted:
            raise RazorError(f"the text has {n_text:,} tokens, expected at least {wanted:,}")
        tokens = tokens[:wanted]
    else:
        from ..converters.calibrate import draw_tokens

        # The tokens that are decoded one by one cross the edge of a block.
        wanted = n_tokens or min(
            plan.n_ctx, first_fold(plan) + MORE_FOLDS * plan.block + SINGLE // 2
        )
        bos, usable = vocabulary(C, model)
        n = min(wanted, plan.n_ctx + 1) - len(bos)
        tokens = np.concatenate([bos, draw_tokens(usable, n, seed)]) if n > 0 else bos[:wanted]
        n_text = wanted
    if wanted > plan.n_ctx:
        raise RazorError(
            f"{wanted:,} tokens do not fit into a context of {plan.n_ctx:,}; use a larger -c"
        )
    if len(tokens) < least:
        raise ProfileError(
            f"the first fold (window {plan.window:,}, block {plan.block}) needs {least:,} tokens,"
            f" found {len(tokens):,}; use a larger -n, or a longer text"
        )
    return tokens, n_text


def _tokenize(C: Any, model: int, text: str) -> np.ndarray:
    vocab = C.llama_model_get_vocab(model)
    if C.llama_vocab_type(vocab) == C.LLAMA_VOCAB_TYPE_NONE:
        raise UnsupportedError("the model has no tokenizer; leave the text out for random tokens")
    data = text.encode()
    size = len(data) + 8
    ids = (ctypes.c_int32 * size)()
    n = C.llama_tokenize(vocab, data, len(data), ids, size, True, False)
    if n < 0:
        raise RazorError("the text could not be tokenized")
    return np.array(ids[:n], np.int32)


def _context(
    lib: native.Native,
    C: Any,
    model: int,
    plan: Plan,
    override: native.Params | None,
    capture: Capture,
    n_batch: int,
    n_ubatch: int,
    n_threads: int,
) -> AbstractContextManager[int]:
    """Create a context (a pointer) whose attention is captured.

    With override None the context uses the profile in the model file.
    """
    params = C.llama_context_default_params()
    params.n_ctx = plan.n_ctx
    params.n_batch, params.n_ubatch = min(n_batch, plan.n_ctx), min(n_ubatch, plan.n_ctx)
    params.n_threads = params.n_threads_batch = n_threads
    params.type_k = KV_TYPES[plan.type_k].ggml_id
    params.type_v = KV_TYPES[plan.type_v].ggml_id
    params.flash_attn_type = (
        C.LLAMA_FLASH_ATTN_TYPE_ENABLED if plan.flash_attn else C.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    params.swa_full = False
    params.cb_eval = capture.eval_callback
    params.abort_callback = capture.control.abort_callback
    params.no_perf = True

    def failed(why: str) -> RazorError:
        return UnsupportedError(f"no context of {plan.n_ctx} tokens could be created: {why}")

    return new_context(lib, C, model, params, override, failed)


def _run(
    C: Any,
    lib: native.Native,
    model: int,
    sides: list[tuple[int, Capture]],
    tokens: np.ndarray,
    positions: np.ndarray,
    n_batch: int,
    block: int,
    control: Control,
) -> Divergence:
    """Decode tokens in both contexts in step, and compare the logits at positions."""
    n, n_vocab = len(tokens), C.llama_vocab_n_tokens(C.llama_model_get_vocab(model))
    n_prompt = max(n - SINGLE, 0)
    wanted = np.zeros(n, bool)
    wanted[positions] = True

    def logits(ctx: int, edges: list[int]) -> np.ndarray:
        """Decode a batch between each two edges, and return f32 [wanted rows, n_vocab]."""
        parts = [np.empty((0, n_vocab), np.float32)]
        for a, b in zip(edges, edges[1:], strict=False):
            _decode(C, lib, ctx, tokens[a:b], a, wanted[a:b], control)
            rows = int(wanted[a:b].sum())
            if rows:
                flat = C.llama_get_logits(ctx)
                parts.append(np.ctypeslib.as_array(flat, (rows, n_vocab)).copy())
        return np.concatenate(parts)

    (razor_ctx, _), (full_ctx, _), *others = sides
    kl, same = [], []
    starts = [*range(0, n_prompt, n_batch), *range(n_prompt, n)]
    for start, end in zip(starts, [*starts[1:], n], strict=True):
        control.progress(start, n, "running")
        razor = logits(razor_ctx, [start, end])
        # Razor's ubatches end where blocks do. The full cache gets the same ubatches, because
        # their size can decide which kernel computes them.
        first = (start // block + 1) * block
        full = logits(full_ctx, [start, *range(first, end, block), end])
        for ctx, _ in others:
            logits(ctx, [start, *range(first, end, block), end])
        kl.append(kl_divergence(full, razor))
        same.append(full.argmax(axis=1) == razor.argmax(axis=1))
    values, tops = np.concatenate(kl), np.concatenate(same)
    return Divergence(
        mean=float(values.mean()),
        largest=float(values.max()),
        end=float(values[positions >= n - max(n // 8, 1)].mean()),
        same_top=float(tops.mean()),
    )


def _decode(
    C: Any,
    lib: native.Native,
    ctx: int,
    tokens: np.ndarray,
    start: int,
    wanted: np.ndarray,
    control: Control,
) -> None:
    n = len(tokens)
    batch = C.llama_batch_init(n, 0, 1)
    try:
        batch.n_tokens = n
        for i in range(n):
            batch.token[i], batch.pos[i] = int(tokens[i]), start + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = bool(wanted[i])
        lib.clear_errors()
        code = C.llama_decode(ctx, batch)
        C.llama_synchronize(ctx)
    finally:
        C.llama_batch_free(batch)
    control.check()
    if code != 0:
        raise RazorError(
            f"computing tokens {start} to {start + n} failed ({lib.reason()}, llama_decode {code})"
        )
