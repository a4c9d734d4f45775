"""Tests of the plan search, with functions instead of a model."""

from __future__ import annotations

from itertools import pairwise, product

from hypothesis import given, settings
from hypothesis import strategies as st

from razor_local.evals.search import (
    TYPES,
    Candidate,
    OutOfTries,
    Space,
    find_best,
    find_smallest,
    last_that_holds,
    narrow,
    pareto,
)

BITS = {"q4_0": 9, "q8_0": 17, "f16": 32}
PAIRS = (("q8_0", "q8_0"), ("q8_0", "q4_0"), ("f16", "q8_0"), ("f16", "f16"), ("q4_0", "q4_0"))


@st.composite
def spaces(draw):
    n_heads, n_cells = draw(st.integers(1, 30)), draw(st.integers(1, 16))
    n_ctx = 256 * (n_cells + draw(st.integers(1, 16)))

    def size(c: Candidate) -> int:
        local = (n_heads - c.n_heads) * c.cells * BITS[c.local_type]
        return c.n_heads * n_ctx * BITS[c.kv_type] + local

    types = tuple(draw(st.permutations(PAIRS)))[: draw(st.integers(1, 5))]
    cells = tuple(256 * (i + 1) for i in range(n_cells))
    return Space(n_heads, cells, types, size, draw(st.integers(0, n_heads)))


@st.composite
def monotone(draw, space: Space):
    """Return a loss that decreases with heads, cells and precision."""
    a, b, c, d = (draw(st.floats(0, 3)) for _ in range(4))

    def loss(x: Candidate) -> float:
        kv, local = (1 - TYPES.index(t) / 5 for t in (x.kv_type, x.local_type))
        missing = (space.n_heads - x.n_heads) / space.n_heads
        return a * missing + b * missing * 256 / x.cells + c * kv + d * local

    return loss


def every(space: Space, cells: list[int]) -> list[Candidate]:
    return [Candidate(n, c, *t) for n, c, t in product(range(space.n_heads), cells, space.types)]


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_the_smallest_plan_that_holds_is_found(data) -> None:
    space = data.draw(spaces())
    loss, bound = data.draw(monotone(space)), data.draw(st.floats(0, 4))
    below = data.draw(st.integers(0, 2 * space.size(Candidate(space.n_heads, 256, "f16", "f16"))))
    asked: list[Candidate] = []

    def holds(c: Candidate) -> bool:
        asked.append(c)
        assert space.size(c) < below
        return loss(c) <= bound

    found = find_smallest(space, holds, below)
    assert len(asked) == len(set(asked)), "no plan is measured twice"
    some = [c for c in every(space, space.coarse()) if loss(c) <= bound and space.size(c) < below]
    assert (found is None) == (not some)
    if found is not None:
        assert loss(found) <= bound and found in asked
        assert space.size(found) <= min(map(space.size, some))
        better = [c for c in asked if loss(c) <= bound and space.size(c) < space.size(found)]
        assert not better


