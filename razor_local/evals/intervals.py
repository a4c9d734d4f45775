"""Compute confidence intervals of scores. docs/evaluation.md explains the choice of methods."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959963984540054  # quantile of the normal distribution for 95 %
N_BOOTSTRAP = 2000


def wilson(p: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a proportion p found in n trials."""
    middle = p + Z**2 / (2 * n)
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    low, high = ((middle + sign * half) / (1 + Z**2 / n) for sign in (-1, 1))
    return max(0.0, min(low, p)), min(1.0, max(high, p))  # rounding


def score_interval(scores: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the mean of scores from 0 to 1.

    This is Wilson's interval if all scores are 0 or 1, and the percentiles of a bootstrap
    otherwise. If all scores are equal, a bootstrap would claim certainty, so Wilson's interval is
    used again. It is wide enough for any scores from 0 to 1, because scores of 0 and 1 have the
    largest variance of all scores with the same mean.
    """
    values = np.asarray(scores, np.float64)
    if np.isin(values, (0.0, 1.0)).all() or (values == values[0]).all():
        return wilson(float(values.mean()), len(values))
    rng = np.random.default_rng(seed)
    means = [rng.choice(values, len(values)).mean() for _ in range(N_BOOTSTRAP)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of a - b for scores of the same questions, and its 95 % interval.

    This is Newcombe's square-and-add interval of two Wilson intervals with the correlation of the
    pairs and its continuity correction (method 10 of Statist. Med. 17, 2635, 1998). The fields of
    the 2 x 2 table are exact if scores are 0 or 1, and expectations otherwise.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    n = len(x)
    p, q = float(x.mean()), float(y.mean())
    (p_low, p_high), (q_low, q_high) = wilson(p, n), wilson(q, n)
    both, neither = float((x * y).sum()), float(((1 - x) * (1 - y)).sum())
    only_a, only_b = float((x * (1 - y)).sum()), float(((1 - x) * y).sum())
    size = math.sqrt(max((n * p) * (n - n * p) * (n * q) * (n - n * q), 0.0))
    cross = both * neither - only_a * only_b
    if cross > 0:
        cross = max(cross - n / 2, 0.0)
    phi = cross / size if size else 0.0

    def half(u: float, v: float) -> float:
        return math.sqrt(max(u * u - 2 * phi * u * v + v * v, 0.0))

    difference = p - q
    return (
        difference,
        difference - half(p - p_low, q_high - q),
        difference + half(p_high - p, q - q_low),
    )


def block_bootstrap(
    weights: np.ndarray, sums: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % interval of sums / weights over blocks of neighboring tokens.

    Blocks are resampled with replacement, the same ones for all k quantities, so a difference of
    two quantities can be one of them.

    Args:
        weights: tokens of each block, [n].
        sums: k quantities summed over each block, [n, k].
        seed: seed of the resampling.

    Returns:
        The lower and the upper bounds, [k] each.
    """
    rng = np.random.default_rng(seed)
    n = len(weights)
    means = np.empty((N_BOOTSTRAP, sums.shape[1]))
    n_rows = max(2**16 // n, 1)  # draws at a time, which bounds the memory
    for start in range(0, N_BOOTSTRAP, n_rows):
        rows = np.arange(start, min(start + n_rows, N_BOOTSTRAP))
        places = rng.integers(0, n, (len(rows), n)) + n * (rows - start)[:, None]
        drawn = np.bincount(places.ravel(), minlength=len(rows) * n).reshape(len(rows), n)
        means[rows] = drawn @ sums / (drawn @ weights)[:, None]
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    return low, high
