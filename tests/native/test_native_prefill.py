"""Prompts read with full attention, one layer at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from razor_local.model_file import ModelFile
from razor_local.plan import make_plan
from razor_local.profile import Profile, split_heads
from tests.support import arch_models, arch_runs, reference, runner
from tests.support.device import examples
from tests.support.native_cases import F32_TOLERANCE, FLASH_F32, weights
from tests.support.reference import Razor
from tests.support.tiny_models import TinySpec
from tests.tools.architectures import RESULTS, RUNS

FOUND = json.loads(RESULTS.read_text())
TRIED = sorted(arch for arch, found in FOUND.items() if found["result"] == RUNS)
N_CTX = 1024
SPEC = TinySpec("llama", 3, 4, 2, 32, seed=47, sharpness=1.0)
MASK = ((0, 1), (0, 0), (1, 0))
PLANS = {
    "window-24": reference.make_razor(MASK, 24),
    "all layers alike": reference.make_razor(((0, 1),) * 3, 40),
    "no retrieval heads": reference.make_razor(((0, 0),) * 3, 40),
    "layers without local heads": reference.make_razor(((1, 1), (0, 1), (1, 1)), 40),
    "no compensation": reference.make_razor(MASK, 30, compensation=False),
    "no sinks": reference.make_razor(MASK, 64, sink_tokens=0),
    "several windows": reference.make_scoped(((24, 0), (130, 60), (60, 24)), N_CTX),
    "four windows": reference.make_scoped(((24, 60), (130, 280), (60, 0)), N_CTX),
}
CACHES: dict[str, dict[str, Any]] = {
    "f32": {"type_k": "f32", "type_v": "f32", "flash_attn": False},
    "f16-flash": {"type_k": "f16", "type_v": "f16", "flash_attn": True},
    "q8_0-flash": {"type_k": "q8_0", "type_v": "q8_0", "flash_attn": True},
}


@pytest.fixture(scope="module")
def model(tiny) -> Iterator[runner.Model]:
    with runner.Model(tiny(SPEC)) as model:
        yield model


def context(model: runner.Model, plan: Any, **params: Any) -> runner.Context:
    override = plan if isinstance(plan, runner.Override) else runner.override(plan)
    defaults = {"n_ctx": N_CTX, "n_batch": 700, "n_ubatch": 128, "flash_attn": True}
    return runner.Context(model, override, **(defaults | params))


def run(ctx: runner.Context, tokens: list[int], steps: list[tuple[str, int]]) -> np.ndarray:
    """Read prompts and decode tokens one by one. Returns the logits of all."""
    parts = []
    for kind, n in steps:
        part = tokens[ctx.n_past : ctx.n_past + n]
        parts.append(ctx.read(part) if kind == "prompt" else ctx.decode(part, 1))
    return np.concatenate(parts)


def with_prompts(plan: Razor, steps: list[tuple[str, int]]) -> Razor:
    """Return the reference's parameters for the steps. Short prompts are read as without this."""
    spans, at = [], 0
    for kind, n in steps:
        windows = [w for row in plan.windows or ((plan.window,),) for w in row if w]
        ends = [int(plan.frontier(at + n - 1, w)) for w in windows]
        if kind == "prompt" and max(ends) > max(int(plan.frontier(at, w)) for w in windows):
            spans.append((at, at + n))
        at += n
    return replace(plan, prompts=tuple(spans))


# the second prompt begins with a fold
CONVERSATION = [("prompt", 420), ("token", 92), ("prompt", 230), ("token", 40), ("prompt", 1)]


@pytest.mark.parametrize("flash_attn", FLASH_F32)
@pytest.mark.parametrize("plan", PLANS)
def test_prompts_equal_the_reference(plan: str, flash_attn: bool, model) -> None:
    tokens = runner.random_tokens(N_CTX, model.n_vocab, 1)
    n = sum(n for _, n in CONVERSATION)
    razor = with_prompts(PLANS[plan], CONVERSATION)
    assert len(razor.prompts) == 2
    want = reference.forward(SPEC, weights(SPEC), tokens[:n], razor)
    with context(model, PLANS[plan], type_k="f32", type_v="f32", flash_attn=flash_attn) as ctx:
        got = run(ctx, tokens, CONVERSATION)
    assert np.abs(got - want).max() <= F32_TOLERANCE
    folded = reference.forward(SPEC, weights(SPEC), tokens[:n], PLANS[plan])
    assert np.abs(folded - want).max() > 100 * F32_TOLERANCE


