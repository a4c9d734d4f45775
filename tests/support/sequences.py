"""Contexts with several sequences, compared with contexts that hold one sequence."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.support import runner
from tests.support.device import tolerance

TOLERANCE = tolerance(1e-5)  # F32 cache, absolute
N_SEQ = 4
N_CTX_SEQ = 512
PARAMS: dict[str, Any] = {"n_batch": 512, "n_ubatch": 128}


@dataclass(frozen=True)
class Text:
    """Tokens, and the logits of a context that holds nothing else."""

    tokens: list[int]
    logits: np.ndarray  # f32 [n_tokens, n_vocab]


def make_texts(
    model: runner.Model,
    razor: runner.Override,
    n: int = N_SEQ,
    n_tokens: int = N_CTX_SEQ,
    common: Sequence[int] = (),
    seed: int = 0,
    **params: Any,
) -> list[Text]:
    """Make n random texts.

    Args:
        model: the model.
        razor: the override of the contexts that compute the logits.
        n: number of texts.
        n_tokens: tokens of each text.
        common: number of tokens that each of the last texts has in common with the first one.
        seed: of the tokens.
        params: parameters of the contexts.
    """
    draws = [runner.random_tokens(n_tokens, model.n_vocab, 100 * seed + i) for i in range(n)]
    for tokens, shared in zip(reversed(draws), reversed(common), strict=False):
        tokens[:shared] = draws[0][:shared]
    texts = []
    for tokens in draws:
        with runner.Context(model, razor, **(PARAMS | {"n_ctx": N_CTX_SEQ} | params)) as ctx:
            texts.append(Text(tokens, ctx.decode(tokens)))
    return texts


class Sequences:
    """A context whose sequences each hold the beginning of a text.

    Attributes:
        ctx: the context.
        text: the text of each sequence.
        held: the number of its tokens that are in the cache.
    """

    def __init__(
        self,
        model: runner.Model,
        razor: runner.Override,
        texts: Sequence[Text],
        n_seq: int = N_SEQ,
        **params: Any,
    ) -> None:
        params = PARAMS | {"n_ctx": N_CTX_SEQ} | params
        params["n_ctx"] *= n_seq
        self.ctx = runner.Context(model, razor, n_seq_max=n_seq, **params)
        self.text = [texts[i % len(texts)] for i in range(n_seq)]
        self.held = [0] * n_seq

    def __enter__(self) -> Sequences:
        return self

    def __exit__(self, *exc: object) -> None:
        self.ctx.close()

    def batch(self, order: Sequence[int]) -> list[tuple[int, int, int]]:
        """Return a batch with the next token of each sequence in `order`."""
        held, batch = list(self.held), []
        for s in order:
            batch.append((s, held[s], self.text[s].tokens[held[s]]))
            held[s] += 1
        return batch

    def decode(self, order: Sequence[int]) -> float:
        """Decode the next token of each sequence in `order`, which may repeat sequences.

        Returns: the largest difference of a logit to that of the text alone.
        """
        batch = self.batch(order)
        got = self.ctx.decode_sequences(batch)
        for s in order:
            self.held[s] += 1
        want = np.stack([self.text[s].logits[pos] for s, pos, _ in batch])
        return float(np.abs(got - want).max())

    def fill(self, lengths: Sequence[int], seed: int = 0) -> float:
        """Decode until the sequences hold these numbers of tokens, in random interleaved batches.

        Returns: the same as decode().
        """
        rng, worst = random.Random(seed), 0.0
        left = [s for s, n in enumerate(lengths) for _ in range(n - self.held[s])]
        rng.shuffle(left)
        while left:
            size = rng.choice([1, 3, 40, 300])
            order = left[:size] if rng.random() < 0.5 else sorted(left[:size])
            worst = max(worst, self.decode(order))
            del left[:size]
        return worst

    def lengths(self) -> list[int]:
        """Return the number of tokens of each sequence in the cache."""
        return [self.ctx.pos_max(s) + 1 for s in range(len(self.held))]
