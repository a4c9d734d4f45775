"""Logits depend on the tokens alone: not on the ubatch size, not on how calls split them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support import reference, runner
from tests.support.device import tolerance
from tests.support.tiny_models import TinySpec, razor_kv

TOLERANCE = tolerance(1e-5)  # F32 cache, absolute; logits have a standard deviation of about 3

SPECS = {
    "llama": TinySpec("llama", 3, 4, 2, 32, seed=1, sharpness=1.0),
    "qwen3": TinySpec("qwen3", 3, 4, 4, 64, seed=2, sharpness=1.0),
    "gpt2": TinySpec("gpt2", 2, 4, 4, 32, seed=3, sharpness=1.0),
}
MASKS = {
    "llama": ((0, 1), (0, 0), (1, 1)),
    "qwen3": ((0, 1, 0, 1), (0, 0, 0, 0), (1, 0, 0, 0)),
    "gpt2": ((0, 1, 1, 0), (0, 0, 0, 1)),
}
N_TOKENS = 520


@pytest.fixture(scope="module", params=list(SPECS))
def setup(request, tiny):
    spec = SPECS[request.param]
    razor = reference.make_razor(MASKS[request.param], window=70)
    tokens = runner.random_tokens(N_TOKENS, spec.n_vocab, 5)
    return tiny(spec), tokens, runner.override(razor)


@pytest.fixture(scope="module")
def whole(setup):
    path, tokens, override = setup
    return runner.logits(path, tokens, override, n_ctx=1024, n_batch=1024)


@pytest.mark.parametrize("n_ubatch", [1, 7, 32, 512])
def test_ubatch_size(setup, whole, n_ubatch: int) -> None:
    path, tokens, override = setup
    got = runner.logits(path, tokens, override, n_ctx=1024, n_batch=1024, n_ubatch=n_ubatch)
    np.testing.assert_allclose(got, whole, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("seed", range(4))
def test_random_splits(setup, whole, seed: int) -> None:
    path, tokens, override = setup
    splits = runner.random_splits(N_TOKENS, (3, 20, 90, 300)[seed], seed)
    n_ubatch = (512, 7, 32, 512)[seed]
    got = runner.logits(path, tokens, override, splits, n_ctx=1024, n_batch=1024, n_ubatch=n_ubatch)
    np.testing.assert_allclose(got, whole, rtol=0, atol=TOLERANCE)


def test_same_split_twice_is_bit_identical(setup) -> None:
    path, tokens, override = setup
    runs = [runner.logits(path, tokens, override, 50, n_ctx=1024) for _ in range(2)]
    np.testing.assert_array_equal(*runs)


def test_metadata_and_override_are_the_same(tiny) -> None:
    """The razor.* keys of a file and the same values given by the override."""
    spec, mask = SPECS["llama"], MASKS["llama"]
    tokens = runner.random_tokens(400, spec.n_vocab, 6)
    keys = razor_kv(mask, sink_tokens=3, window_min=20, window_divisor=20, compensation=False)
    # n_ctx / 20 = 51: the divisor decides
    razor = reference.make_razor(mask, 51, sink_tokens=3, compensation=False)
    from_file = runner.logits(tiny(spec, keys), tokens, n_ctx=1024)
    overridden = runner.logits(tiny(spec), tokens, runner.override(razor), n_ctx=1024)
    np.testing.assert_array_equal(from_file, overridden)
    assert np.abs(from_file - runner.logits(tiny(spec), tokens, n_ctx=1024)).max() > 0.1
    # an override wins over the file, without a mask it uses the file's
    other = runner.Override(window=33, sink_tokens=4)
    want = runner.override(reference.make_razor(mask, 33))
    np.testing.assert_array_equal(
        runner.logits(tiny(spec, keys), tokens, other, n_ctx=1024),
        runner.logits(tiny(spec), tokens, want, n_ctx=1024),
    )


@pytest.mark.parametrize("flash_attn", [True, False], ids=["fa", "nofa"])
@pytest.mark.parametrize("kv", ["f32", "f16", "q8_0", "q4_0"])
def test_window_that_holds_everything_equals_stock(
    kv: str, flash_attn: bool, tiny, stock, monkeypatch
) -> None:
    """Window >= tokens: two attentions instead of one, the same sums up to F32 rounding (and to
    that of the KV type, which flash attention makes F16 of F32). By upstream's attention on CPUs
    too, whose error is larger than that of ours."""
    monkeypatch.setenv("RAZOR_LOCAL_CPU_ATTENTION", "off")
    type_v = kv if flash_attn or kv in ("f32", "f16") else "f16"
    params = {"n_ctx": 1024, "type_k": kv, "type_v": type_v, "flash_attn": flash_attn}
    atol = tolerance(1e-5 if kv == "f32" and not flash_attn else 5e-3, kv, type_v, flash_attn)
    for name, spec in SPECS.items():
        tokens = runner.random_tokens(256, spec.n_vocab, 7)
        want = stock(runner.logits, tiny(spec), tokens, **params)
        # with local heads alone nothing of upstream's cache is left, its rotation of quantized
        # rows must be there all the same
        for mask in (MASKS[name], tuple((0,) * n for n in spec.kv_heads)):
            override = runner.override(reference.make_razor(mask, window=300))
            with runner.Model(tiny(spec)) as model:
                with runner.Context(model, override, **params) as ctx:
                    assert ctx.stats().active == 1
                    # the second batch finds the first, sinks included, in the cache
                    got = ctx.decode(tokens, [100, 156])
                    assert ctx.seq().n_folded == 0
            np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("flash_attn", [True, False], ids=["fa", "nofa"])
@pytest.mark.parametrize("kv", ["f32", "f16", "q8_0"])
def test_all_retrieval_heads_are_bit_identical_to_stock(
    kv: str, flash_attn: bool, tiny, stock, monkeypatch
) -> None:
    """With llama.cpp's own attention; test_native_full.py has ours."""
    monkeypatch.setenv("RAZOR_LOCAL_CPU_ATTENTION", "off")
    type_v = kv if flash_attn or kv in ("f32", "f16") else "f16"
    params = {"n_ctx": 1024, "type_k": kv, "type_v": type_v, "flash_attn": flash_attn}
    for spec in SPECS.values():
        mask = tuple((1,) * n for n in spec.kv_heads)
        override = runner.override(reference.make_razor(mask, window=16))
        tokens = runner.random_tokens(400, spec.n_vocab, 8)
        got = runner.logits(tiny(spec), tokens, override, 100, **params)
        from_file = runner.logits(tiny(spec, razor_kv(mask)), tokens, None, 100, **params)
        want = stock(runner.logits, tiny(spec), tokens, None, 100, **params)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(from_file, want)


def test_window_that_saves_nothing_is_bit_identical_to_stock(tiny, stock) -> None:
    """cells >= n_ctx: the full cache runs."""
    spec = SPECS["llama"]
    tokens = runner.random_tokens(256, spec.n_vocab, 9)
    with runner.Model(tiny(spec, razor_kv(MASKS["llama"]))) as model:
        with runner.Context(model, n_ctx=256) as ctx:
            assert ctx.stats().active == 0
            got = ctx.decode(tokens)
    want = stock(runner.logits, tiny(spec), tokens, n_ctx=256)
    np.testing.assert_array_equal(got, want)