@settings(
    max_examples=examples(25),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    plan=st.sampled_from(list(PLANS)),
    n_ubatch=st.sampled_from([16, 50, 128]),
    steps=st.lists(
        st.tuples(st.sampled_from(["prompt", "token"]), st.integers(1, 330)), min_size=1, max_size=4
    ).filter(lambda steps: sum(n for _, n in steps) <= 900),
)
def test_any_conversation_equals_the_reference(plan, n_ubatch, steps, model) -> None:
    tokens = runner.random_tokens(N_CTX, model.n_vocab, 2)
    n = sum(n for _, n in steps)
    want = reference.forward(SPEC, weights(SPEC), tokens[:n], with_prompts(PLANS[plan], steps))
    params = {"type_k": "f32", "type_v": "f32", "n_ubatch": n_ubatch}
    with context(model, PLANS[plan], **params) as ctx:
        assert np.abs(run(ctx, tokens, steps) - want).max() <= F32_TOLERANCE


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("plan", ["window-24", "several windows", "four windows"])
def test_a_prompt_equals_a_full_cache(plan: str, cache: str, model) -> None:
    """to the bit where razor_local's attention runs."""
    tokens = runner.random_tokens(700, model.n_vocab, 3)
    full = runner.override(reference.make_razor(MASK, 24))
    full = replace(full, retrieval=b"\1" * len(full.retrieval), own_attention=True, window=900)
    with context(model, full, **CACHES[cache]) as ctx:
        assert not ctx.stats().active
        want = ctx.decode(tokens)
    with context(model, PLANS[plan], **CACHES[cache]) as ctx:
        got = ctx.read(tokens)
        own = ctx.stats().own_attention and plan != "four windows"
    tolerance = 0 if own or cache == "f32" else 3e-2
    assert np.abs(got - want).max() <= tolerance


def test_a_prompt_exceeds_a_batch(model) -> None:
    tokens = runner.random_tokens(900, model.n_vocab, 3)
    with context(model, PLANS["window-24"], n_batch=1024) as ctx:
        want = ctx.read(tokens)
    with context(model, PLANS["window-24"], n_batch=64, n_ubatch=64) as ctx:
        assert ctx.try_decode(tokens[:64])[0] == 0
        ctx.clear()
        assert ctx.set_full_prefill(True)
        status, logits = ctx.try_decode(tokens, 0, last_only=True)
        assert status == 0
        np.testing.assert_allclose(logits, want[-1:], atol=1e-5)
        ctx.clear()
        assert ctx.try_decode(tokens[:65], 0)[0] == 1  # 65 outputs
        assert "the batch has more outputs than n_outputs_max" in runner.last_error()


@pytest.mark.parametrize("local", ["q4_0", "q8_0", "f16"])
def test_local_heads_with_types_of_their_own(local: str, model) -> None:
    types = (("f16", "f16"), (local, local))
    tokens = runner.random_tokens(N_CTX, model.n_vocab, 4)
    razor = with_prompts(replace(PLANS["window-24"], types=types), CONVERSATION)
    n = sum(n for _, n in CONVERSATION)
    want = reference.forward(SPEC, weights(SPEC), tokens[:n], razor)
    override = runner.override(PLANS["window-24"], type_k_local=local, type_v_local=local)
    with context(model, override, type_k="f16", type_v="f16") as ctx:
        got = run(ctx, tokens, CONVERSATION)
    other = reference.forward(SPEC, weights(SPEC), tokens[:n], replace(razor, types=None))
    error = float(np.sqrt(((got - want) ** 2).mean()))
    assert error < min(2e-4, np.sqrt(((got - other) ** 2).mean()) / 2)


@pytest.mark.parametrize("mode", ["ram", "disk"])
@pytest.mark.parametrize("plan", ["window-24", "several windows", "no compensation"])
def test_the_rewind_log_of_a_prompt(plan: str, mode: str, model, tmp_path) -> None:
    """Going back to the end of a prompt, behind another one, gives what was there."""
    tokens = runner.random_tokens(N_CTX, model.n_vocab, 5)
    override = runner.override(PLANS[plan], rewind=mode, rewind_folder=str(tmp_path))
    with context(model, override) as ctx:
        run(ctx, tokens, [("prompt", 400)])
        state = ctx.save(whole=False)
        run(ctx, tokens, [("prompt", 300), ("token", 60)])
        assert ctx.seq(0).n_rollback == ctx.n_past
        assert ctx.seq_rm(400)
        again = run(ctx, tokens, [("token", 40)])
        assert ctx.load(state, whole=False)
        np.testing.assert_array_equal(again, run(ctx, tokens, [("token", 40)]))


