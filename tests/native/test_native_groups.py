"""Several windows: each KV head has a scope, and the heads with the same window are a group."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from razor_local.model_file import read_model_shape
from razor_local.plan import make_plan
from razor_local.profile import Profile
from tests.support import reference, runner
from tests.support.device import examples, tolerance
from tests.support.native_cases import F32_TOLERANCE, FLASH_F32, KV, Case, expected, tokens_of
from tests.support.tiny_models import TinySpec, razor_kv

Scopes = tuple[tuple[int, ...], ...]

N_CTX = 1024
FLASH = pytest.mark.parametrize("flash_attn", FLASH_F32, ids=["nofa", "fa"][: len(FLASH_F32)])


def case(arch: str, n_head: int, n_kv: int, d: int, scopes: Scopes, **fields: Any) -> Case:
    """Make a case of heads with scopes, which determine its mask."""
    spec = TinySpec(arch, len(scopes), n_head, n_kv, d, seed=700)
    mask = tuple(tuple(int(x == 0) for x in row) for row in scopes)
    return Case(spec, mask, 0, fields.pop("n_tokens", 620), scopes=scopes, **fields)


# windows are multiples of 64
CASES = [
    # groups mixed, in the order of the model, in another order; layers with other groups
    case("llama", 8, 4, 32, ((30, 0, 200, 130), (0, 200, 200, 30), (64, 200, 0, 0))),
    case("qwen3", 4, 4, 64, ((64, 64, 300, 0), (300, 64, 300, 64), (0, 0, 0, 64))),
    # no retrieval heads; no sinks; no compensation; sinks beyond a block
    case("qwen2", 4, 2, 32, ((64, 300), (300, 64)), sink_tokens=0),
    case("gpt2", 4, 4, 32, ((1, 65, 129, 193), (0, 300, 1, 65)), compensation=False),
    case("llama", 6, 3, 80, ((130, 0, 20), (20, 20, 20)), sink_tokens=130),
    # more than four windows; heads that keep everything, because they would save nothing
    case("llama", 8, 8, 32, ((10, 70, 140, 200, 260, 330, 390, 0),) * 2),
    case("llama", 4, 4, 32, ((2000, 1024, 800, 30), (30, 100, 2000, 30))),
    # layers with different numbers of KV heads, one without attention
    Case(TinySpec("deci", 3, 4, (4, 0, 2), 32, seed=701), ((0, 1, 0, 0), (), (0, 0)), 0, 500,
         scopes=((200, 0, 30, 200), (), (30, 100))),
]  # fmt: skip


@FLASH
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scopes_equal_the_reference(case: Case, flash_attn: bool, tiny) -> None:
    """Ubatches have several sizes, and the last tokens are decoded one by one."""
    want = expected(case.spec, case.n_tokens, case.razor)
    tokens = tokens_of(case.spec, case.n_tokens)
    n = case.n_tokens - 150
    with runner.Model(tiny(case.spec)) as model:
        for n_ubatch in (512, 100):
            params = {"n_ctx": N_CTX, "n_ubatch": n_ubatch, "flash_attn": flash_attn}
            with runner.Context(model, runner.override(case.razor), **params) as ctx:
                windows = {w for row in case.razor.windows for w in row if w}
                assert list(ctx.stats().windows)[: ctx.stats().n_windows] == sorted(windows)[::-1]
                got = np.concatenate([ctx.decode(tokens[:n]), ctx.decode(tokens[n:], 1)])
            assert np.abs(got - want).max() <= F32_TOLERANCE
    # check the case itself: one window for all local heads gives other logits
    one = reference.make_razor(case.razor.mask, 64, case.sink_tokens, case.compensation)
    assert np.abs(want - expected(case.spec, case.n_tokens, one)).max() > 1e-2


@st.composite
def random_scopes(draw: Any, n_kv: int, n_layer: int) -> Scopes:
    scope = st.sampled_from([0, 1, 60, 64, 65, 120, 128, 200, 250, 320, 400, 500, 700, 1024, 4000])
    row = st.lists(scope, min_size=n_kv, max_size=n_kv).map(tuple)
    return tuple(draw(st.lists(row, min_size=n_layer, max_size=n_layer)))


@st.composite
def random_cases(draw: Any) -> tuple[Case, list[int], dict[str, Any]]:
    n_kv, n_layer = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    scopes = draw(random_scopes(n_kv, n_layer))
    assume(any(0 < x <= 500 for row in scopes for x in row))
    drawn = case(
        draw(st.sampled_from(["llama", "qwen3"])),
        n_kv * draw(st.sampled_from([1, 2, 3])),
        n_kv,
        draw(st.sampled_from([16, 32])),
        scopes,
        n_tokens=draw(st.integers(1, 700)),
        sink_tokens=draw(st.sampled_from([0, 1, 4, 65])),
        compensation=draw(st.booleans()),
    )
    splits = runner.random_splits(drawn.n_tokens, draw(st.sampled_from([3, 50, 200])), 0)
    params = {"n_ubatch": draw(st.sampled_from([1, 16, 100, 512]))}
    return drawn, splits, params | {"flash_attn": draw(st.sampled_from(FLASH_F32))}


@settings(
    derandomize=True, deadline=None, max_examples=examples(40), suppress_health_check=HealthCheck
)
@given(random_cases())
def test_any_scopes_equal_the_reference(tiny, drawn: tuple[Case, list[int], dict]) -> None:
    case, splits, params = drawn
    with runner.Model(tiny(case.spec)) as model:
        with runner.Context(model, runner.override(case.razor), n_ctx=N_CTX, **params) as ctx:
            got = ctx.decode(tokens_of(case.spec, case.n_tokens), splits)
    want = expected(case.spec, case.n_tokens, case.razor)
    assert np.abs(got - want).max() <= F32_TOLERANCE


@pytest.mark.parametrize(
    ("type_k", "type_v", "flash_attn"), KV, ids=lambda x: {True: "fa", False: "nofa"}.get(x, x)
)
def test_other_types_are_as_exact_as_with_one_window(
    type_k: str, type_v: str, flash_attn: bool, tiny
) -> None:
    params = {"type_k": type_k, "type_v": type_v, "flash_attn": flash_attn, "n_ctx": N_CTX}
    several = case("llama", 4, 4, 64, ((64, 0, 300, 128), (300, 64, 64, 0)))
    errors = []
    for razor in (several.razor, reference.make_razor(several.mask, 128)):
        tokens = tokens_of(several.spec, several.n_tokens)
        got = runner.logits(tiny(several.spec), tokens, runner.override(razor), **params)
        want = expected(several.spec, several.n_tokens, razor)
        errors.append(float(np.sqrt(((got - want) ** 2).mean())))
    assert errors[0] <= max(1.3 * errors[1], F32_TOLERANCE / 10)


@FLASH
def test_scopes_of_one_window_are_that_window(flash_attn: bool, tiny) -> None:
    """The logits are bit-identical, because 64 is a multiple of the block."""
    spec = TinySpec("llama", 2, 4, 4, 32, seed=702)
    mask = ((0, 1, 0, 0), (0, 0, 0, 0))
    scopes = tuple(tuple(0 if x else 64 for x in row) for row in mask)
    runs = [
        runner.logits(
            tiny(spec),
            tokens_of(spec, 500),
            runner.override(razor),
            n_ctx=N_CTX,
            flash_attn=flash_attn,
        )
        for razor in (reference.make_razor(mask, 64), reference.make_scoped(scopes, N_CTX))
    ]
    np.testing.assert_array_equal(*runs)


@pytest.mark.parametrize("version", [1, 2])
def test_scopes_of_the_metadata(version: int, tiny) -> None:
    """Version 2 uses them unless a window is given. Version 1 does not use them."""
    spec = TinySpec("llama", 2, 4, 2, 32, seed=703)
    mask, scopes = ((0, 1), (0, 0)), ((30, 0), (300, 30))
    keys = razor_kv(mask, window_min=100, window_divisor=0, scopes=scopes, version=version)
    tokens = tokens_of(spec, 500)
    scoped, window = reference.make_scoped(scopes, N_CTX), reference.make_razor(mask, 100)
    other = reference.make_razor(mask, 77)
    for given_, razor in ((None, scoped if version == 2 else window), (77, other)):
        override = None if given_ is None else runner.Override(window=given_)
        np.testing.assert_array_equal(
            runner.logits(tiny(spec, keys), tokens, override, n_ctx=N_CTX),
            runner.logits(tiny(spec), tokens, runner.override(razor), n_ctx=N_CTX),
        )


@pytest.mark.parametrize(
    ("scopes", "says"),
    [
        ((30, 0, 2**30 + 1, 30), "razor.head.scope[2] is 1073741825, expected 0 to 1073741824"),
        ((30, 30, 30, 30), "razor.head.scope[1] is 30 and razor.head.retrieval[1] is 1"),
        ((0, 0, 30, 30), "razor.head.scope[0] is 0 and razor.head.retrieval[0] is 0"),
    ],
    ids=["large", "of a retrieval head", "none of a local head"],
)
def test_bad_scopes_are_refused(scopes: tuple[int, ...], says: str, tiny) -> None:
    spec = TinySpec("llama", 2, 4, 2, 32, seed=703)
    with pytest.raises(runner.LoadError) as error:
        runner.set_override(runner.Override(bytes((0, 1, 0, 0)), scope=scopes))
    assert says in str(error.value)
    rows = (scopes[:2], scopes[2:])
    with pytest.raises(runner.LoadError) as error:
        runner.Model(tiny(spec, razor_kv(((0, 1), (0, 0)), version=2)))
    assert "without razor.head.scope, expected u32[4]" in str(error.value)
    with pytest.raises(runner.LoadError) as error:
        runner.Model(tiny(spec, razor_kv(((0, 1), (0, 0)), scopes=rows, version=2)))
    assert says in str(error.value)


BYTES = TinySpec("llama", 3, 6, 6, 32, n_embd=32, n_ff=32, n_vocab=32, seed=704)


@settings(
    derandomize=True, deadline=None, max_examples=examples(100), suppress_health_check=HealthCheck
)
@given(
    random_scopes(6, 3),
    st.sampled_from([256, 512, 1024, 4096]),
    st.sampled_from([0, 4, 60, 600]),
    st.booleans(),
    st.sampled_from([("f16", "f16", True), ("q8_0", "q4_0", True), ("q8_0", "f16", False)]),
)
def test_bytes_of_any_scopes(tiny, scopes: Scopes, n_ctx: int, sinks: int, comp: bool, kv) -> None:
    """The backend buffers match razor_local.plan in total and per layer, and so do the windows."""
    mask = tuple(tuple(int(x == 0) for x in row) for row in scopes)
    type_k, type_v, flash_attn = kv
    profile = Profile(
        tuple(np.array(row, np.uint8) for row in mask),
        scope=tuple(np.array(row, np.uint32) for row in scopes),
        sink_tokens=sinks,
        compensation=comp,
    )
    path = tiny(BYTES)
    plan = make_plan(read_model_shape(path), profile, n_ctx, type_k, type_v, flash_attn)
    override = runner.Override(
        bytes(sum(mask, ())), sink_tokens=sinks, compensation=comp, scope=sum(scopes, ())
    )
    params = {"type_k": type_k, "type_v": type_v, "flash_attn": flash_attn, "n_ubatch": 16}
    with runner.Model(path) as model:
        with runner.Context(model, override, n_ctx=n_ctx, **params) as ctx:
            stats, buffers = ctx.stats(), ctx.buffers()
            layers = [ctx.layer(il) for il in range(3)] if stats.active else []
    assert (bool(stats.active), stats.kv_bytes) == (plan.active, plan.kv_bytes)
    if not stats.active:
        return
    assert stats.kv_bytes == sum(b.bytes for b in buffers)
    assert list(stats.windows)[: stats.n_windows] == [group.window for group in plan.groups]
    assert (stats.block, stats.window, stats.cells) == (plan.block, plan.window, plan.cells)
    for got, want in zip(layers, plan.layers, strict=True):
        assert (got.n_retrieval, got.n_local) == (want.n_retrieval, want.n_local)
        sizes = (got.bytes_k, got.bytes_v, got.bytes_sums)
        assert sizes == (want.bytes_k, want.bytes_v, want.bytes_sums)
    # and tests/support/reference.py, which computes the windows independently
    razor = reference.make_scoped(scopes, n_ctx, sinks, comp)
    assert (razor.block, razor.windows) == (plan.block, tuple(x.windows for x in plan.layers))


@pytest.mark.parametrize("compensation", [True, False], ids=["comp", "nocomp"])
def test_a_rollback_needs_every_group(compensation: bool, tiny) -> None:
    """The rings have different spare room. If one group cannot undo a fold, nothing changes."""
    spec = TinySpec("llama", 2, 4, 2, 32, seed=705)
    razor = reference.make_scoped(((64, 256), (64, 0)), N_CTX, compensation=compensation)
    assert (razor.block, razor.windows) == (64, ((64, 256), (64, 0)))
    rings = {
        w: reference.cells_of(w, 4, compensation, 64) - 4 - 4 * compensation for w in (64, 256)
    }

    def can_go(n: int, to: int, window: int) -> bool:
        now, then = (int(razor.frontier(p, window)) for p in (n - 1, to))
        one_fold = int(razor.frontier(n - 1 - razor.block, window))
        return then >= now or (n <= then + rings[window] and (not compensation or then == one_fold))

    tokens = tokens_of(spec, 700)
    refused_by = set()
    with runner.Model(tiny(spec)) as model:
        with runner.Context(model, runner.override(razor), n_ctx=N_CTX) as ctx:
            want = ctx.decode(tokens)
            for back in range(1, 330, 7):
                ctx.clear()
                ctx.decode(tokens[:650])
                to = 650 - back
                goes = {w: can_go(650, to, w) for w in rings}
                refused_by.add(tuple(sorted(w for w in rings if not goes[w])))
                assert (ctx.seq().n_rollback >= back) <= all(goes.values())
                assert ctx.seq_rm(to) == all(goes.values()), f"from 650 to {to}"
                n = ctx.n_past
                assert n == (to if all(goes.values()) else 650)
                got = ctx.decode(tokens[n:])
                np.testing.assert_allclose(got, want[n:], rtol=0, atol=tolerance(1e-5))
    assert refused_by == {(), (64, 256)} | ({(64,)} if not compensation else set())


A_GROUP, TWO_GROUPS = (64, 0, 64, 64), (64, 0, 64, 128)


def test_state_of_exchanged_windows_is_refused(tiny) -> None:
    """Each layer has as many heads with each window, but different ones. Nothing changes."""
    spec = TinySpec("llama", 2, 4, 4, 32, seed=707)
    tokens = tokens_of(spec, 420)
    rows = ((64, 256, 0, 64), (0, 256, 64, 0)), ((256, 64, 0, 64), (0, 256, 64, 0))
    with runner.Model(tiny(spec)) as model:
        overrides = [runner.override(reference.make_scoped(row, N_CTX)) for row in rows]
        with (
            runner.Context(model, overrides[0], n_ctx=N_CTX) as one,
            runner.Context(model, overrides[1], n_ctx=N_CTX) as other,
        ):
            for ctx in (one, other):
                ctx.decode(tokens[:400])
            assert not other.load(one.save(True), True)
            assert "saved under another plan" in runner.last_error()
            assert other.load(other.save(True), True)
            want = other.decode(tokens[400:])
            other.clear()
            other.decode(tokens[:400])
            np.testing.assert_array_equal(other.decode(tokens[400:]), want)


@pytest.mark.skipif(runner.GPU_LAYERS != 0, reason="on CPUs")
@pytest.mark.parametrize(("own", "more"), [(True, 0), (False, 2)], ids=["razor", "upstream"])
def test_nodes_of_another_group(own: bool, more: int, tiny, monkeypatch) -> None:
    """Razor's attention adds none, upstream's an attention and a concatenation per layer."""
    if not own:
        monkeypatch.setenv("RAZOR_LOCAL_CPU_ATTENTION", "off")
    n_layer = 4
    path = tiny(TinySpec("llama", n_layer, 8, 4, 64, seed=31))
    params = {"type_k": "f16", "type_v": "f16", "flash_attn": True, "n_ctx": N_CTX}
    plans = [reference.make_scoped((row,) * n_layer, N_CTX) for row in (A_GROUP, TWO_GROUPS)]
    counts = [runner.count_nodes(path, runner.override(plan), 300, **params) for plan in plans]
    assert counts[1] - counts[0] == more * n_layer


def test_statistics_are_of_the_smallest_window(tiny) -> None:
    spec = TinySpec("llama", 2, 4, 2, 32, seed=706)
    razor = reference.make_scoped(((64, 256), (64, 0)), N_CTX)
    with runner.Model(tiny(spec)) as model:
        with runner.Context(model, runner.override(razor), n_ctx=N_CTX) as ctx:
            for n in (50, 130, 200, 400):
                ctx.decode([1] * (n - ctx.n_past))
                frontier = int(razor.frontier(n - 1, 64))
                assert (ctx.seq().frontier, ctx.seq().n_folded) == (frontier, frontier - 4)
            assert (ctx.stats().window, ctx.stats().n_windows) == (256, 2)
