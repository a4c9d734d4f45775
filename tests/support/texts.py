"""A text with a fact in it, and the question that the built-in model answers from it."""

from __future__ import annotations

import random

WORDS = "the sea was calm and a small boat lay near the old stone pier while men spoke".split()


def text_with(fact, n_words=400, seed=0):
    rng = random.Random(seed)
    words = [rng.choice(WORDS) for _ in range(n_words)]
    return f"{' '.join(words[: n_words // 3])}. {fact} {' '.join(words[n_words // 3 :])}."


FACT = "The secret code of Marlow is 48213."


QUESTION = "What is the secret code of Marlow?"