@pytest.mark.parametrize("plan", PLANS)
def test_going_back_into_a_prompt(plan: str, model) -> None:
    """The cache is that of a prompt which ended there: K and V of a token depend on earlier ones
    alone, and each of them was folded when its layer read the prompt."""
    tokens = runner.random_tokens(N_CTX, model.n_vocab, 6)
    override = runner.override(PLANS[plan], rewind="ram")
    with context(model, override) as ctx, context(model, override) as other:
        ctx.read(tokens[:600])
        for n in (590, 448, 333, 300, 200):
            assert ctx.seq_rm(n)
            other.clear()
            other.read(tokens[:n])
            for at in range(n, n + 70, 10):
                part = tokens[at : at + 10]
                np.testing.assert_array_equal(ctx.decode(part), other.decode(part))
            assert ctx.seq_rm(n)


def test_a_state_after_a_prompt(model) -> None:
    tokens = runner.random_tokens(N_CTX, model.n_vocab, 7)
    with context(model, PLANS["window-24"]) as ctx, context(model, PLANS["window-24"]) as other:
        ctx.read(tokens[:500])
        assert other.load(ctx.save())
        want = run(ctx, tokens, [("prompt", 200), ("token", 10)])
        np.testing.assert_array_equal(run(other, tokens, [("prompt", 200), ("token", 10)]), want)


def test_temporary_buffers(model, tiny) -> None:
    """Their size is the plan's formula, they are freed, and the cache does not grow."""
    shape = ModelFile(tiny(SPEC)).shape
    heads = split_heads(np.array([x for row in MASK for x in row], np.uint8), shape.n_head_kv)
    profile = Profile(heads, window_min=24, window_divisor=0)
    plan = make_plan(shape, profile, N_CTX, "f32", "f32", True)
    tokens = runner.random_tokens(700, model.n_vocab, 8)
    with context(model, PLANS["window-24"]) as ctx:
        before = ctx.stats()
        assert before.prefill_bytes == 0
        ctx.read(tokens)
        after = ctx.stats()
        n_embd = runner.bindings().llama_model_n_embd(model.ptr)
        assert after.prefill_bytes == plan.prefill_bytes(700, n_embd) > 0
        assert after.kv_bytes == before.kv_bytes == plan.kv_bytes
        assert after.prefill_done == 0 and not after.full_prefill
    for first in (1, 40, 90, 200):
        with context(model, PLANS["window-24"]) as ctx:
            ctx.decode(tokens[:first])
            ctx.read(tokens[first:])
            asked = plan.prefill_bytes(700 - first, n_embd, first)
            assert ctx.stats().prefill_bytes == asked


@pytest.mark.parametrize("window", [24, 100, 130])
def test_the_plan_knows_when_it_matters(window: int, model, tiny) -> None:
    """The library needs temporary buffers exactly for the prompts that the plan names."""
    shape = ModelFile(tiny(SPEC)).shape
    heads = split_heads(np.array([x for row in MASK for x in row], np.uint8), shape.n_head_kv)
    profile = Profile(heads, window_min=window, window_divisor=0)
    plan = make_plan(shape, profile, N_CTX, "f32", "f32", True)
    tokens = runner.random_tokens(N_CTX, model.n_vocab, 11)
    with context(model, reference.make_razor(MASK, window)) as ctx:
        for first in (0, 1, 63, 64, 127, 128, 200, 256, 320):
            for n in (1, 63, 64, 65, 127, 128, 129, 192, 193):
                ctx.clear()
                ctx.decode(tokens[:first])
                before = ctx.stats().prefill_count
                ctx.read(tokens[first : first + n])
                read = ctx.stats().prefill_count > before
                assert read == plan.folds_between(first, first + n), (first, n)


