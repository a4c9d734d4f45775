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
from .ownership import Inside

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
    if llama.draft_model is not None:
        inside: Any = Inside(llama)
        yield from llama_cpp.Llama.generate(inside, tokens, **options)
        return
    tokens, reset = list(tokens), options.pop("reset", True)
    criteria = options.pop("stopping_criteria", None)
    if reset and not tokens:
        raise RazorError("the prompt has no tokens; pass at least one")
    with closing(llama._init_sampler(seed=seed, **options)) as sampler:
        _begin(llama, tokens, reset)
        while True:
            token = sampler.sample(llama._ctx)
            if criteria is not None and criteria(llama._input_ids, llama._last_logits()):
                return
            more = yield token
            if more is None and evaluation.n_cached(llama) == llama.n_tokens < llama._n_ctx:
                evaluation.eval_batch(llama, [token])  # all that evaluate() would do
            else:
                evaluation.evaluate(llama, [token, *(more or ())])


def _begin(llama: Llama, tokens: list[int], reset: bool) -> None:
    evaluation.evaluate(llama, tokens[evaluation.rewind(llama, tokens) :] if reset else tokens)
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
            return self._sampler.sample(ctx, idx)
        llama = self._llama
        logits = np.ctypeslib.as_array(ctx.get_logits_ith(idx), shape=(llama._n_vocab,))
        original = logits.copy()
        changed = original.copy()
        for processor in self._processors:
            changed = _checked_logits(processor(llama._input_ids, changed), len(original))
        llama._requires_eval = True  # while the library's logits are not the model's
        logits[:] = changed
        token = self._sampler.sample(ctx, idx)
        logits[:] = original
        llama._requires_eval = False
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
