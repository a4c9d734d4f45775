"""Models with ALiBi: heads keep their slopes in any group, and there is no compensation.

The error is max |logit - float64 reference| with an F32 cache. The logits have a standard deviation
of about 8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from razor_local.model_file import read_model_shape
from razor_local.plan import make_plan
from razor_local.profile import Profile
from tests.support import reference, runner, tiny_models
from tests.support.alibi_models import AlibiSpec, forward, make_weights, write
from tests.support.device import examples, tolerance
from tests.support.native_cases import FLASH_F32, KV

Scopes = tuple[tuple[int, ...], ...]

N_CTX = 1024
TOLERANCE = tolerance(1e-4)
FLASH = pytest.mark.parametrize("flash_attn", FLASH_F32, ids=["nofa", "fa"][: len(FLASH_F32)])


@dataclass(frozen=True)
class Case:
    name: str
    spec: AlibiSpec
    scopes: Scopes
    sink_tokens: int = 0

    @property
    def razor(self) -> reference.Razor:
        return reference.make_scoped(self.scopes, N_CTX, self.sink_tokens, compensation=False)


MIXED = ((30, 0, 200, 130), (0, 200, 200, 30), (64, 200, 0, 0))
CASES = [
    Case("bloom", AlibiSpec("bloom", 3), MIXED),
    Case("mpt", AlibiSpec("mpt", 2, 3, 3, 32, bias=0, max_bias=4.0), ((30, 0, 200), (200, 30, 0))),
    Case("mpt of 6", AlibiSpec("mpt", 2, 6, 6, 16, clamp=1.5), ((64, 300, 1, 0, 64, 300),) * 2),
    Case("jais", AlibiSpec("jais", 3, gain=2.0), MIXED, sink_tokens=4),
    Case("jais of 16", AlibiSpec("jais", 2, 16, 16, 16), ((300, 64, 0, 64) * 4, (64, 0) * 8)),
    Case("refact", AlibiSpec("refact", 2, 6, 3, fused=False), ((0, 64, 300), (64, 0, 0))),
    Case("refact mqa", AlibiSpec("refact", 3, 4, 1), ((64,), (0,), (300,)), sink_tokens=70),
    Case("all local", AlibiSpec("bloom", 2), ((64, 300, 64, 300), (64, 64, 64, 64))),
    Case("many windows", AlibiSpec("bloom", 2, 8, 8), ((10, 70, 140, 200, 260, 330, 390, 0),) * 2),
    Case("baichuan", AlibiSpec("baichuan", 40, 4, 4, 16, fused=False), (MIXED * 14)[:40]),
    Case("heads of 8", AlibiSpec("bloom", 3, head_dim=8), MIXED),
]
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(scope="module")
def path_of(tmp_path_factory):
    """path_of(spec) -> path of the model, written once."""
    folder, paths = tmp_path_factory.mktemp("alibi"), {}

    def make(spec: AlibiSpec) -> Path:
        if spec not in paths:
            paths[spec] = write(folder / f"{len(paths)}.gguf", spec, weights_of(spec))
        return paths[spec]

    return make


def weights_of(spec: AlibiSpec) -> dict[str, np.ndarray]:
    """Return weights that keep llama.cpp's GELU from hiding errors of the attention.

    GELU rounds to F16, so even a tiny difference can grow to the size of a rounding error.
    """
    weights = make_weights(spec)
    for name in weights:
        if "ffn_down" in name and spec.arch in ("bloom", "mpt"):
            weights[name] *= np.float32(1e-3)
    return weights


def tokens_of(spec: AlibiSpec, n: int) -> list[int]:
    return runner.random_tokens(n, spec.n_vocab, spec.seed)


def expected(case: Case, n: int) -> np.ndarray:
    return forward(case.spec, weights_of(case.spec), tokens_of(case.spec, n), case.razor)


def without_local_heads(case: Case) -> Case:
    return replace(case, scopes=tuple((0,) * len(row) for row in case.scopes))


# -- what the attention computes --


@pytest.mark.parametrize("own", [True, False], ids=["razor", "upstream"])
@FLASH
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_alibi_scopes_equal_the_reference(
    case: Case, flash_attn: bool, own: bool, path_of, monkeypatch
) -> None:
    """Use ubatches of several sizes, and decode the last tokens one by one."""
    if not own:
        monkeypatch.setenv("RAZOR_LOCAL_CPU_ATTENTION", "off")
    n, single = 520, 70
    want, tokens = expected(case, n), tokens_of(case.spec, n)
    limit = TOLERANCE
    if flash_attn and (not own or case.spec.head_dim % 16) and not all_split(case):
        limit = 0.1  # upstream's flash attention rounds to F16
    with runner.Model(path_of(case.spec)) as model:
        for n_ubatch in (512, 100):
            params = {"n_ctx": N_CTX, "n_ubatch": n_ubatch, "flash_attn": flash_attn}
            with runner.Context(model, runner.override(case.razor), **params) as ctx:
                windows = {w for row in case.razor.windows for w in row if w}
                assert list(ctx.stats().windows)[: ctx.stats().n_windows] == sorted(windows)[::-1]
                got = np.concatenate(
                    [ctx.decode(tokens[:-single]), ctx.decode(tokens[-single:], 1)]
                )
            assert np.abs(got - want).max() <= limit
    # check the case itself: a full cache gives other logits
    full = forward(case.spec, weights_of(case.spec), tokens)
    assert np.abs(want - full).max() > 1e-2


def all_split(case: Case) -> bool:
    """Return whether each layer has several groups of heads."""
    return all(len(set(row)) > 1 for row in case.razor.windows)


@st.composite
def random_cases(draw: Any) -> tuple[Case, int, list[int], dict[str, Any]]:
    arch = draw(st.sampled_from(["bloom", "mpt", "jais", "refact"]))
    n_kv, n_layer = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    group = draw(st.sampled_from([1, 2, 3])) if arch == "refact" else 1
    max_bias = draw(st.sampled_from([8.0, 4.0, 3.1])) if arch in ("mpt", "jais") else 8.0
    spec = AlibiSpec(arch, n_layer, n_kv * group, n_kv, draw(st.sampled_from([8, 16, 32])),
                     max_bias=max_bias, seed=3)  # fmt: skip
    scope = st.sampled_from([0, 1, 60, 64, 65, 120, 128, 200, 250, 320, 400, 500, 700, 1024, 4000])
    row = st.lists(scope, min_size=n_kv, max_size=n_kv).map(tuple)
    scopes = tuple(draw(st.lists(row, min_size=n_layer, max_size=n_layer)))
    assume(any(0 < x <= 500 for row in scopes for x in row))
    n = draw(st.integers(1, 700))
    splits = runner.random_splits(n, draw(st.sampled_from([3, 50, 200])), 0)
    params = {"n_ubatch": draw(st.sampled_from([1, 16, 100, 512]))}
    # upstream's flash attention rounds to F16
    flash = draw(st.sampled_from(FLASH_F32)) and spec.head_dim % 16 == 0
    return (
        Case("random", spec, scopes, draw(st.sampled_from([0, 0, 4, 65]))),
        n,
        splits,
        params | {"flash_attn": flash},
    )


@settings(
    derandomize=True, deadline=None, max_examples=examples(60), suppress_health_check=HealthCheck
)
@given(random_cases())
def test_any_alibi_scopes_equal_the_reference(path_of, drawn) -> None:
    case, n, splits, params = drawn
    with runner.Model(path_of(case.spec)) as model:
        with runner.Context(model, runner.override(case.razor), n_ctx=N_CTX, **params) as ctx:
            got = ctx.decode(tokens_of(case.spec, n), splits)
    assert np.abs(got - expected(case, n)).max() <= TOLERANCE


@pytest.mark.skipif(runner.GPU_LAYERS != 0, reason="on CPUs")
@pytest.mark.parametrize("name", ["bloom", "mpt of 6", "refact", "refact mqa"])
def test_a_full_cache_with_alibi_equals_the_reference(name: str, path_of) -> None:
    """Razor's attention runs in llama.cpp's own cache, for a prompt and for single tokens."""
    case = without_local_heads(BY_NAME[name])
    tokens = tokens_of(case.spec, 520)
    want = forward(case.spec, weights_of(case.spec), tokens)
    full = runner.Override(enabled=False, own_attention=True)
    with runner.Model(path_of(case.spec)) as model:
        with runner.Context(model, full, n_ctx=N_CTX, flash_attn=True) as ctx:
            assert ctx.stats().own_attention
            got = np.concatenate([ctx.decode(tokens[:450]), ctx.decode(tokens[450:], 1)])
    assert np.abs(got - want).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("type_k", "type_v", "flash_attn"), KV, ids=lambda x: {True: "fa", False: "nofa"}.get(x, x)
)
@pytest.mark.parametrize("own", [True, False], ids=["razor", "upstream"])
def test_other_types_with_alibi_are_as_exact_as_a_full_cache(
    own: bool, type_k: str, type_v: str, flash_attn: bool, path_of, monkeypatch
) -> None:
    if not own:
        monkeypatch.setenv("RAZOR_LOCAL_CPU_ATTENTION", "off")
    params = {"type_k": type_k, "type_v": type_v, "flash_attn": flash_attn, "n_ctx": N_CTX}
    spec = AlibiSpec("mpt", 2, 6, 6, 64)
    case = Case("types", spec, ((64, 0, 300, 64, 128, 0), (300, 64, 64, 0, 0, 128)))
    tokens = tokens_of(spec, 520)
    errors = []
    for razor, override in ((case.razor, runner.override(case.razor)), (None, runner.OFF)):
        got = runner.logits(path_of(spec), tokens, override, **params)
        want = forward(spec, weights_of(spec), tokens, razor)
        errors.append(float(np.sqrt(((got - want) ** 2).mean())))
    assert errors[0] <= max(1.3 * errors[1], TOLERANCE / 10)


# -- stock --


@pytest.mark.parametrize("flash_attn", [False, True], ids=["nofa", "fa"])
@pytest.mark.parametrize("name", ["bloom", "jais", "jais of 16", "mpt", "mpt of 6", "refact mqa"])
def test_alibi_window_that_holds_everything_equals_stock(
    name: str, flash_attn: bool, path_of, stock, monkeypatch
) -> None:
    """Compare the bits with stock, with upstream's operations and an F16 cache.

    They differ only for slopes that are not powers of two, in layers with several groups: the
    products of slope and distance are rounded before they are added to the logit. Flash attention
    is only used in layers with one group.
    """
    monkeypatch.setenv("RAZOR_LOCAL_CPU_ATTENTION", "off")
    case = BY_NAME[name]
    flash = flash_attn and not all_split(case)
    tokens = tokens_of(case.spec, 60)
    params = {"type_k": "f16", "type_v": "f16", "n_ctx": N_CTX, "n_ubatch": 32}
    razor, path = runner.override(case.razor), path_of(case.spec)
    got = runner.logits(path, tokens, razor, 40, flash_attn=flash_attn, **params)
    want = stock(runner.logits, path, tokens, None, 40, flash_attn=flash, **params)
    if name == "jais of 16":  # its first slope is the root of 1/2
        exact = forward(case.spec, weights_of(case.spec), tokens)
        errors = [float(np.sqrt(((logits - exact) ** 2).mean())) for logits in (got, want)]
        assert errors[0] <= 1.1 * errors[1]
    else:
        np.testing.assert_array_equal(got, want)


# -- going back, states, aborts --


def test_alibi_rollback(path_of) -> None:
    """A sequence can be rolled back as long as its rows are in the rings of all groups."""
    case = BY_NAME["bloom"]
    razor, spec = case.razor, case.spec
    assert razor.block == 64
    rings = {w: reference.cells_of(w, 0, False, 64) for row in razor.windows for w in row if w}
    tokens, went = tokens_of(spec, 700), set()
    with runner.Model(path_of(spec)) as model:
        with runner.Context(model, runner.override(razor), n_ctx=N_CTX) as ctx:
            want = ctx.decode(tokens)
            for back in range(1, 330, 7):
                ctx.clear()
                ctx.decode(tokens[:650])
                to = 650 - back
                goes = all(
                    650 <= int(razor.frontier(to, w)) + ring
                    or razor.frontier(to, w) == razor.frontier(649, w)
                    for w, ring in rings.items()
                )
                assert ctx.seq_rm(to) == goes, f"from 650 to {to}"
                went.add(goes)
                got = ctx.decode(tokens[ctx.n_past :])
                np.testing.assert_allclose(got, want[-len(got) :], rtol=0, atol=tolerance(1e-5))
    assert went == {True, False}


@pytest.mark.parametrize("whole", [True, False])
def test_alibi_state(whole: bool, path_of) -> None:
    """A context continues from a loaded state with the same bits; other scopes are refused."""
    case = BY_NAME["jais"]
    tokens, razor = tokens_of(case.spec, 500), runner.override(case.razor)
    assert case.scopes[0] == (30, 0, 200, 130)
    other = replace(case, scopes=((200, 0, 30, 130), *case.scopes[1:])).razor
    with runner.Model(path_of(case.spec)) as model:
        with runner.Context(model, razor, n_ctx=N_CTX) as ctx:
            ctx.decode(tokens[:420])
            state = ctx.save(whole)
            want = ctx.decode(tokens[420:])
        with runner.Context(model, razor, n_ctx=N_CTX) as ctx:
            ctx.decode(tokens[100:150])
            assert ctx.load(state, whole)
            np.testing.assert_array_equal(ctx.decode(tokens[420:]), want)
        with runner.Context(model, runner.override(other), n_ctx=N_CTX) as ctx:
            assert not ctx.load(state, whole)
            assert "saved under another plan" in runner.last_error()


def test_alibi_abort(path_of) -> None:
    """After an abort, decoding continues from the tokens that the cache holds."""
    case = BY_NAME["bloom"]
    tokens, held = tokens_of(case.spec, 500), set()
    params = {"n_ctx": N_CTX, "n_ubatch": 64}
    with runner.Model(path_of(case.spec)) as model:
        with runner.Context(model, runner.override(case.razor), **params) as ctx:
            want = ctx.decode(tokens)
            for n_nodes in (*range(1, 60, 9), 100, 250):
                ctx.clear()
                ctx.decode(tokens[:380])
                ctx.abort_after(n_nodes)
                status, _ = ctx.try_decode(tokens[380:])
                ctx.abort_after(None)
                assert status != 0
                ctx.n_past = ctx.pos_max() + 1
                held.add(ctx.n_past)
                got = ctx.decode(tokens[ctx.n_past :])
                np.testing.assert_allclose(got, want[-len(got) :], rtol=0, atol=tolerance(1e-5))
    assert max(held) >= 380


# -- the plan --


@settings(
    derandomize=True, deadline=None, max_examples=examples(60), suppress_health_check=HealthCheck
)
@given(
    st.lists(
        st.tuples(*[st.sampled_from([0, 1, 64, 65, 200, 320, 500, 1500, 4000, 2**30])] * 4),
        min_size=2,
        max_size=2,
    ),
    st.sampled_from([256, 512, 1024, 4096]),
    st.sampled_from([("f16", "f16", True), ("q8_0", "q4_0", True), ("q8_0", "f16", False)]),
)
def test_bytes_of_alibi_scopes(path_of, scopes: list, n_ctx: int, kv: tuple) -> None:
    """Buffers have the bytes of razor_local.plan, there are no sums, and no scope is shortened."""
    path = path_of(AlibiSpec("bloom", 2, 4, 4, 32))
    type_k, type_v, flash_attn = kv
    profile = Profile(
        tuple(np.array([s == 0 for s in row], np.uint8) for row in scopes),
        method="alibi",
        scope=tuple(np.array(row, np.uint32) for row in scopes),
        sink_tokens=0,
        compensation=False,
    )
    plan = make_plan(read_model_shape(path), profile, n_ctx, type_k, type_v, flash_attn)
    override = runner.Override(
        profile.flat().tobytes(), sink_tokens=0, compensation=False, scope=sum(scopes, ())
    )
    params = {"type_k": type_k, "type_v": type_v, "flash_attn": flash_attn, "n_ubatch": 16}
    with runner.Model(path) as model:
        with runner.Context(model, override, n_ctx=n_ctx, **params) as ctx:
            stats, buffers = ctx.stats(), ctx.buffers()
            sums = [ctx.layer(il).bytes_sums for il in range(2)] if stats.active else []
    assert (bool(stats.active), stats.kv_bytes) == (plan.active, plan.kv_bytes)
    for layer, row in zip(plan.layers, scopes, strict=True):
        for window, scope in zip(layer.windows, row, strict=True):
            assert window == 0 or window >= scope > 0
    if stats.active:
        assert stats.kv_bytes == sum(b.bytes for b in buffers)
        assert list(stats.windows)[: stats.n_windows] == [group.window for group in plan.groups]
        assert sums == [0, 0]


def alibi_keys(scopes: Scopes, **changes: Any) -> dict[str, Any]:
    """Return the metadata of a profile with the method "alibi"."""
    mask = tuple(tuple(int(x == 0) for x in row) for row in scopes)
    return tiny_models.razor_kv(mask, scopes=scopes, version=1, **changes) | {
        "razor.method": ("alibi", GGUFValueType.STRING),
        "razor.sink_tokens": (0, GGUFValueType.UINT32),
        "razor.compensation": (False, GGUFValueType.BOOL),
    }


def test_alibi_scopes_of_the_metadata(tmp_path: Path, path_of) -> None:
    """Version 1 uses scopes with the method "alibi", and a window replaces them."""
    case = BY_NAME["all local"]
    tokens = tokens_of(case.spec, 500)
    path = write(tmp_path / "m.gguf", case.spec, weights_of(case.spec), alibi_keys(case.scopes))
    window = reference.make_razor(case.razor.mask, 80, 0, compensation=False)
    for given_, razor in ((None, case.razor), (80, window)):
        override = None
        if given_ is not None:
            override = runner.Override(window=given_, sink_tokens=0, compensation=False)
        np.testing.assert_array_equal(
            runner.logits(path, tokens, override, n_ctx=N_CTX),
            runner.logits(path_of(case.spec), tokens, runner.override(razor), n_ctx=N_CTX),
        )


def test_alibi_is_refused_by_name(tmp_path: Path, path_of) -> None:
    """Refuse a compensation token, and the method "alibi" in other models."""
    case = BY_NAME["bloom"]
    path = path_of(case.spec)
    razor = runner.override(case.razor, compensation=True)
    sentence = runner.refusal(str(path), razor, n_ctx=N_CTX)
    assert sentence and "a compensation token is not supported with ALiBi" in sentence
    assert runner.refusal(str(path), runner.OFF, n_ctx=N_CTX) is None
    # such a model can be loaded
    scopes = ((9, 9),) * 3
    llama = tiny_models.make_model(
        tmp_path / "llama.gguf", tiny_models.TinySpec(), alibi_keys(scopes)
    )
    sentence = runner.refusal(str(llama))
    assert sentence and "razor.method is 'alibi' and llama does not use ALiBi" in sentence
    assert runner.refusal(str(llama), runner.OFF) is None
    assert runner.refusal(str(llama), runner.Override(bytes(6), window=16)) is None
    keys = alibi_keys(scopes)
    del keys["razor.head.scope"]
    with pytest.raises(runner.LoadError, match=r"without razor\.head\.scope, expected u32\[6\]"):
        runner.Model(tiny_models.make_model(tmp_path / "m.gguf", tiny_models.TinySpec(), keys))
