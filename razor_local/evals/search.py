"""Search for the best plan of a KV cache: retrieval heads, cells of local heads, and KV types.

This needs no model. A function measures how good a candidate is. It can take minutes, so the search
calls it as rarely as possible. The search assumes that a candidate with at least as much of
everything is at least as good. If that is wrong, it may miss a better candidate, but the candidate
that it returns was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from ..plan import split_type

# KV types in ascending precision; bf16 and f32 are not searched
TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16")


@dataclass(frozen=True, order=True)
class Candidate:
    """A plan.

    Attributes:
        n_heads: number of retrieval heads, the strongest ones. All heads: a full cache.
        cells: number of cells of each local head; 0 if windows is set.
        kv_type, local_type: KV types of retrieval heads and of local heads. Each is one type for K
            and V, or two as in "q8_0/q4_0".
        windows: for each layer, the window of its local heads in tokens. Empty: all layers have the
            same window, which follows from cells.
    """

    n_heads: int
    cells: int
    kv_type: str = "f16"
    local_type: str = "f16"
    windows: tuple[int, ...] = ()

    def has_all_of(self, other: Candidate) -> bool:
        """Return True if it keeps at least as much as the other, in types at least as precise."""
        ours, theirs = (
            [TYPES.index(t) for types in (c.kv_type, c.local_type) for t in split_type(types)]
            for c in (self, other)
        )
        return (
            self.n_heads >= other.n_heads
            and self.cells >= other.cells
            and all(a >= b for a, b in zip(ours, theirs, strict=True))
        )


@dataclass(frozen=True)
class Space:
    """The candidates.

    Attributes:
        n_heads: number of KV heads of the model; candidates have fewer retrieval heads.
        cells: numbers of cells to choose from, in ascending order.
        types: pairs of KV types, in the order in which they are tried.
        size: bytes of the cache. It grows with the heads, the cells and the precision.
        likely: number of retrieval heads that the bisection tries first.
    """

    n_heads: int
    cells: tuple[int, ...]
    types: tuple[tuple[str, str], ...]
    size: Callable[[Candidate], int]
    likely: int

    def coarse(self) -> list[int]:
        """Return some of the cells, each about 1.6 times the one before, the middle ones first."""
        chosen, at = [], 1
        while at <= len(self.cells):
            chosen.append(self.cells[at - 1])
            at = max(at + 1, round(at * 1.6))
        middle = len(chosen) // 2
        return sorted(chosen, key=lambda cells: abs(chosen.index(cells) - middle))

    def most_heads(self, cells: int, types: tuple[str, str], below: int) -> int:
        """Return the largest number of retrieval heads that takes fewer bytes, -1 if none does."""
        low, high = -1, self.n_heads - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self.size(Candidate(middle, cells, *types)) < below:
                low = middle
            else:
                high = middle - 1
        return low


class OutOfTries(Exception):
    """No more candidates may be measured: the search ends and returns what it has."""


def find_smallest(space: Space, holds: Callable[[Candidate], bool], below: int) -> Candidate | None:
    """Return the smallest candidate that is good enough, None if none was found.

    1. For each pair of types and each of the coarse cells, try the candidate with the most heads
       that is smaller than the best one. If it holds, find the fewest heads by bisection.
    2. Do the same for the cells between the best ones and their neighbors.

    A candidate is not tried if another one that keeps at least as much did not hold.

    Args:
        holds: returns True if a candidate is good enough. Called once per candidate; may raise
            OutOfTries.
        below: candidates must take fewer bytes than this.
    """
    failed: list[Candidate] = []
    best: Candidate | None = None
    limit = below

    def is_good(candidate: Candidate) -> bool:
        nonlocal best, limit
        if any(other.has_all_of(candidate) for other in failed):
            return False
        if not holds(candidate):
            failed.append(candidate)
            return False
        best, limit = candidate, space.size(candidate)
        return True

    def explore(cells: int, types: tuple[str, str]) -> None:
        high = space.most_heads(cells, types, limit)
        if high < 0 or not is_good(Candidate(high, cells, *types)):
            return
        low, middle = -1, space.likely
        while high - low > 1:
            middle = middle if low < middle < high else (low + high) // 2
            if is_good(Candidate(middle, cells, *types)):
                high = middle
            else:
                low = middle
            middle = -1

    try:
        for types, cells in product(space.types, space.coarse()):
            explore(cells, types)
        _refine(space, lambda: best, explore)
    except OutOfTries:
        pass
    return best


def find_best(space: Space, loss: Callable[[Candidate], float], at_most: int) -> list[Candidate]:
    """Return the measured candidates, which take at most this size, with the least loss first.

    Only candidates with the most heads that fit are measured: for each pair of types with the
    coarse cells, then with the cells between the best ones and their neighbors.

    Args:
        loss: returns the loss of a candidate. Called once per candidate; may raise OutOfTries.
        at_most: maximum bytes of a candidate.
    """
    measured: dict[Candidate, float] = {}

    def explore(cells: int, types: tuple[str, str]) -> None:
        n_heads = space.most_heads(cells, types, at_most + 1)
        candidate = Candidate(n_heads, cells, *types)
        if n_heads < 0 or any(other.has_all_of(candidate) for other in measured):
            return
        measured[candidate] = loss(candidate)

    def ranked() -> list[Candidate]:
        return sorted(measured, key=lambda c: (measured[c], space.size(c)))

    try:
        for types, cells in product(space.types, space.coarse()):
            explore(cells, types)
        _refine(space, lambda: next(iter(ranked()), None), explore)
    except OutOfTries:
        pass
    return ranked()


def _refine(
    space: Space,
    best: Callable[[], Candidate | None],
    explore: Callable[[int, tuple[str, str]], None],
) -> None:
    """Explore the cells halfway between the best ones and their neighbors until none are left."""
    coarse = sorted(space.coarse())
    seen = set(coarse)
    while True:
        now = best()
        if now is None:
            return
        at = space.cells.index(now.cells)
        known = sorted(space.cells.index(cells) for cells in seen)
        below = max((i for i in known if i < at), default=at)
        above = min((i for i in known if i > at), default=at)
        new = [i for i in ((below + at) // 2, (at + above) // 2) if space.cells[i] not in seen]
        if not new:
            return
        for i in new:
            seen.add(space.cells[i])
            explore(space.cells[i], (now.kv_type, now.local_type))


def narrow(
    windows: Sequence[int],
    losses: Sequence[float],
    weights: Sequence[float],
    n_local: Sequence[int],
) -> list[tuple[int, ...]]:
    """Return plans with a window for each layer, from the largest windows to the smallest.

    Each plan narrows one layer of the previous plan by one step: the layer where this adds the
    least loss per dropped token. The loss of a plan is estimated as the sum over all layers of the
    layer's weight times the loss of its window.

    Args:
        windows: the windows to choose from, in ascending order.
        losses: for each window, the loss of a plan in which every layer has it.
        weights: for each layer, its share of the loss.
        n_local: for each layer, the number of local heads. Layers without any have windows[0].
    """
    at = [len(windows) - 1 if n else 0 for n in n_local]
    path = [tuple(windows[i] for i in at)]

    def price(layer: int) -> float:
        i = at[layer]
        added = weights[layer] * (losses[i - 1] - losses[i])
        return added / (n_local[layer] * (windows[i] - windows[i - 1]))

    while left := [layer for layer, i in enumerate(at) if i]:
        at[min(left, key=price)] -= 1
        path.append(tuple(windows[i] for i in at))
    return path


def last_that_holds(n: int, first: int, holds: Callable[[int], bool]) -> int:
    """Return the largest index below n for which holds() is true, -1 if there is none.

    The result is exact only if holds() is true up to some index and false after it. The bisection
    starts at the index first, and calls holds() at most once per index.
    """
    low, high, middle = -1, n, first
    while high - low > 1:
        if holds(middle):
            low = middle
        else:
            high = middle
        middle = (low + high) // 2
    return low


def pareto(points: Sequence[tuple[int, float]]) -> list[int]:
    """Return the indices of the Pareto-optimal points (bytes, loss), in ascending bytes."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front
