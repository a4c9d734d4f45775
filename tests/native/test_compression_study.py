"""The simulation of models/compression_study.py: it does what the runtime does, where that can."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from razor_local import Llama
from razor_local.errors import UnsupportedError
from razor_local.profile import read_profile
from tests.support.tiny_models import TinySpec, make_model, razor_kv

MODELS = Path(__file__).parents[2] / "models"
N_CTX = 768
SPEC = TinySpec(n_head=6, n_head_kv=3, still=True)
MASK = [[0, 1, 0], [1, 1, 0], [0, 0, 0]]


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(MODELS))
    try:
        yield importlib.import_module("compression_study")
    finally:
        sys.path.remove(str(MODELS))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "model.gguf"
    make_model(path, SPEC, razor_kv(MASK, window_min=128, window_divisor=0))
    return path


@pytest.fixture(scope="module")
def model(study: ModuleType, path: Path):
    return study.Model(path)


@pytest.fixture(scope="module")
def setting(study: ModuleType, path: Path):
    return study.read_setting(path, N_CTX)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, SPEC.n_vocab, 700)


def fixed(setting) -> tuple:
    return setting.retrieval, setting.window, setting.block, setting.n_ctx


@pytest.mark.parametrize("name", ["full", "razor", "razor without compensation"])
def test_it_computes_what_the_runtime_does(study, model, setting, path, tokens, name):
    """Whole model, F32: logits of every position."""
    policy, razor = None, False
    if name != "full":
        razor = read_profile(path)
        policy = study.Policy("razor")
    if name == "razor without compensation":
        razor = replace(razor, compensation=False)
        policy = study.Policy("razor", "none")
    ours = model.logits(model.run(tokens, policy, *fixed(setting)))
    llama = Llama(
        path,
        n_ctx=N_CTX,
        razor=razor,
        logits_all=True,
        type_k="f32",
        type_v="f32",
        flash_attn=False,
    )
    llama.eval(tokens.tolist())
    assert llama.plan.active == (name != "full")
    theirs = llama.scores[: len(tokens)]
    assert np.abs(ours - theirs).max() < 2e-3 * np.abs(theirs).max()


def test_a_past_that_saw_everything_is_continued(study, model, setting, tokens):
    """In parts and with a full cache: as at once."""
    cache = study.Cache()
    whole = model.run(tokens, None, *fixed(setting), keep=cache)
    past = study.Cache([k[:, :555] for k in cache.k], [v[:, :555] for v in cache.v])
    rest = model.run(tokens[555:], None, *fixed(setting), past=past)
    assert np.abs(rest - whole[555:]).max() < 1e-3


@pytest.mark.parametrize(
    "name", ["2 segments", "16 segments", "16 buckets", "16 clusters", "16 first clusters"]
)
def test_parts_count_every_row_once(study, name):
    """Where all keys are equal, any parts give the sum over all rows: equation 5 is exact."""
    rng = np.random.default_rng(1)
    q = rng.standard_normal((5, 32)).astype(np.float32)
    v = rng.standard_normal((333, 32)).astype(np.float32)
    k = np.tile(rng.standard_normal(32).astype(np.float32), (333, 1))
    for found in (study.COMPENSATIONS[name](q, k, v, 640), study.mean(q, k, v, 640)):
        weights = np.exp(found.logits)
        assert np.allclose(weights.sum(1), np.exp(q @ k.T).sum(1), rtol=1e-4)
        assert np.allclose(weights @ found.values, np.exp(q @ k.T) @ v, rtol=1e-2, atol=1e-2)


def test_covariances_are_exact_for_normal_keys(study):
    rng = np.random.default_rng(2)
    mix = 0.3 * rng.standard_normal((8, 8))
    k = rng.standard_normal((200_000, 8)) @ mix
    v = k @ rng.standard_normal((8, 8))
    q = 0.5 * rng.standard_normal((4, 8))
    found = study.by_covariance(q, k, v, 0)
    weights = np.exp(q @ k.T)
    assert np.allclose(found.logits[:, 0], np.log(weights.sum(1)), atol=0.02)
    expected = weights @ v / weights.sum(1, keepdims=True)
    assert np.allclose(found.values[:, 0], expected, atol=0.05)


@pytest.mark.parametrize(
    ("arch", "profile", "n_ctx", "sentence"),
    [
        ("qwen2", True, N_CTX, "architecture qwen2, expected llama"),
        ("llama", False, N_CTX, "has no profile, add one"),
        ("llama", True, 256, "nothing is compressed at 256 tokens"),
    ],
)
def test_what_cannot_be_simulated_is_refused(study, tmp_path, arch, profile, n_ctx, sentence):
    path = tmp_path / "model.gguf"
    mask = [[0, 1]] * 3
    make_model(path, TinySpec(arch), razor_kv(mask, window_min=128) if profile else {})
    with pytest.raises(UnsupportedError, match=sentence):
        study.read_setting(path, n_ctx)