@given(st.data(), st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_what_is_returned_holds_even_if_more_is_not_better(data, tries) -> None:
    space = data.draw(spaces())
    seed = data.draw(st.integers(0, 1 << 30))
    asked: dict[Candidate, bool] = {}

    def holds(c: Candidate) -> bool:
        if len(asked) == tries:
            raise OutOfTries
        asked[c] = hash((seed, c)) % 3 == 0
        return asked[c]

    found = find_smallest(space, holds, 1 << 60)
    assert len(asked) <= tries
    held = [c for c, good in asked.items() if good]
    assert found == min(held, key=space.size, default=None) or space.size(found) == min(
        map(space.size, held)
    )


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_the_best_plan_of_a_size_is_found(data) -> None:
    space = data.draw(spaces())
    loss = data.draw(monotone(space))
    at_most = data.draw(st.integers(0, 2 * space.size(Candidate(space.n_heads, 256, "f16", "f16"))))
    asked: list[Candidate] = []

    def measure(c: Candidate) -> float:
        asked.append(c)
        assert space.size(c) <= at_most
        return loss(c)

    found = find_best(space, measure, at_most)
    assert sorted(found) == sorted(set(asked)) and len(asked) == len(found)
    assert [loss(c) for c in found] == sorted(map(loss, found))
    some = [c for c in every(space, space.coarse()) if space.size(c) <= at_most]
    assert bool(found) == bool(some)
    if some:
        assert loss(found[0]) <= min(map(loss, some)) + 1e-9

    def thrice(c: Candidate) -> float:
        if len(asked) == 3:
            raise OutOfTries
        return measure(c)

    asked.clear()
    assert len(find_best(space, thrice, at_most)) == len(asked) <= 3


def test_few_plans_are_measured() -> None:
    """The shape of SmolLM2 at 8,192 tokens: 90 KV heads, 15 windows, 5 pairs of types."""
    cells = tuple(range(256, 4097, 256))

    def size(c: Candidate) -> int:
        local = (90 - c.n_heads) * c.cells * BITS[c.local_type]
        return c.n_heads * 8192 * BITS[c.kv_type] + local

    def loss(c: Candidate) -> float:
        quantized = {"f16": 0, "q8_0": 0.0005, "q4_0": 0.06}
        local = quantized[c.local_type] * (90 - c.n_heads) / 90
        forgotten = 0.02 * 0.95**c.n_heads * (256 / c.cells) ** 0.4
        return quantized[c.kv_type] * c.n_heads / 90 + local + forgotten

    space, asked = Space(90, cells, PAIRS, size, 13), []
    found = find_smallest(space, lambda c: asked.append(c) or loss(c) <= 0.01, 90 * 8192 * 17)
    assert found is not None and len(asked) <= 40, len(asked)
    exact = min((c for c in every(space, list(cells)) if loss(c) <= 0.01), key=size)
    assert size(found) <= 1.05 * size(exact)


@given(st.lists(st.tuples(st.integers(0, 20), st.floats(0, 1)), max_size=30))
def test_the_pareto_front_is_what_nothing_beats(points) -> None:
    front = pareto(points)
    kept = [points[i] for i in front]
    assert kept == sorted(kept) and len(set(kept)) == len(kept)
    for size, loss in points:
        assert any(a <= size and b <= loss for a, b in kept)
    for i, (size, loss) in enumerate(kept):
        assert not any(a <= size and b <= loss for a, b in kept[:i] + kept[i + 1 :])


@given(st.data(), st.integers(1, 8), st.integers(2, 4))
@settings(max_examples=200, deadline=None)
def test_layers_are_narrowed_where_it_costs_least(data, n_layer, n_windows) -> None:
    windows = sorted(
        data.draw(st.sets(st.integers(64, 4096), min_size=n_windows, max_size=n_windows))
    )
    losses = sorted(
        data.draw(st.lists(st.floats(0, 1), min_size=n_windows, max_size=n_windows)), reverse=True
    )
    weights = data.draw(st.lists(st.floats(1e-3, 1), min_size=n_layer, max_size=n_layer))
    n_local = data.draw(st.lists(st.integers(0, 4), min_size=n_layer, max_size=n_layer))
    path = narrow(windows, losses, weights, n_local)
    assert path[0] == tuple(windows[-1] if n else windows[0] for n in n_local)
    assert path[-1] == (windows[0],) * n_layer
    assert len(path) == 1 + (n_windows - 1) * sum(n > 0 for n in n_local)
    of = dict(zip(windows, losses, strict=True))

    def loss(plan) -> float:
        return sum(w * of[x] for w, x in zip(weights, plan, strict=True))

    def kept(plan) -> int:
        return sum(n * x for n, x in zip(n_local, plan, strict=True))

    for before, after in pairwise(path):
        changed = [i for i in range(n_layer) if before[i] != after[i]]
        assert (
            len(changed) == 1 and kept(after) < kept(before) and loss(after) >= loss(before) - 1e-9
        )
        price = (loss(after) - loss(before)) / (kept(before) - kept(after))
        for i in range(n_layer):  # no other layer would have been cheaper
            at = windows.index(before[i])
            if n_local[i] and at:
                other = (*before[:i], windows[at - 1], *before[i + 1 :])
                assert price <= (loss(other) - loss(before)) / (kept(before) - kept(other)) + 1e-9


@given(st.integers(1, 60), st.data())
def test_the_last_that_holds_is_found(n, data) -> None:
    last, first = data.draw(st.integers(-1, n - 1)), data.draw(st.integers(0, n - 1))
    asked: list[int] = []
    assert last_that_holds(n, first, lambda i: asked.append(i) or i <= last) == last
    assert asked[0] == first and len(asked) == len(set(asked)) <= 2 + n.bit_length()
