"""A model whose heads have scopes, in Python and in every command that uses a profile."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from razor_local.converters.write import write_copy, write_sidecar

from razor_local import Llama, RazorError
from razor_local.cli.chat import DEFAULT_MODEL
from razor_local.cli.chat_status import _heads
from razor_local.evals.policies import make_policies
from razor_local.model_file import read_model_shape, read_profile
from razor_local.model_setup import ModelSetup
from razor_local.profile import Profile
from tests.support.cli import run

SCOPES = [[0, 64, 256, 120], [64, 64, 0, 300], [128] * 4] * 2
# blocks of 64: the mean is 138
WINDOWS = [320, 256, 128, 64]
PARAMS = {"n_ctx": 2048, "n_threads": 1, "n_threads_batch": 1}


@pytest.fixture(scope="module")
def profile() -> Profile:
    return replace(
        read_profile(DEFAULT_MODEL),
        retrieval=tuple(np.array([x == 0 for x in row], np.uint8) for row in SCOPES),
        scope=tuple(np.array(row, np.uint32) for row in SCOPES),
    )


@pytest.fixture(scope="module")
def model(profile: Profile, tmp_path_factory) -> Path:
    return write_copy(DEFAULT_MODEL, tmp_path_factory.mktemp("scoped") / "scoped.gguf", profile)


def test_bytes_and_windows_are_those_of_the_plan(model: Path) -> None:
    for kv_type in ("f16", "q8_0"):
        llama = Llama(model, type_k=kv_type, type_v=kv_type, **PARAMS)
        memory, plan = llama.memory(), llama.plan
        assert [group.window for group in plan.groups] == WINDOWS
        assert memory.active and memory.kv_bytes == plan.kv_bytes < memory.kv_bytes_full
        assert [layer.kv_bytes for layer in memory.layers] == [x.kv_bytes for x in plan.layers]
        assert memory.own_attention and not memory.device_attention
        assert "the first 4 and the last 64 to 320, and the average" in _heads(llama)


def test_files_sidecars_and_profiles_give_the_same_answers(
    model: Path, profile: Profile, tmp_path: Path
) -> None:
    sidecar = write_sidecar(DEFAULT_MODEL, tmp_path / "side.gguf", profile)
    answers = []
    for path, razor in ((model, True), (DEFAULT_MODEL, sidecar), (DEFAULT_MODEL, profile)):
        llama = Llama(path, razor=razor, logits_all=True, **PARAMS)
        tokens = llama.tokenize(("The river runs. " * 150).encode())[:700]
        llama.prefill(tokens)
        answers.append(np.array(llama.scores[len(tokens) - 1]))
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_array_equal(answers[0], answers[2])


def test_a_window_replaces_the_scopes_and_a_budget_is_refused(model: Path) -> None:
    assert [g.window for g in Llama(model, window=100, **PARAMS).plan.groups] == [100]
    with pytest.raises(RazorError, match="holds a scope for each head"):
        Llama(model, budget=0.2, **PARAMS)


def test_a_state_goes_on_and_is_refused_by_other_scopes(model: Path, profile: Profile) -> None:
    llama = Llama(model, logits_all=True, **PARAMS)
    tokens = llama.tokenize(("The river runs. " * 150).encode())[:500]
    llama.prefill(tokens)
    state = llama.save_state()
    first, *rest = profile.scope
    other = replace(
        profile,
        scope=(first[::-1], *rest),
        retrieval=(profile.retrieval[0][::-1], *profile.retrieval[1:]),
    )
    with pytest.raises(RazorError, match="saved under another plan"):
        Llama(DEFAULT_MODEL, razor=other, **PARAMS).load_state(state)
    again = Llama(model, logits_all=True, **PARAMS)
    again.load_state(state)
    for one in (llama, again):
        one.eval([1, 2, 3])
        assert llama.scores[502].any()
    np.testing.assert_array_equal(llama.scores[502], again.scores[502])


def test_fit_and_inspect_count_the_same_bytes(model: Path) -> None:
    code, stdout, stderr = run("fit", model, "-c", 2048, "--json")
    assert code == 0, stderr
    plan = json.loads(run("inspect", model, "-c", 2048, "--json")[1])
    assert [group["window"] for group in plan["groups"]] == WINDOWS
    assert plan["kv_bytes"] == Llama(model, **PARAMS).memory().kv_bytes
    assert f"{plan['kv_bytes']}" in stdout


def test_policies_with_other_heads_have_one_window(model: Path) -> None:
    setup = ModelSetup(str(model), window_min=None)
    names = ["razor-f16", "razor-no-comp", "local-f16", "random-heads-f16"]
    shape, policies = make_policies(setup, names)
    groups = [len(policy.plan(shape, 8192).groups) for policy in policies]
    assert groups == [4, 4, 1, 1]


def test_eval_and_bench_run(model: Path, tmp_path: Path) -> None:
    code, _, stderr = run(
        "eval", "needle", model, "-c", "1k", "--depths", "20", "--kinds", "single", "--samples", 1,
        "--policies", "full-f16,razor-f16", "-t", 1,
    )  # fmt: skip
    assert code == 0, stderr
    code, stdout, stderr = run(
        "bench", model, "-d", "0,700", "--types", "f16", "-t", 1, "--seconds", 0.1, "--json"
    )
    assert code == 0, stderr
    assert read_model_shape(model).n_layer == 6 and json.loads(stdout)
