"""Keys and values that come from a full cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import reference, runner
from tests.support.device import examples
from tests.support.tiny_models import TinySpec

pytestmark = pytest.mark.skipif(
    runner.GPU_LAYERS != 0, reason="needs keys and values in main memory"
)

N_CTX = 1024
SPEC = TinySpec("llama", 3, 4, 2, 64, seed=47, sharpness=1.0)
MASK = ((0, 1), (0, 0), (1, 0))
PLANS = {
    "window-24": reference.make_razor(MASK, 24),
    "no retrieval heads": reference.make_razor(((0, 0),) * 3, 40),
    "layers without local heads": reference.make_razor(((1, 1), (0, 1), (1, 1)), 40),
    "no compensation": reference.make_razor(MASK, 30, compensation=False),
    "no sinks": reference.make_razor(MASK, 64, sink_tokens=0),
    "several windows": reference.make_scoped(((24, 0), (130, 60), (60, 24)), N_CTX),
}
TYPES = ("f32", "f16", "q8_0", "q4_0")
FULL = runner.override(reference.make_razor(((1, 1),) * 3, 900), own_attention=True)


@pytest.fixture(scope="module")
def model(tiny) -> Iterator[runner.Model]:
    with runner.Model(tiny(SPEC)) as model:
        yield model


def context(model: runner.Model, plan: Any, kv_type: str = "f16", **params: Any) -> runner.Context:
    override = plan if isinstance(plan, runner.Override) else runner.override(plan)
    defaults = {"n_ctx": N_CTX, "n_batch": 1024, "n_ubatch": 128, "flash_attn": True}
    types = {"type_k": kv_type, "type_v": kv_type}
    return runner.Context(model, override, **(defaults | types | params))


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("plan", PLANS)
def test_the_cache_is_that_of_a_prompt_that_was_read(plan: str, kv_type: str, model) -> None:
    """Both caches are bit-identical, and so are the logits of all tokens after the prompt."""
    tokens = runner.random_tokens(900, model.n_vocab, 1)
    with (
        context(model, FULL, kv_type) as full,
        context(model, PLANS[plan], kv_type) as read,
        context(model, PLANS[plan], kv_type, n_batch=300) as taken,
    ):
        assert not full.stats().active
        full.decode(tokens)
        read.read(tokens[:768])
        taken.take(tokens[:768], full)
        assert taken.stats().kv_bytes == read.stats().kv_bytes
        assert taken.seq().n_folded == read.seq().n_folded > 0
        assert taken.save() == read.save()
        # the first batch has as many tokens as the last graph that took them
        assert np.array_equal(taken.decode(tokens[768:832]), read.decode(tokens[768:832]))
        assert np.array_equal(taken.decode(tokens[832:], 1), read.decode(tokens[832:], 1))


@settings(
    max_examples=examples(25),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    plan=st.sampled_from(list(PLANS)),
    n_ubatch=st.sampled_from([16, 50, 128]),
    splits=st.lists(st.integers(1, 400), min_size=1, max_size=5).filter(lambda x: sum(x) <= 900),
    back=st.integers(0, 60),
)
def test_any_splits_give_the_same_cache(plan, n_ubatch, splits, back, model) -> None:
    n = sum(splits)
    tokens = runner.random_tokens(n, model.n_vocab, 2)
    with (
        context(model, FULL, "f32") as full,
        context(model, PLANS[plan], "f32") as whole,
        context(model, PLANS[plan], "f32", n_ubatch=n_ubatch) as parts,
    ):
        full.decode(tokens)
        whole.take(tokens, full)
        for size in splits:
            parts.take(tokens[parts.n_past : parts.n_past + size], full)
        back = min(back, n - 1)
        if back and parts.seq_rm(n - back):
            parts.take(tokens[n - back :], full)
        # means are summed in a different order if a rollback undid a fold
        assert np.abs(parts.decode(tokens[:1]) - whole.decode(tokens[:1])).max() <= 1e-5


@pytest.mark.parametrize(
    ("plan", "params", "source", "source_params", "why"),
    [
        (FULL, {}, FULL, {}, "razor is not active in this context"),
        ("window-24", {}, "window-24", {}, "is not a full cache in main memory"),
        ("window-24", {}, runner.OFF, {}, "is not a full cache in main memory"),
        ("window-24", {}, FULL, {"type_k": "q8_0"}, "the source has other KV types"),
        ("window-24", {}, FULL, {"type_v": "q8_0"}, "the source has other KV types"),
        ("local q8_0", {}, FULL, {}, "the source has other KV types"),
        ("window-24", {"flash_attn": False}, FULL, {}, "without flash attention"),
    ],
)
def test_refusals(plan, params, source, source_params, why, model) -> None:
    local = runner.override(PLANS["window-24"], type_k_local="q8_0", type_v_local="q8_0")
    plan = local if plan == "local q8_0" else PLANS.get(plan, plan) if type(plan) is str else plan
    source = PLANS[source] if type(source) is str else source
    tokens = runner.random_tokens(40, model.n_vocab, 3)
    with context(model, source, **source_params) as full, context(model, plan, **params) as ctx:
        full.decode(tokens)
        assert not ctx.set_source(full)
        assert why in runner.last_error()
        ctx.decode(tokens)  # nothing was set


def test_another_model_is_refused(tiny, model) -> None:
    with runner.Model(tiny(replace(SPEC, n_head_kv=1, seed=3))) as other:
        with context(other, runner.override(reference.make_razor(((1,),) * 3, 900),
                                            own_attention=True)) as full:  # fmt: skip
            with context(model, PLANS["window-24"]) as ctx:
                assert not ctx.set_source(full)
                assert "a model with another attention shape" in runner.last_error()


def test_tokens_that_the_source_lacks(model) -> None:
    tokens = runner.random_tokens(400, model.n_vocab, 4)
    with context(model, FULL) as full, context(model, PLANS["window-24"]) as ctx:
        full.decode(tokens[:300])
        assert ctx.set_source(full)
        assert ctx.try_decode(tokens, outputs=False)[0] != 0
        assert runner.last_error() == "the source does not hold these tokens"
        assert ctx.try_decode(tokens[:300])[0] != 0
        assert runner.last_error() == "tokens from a source have no outputs"
        assert ctx.try_decode(tokens[:300], outputs=False)[0] == 0
        ctx.set_source(None)
        want = full.decode(tokens[300:])
        assert want.shape == ctx.decode(tokens[300:]).shape


def test_an_abort_leaves_whole_ubatches(model) -> None:
    tokens = runner.random_tokens(600, model.n_vocab, 5)
    with (
        context(model, FULL, "f32") as full,
        context(model, PLANS["window-24"], "f32") as whole,
        context(model, PLANS["window-24"], "f32") as ctx,
    ):
        full.decode(tokens)
        whole.take(tokens, full)
        for n_nodes in (0, 7, 60, 150):
            ctx.clear()
            ctx.abort_after(n_nodes)
            with pytest.raises(RuntimeError, match="returned 2"):
                ctx.take(tokens, full)
            ctx.abort_after(None)
            ctx.n_past = ctx.pos_max() + 1
            assert ctx.n_past < 600 and ctx.n_past % 64 == 0
            ctx.take(tokens[ctx.n_past :], full)
            assert np.abs(ctx.decode([1]) - whole.decode([1])).max() <= 1e-5
            assert whole.seq_rm(600)
