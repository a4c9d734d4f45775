"""Evaluate tokens into the cache of a Llama, and track what the cache holds.

llama.n_tokens is never more than the cache holds, so that an exception at any line leaves a Llama
whose next answer is right. llama._requires_eval is True if the logits in memory may not be those of
the last token.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import checkpoints, native
from .available_memory import available_ram
from .common.progress import Progress, Stop, silent
from .errors import ContextFullError, RazorError, UnsupportedError, option, options
from .native.callbacks import Callback
from .native.loaded import C, library, llama_cpp
from .native.prefill import full_attention

if TYPE_CHECKING:
    from .llama import Llama

_ABORTED = 2  # llama_decode: stopped by the abort callback
_NO_SLOT = 1  # llama_decode: no room for the batch
_NO_BUFFERS = "out of memory for reading a prompt with full attention"  # of the native library
_SMALL = 2**28  # smaller buffers are allocated without checking the free memory, in bytes
_NO_CALLBACK = C.ggml_abort_callback()


class Prefill(NamedTuple):
    """n_reused: tokens already in the cache. n_evaluated: tokens run. complete: not stopped."""

    n_reused: int
    n_evaluated: int
    complete: bool


class _AbortedError(RazorError):
    pass


class _NoMemoryError(RazorError):
    """The temporary buffers for a prompt cannot be allocated. The cache has not changed."""


def evaluate(llama: Llama, tokens: Sequence[int]) -> None:
    """See Llama.eval()."""
    tokens = after_cached(llama, tokens)
    for i in range(0, len(tokens), llama.n_batch):
        eval_batch(llama, tokens[i : i + llama.n_batch])


def evaluate_logits(
    llama: Llama, tokens: Sequence[int], wanted: Sequence[bool] | None = None
) -> Generator[np.ndarray, None, None]:
    """See Llama.eval_logits()."""
    tokens = list(tokens)
    rows = [True] * len(tokens) if wanted is None else list(map(bool, wanted))
    again = after_cached(llama, tokens)
    rows = [False] * (len(again) - len(tokens)) + rows
    for i in range(0, len(again), llama.n_batch):
        some = rows[i : i + llama.n_batch]
        eval_batch(llama, again[i : i + llama.n_batch], some)
        n = sum(some)
        if n:
            flat = np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(n * llama._n_vocab,))
            yield flat.reshape(n, llama._n_vocab)


def prefill(
    llama: Llama,
    tokens: Sequence[int],
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> Prefill:
    """See Llama.prefill()."""
    tokens = list(tokens)
    report = progress or silent
    if not tokens:
        raise RazorError("there is nothing to evaluate: the prompt has no tokens")
    if len(tokens) > llama._n_ctx:
        raise ContextFullError(
            f"the prompt has {len(tokens)} tokens, the context {llama._n_ctx}; use a larger"
            f" {option('n_ctx')} or a shorter text"
        )
    keep = rewind(llama, tokens)
    last = len(tokens) - checkpoints.MARGIN
    n_full = len(tokens) - 1 if _reads_fully(llama, keep, len(tokens) - 1) else 0

    reported = time.monotonic()

    def interrupted(_data: int | None) -> bool:  # called for each operation
        nonlocal reported
        if llama.n_tokens < n_full and time.monotonic() > reported + 0.1:
            reported = time.monotonic()
            done = library.stats(llama.ctx).prefill_done * (n_full - llama.n_tokens)
            report(llama.n_tokens + int(done), len(tokens), "reading the prompt")
        return stop is not None and bool(stop())

    asked = Callback(interrupted, on_error=True)
    llama._abort_callback = C.ggml_abort_callback(asked.call)
    watched = stop is not None or (progress is not None and n_full > 0)
    try:
        if watched:
            C.llama_set_abort_callback(llama._ctx.ctx, llama._abort_callback, None)
        while llama.n_tokens < len(tokens):
            if stop is not None and stop():
                return Prefill(keep, llama.n_tokens - keep, False)
            report(llama.n_tokens, len(tokens), "reading the prompt")
            n = llama.n_tokens
            end = n + llama.n_batch
            if llama._checkpoints is not None:
                if n == last or (n == keep > 0 and last - n >= checkpoints.MIN_NEW_TOKENS):
                    llama._checkpoints.save(llama._input_ids)
                end = last if n < last < end else end
            try:
                if n >= n_full:
                    evaluate(llama, tokens[n:end])
                elif not _take(llama, tokens[:n_full], progress, stop):
                    _read_fully(llama, tokens[n:n_full])
            except _NoMemoryError as error:
                if llama._razor_args["prefill"] == "full":
                    raise RazorError(f"{error}; use {options(prefill='razor')}") from None
                llama._why_no_full_prefill = str(error)
                n_full = 0
            except _AbortedError:
                asked.check()
                return Prefill(keep, max(llama.n_tokens - keep, 0), False)
            asked.check()
        report(llama.n_tokens, len(tokens), "reading the prompt")
    finally:
        if watched:
            C.llama_set_abort_callback(llama._ctx.ctx, _NO_CALLBACK, None)
    return Prefill(keep, len(tokens) - keep, True)


def _reads_fully(llama: Llama, first: int, end: int) -> bool:
    """Return True if a prompt is read with full attention, and the memory suffices for that."""
    if not llama._full_prefill or llama._logits_all:
        return False
    assert llama._plan is not None
    llama._why_no_full_prefill = None
    if not llama._plan.folds_between(first, end):
        return False
    n_tokens = end - first
    n_bytes = llama._plan.prefill_bytes(n_tokens, llama.n_embd(), first)
    if n_bytes < _SMALL or llama.memory().devices or n_bytes < available_ram():
        return True
    llama._why_no_full_prefill = _no_room(n_tokens, n_bytes)
    if llama._razor_args["prefill"] == "full":
        raise RazorError(f"{llama._why_no_full_prefill}; use {options(prefill='razor')}")
    return False


def _no_room(n_tokens: int, n_bytes: int) -> str:
    return (
        f"the temporary buffers of a prompt of {n_tokens:,} tokens ({n_bytes / 2**20:,.1f} MiB)"
        " do not fit into the free memory"
    )


def _read_fully(llama: Llama, tokens: list[int]) -> None:
    """Evaluate tokens with full attention, and compress the cache afterwards.

    The last token of a prompt is not among them: it is evaluated afterwards, like those of the
    answer. If the same prompt follows while the cache holds its other tokens, the last token is
    evaluated in the same way, and its logits are the same.
    """
    tokens = after_cached(llama, tokens)
    with full_attention(library, llama.ctx):
        eval_batch(llama, tokens)


def set_source(llama: Llama, source: Llama | None) -> bool:
    """From now on, take the keys and values of prompts from a full cache, which reads them first.

    If several caches of one model read the same prompts, the source reads each prompt only once.
    The cache is bit-identical to one that read the prompt itself with full attention.

    Args:
        source: a full cache of the same model with the same KV types, in main memory, with
            razor_local's attention. It must stay open. None: llama reads its prompts itself.

    Returns:
        False if llama has to read its prompts itself.
    """
    llama._source = None
    if source is None or not llama._full_prefill:
        return source is None
    if not library.lib.llama_razor_set_source(llama.ctx, source.ctx):
        return False
    library.lib.llama_razor_set_source(llama.ctx, None)
    llama._source = source
    return True


def _take(llama: Llama, tokens: list[int], progress: Progress | None, stop: Stop | None) -> bool:
    """Fill the cache with the first tokens of a prompt, which the source reads.

    Returns:
        False if llama has to read them itself, because it has no source or has already dropped
        tokens, so that later tokens would differ from those of the source.
    """
    source, plan = llama._source, llama._plan
    if source is None or plan is None or plan.folds_between(0, llama.n_tokens):
        return False
    if common_prefix(source, tokens) < len(tokens):
        if not source.prefill(tokens, progress, stop).complete:
            raise _AbortedError("the computation was stopped")
    tokens = after_cached(llama, tokens[llama.n_tokens :])
    library.lib.llama_razor_set_source(llama.ctx, source.ctx)
    try:
        eval_batch(llama, tokens, [False] * len(tokens))
    finally:
        library.lib.llama_razor_set_source(llama.ctx, None)
    return True


def refresh_logits(llama: Llama) -> None:
    """Evaluate the last token again where the logits in memory are not known to be its."""
    if llama.n_tokens == 0:
        raise RazorError("no tokens have been evaluated; evaluate a prompt first")
    if not _has_logits(llama):
        tokens = llama._input_ids.tolist()
        evaluate(llama, tokens[rewind(llama, tokens) :])


def _has_logits(llama: Llama) -> bool:
    """Return True if the logits in memory are those after n_tokens, which callers can change."""
    return not llama._requires_eval and n_cached(llama) == llama.n_tokens


def rewind(llama: Llama, tokens: list[int]) -> int:
    """Take the cache back to what it has of tokens, and return how many these are.

    One at least is left to evaluate, for its logits, unless they are those of the last token.
    """
    llama._check_tokens(tokens)
    same = common_prefix(llama, tokens)
    if same == len(tokens) == llama.n_tokens and _has_logits(llama):
        return same
    keep = min(same, len(tokens) - 1)
    if keep == 0:
        reset(llama)
        return 0
    return go_back(llama, keep)


def go_back(llama: Llama, n: int) -> int:
    """Take the cache back to its first n tokens, or to fewer if it cannot keep exactly these.

    Returns:
        The number of tokens that it keeps.
    """
    llama._requires_eval = True
    llama.n_tokens = n  # before the cache, which may hold more but not less
    if _windows_reach(llama, n) and llama._ctx.kv_cache_seq_rm(-1, n, -1):
        return n
    return _restore_checkpoint(llama)


def _windows_reach(llama: Llama, n: int) -> bool:
    """Return False if sliding windows have lost tokens that position n attends to.

    llama.cpp's own cache of such layers does not check this itself. Tokens outside the window can
    be overwritten, also in a cache of the whole context, after a state was loaded.
    """
    n_swa: int = C.llama_model_n_swa(llama._model.model)
    if n_swa == 0 or (llama._plan is not None and llama._plan.active):
        return True
    first: int = C.llama_memory_seq_pos_min(llama._ctx.memory, 0)
    return first <= max(0, n - n_swa)


def _restore_checkpoint(llama: Llama) -> int:
    """Take the cache back to a checkpoint within the first n_tokens, or clear it.

    Returns:
        The number of tokens that it keeps.
    """
    before = llama._input_ids
    llama.n_tokens = 0  # until all layers hold the same tokens
    if llama._checkpoints is not None:
        n = llama._checkpoints.restore(before)
        if n > 0 and llama._ctx.kv_cache_seq_rm(-1, n, -1) and n_cached(llama) == n:
            llama.n_tokens = n
            return n
    clear_cache(llama)
    return 0


def common_prefix(llama: Llama, tokens: list[int]) -> int:
    """Return how many tokens of the cache these begin with."""
    n = min(llama.n_tokens, len(tokens))
    differs = np.flatnonzero(llama.input_ids[:n] != np.asarray(tokens[:n], dtype=np.intc))
    return int(differs[0]) if differs.size else n


def after_cached(llama: Llama, tokens: Sequence[int]) -> list[int]:
    """Return the tokens to evaluate where the cache ends now, so that they follow n_tokens."""
    tokens = list(tokens)
    if llama._model_params.vocab_only:
        raise UnsupportedError("vocab_only=True loads no weights, nothing can be evaluated")
    llama._check_tokens(tokens)
    if llama.n_tokens + len(tokens) > llama._n_ctx:
        raise ContextFullError(
            f"{llama.n_tokens} tokens are in the context and {len(tokens)} more do not fit its"
            f" {llama._n_ctx}; use a larger {option('n_ctx')} or a shorter text"
        )
    # checked first: removing nothing scans all cells of llama.cpp's own cache
    cached = n_cached(llama)
    if cached != llama.n_tokens:
        before = llama._input_ids.tolist()
        if cached > len(before):
            kept = go_back(llama, len(before))
        else:
            clear_cache(llama)
            kept = 0
        tokens = [*before[kept:], *tokens]
    return tokens


def eval_batch(llama: Llama, batch: list[int], wanted: list[bool] | None = None) -> None:
    """Evaluate up to n_batch tokens.

    Args:
        wanted: the tokens whose logits are computed; None: the last, or all with logits_all.
    """
    n_past, n = llama.n_tokens, len(batch)
    library.clear_errors()
    native.computed()
    # an interrupt may come at any time: the logits count, and n_tokens grows, at the very end
    llama._requires_eval = True
    llama._logits_row = -1
    if n == 1 and wanted is None:
        ids, native_batch = llama._one
        ids[0] = batch[0]
    else:
        ids = (C.llama_token * n)(*batch)  # the native batch only points to them
        native_batch = C.llama_batch_get_one(ids, n)
        if wanted is not None or llama._logits_all:
            native_batch.logits = (ctypes.c_int8 * n)(*(wanted or [True] * n))
    code = C.llama_decode(llama._ctx.ctx, native_batch)
    if code != 0:
        reason = library.reason("")
        _after_failed_decode(llama, batch, n_past, code)
        if code == _ABORTED:
            raise _AbortedError("the computation was stopped")
        if reason == _NO_BUFFERS:
            assert llama._plan is not None
            raise _NoMemoryError(_no_room(n, llama._plan.prefill_bytes(n, llama.n_embd(), n_past)))
        full = code == _NO_SLOT and reason in ("", "the context is full")
        what = f"{n} tokens after {n_past} in a context of {llama._n_ctx}"
        if full:
            raise ContextFullError(f"there is no room for {what}; use a larger {option('n_ctx')}")
        raise RazorError(f"evaluating {what} failed: {reason or f'llama_decode {code}'}")
    if n == 1:
        llama.input_ids[n_past] = batch[0]  # in a third of the time
    else:
        llama.input_ids[n_past : n_past + n] = batch
    if llama._logits_all and wanted is None:
        logits = np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(n * llama._n_vocab,))
        llama.scores[n_past : n_past + n, :].reshape(-1)[:] = logits
    llama.n_tokens += n
    llama._requires_eval = wanted is not None and not wanted[-1]


def _after_failed_decode(llama: Llama, batch: list[int], n_past: int, code: int) -> None:
    """Set n_tokens to what the cache holds: part of the batch may have been evaluated."""
    llama._requires_eval = True
    if llama._is_recurrent and code != _NO_SLOT:  # it holds part of a ubatch
        _restore_checkpoint(llama)
        return
    if llama._logits_all:  # the logits of that part were not kept
        return
    n = n_cached(llama)
    if n_past <= n <= n_past + len(batch) and llama._ctx.kv_cache_seq_rm(-1, n, -1):
        llama.input_ids[n_past:n] = batch[: n - n_past]
        llama.n_tokens = n
    else:
        clear_cache(llama)


def n_cached(llama: Llama) -> int:
    """Return the number of tokens in the cache itself."""
    last: int = C.llama_memory_seq_pos_max(llama._ctx.memory, 0)
    return last + 1


def clear_cache(llama: Llama) -> None:
    """Take all tokens out of the cache itself."""
    llama._requires_eval = True
    llama.n_tokens = 0
    llama._ctx.kv_cache_clear()


def reset(llama: Llama) -> None:
    """Forget all tokens. The cache keeps them until others are evaluated."""
    llama_cpp.Llama.reset(llama)
