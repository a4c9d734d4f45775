"""Choose tokens with a sampler of the library, after logits processors in Python."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np

from . import evaluation
from .errors import RazorError
from .native.loaded import llama_cpp
from .plan import SLACK

if TYPE_CHECKING:
    from .llama import Llama

_GENERATE = inspect.signature(llama_cpp.Llama.generate)
_SAMPLE = inspect.signature(llama_cpp.Llama.sample)


def generate(
    llama: Llama, tokens: Sequence[int], *args: Any, **kwargs: Any
) -> Generator[int, Sequence[int] | None, None]:
    """See Llama.generate()."""
    seed = kwargs.pop("seed", None)
    options = dict(_GENERATE.bind(llama, tokens, *args, **kwargs).arguments)
    del options["self"], options["tokens"]
    tokens, reset = list(tokens), options.pop("reset", True)
    criteria = options.pop("stopping_criteria", None)
    if reset and not tokens:
        raise RazorError("the prompt has no tokens; pass at least one")
    with closing(llama._init_sampler(seed=seed, **options)) as sampler:
        _begin(llama, tokens, reset)
        if llama.draft_model is not None:
            yield from _generate_with_drafts(llama, sampler, criteria)
            return
        while True:
            token = sampler.sample(llama._ctx)
            if criteria is not None and criteria(llama._input_ids, llama._last_logits()):
                return
            more = yield token
            if more is None and evaluation.n_cached(llama) == llama.n_tokens < llama._n_ctx:
                evaluation.eval_batch(llama, [token])  # all that evaluate() would do
            else:
                evaluation.evaluate(llama, [token, *(more or ())])


def _generate_with_drafts(
    llama: Llama, sampler: Sampler, criteria: Any
) -> Generator[int, Sequence[int] | None, None]:
    """Generate from the logits of the last token, several tokens per evaluation.

    The tokens that the draft model proposes are evaluated together. Then tokens are sampled from
    their logits, one after another, until one differs from the draft.
    """
    n_before = llama.n_tokens
    draft: list[int] = []
    while True:
        for i, proposed in enumerate([*draft, None]):
            # now, so that another request finds only tokens that were drawn
            llama.n_tokens = n_before + i
            llama._requires_eval = proposed is not None
            llama._logits_row = i - len(draft) - 1
            token = sampler.sample(llama._ctx, llama._logits_row)
            if criteria is not None and criteria(llama._input_ids, llama._last_logits()):
                return
            more = yield token
            if more is not None or token != proposed:
                break
        tokens = [token, *(more or ())]
        draft = [] if more else _draft(llama, token)
        tokens = evaluation.after_cached(llama, [*tokens, *draft])
        n = len(tokens) - len(draft) - 1
        if n > 0:
            evaluation.evaluate(llama, tokens[:n])
        evaluation.eval_batch(llama, tokens[n:], [True] * (len(draft) + 1))
        n_before = llama.n_tokens - len(draft)


def _draft(llama: Llama, token: int) -> list[int]:
    """Return what the draft model proposes after the last token and this one."""
    room = min(llama._n_ctx - llama.n_tokens, llama.n_batch) - 1
    before = np.append(llama._input_ids, np.intc(token))
    assert llama.draft_model is not None
    draft: Any = llama.draft_model(before)
    try:
        ids = np.asarray(draft)
    except ValueError:  # rows of different lengths
        ids = np.empty((0, 0), object)
    if ids.ndim != 1 or not (ids.size == 0 or np.issubdtype(ids.dtype, np.integer)):
        raise RazorError(
            f"the draft model returned {type(draft).__name__}, expected an array of token ids"
        )
    first: list[int] = ids[: max(0, min(room, SLACK))].tolist()
    return first


def _begin(llama: Llama, tokens: list[int], reset: bool) -> None:
    if reset:
        evaluation.prefill(llama, tokens)
    else:
        evaluation.evaluate(llama, tokens)
    evaluation.refresh_logits(llama)
    if not np.isfinite(llama._last_logits().max()):  # nan, if any of them is
        raise RazorError(
            f"{llama.model_path} computes logits that are not numbers, so it cannot answer;"
            " the file is damaged, or its values are too large for their types"
        )


def sample(llama: Llama, *args: Any, **kwargs: Any) -> int:
    """See Llama.sample()."""
    options = dict(_SAMPLE.bind(llama, *args, **kwargs).arguments)
    del options["self"]
    idx = options.pop("idx", None)
    evaluation.refresh_logits(llama)
    with closing(llama._init_sampler(**options)) as sampler:
        return sampler.sample(llama._ctx, -1 if idx is None else idx - llama.n_tokens)


class Sampler:
    """A sampler of the library, and logits processors that run in Python before it.

    The base class calls these from native code, which swallows what they raise.
    """

    def __init__(self, llama: Llama, sampler: Any, processors: Any) -> None:
        if callable(processors) and not isinstance(processors, list):
            processors = [processors]
        self._llama: Any = weakref.proxy(llama)
        self._sampler, self._processors = sampler, list(processors or ())

    def close(self) -> None:
        self._sampler.close()

    def sample(self, ctx: Any, idx: int = -1) -> int:
        if not self._processors:
            drawn: int = self._sampler.sample(ctx, idx)
            return drawn
        llama = self._llama
        logits = np.ctypeslib.as_array(ctx.get_logits_ith(idx), shape=(llama._n_vocab,))
        original = logits.copy()
        changed = original.copy()
        for processor in self._processors:
            changed = _checked_logits(processor(llama._input_ids, changed), len(original))
        requires_eval = llama._requires_eval
        llama._requires_eval = True  # while the library's logits are not the model's
        logits[:] = changed
        token: int = self._sampler.sample(ctx, idx)
        logits[:] = original
        llama._requires_eval = requires_eval
        return token


def _checked_logits(logits: Any, n_vocab: int) -> np.ndarray:
    """Return the logits of a logits processor. Raises RazorError unless they are valid."""
    try:
        changed = np.asarray(logits, np.float32)
    except (TypeError, ValueError):
        changed = np.empty(0, np.float32)
    if changed.shape != (n_vocab,):
        found = type(logits).__name__
        if isinstance(logits, np.ndarray):
            found = f"an array of shape {list(logits.shape)}"
        raise RazorError(
            f"a logits processor returned {found}, expected an array of {n_vocab} numbers"
        )
    if np.isnan(changed).any() or changed.max() in (np.inf, -np.inf):
        raise RazorError("a logits processor returned unusable scores: NaN, +inf, or only -inf")
    return changed
