"""The native cache against an independent float64 model: full, with F32, F16 and quantized KV.

Error of an F32 cache: max |logit - reference| over all positions and the vocabulary, absolute; the
logits of the tiny models have a standard deviation of about 3, and a stock build's own error is
3e-6 to 1e-5. Error of other types: root mean square of the difference, pooled
over all models of a test; stock's own error is that of a full cache of the same type against the
full float64 model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import reference, runner
from tests.support.device import examples, tolerance
from tests.support.native_cases import (
    F32_TOLERANCE,
    FLASH_F32,
    KV,
    POOL,
    Case,
    expected,
    mask_of,
    tokens_of,
    weights,
)
from tests.support.tiny_models import TinySpec, with_kv_heads

MASKS = ("none", "mixed", "prefix", "suffix", "scattered", "middle", "edges")


def matrix() -> list[Case]:
    """All archs x groupings x head sizes, with masks, windows, sinks and lengths in turn; then all
    masks with and without compensation for one shape per arch."""
    cases = []
    for arch in ("llama", "qwen2", "qwen3", "gpt2"):
        for grouping in ("mha",) if arch == "gpt2" else ("mha", "gqa", "mqa"):
            for head_dim in (32, 64, 96, 128):
                i = len(cases)
                spec = TinySpec(arch, 3, 4, 4, head_dim, seed=i, tied=i % 5 == 4)
                spec = with_kv_heads(spec, grouping)
                cases.append(
                    Case(
                        spec,
                        mask_of(MASKS[i % len(MASKS)], spec.kv_heads[0], spec.n_layer),
                        window=(16, 33, 20, 64, 100)[i % 5],
                        n_tokens=(310, 420, 530)[i % 3],
                        sink_tokens=(4, 0, 7, 1)[i % 4],
                        compensation=i % 6 != 5,
                    )
                )
    for arch in ("llama", "qwen2", "qwen3", "gpt2"):
        n_kv = 8 if arch == "gpt2" else 4
        spec = TinySpec(arch, 3, 8, n_kv, 32, seed=100)
        for kind in MASKS:
            for compensation in (True, False):
                mask = mask_of(kind, n_kv, 3)
                cases.append(Case(spec, mask, 24, 280, compensation=compensation))
    # layers with different numbers of KV heads, one without attention
    for n_kv, mask in (
        ((4, 1, 2), ((1, 0, 0, 1), (0,), (0, 1))),
        ((2, 0, 4), ((0, 1), (), (0, 0, 1, 0))),
        ((1, 4, 0), ((1,), (0, 0, 0, 0), ())),
    ):
        cases.append(Case(TinySpec("deci", 3, 4, n_kv, 32, seed=101), mask, 24, 280))
    # half of every head without RoPE, as in the built-in model's recipe
    spec = TinySpec("llama", 3, 4, 2, 64, seed=102, still=True)
    cases.append(Case(spec, ((0, 0), (1, 0), (0, 1)), 24, 280))
    return cases


def test_matrix_covers_what_it_says() -> None:
    cases = matrix()
    assert len(cases) >= 90
    assert len({str(case) for case in cases}) == len(cases)
    for name, values in (
        ("arch", {"llama", "qwen2", "qwen3", "gpt2", "deci"}),
        ("head_dim", {32, 64, 96, 128}),
    ):
        assert {getattr(case.spec, name) for case in cases} == values
    assert {n for case in cases for n in case.spec.kv_heads} == {0, 1, 2, 4, 8}
    rows = {row for case in cases for row in case.mask}
    assert {(1, 1, 0, 0), (0, 0, 1, 1), (1, 0, 1, 0), (0, 1, 1, 0), (1, 0, 0, 1)} <= rows
    assert any(not any(row) for row in rows) and any(all(row) for row in rows)


@pytest.mark.parametrize("flash_attn", FLASH_F32, ids=["nofa", "fa"][: len(FLASH_F32)])
@pytest.mark.parametrize("case", matrix(), ids=str)
def test_f32_cache_equals_the_reference(case: Case, flash_attn: bool, tiny) -> None:
    want = expected(case.spec, case.n_tokens, case.razor)
    got = runner.logits(
        tiny(case.spec),
        tokens_of(case.spec, case.n_tokens),
        runner.override(case.razor),
        n_ctx=1024,
        n_ubatch=128,
        flash_attn=flash_attn,
    )
    # the case can tell right from wrong: neither a full cache nor the other mode is near
    other = replace(case, compensation=not case.compensation)
    for wrong in (None, other.razor):
        diff = np.abs(want - expected(case.spec, case.n_tokens, wrong))
        assert diff.max() > 1e-2

    error = np.abs(got - want).max(axis=1)
    first = np.argmax(error > F32_TOLERANCE)
    assert error.max() <= F32_TOLERANCE, f"error {error.max():.2e}, from position {first} on"


@st.composite
def random_cases(draw) -> tuple[Case, list[int], dict[str, Any]]:
    """Any small plan: windows of one token, sinks beyond a block, any mask, any split."""
    n_kv = draw(st.sampled_from([1, 2, 3, 5]))
    n_layer = draw(st.integers(1, 3))
    arch = draw(st.sampled_from(["llama", "qwen2", "qwen3"]))
    n_head, head_dim = (
        n_kv * draw(st.sampled_from([1, 2, 3, 4])),
        draw(st.sampled_from([16, 32, 80])),
    )
    spec = TinySpec(arch, n_layer, n_head, n_kv, head_dim, seed=400)
    bits = draw(st.lists(st.integers(0, 1), min_size=n_kv * n_layer, max_size=n_kv * n_layer))
    mask = tuple(tuple(bits[i * n_kv : (i + 1) * n_kv]) for i in range(n_layer))
    n_tokens = draw(st.integers(1, 600))
    case = Case(
        spec,
        mask,
        window=draw(st.sampled_from([1, 2, 15, 63, 64, 65, 120, 121, 150, 300])),
        n_tokens=n_tokens,
        sink_tokens=draw(st.sampled_from([0, 1, 4, 63, 64, 65, 130])),
        compensation=draw(st.booleans()),
    )
    splits = runner.random_splits(n_tokens, draw(st.sampled_from([3, 50, 200])), 0)
    params = {"n_ubatch": draw(st.sampled_from([1, 16, 100, 512]))}
    # without local heads it is upstream's attention
    flash_attn = draw(st.sampled_from(FLASH_F32)) and 0 in bits
    return case, splits, params | {"flash_attn": flash_attn}


@settings(
    derandomize=True, deadline=None, max_examples=examples(40), suppress_health_check=HealthCheck
)
@given(random_cases())
def test_any_plan_equals_the_reference(tiny, drawn: tuple[Case, list[int], dict[str, Any]]) -> None:
    case, splits, params = drawn
    tokens = tokens_of(case.spec, case.n_tokens)
    with runner.Model(tiny(case.spec)) as model:
        override = runner.override(case.razor)
        with runner.Context(model, override, n_ctx=1024, **params) as ctx:
            assert ctx.stats().active == (0 in sum(case.mask, ()))
            got = ctx.decode(tokens, splits)
    want = reference.forward(case.spec, weights(case.spec), tokens, case.razor)
    assert np.abs(got - want).max() <= F32_TOLERANCE


def rms_pair(params: dict[str, Any], tiny, stock) -> tuple[float, float]:
    """Pooled rms error of razor and of stock, each against its own float64 reference."""
    squares: dict[str, list[float]] = {"razor": [], "stock": []}
    for case in POOL:
        path, tokens = tiny(case.spec), tokens_of(case.spec, case.n_tokens)
        razor = runner.logits(path, tokens, runner.override(case.razor), n_ctx=512, **params)
        full = stock(runner.logits, path, tokens, n_ctx=512, **params)
        for name, got, plan in (("razor", razor, case.razor), ("stock", full, None)):
            want = expected(case.spec, case.n_tokens, plan)
            squares[name].append(float(((got - want) ** 2).mean()))
    return tuple(float(np.sqrt(np.mean(squares[name]))) for name in ("razor", "stock"))


# below 64 tokens upstream's CPU flash attention sums F16 values in F16, with ten times the error
@pytest.mark.parametrize("n_ubatch", [512, 32])
@pytest.mark.parametrize(
    ("type_k", "type_v", "flash_attn"), KV, ids=lambda x: {True: "fa", False: "nofa"}.get(x, x)
)
def test_error_is_within_stocks_own(
    type_k: str, type_v: str, flash_attn: bool, n_ubatch: int, tiny, stock
) -> None:
    params = {"type_k": type_k, "type_v": type_v, "flash_attn": flash_attn, "n_ubatch": n_ubatch}
    razor, full = rms_pair(params, tiny, stock)
    print(f"rms error: razor {razor:.2e}, stock {full:.2e}, ratio {razor / full:.2f}")
    assert full > 0
    assert razor <= 1.2 * full


@pytest.mark.parametrize("flash_attn", FLASH_F32, ids=["nofa", "fa"][: len(FLASH_F32)])
def test_single_token_decode_across_folds(flash_attn: bool, tiny) -> None:
    """600 decodes of one token each: graphs are reused, folds happen in between."""
    case = Case(TinySpec("llama", 3, 4, 2, 32, seed=300), ((0, 0), (1, 0), (0, 1)), 40, 600)
    got = runner.logits(
        tiny(case.spec),
        tokens_of(case.spec, case.n_tokens),
        runner.override(case.razor),
        splits=1,
        n_ctx=1024,
        flash_attn=flash_attn,
    )
    want = expected(case.spec, case.n_tokens, case.razor)
    assert np.abs(got - want).max() <= F32_TOLERANCE


@pytest.mark.parametrize("window", [520, 1100])
def test_larger_blocks(window: int, tiny) -> None:
    """Folds of 128 and 256 tokens, a ring that comes around more than once."""
    spec = TinySpec("llama", 2, 2, 2, 32, seed=302)
    case = Case(spec, ((0, 1), (0, 0)), window, 2700)
    assert case.razor.block == {520: 128, 1100: 256}[window]
    got = runner.logits(
        tiny(spec), tokens_of(spec, 2700), runner.override(case.razor), n_ctx=4096, n_ubatch=200
    )
    want = reference.forward(spec, weights(spec), tokens_of(spec, 2700), case.razor)
    assert np.abs(got - want).max() <= F32_TOLERANCE


@pytest.mark.parametrize("offload", [True, False], ids=["offload", "no-offload"])
@pytest.mark.parametrize("flash_attn", [True, False], ids=["fa", "nofa"])
def test_kv_offload_flag(offload: bool, flash_attn: bool, tiny) -> None:
    """offload_kqv changes where things run, not what comes out."""
    case = POOL[0]
    params = {"n_ctx": 512, "flash_attn": flash_attn}
    tokens = tokens_of(case.spec, 300)
    runs = [
        runner.logits(tiny(case.spec), tokens, runner.override(case.razor), offload_kqv=x, **params)
        for x in (True, offload)
    ]
    if runner.GPU_LAYERS:  # the device's attention against the CPU's
        np.testing.assert_allclose(*runs, rtol=0, atol=tolerance(0.0, flash_attn=flash_attn))
    else:
        np.testing.assert_array_equal(*runs)


@pytest.mark.parametrize("flash_attn", FLASH_F32, ids=["nofa", "fa"][: len(FLASH_F32)])
def test_several_threads(flash_attn: bool, tiny) -> None:
    """Two threads give the same logits as the reference too."""
    case = Case(TinySpec("qwen3", 3, 8, 4, 64, seed=301), mask_of("middle", 4, 3), 32, 400)
    got = runner.logits(
        tiny(case.spec),
        tokens_of(case.spec, case.n_tokens),
        runner.override(case.razor),
        n_ctx=1024,
        n_threads=2,
        flash_attn=flash_attn,
    )
    want = expected(case.spec, case.n_tokens, case.razor)
    assert np.abs(got - want).max() <= F32_TOLERANCE
