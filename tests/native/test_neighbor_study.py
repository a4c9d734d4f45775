"""The simulation of models/neighbor_study.py: rules of other papers for what each head keeps."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.support.tiny_models import TinySpec, make_model, razor_kv

MODELS = Path(__file__).parents[2] / "models"
SPEC = TinySpec(n_layer=4, n_head=6, n_head_kv=3, still=True)
MASK = [[0, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1]]
N, WINDOW = 300, 64


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(MODELS))
    try:
        yield [importlib.import_module(f"{name}_study") for name in ("neighbor", "compression")]
    finally:
        sys.path.remove(str(MODELS))


@pytest.fixture(scope="module")
def study(modules) -> ModuleType:
    return modules[0]


@pytest.fixture(scope="module")
def model(study, tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "model.gguf"
    make_model(path, SPEC, razor_kv(MASK, window_min=WINDOW, window_divisor=0))
    return study.Reader(path)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, SPEC.n_vocab, N + 40)


@pytest.fixture(scope="module")
def prompt(study, model, tokens):
    return model.read(tokens[:N], WINDOW)


@pytest.fixture(scope="module")
def setting(study, prompt):
    strength = np.random.default_rng(1).random((4, 3))
    return study.Setting(np.array(MASK, bool), strength, WINDOW, np.array(prompt.mass))


def policy(study, name):
    (found,) = [policy for policy in study.POLICIES if policy.name == name]
    return found


def test_a_full_cache_and_razor_are_those_of_the_other_study(
    modules, model, prompt, setting, tokens
) -> None:
    """The other study begins to compress at token N, with a fold frontier at N - WINDOW."""
    study, other = modules
    fixed = (np.array(MASK, bool), WINDOW, 1 << 20, 1024)
    cache = other.Cache()
    whole = model.log_probs(model.run(tokens, None, *fixed, keep=cache))[N:]
    (found,), share = study.measure(model, setting, prompt, [tokens[N:]], policy(study, "full f16"))
    assert share == 1
    assert np.abs(found - whole).max() < 5e-3
    past = other.Cache([k[:, :N] for k in cache.k], [v[:, :N] for v in cache.v])
    moved = replace(other.Policy("razor"), block=N)
    states = model.run(tokens[N:], moved, fixed[0], WINDOW, N, 1024, past=past)
    (found,), share = study.measure(model, setting, prompt, [tokens[N:]], policy(study, "razor"))
    want = model.log_probs(states)
    assert np.abs(found - want).max() < 5e-3
    assert np.abs(found - whole).max() > 0.02
    kept = 4 * N + 8 * (4 + WINDOW + 1)
    assert share == pytest.approx(kept / (12 * N))


def test_parts_do_not_see_each_other(study, model, prompt, setting, tokens) -> None:
    parts = [tokens[N : N + 10], tokens[N + 10 :]]
    together, _ = study.measure(model, setting, prompt, parts, policy(study, "razor"))
    for part, found in zip(parts, together, strict=True):
        (alone,), _ = study.measure(model, setting, prompt, [part], policy(study, "razor"))
        assert np.abs(found - alone).max() < 1e-3


@pytest.mark.parametrize("name", ["all local", "HeadKV", "SqueezeAttention", "windows by score"])
def test_rules_spend_the_same_budget(study, setting, prompt, name) -> None:
    windows = policy(study, name).windows(setting, prompt)
    spent = np.where(windows == 0, N - study.SINKS, windows).sum()
    allowed = study.razor(setting, prompt)
    allowed = np.where(allowed == 0, N - study.SINKS, allowed).sum()
    # a head cannot keep more than everything
    assert allowed * (0.75 if name == "HeadKV" else 0.97) <= spent <= allowed
    assert len(np.unique(windows)) > 1 or name == "all local"


def test_squeezed_layers_are_those_that_change_their_input_least(study) -> None:
    low = study.most_similar(np.array([0.5, 0.98, 0.97, 0.7, 0.72, 0.99]))
    assert low.tolist() == [False, True, True, False, False, True]


def test_a_subset_stands_for_all_rows(study) -> None:
    """It approximates sums over all rows better than random subsets of the same size do."""
    rng = np.random.default_rng(3)
    k, v = rng.standard_normal((2, 1024, 16)).astype(np.float32)
    q = 0.3 * rng.standard_normal((64, 16))
    chosen, weight = study.balanced_subset(k, v)
    assert study.SUBSET <= len(chosen) < 2 * study.SUBSET
    assert weight * len(chosen) == pytest.approx(1024)
    want = np.exp(q @ k.T) @ v
    error = np.abs(np.exp(q @ k[chosen].T) @ v[chosen] * weight - want).mean()
    random = []
    for seed in range(20):
        rows = np.random.default_rng(seed).permutation(1024)[: len(chosen)]
        random.append(np.abs(np.exp(q @ k[rows].T) @ v[rows] * weight - want).mean())
    assert error < np.mean(random)


def test_a_tilt_is_exact_to_first_order_and_clamped(study, prompt) -> None:
    """The value of the compensation token is v + Cov(v, k) q for small q."""
    options = study.Options("f16", "f16", "moment")
    rows = np.r_[0:4, N - WINDOW : N]
    head = study.keep(prompt, 1, 2, rows, options)
    k, v = (x[1][2][4 : N - WINDOW] for x in (prompt.k, prompt.v))
    q = 1e-2 * np.random.default_rng(4).standard_normal((3, k.shape[1]))
    weights = np.exp(q @ k.T)
    exact = weights @ v / weights.sum(1, keepdims=True)
    moved = v.mean(0) + q @ head.tilt.T
    assert np.abs(moved - exact).max() < 0.05 * np.abs(exact - v.mean(0)).max()
    far = head.attend(1e3 * q, np.full((3, 0), 0.0), np.zeros((0, v.shape[1])))
    assert np.isfinite(far).all()
    assert head.limit > 0
    assert np.linalg.norm(far, axis=1).max() < head.limit + np.linalg.norm(v, axis=1).max()


def test_full_rank_changes_nothing_and_lower_rank_costs_less_bytes(study, prompt) -> None:
    rows = np.arange(N)
    d = prompt.k[0].shape[2]
    whole, same, half = (
        study.keep(prompt, 0, 0, rows, study.Options(rank=rank)) for rank in (0, d, d // 2)
    )
    assert np.abs(whole.v - same.v).max() < 5e-3
    assert half.n_bytes == 0.75 * whole.n_bytes
    assert np.abs(whole.v - half.v).max() > 0.01


def test_longflow_keeps_what_the_last_query_weights(study, setting, prompt) -> None:
    """The rows that LongFlow keeps get more of the last query's attention than the newest do."""
    sums = {}
    for name in ("razor", "LongFlow"):
        head = policy(study, name).cache(setting, prompt)[2][1]
        q = prompt.q[2][2:4, -1]
        keys = prompt.k[2][1].astype(np.float16).astype(np.float32)
        at = [int(np.abs(keys - row).sum(1).argmin()) for row in head.k[:-1]]
        sums[name] = study.softmax(q @ prompt.k[2][1].T).mean(0)[at].sum()
    assert sums["LongFlow"] > sums["razor"]
