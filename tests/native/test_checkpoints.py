"""Checkpoints: how caches with sliding windows or recurrent states go back."""

from __future__ import annotations

import re
from contextlib import closing

import numpy as np
import pytest

from razor_local import Llama, Profile, rewind_log
from razor_local.checkpoints import MARGIN, MAX_COUNT
from razor_local.cli.chat_status import _rewind
from razor_local.model_file import ModelFile
from razor_local.profile import split_heads
from tests.support import arch_models, arch_runs

ARCHS = ["lfm2", "qwen35", "granitehybrid", "gemma3", "gpt-oss"]
RNG = np.random.default_rng(0)
PROMPT, ANSWER, MESSAGE, OTHER = (RNG.integers(3, 100, n).tolist() for n in (300, 60, 100, 120))
KEPT = ANSWER[40:]  # by a template that drops the thoughts


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(rewind_log, "cache_folder", lambda: tmp_path / "cache")


def open_llama(arch, razor=True, **options):
    path = arch_models.path_of(arch)
    n_head_kv = ModelFile(path).shape.n_head_kv
    heads = np.frombuffer(arch_runs.mask_of(n_head_kv), np.uint8)
    profile = Profile(split_heads(heads, n_head_kv), window_min=64, window_divisor=0)
    precise = {"type_k": "f32", "type_v": "f32", "flash_attn": False}
    options = precise | {"n_ctx": 1024, "n_batch": 128, "swa_full": False} | options
    return closing(Llama(path, razor=profile if razor else False, **options))


def check_logits(llama, arch, razor, tokens):
    with open_llama(arch, razor) as fresh:
        assert fresh.prefill(tokens).n_reused == 0
        np.testing.assert_allclose(llama._last_logits(), fresh._last_logits(), atol=1e-3)


@pytest.mark.parametrize("razor", [True, False])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_conversation_goes_back_to_its_turns(arch, razor) -> None:
    second = PROMPT + ANSWER + MESSAGE
    with open_llama(arch, razor) as llama:
        assert llama.memory().active == razor
        llama.prefill(PROMPT)
        llama.eval(ANSWER)
        assert llama.prefill(second).n_evaluated == len(MESSAGE)
        llama.eval(ANSWER)
        # the last answer again
        assert llama.prefill(second).n_evaluated <= MARGIN
        check_logits(llama, arch, razor, second)
        llama.eval(ANSWER)
        # another message
        edited = PROMPT + ANSWER + OTHER
        assert llama.prefill(edited).n_evaluated == len(OTHER)
        check_logits(llama, arch, razor, edited)
        # a template that drops thoughts
        dropped = PROMPT + KEPT + MESSAGE
        assert llama.prefill(dropped).n_evaluated <= MARGIN + len(KEPT + MESSAGE)
        check_logits(llama, arch, razor, dropped)
        # n_tokens of the base class
        llama.n_tokens = len(PROMPT)
        llama.eval(ANSWER)
        check_logits(llama, arch, razor, PROMPT + ANSWER)


@pytest.mark.parametrize("arch", ["lfm2", "gemma3"])
def test_without_checkpoints_all_is_evaluated_again(arch) -> None:
    with open_llama(arch, rewind="off") as llama:
        llama.prefill(PROMPT + ANSWER + MESSAGE)
        assert llama.memory().checkpoints == 0
        assert llama.prefill(PROMPT + OTHER).n_reused == 0


@pytest.mark.parametrize("arch", ["lfm2", "gemma3"])
def test_their_number_and_size_are_limited(arch) -> None:
    with open_llama(arch) as llama:
        tokens = []
        for _ in range(12):
            tokens += MESSAGE[:60]
            llama.prefill(tokens)
            llama.eval(ANSWER[:20])
            tokens += ANSWER[:20]
        memory = llama.memory()
        assert memory.checkpoints == MAX_COUNT
        one = memory.checkpoint_bytes // MAX_COUNT
        assert 0 < one < memory.kv_bytes
        assert re.search(rf"and to {MAX_COUNT} checkpoints \(.+ [KM]iB\)", _rewind(llama))
        # the newest are kept
        assert llama.prefill([*tokens[:-81], *OTHER]).n_reused >= len(tokens) - 80 - 20 - MARGIN
    with open_llama(arch, rewind_limit=3 * one) as llama:
        llama.prefill(PROMPT)
        llama.prefill(PROMPT + MESSAGE)
        assert 0 < llama.memory().checkpoint_bytes <= 3 * one
    with open_llama(arch, rewind_limit=one // 20) as llama:
        llama.prefill(PROMPT)
        assert llama.memory().checkpoints == 0
        assert llama.prefill(PROMPT[:20]).n_reused == 0


def test_a_full_attention_model_needs_none() -> None:
    with open_llama("llama") as llama:
        llama.prefill(PROMPT)
        llama.prefill(PROMPT + MESSAGE)
        assert llama.memory().checkpoints is None
    with open_llama("llama", razor=False) as llama:
        assert _rewind(llama) == "the full cache can go back to any token"
    with open_llama("lfm2", razor=False) as llama:
        assert _rewind(llama) == "the full cache can go back to 0 checkpoints (0.0 MiB)"


@pytest.mark.parametrize("razor", [True, False])
@pytest.mark.parametrize("arch", ["llama", "lfm2", "qwen35", "gemma3"])
def test_a_stopped_prompt_leaves_a_valid_cache(arch, razor) -> None:
    """Part of a ubatch may be in a recurrent state when the computation stops."""
    with open_llama(arch, razor, n_ubatch=16) as llama, open_llama(arch, razor) as fresh:
        for n_calls in range(1, 30, 4):
            left = iter([False] * n_calls)
            llama.prefill(PROMPT[:40])
            llama.prefill(PROMPT, stop=lambda left=left: next(left, True))
            n = llama.n_tokens
            llama.eval(OTHER[:5])
            fresh.reset()
            fresh.eval(PROMPT[:n] + OTHER[:5])
            np.testing.assert_allclose(llama._last_logits(), fresh._last_logits(), atol=1e-3)
            llama.reset()


@pytest.mark.parametrize("arch", ["gemma3", "gpt-oss"])
@pytest.mark.parametrize("razor", [True, False])
def test_windows_that_were_overwritten_after_a_state_was_loaded(arch, razor) -> None:
    with open_llama(arch, razor, swa_full=True) as llama:
        llama.eval(PROMPT[:200])
        llama.load_state(llama.save_state())
        llama.eval(PROMPT[200:300])
        llama.prefill(PROMPT[:60] + OTHER)
        check_logits(llama, arch, razor, PROMPT[:60] + OTHER)


@pytest.mark.parametrize("arch", ["llama", "lfm2", "gemma3"])
def test_logits_of_a_longer_text_are_not_used(arch) -> None:
    """Callers can lower n_tokens, and the logits in memory are then of the longer text."""
    with open_llama(arch) as llama:
        llama.eval(PROMPT)
        llama.n_tokens = 200
        first = llama.sample(temp=0)
        llama.eval(PROMPT[200:])
        llama.n_tokens = 200
        generated = next(llama.generate(PROMPT[:200], temp=0))
    with open_llama(arch) as fresh:
        assert first == generated == next(fresh.generate(PROMPT[:200], temp=0))
