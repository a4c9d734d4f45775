"""Without razor metadata, or with razor off, the patched library is llama.cpp, bit by bit."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.support import runner
from tests.support.other_models import MODELS, N_VOCAB, make_other
from tests.support.tiny_models import ARCHS, TinySpec, razor_kv

NATIVE = Path(__file__).parents[2] / "native"
MAX_ADDED_LINES = 100
MAX_ADDED_LINES_SERVER = 40

KV = [("f32", False), ("f16", False), ("f16", True), ("q8_0", True), ("q4_0", True)]
N_HEAD_KV = {"gpt2": 4, "deci": (1, 4)}
SPECS = {arch: TinySpec(arch, 2, 4, N_HEAD_KV.get(arch, 2), 64, seed=11) for arch in ARCHS}


@pytest.mark.parametrize(("kv", "flash_attn"), KV)
@pytest.mark.parametrize("arch", ARCHS)
def test_supported_arch_without_metadata(arch: str, kv: str, flash_attn: bool, tiny, stock) -> None:
    spec = SPECS[arch]
    tokens = runner.random_tokens(300, spec.n_vocab, 1)
    params = {"type_k": kv, "type_v": kv, "flash_attn": flash_attn, "n_ubatch": 64}
    got = runner.logits(tiny(spec), tokens, None, 90, **params)
    want = stock(runner.logits, tiny(spec), tokens, None, 90, **params)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("arch", MODELS)
def test_other_arch_without_metadata(arch: str, tmp_path: Path, stock) -> None:
    """Architectures that razor does not support run as in stock."""
    path = make_other(tmp_path / "model.gguf", arch)
    tokens = runner.random_tokens(150, N_VOCAB, 2)
    params = {"type_k": "f16", "type_v": "f16", "n_ubatch": 32}
    got = runner.logits(path, tokens, None, 40, **params)
    want = stock(runner.logits, path, tokens, None, 40, **params)
    np.testing.assert_array_equal(got, want)


def test_two_sequences_without_metadata(tiny) -> None:
    """Contexts with several sequences are upstream's as long as razor is not asked for."""
    with runner.Model(tiny(SPECS["llama"])) as model:
        with runner.Context(model, n_seq_max=2) as ctx:
            stats = ctx.stats()
            assert (stats.active, stats.n_stream) == (0, 2)
            assert np.isfinite(ctx.decode([1, 2, 3])).all()


def test_rollback_and_state_without_metadata(tiny, stock) -> None:
    spec = SPECS["qwen2"]
    tokens = runner.random_tokens(200, spec.n_vocab, 3)
    state = stock(runner.save_state, str(tiny(spec)), tokens[:100], None, True, {})
    want = stock(runner.logits, tiny(spec), tokens, None, 100)[100:]
    with runner.Model(tiny(spec)) as model, runner.Context(model) as ctx:
        assert ctx.load(state), "a state saved by stock"
        np.testing.assert_array_equal(ctx.decode(tokens[100:]), want)
        assert ctx.seq_rm(50, 60), "stock can remove the middle"


@pytest.mark.parametrize("value", ["1", "yes"])
def test_environment_switch(value: str, tiny, stock) -> None:
    """RAZOR_LOCAL_DISABLE: metadata and overrides are ignored."""
    spec = SPECS["llama"]
    keys = razor_kv(((0, 1), (0, 0)), window_min=16, window_divisor=0)
    tokens = runner.random_tokens(400, spec.n_vocab, 4)
    want = stock(runner.logits, tiny(spec), tokens)
    on = runner.logits(tiny(spec, keys), tokens)
    assert np.abs(on - want).max() > 0.1, "razor is active without the switch"
    override = runner.Override(retrieval=bytes(4), window=16)
    with runner.Worker(None, {"RAZOR_LOCAL_DISABLE": value}) as off:
        assert off(runner.ping), "the same patched library"
        np.testing.assert_array_equal(off(runner.logits, tiny(spec, keys), tokens), want)
        np.testing.assert_array_equal(off(runner.logits, tiny(spec), tokens, override), want)


@pytest.mark.parametrize("value", ["", "0"])
def test_environment_switch_not_set(value: str, tiny) -> None:
    spec = SPECS["llama"]
    keys = razor_kv(((0, 1), (0, 0)), window_min=16, window_divisor=0)
    tokens = runner.random_tokens(400, spec.n_vocab, 4)
    with runner.Worker(None, {"RAZOR_LOCAL_DISABLE": value}) as worker:
        got = worker(runner.logits, tiny(spec, keys), tokens)
    np.testing.assert_array_equal(got, runner.logits(tiny(spec, keys), tokens))
    assert np.abs(got - runner.logits(tiny(spec), tokens)).max() > 0.1, "razor is active"


def test_override_off(tiny, stock) -> None:
    """enabled = 0: upstream's cache, whatever the metadata says."""
    spec = SPECS["llama"]
    keys = razor_kv(((0, 1), (0, 0)), window_min=16, window_divisor=0)
    tokens = runner.random_tokens(400, spec.n_vocab, 4)
    want = stock(runner.logits, tiny(spec), tokens)
    np.testing.assert_array_equal(runner.logits(tiny(spec, keys), tokens, runner.OFF), want)
    # also where the default window would save something
    with runner.Model(tiny(spec, keys)) as model:
        with runner.Context(model, runner.OFF, n_ctx=8192) as ctx:
            assert ctx.stats().active == 0


def test_override_is_dropped(tiny) -> None:
    """NULL goes back to the metadata: contexts created later do not inherit an override."""
    spec = SPECS["llama"]
    with runner.Model(tiny(spec)) as model:
        override = runner.Override(retrieval=bytes(4), window=16)
        with runner.Context(model, override) as first, runner.Context(model) as second:
            assert (first.stats().active, second.stats().active) == (1, 0)


def test_patches_stay_small() -> None:
    """Call sites only: at most 100 added lines in the library, and 40 in llama-server."""
    patches = sorted((NATIVE / "patches").glob("*.patch"))
    assert patches, f"no *.patch in {NATIVE / 'patches'}"
    added = {
        patch.name: len(re.findall(r"^\+(?!\+\+ )", patch.read_text(), re.M)) for patch in patches
    }
    assert 0 < added.pop("0003-razor-server.patch") <= MAX_ADDED_LINES_SERVER
    assert 0 < sum(added.values()) <= MAX_ADDED_LINES