def test_progress_and_abort_in_every_layer(model) -> None:
    """An aborted prompt leaves an empty sequence, which can be used again."""
    tokens = runner.random_tokens(600, model.n_vocab, 9)
    llama = runner.bindings()
    done: list[float] = []
    with context(model, PLANS["window-24"]) as ctx:
        want = ctx.read(tokens)

        @llama.ggml_abort_callback
        def abort(_data: Any) -> bool:
            done.append(ctx.stats().prefill_done)
            return done[-1] >= limit

        llama.llama_set_abort_callback(ctx.ptr, abort, None)
        for limit in (0.0, 0.2, 0.4, 0.5, 0.7, 0.9):
            ctx.clear()
            ctx.decode(tokens[:3]) if limit > 0 else None
            done.clear()
            start = ctx.n_past
            with pytest.raises(RuntimeError, match="returned 2"):
                ctx.read(tokens[start:])
            assert done == sorted(done) and done[-1] >= limit
            assert ctx.pos_max() == -1
        limit = 2.0
        ctx.n_past = 0
        np.testing.assert_array_equal(ctx.read(tokens), want)


def test_other_sequences_are_not_touched(model) -> None:
    """A batch of several sequences is decoded as without this."""
    tokens = runner.random_tokens(400, model.n_vocab, 10)
    params = {"n_ctx": 2 * 512, "n_seq_max": 2, "kv_unified": False}
    with context(model, PLANS["window-24"], **params) as ctx:
        ctx.decode(tokens[:200])
        state = ctx.save(whole=False)
        assert ctx.set_full_prefill(True)
        ctx.decode_sequences([(1, i, token) for i, token in enumerate(tokens)])
        assert ctx.stats().prefill_count == 1
        assert ctx.save(whole=False) == state
        parts = [(0, 200, 80), (1, 400, 90), (0, 280, 90)]  # sequence, first position, tokens
        mixed = [(s, first + i, tokens[i]) for s, first, n in parts for i in range(n)]
        before = ctx.stats().prefill_count
        ctx.decode_sequences(mixed)
        assert ctx.stats().prefill_count == before


@pytest.mark.parametrize("arch", ["llama", "qwen3moe", "phi3", "falcon", "gpt2", "bloom", "mpt"])
def test_architectures_read_prompts(arch: str) -> None:
    """Compare some architectures with a full cache; the slow test compares all of them."""
    assert reads_like_a_full_cache(arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", TRIED)
def test_all_architectures_read_prompts(arch: str) -> None:
    assert reads_like_a_full_cache(arch) != is_refused(arch)


def is_refused(arch: str) -> bool:
    header = ModelFile(arch_models.path_of(arch)).shape
    return header.sliding is not None or header.recurrent_bytes > 0


def reads_like_a_full_cache(arch: str) -> bool:
    """Return False if the library refuses to read prompts of the architecture."""
    path = arch_models.path_of(arch)
    tokens, mask = arch_runs.tokens_of(path), arch_runs.mask_of(arch_runs.layers_of(path))
    local = runner.Override(mask, window=64, compensation=arch_runs.compensates(path))
    full = replace(local, retrieval=b"\1" * len(mask), window=1500, own_attention=True)
    params: dict[str, Any] = {"n_ctx": 2048, "type_k": "f16", "type_v": "f16", "swa_full": False}
    with runner.Model(path) as model:
        with context(model, local, **params) as ctx:
            if not ctx.set_full_prefill(True):
                return False
            got = ctx.read(tokens)
            assert ctx.stats().prefill_bytes > 0
        with context(model, full, **params) as ctx:
            np.testing.assert_array_equal(got, ctx.decode(tokens))
    return True


def test_refusals_to_read_fully(model) -> None:
    with context(model, runner.OFF) as ctx:
        assert not ctx.set_full_prefill(True)
        assert runner.last_error() == "razor is not active in this context"
        assert ctx.set_full_prefill(False)
    with runner.Model(arch_models.path_of("gemma3")) as sliding:
        shape = ModelFile(arch_models.path_of("gemma3")).shape
        plan = runner.Override(arch_runs.mask_of(shape.n_head_kv), window=64)
        with context(sliding, plan) as ctx:
            assert not ctx.set_full_prefill(True)
            assert "sliding windows or recurrent layers" in runner.last_error()


def test_the_reference_of_prompts_differs_from_both_others() -> None:
    razor = replace(PLANS["window-24"], prompts=((0, 300), (350, 500)))
    assert [int(razor.frontier(p)) for p in (0, 299, 300, 350, 499, 500)] == [
        4, 4, 232, 296, 296, 424,
    ]  # fmt: skip
