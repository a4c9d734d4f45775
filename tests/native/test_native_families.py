"""Model families whose memory has more parts than one KV cache, and M-RoPE.

gemma2 (soft cap), gpt-oss (sink logits), gemma3n and gemma4 (shared caches, two head sizes) and
llama4 (chunked windows) have sliding windows; the hybrids have recurrent states.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType

from razor_local import Llama, Profile
from razor_local.model_file import ModelFile
from razor_local.profile import split_heads
from tests.support import (
    arch_models,
    arch_runs,
    family_models,
    other_models,
    reference,
    runner,
)
from tests.support.device import tolerance
from tests.support.native_cases import F32_TOLERANCE
from tests.support.runner import OFF, Context, Model, Override

SLIDING = ["gemma2", "gemma3", "gemma3n", "gemma4", "gpt-oss", "cohere2", "llama4"]
HYBRID = ["falcon-h1", "granitehybrid", "jamba", "lfm2", "lfm2moe", "minimax-01", "nemotron_h",
          "plamo2", "qwen35", "qwen3next"]  # fmt: skip
MROPE = ["qwen2vl", "qwen3vl", "qwen3vlmoe", "paddleocr"]
ALL = SLIDING + HYBRID + MROPE

PARAMS = {"n_ctx": 1024, "swa_full": False, "type_k": "f16", "type_v": "f16"}


@pytest.fixture(scope="module")
def path(request) -> Path:
    return arch_models.path_of(request.param)


def over(*archs: str):
    return pytest.mark.parametrize("path", archs, indirect=True, scope="module")


def razor_of(path: Path, window: int = 64) -> Override:
    return Override(arch_runs.mask_of(arch_runs.layers_of(path)), window=window)


def tokens(n: int, seed: int = 3) -> list[int]:
    return runner.random_tokens(n, 100, seed)


def noise(model: Model, text: list[int], **params) -> float:
    """How far logits of llama.cpp's own cache are from each other.

    The logits differ by the size of batches, and after a state was loaded: the tokens are then in
    other cells, which changes the order of sums.
    """
    with Context(model, OFF, **params) as ctx:
        want = ctx.decode(text[:300])
        states = {whole: ctx.save(whole) for whole in (True, False)}
        want = np.concatenate([want, ctx.decode(text[300:])])
    worst = 0.0
    for size in (1, 37):
        with Context(model, OFF, **params) as ctx:
            worst = max(worst, float(np.abs(ctx.decode(text, size) - want).max()))
    for whole, state in states.items():
        with Context(model, OFF, **params) as ctx:
            ctx.decode(tokens(50, 8))
            ctx.load(state, whole)
            worst = max(worst, float(np.abs(ctx.decode(text[300:]) - want[300:]).max()))
    return tolerance(max(1e-4, 4 * worst))


# -- what the attention computes --


@over(*ALL, "grok")
@pytest.mark.parametrize("flash_attn", [False, True])
def test_attention_of_each_layer(path: Path, flash_attn: bool) -> None:
    """Window 64, 400 tokens: every head against the reference, with an F32 cache."""
    assert arch_runs.attention_error(path, flash_attn) <= tolerance(1e-4)


@over("gemma3", "lfm2")
@pytest.mark.skipif(runner.GPU_LAYERS == 0, reason="needs a device")
def test_attention_with_the_cache_in_main_memory(path: Path) -> None:
    """The device computes large batches, and its keys and values are copied to the cache."""
    assert arch_runs.attention_error(path, False, n_gpu_layers=0) <= tolerance(1e-4)


@over("gpt-oss", "gemma4", "lfm2", "granitehybrid", "qwen35", "qwen35moe", "qwen3vl", "gemma2")
@pytest.mark.parametrize("flash_attn", [False, True])
def test_attention_with_several_windows(path: Path, flash_attn: bool) -> None:
    error = arch_runs.attention_error(path, flash_attn, windows=(64, 200))
    assert error <= tolerance(1e-4)


# upstream's flash attention on CPUs, which sliding layers run, is less exact
@pytest.mark.parametrize(
    ("arch", "flash_attn"), [("gemma3", False), ("lfm2", False), ("lfm2", True)]
)
@pytest.mark.parametrize("window", [64, 100])
def test_logits_equal_a_float64_model(
    tmp_path: Path, arch: str, flash_attn: bool, window: int
) -> None:
    """Compare all logits, with an F32 cache."""
    text = tokens(530)
    full = family_models.FULL[arch]
    heads = [[0, 1], [1, 0]]  # of the two layers with full attention
    masks = [heads[sum(full[:il])] if full[il] else [1, 1] for il in range(len(full))]
    want = family_models.forward(arch, text, reference.make_razor(masks, window))
    flat = bytes(x for row in heads for x in row)
    got = runner.logits(
        family_models.make_model(tmp_path / "m.gguf", arch),
        text,
        Override(flat, window=window),
        runner.random_splits(len(text), 150, seed=window),
        **PARAMS | {"type_k": "f32", "type_v": "f32", "flash_attn": flash_attn},
    )
    assert 1 < want.std() < 10
    assert np.abs(got - want).max() <= F32_TOLERANCE


@pytest.mark.stock
@over(*ALL)
@pytest.mark.parametrize("flash_attn", [False, True])
def test_window_longer_than_the_text(path: Path, flash_attn: bool, stock) -> None:
    """One local head per layer and upstream's operations: the bits of a stock library."""
    with runner.Worker(None, {"RAZOR_LOCAL_CPU_ATTENTION": "off"}) as worker:
        got = worker(arch_runs.razor_logits, path, flash_attn, 500)
    want = stock(arch_runs.full_logits, path, flash_attn)
    np.testing.assert_array_equal(got, want)


@pytest.mark.stock
@over(*ALL)
def test_razor_off(path: Path, stock) -> None:
    got = arch_runs.full_logits(path, True)
    np.testing.assert_array_equal(got, stock(arch_runs.full_logits, path, True))


@over("gemma2", "gpt-oss")
def test_few_and_many_cells(path: Path) -> None:
    """The soft cap and the sink logits count once, however many parts the cells are split into."""
    text = tokens(900)
    params = PARAMS | {"flash_attn": True, "type_k": "f32", "type_v": "f32"}
    razor = razor_of(path, window=512)
    with Model(path) as model:
        with Context(model, razor, **params) as ctx:
            together = ctx.decode(text)
        with Context(model, razor, **params) as ctx:
            ctx.decode(text[:600])
            one_by_one = ctx.decode(text[600:], 1)
        limit = noise(model, text, **params)
    np.testing.assert_allclose(one_by_one, together[600:], rtol=0, atol=limit)


@over(*SLIDING, *HYBRID)
def test_size_of_ubatches(path: Path) -> None:
    """What is folded does not depend on them."""
    text = tokens(500)
    razor = razor_of(path)
    results = []
    with Model(path) as model:
        for n_ubatch in (512, 37):
            params = PARAMS | {"type_k": "f32", "type_v": "f32"}
            with Context(model, razor, n_ubatch=n_ubatch, **params) as ctx:
                results.append(ctx.decode(text, 200))
                assert ctx.seq().n_folded == 380
        limit = noise(model, text, **params)
    np.testing.assert_allclose(results[1], results[0], rtol=0, atol=limit)


# -- M-RoPE --


@over("qwen2vl")
def test_embeddings_are_refused_with_mrope(path: Path) -> None:
    llama = runner.bindings()
    text = tokens(300)
    with Model(path) as model, Context(model, razor_of(path), **PARAMS) as ctx:
        want = ctx.decode(text)
        ctx.clear()
        first = ctx.decode(text[:200])
        n_embd = llama.llama_model_n_embd(model.ptr)
        batch = llama.llama_batch_init(16, n_embd, 1)  # four positions for each of 4 tokens
        batch.n_tokens = 4
        for i in range(16):
            batch.pos[i] = 200
        for i in range(4):
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, False
        for i in range(4 * n_embd):
            batch.embd[i] = 0.0
        assert llama.llama_decode(ctx.ptr, batch) != 0
        llama.llama_batch_free(batch)
        assert "embeddings" in runner.last_error() and "M-RoPE" in runner.last_error()
        assert ctx.pos_max() == 199
        got = np.concatenate([first, ctx.decode(text[200:])])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


# -- going back --


@over(*SLIDING)
def test_rollback_with_sliding_windows(path: Path) -> None:
    """seq_rm goes back as far as both parts can, and else changes nothing."""
    text = tokens(700)
    with Model(path) as model, Context(model, razor_of(path), n_ubatch=64, **PARAMS) as ctx:
        want = ctx.decode(text)
        n = ctx.seq().n_rollback
        assert n >= 32
        assert not ctx.seq_rm(100), "the fold cannot be undone"
        assert ctx.pos_max() == 699
        assert ctx.seq_rm(700 - n)
        got = ctx.decode(text[700 - n :])
        limit = noise(model, text, **PARAMS)
        np.testing.assert_allclose(got, want[700 - n :], rtol=0, atol=limit)
        assert ctx.seq_rm(0) and ctx.pos_max() == -1


@over("gemma3")
def test_rollback_beyond_the_sliding_window(path: Path) -> None:
    """The base cache could go back, the sliding part has lost what is needed there."""
    razor = razor_of(path, window=512)
    with Model(path) as model, Context(model, razor, n_ubatch=64, **PARAMS) as ctx:
        text = tokens(600)
        want = ctx.decode(text)
        low = ctx.pos_min()
        assert low > 0
        assert not ctx.seq_rm(low)
        assert ctx.pos_max() == 599
        np.testing.assert_allclose(ctx.decode(tokens(5, 9)).shape, (5, model.n_vocab))
        assert ctx.seq_rm(600)
        ctx.clear()
        np.testing.assert_array_equal(ctx.decode(text), want)


@over(*HYBRID)
def test_rollback_of_hybrids(path: Path) -> None:
    """A recurrent state cannot go back: everything can be removed, or nothing."""
    text = tokens(300)
    with Model(path) as model, Context(model, razor_of(path), **PARAMS) as ctx:
        want = ctx.decode(text)
        assert not ctx.seq_rm(299) and ctx.pos_max() == 299
        assert ctx.seq().n_rollback == 0
        assert ctx.seq_rm(0) and ctx.pos_max() == -1
        np.testing.assert_array_equal(ctx.decode(text), want)


@over("qwen35")
def test_rollback_states_are_refused(path: Path) -> None:
    sentence = runner.refusal(str(path), razor_of(path), n_rs_seq=4, **PARAMS)
    assert sentence and "n_rs_seq" in sentence
    assert runner.refusal(str(path), OFF, n_rs_seq=4, **PARAMS) is None


# -- states and aborts --


@over(*SLIDING)
def test_cells_in_another_order(path: Path) -> None:
    """A batch of several ubatches loses no tokens if a sliding window has unordered cells."""
    text, other = tokens(400), tokens(13, 8)
    params = PARAMS | {"n_ubatch": 128}
    with Model(path) as model, Context(model, razor_of(path), **params) as ctx:
        want = ctx.decode(text)
        limit = noise(model, text, **params)
        for n_rollback in (0, 40, 76):
            ctx.clear()
            ctx.decode(text[:110])
            state = ctx.save(False)
            ctx.clear()
            ctx.decode(other)
            ctx.load(state, False)  # into other cells
            ctx.decode(text[110:235])
            ctx.load(ctx.save(True), True)
            ctx.decode(text[235:238])
            assert ctx.seq_rm(238 - min(n_rollback, ctx.seq().n_rollback))
            ctx.decode(text[ctx.n_past : 258])
            ctx.load(ctx.save(True), True)
            got = ctx.decode(text[258:])
            np.testing.assert_allclose(got, want[258:], rtol=0, atol=limit)


@over(*SLIDING, *HYBRID)
@pytest.mark.parametrize("whole", [True, False])
def test_state(path: Path, whole: bool) -> None:
    """A context goes on from a loaded state; another plan is refused.

    Sliding windows get other cells, which changes the order of llama.cpp's sums.
    """
    text = tokens(400)
    razor = razor_of(path)
    with Model(path) as model:
        slides = ModelFile(path).shape.sliding is not None
        limit = noise(model, text, **PARAMS) if slides else 0
        with Context(model, razor, **PARAMS) as ctx:
            ctx.decode(text[:300])
            state = ctx.save(whole)
            want = ctx.decode(text[300:])
        with Context(model, razor, **PARAMS) as ctx:
            ctx.decode(tokens(50, 8))
            assert ctx.load(state, whole)
            np.testing.assert_allclose(ctx.decode(text[300:]), want, rtol=0, atol=limit)
        with Context(model, razor_of(path, 96), **PARAMS) as ctx:
            ctx.decode(tokens(50, 8))
            assert not ctx.load(state, whole)
            assert "plan" in runner.last_error()
            assert ctx.pos_max() == 49, "nothing has changed"
        with Context(model, razor, **PARAMS) as ctx:
            ctx.decode(tokens(50, 8))
            ctx.load(state[: len(state) - 40], whole)
            assert ctx.pos_max() in (-1, 49)
            ctx.clear()
            ctx.decode(text[:300])
            np.testing.assert_allclose(ctx.decode(text[300:]), want, rtol=0, atol=limit)


@over("gemma3", "gemma4", "falcon-h1", "qwen35")
def test_abort(path: Path) -> None:
    """After an abort the cache goes on from what it holds; a hybrid's is empty."""
    hybrid = ModelFile(path).shape.recurrent_bytes > 0
    text = tokens(400)
    with Model(path) as model, Context(model, razor_of(path), n_ubatch=64, **PARAMS) as ctx:
        want = ctx.decode(text)
        limit = noise(model, text, **PARAMS)
        for n_nodes in (5, 60, 150):
            ctx.clear()
            ctx.decode(text[:330])
            ctx.abort_after(n_nodes)
            status, _ = ctx.try_decode(text[330:])
            ctx.abort_after(None)
            if status == 0:
                continue
            held = ctx.pos_max() + 1
            assert held == 0 if hybrid else held in (0, 330, 384)
            ctx.n_past = held
            got = ctx.decode(text[held:])
            np.testing.assert_allclose(got, want[held:], rtol=0, atol=limit)


def test_random_operations_on_each_memory() -> None:
    from tests.fuzz import memories

    archs = ("gemma3", "gemma4", "gpt-oss", "granitehybrid", "qwen35", "qwen3vl")
    assert sum(memories.run(1200, seed=1, archs=archs).values()) >= 1200


# -- memory --


@over(*SLIDING, *HYBRID, *MROPE)
@pytest.mark.parametrize("razor", [True, False])
def test_bytes(path: Path, razor: bool) -> None:
    """The backends' buffers are the plan's bytes, and the parts add up to them."""
    file = ModelFile(path)
    layers = file.shape.n_head_kv
    assert tuple(arch_runs.layers_of(path)) == layers
    mask = np.frombuffer(arch_runs.mask_of(layers), np.uint8)
    profile = Profile(split_heads(mask, layers), window_min=64, window_divisor=0)
    llama = Llama(path, razor=profile if razor else False, n_ctx=2048, n_ubatch=128)
    try:
        memory, plan = llama.memory(), llama.plan
        assert plan is not None and memory.active == plan.active == razor
        assert memory.kv_bytes == plan.kv_bytes
        assert memory.sliding_bytes == plan.sliding_bytes
        assert memory.recurrent_bytes == plan.recurrent_bytes
        assert (memory.sliding_bytes > 0) == (file.shape.sliding is not None)
        assert (memory.recurrent_bytes > 0) == (file.shape.recurrent_bytes > 0)
        rest = sum(layer.kv_bytes for layer in (memory.layers or plan.layers))
        assert rest + memory.sliding_bytes + memory.recurrent_bytes == memory.kv_bytes
        assert memory.kv_bytes <= memory.kv_bytes_full
    finally:
        llama.close()


@over("gemma3", "qwen35")
def test_llama_goes_on_from_another_prompt(path: Path) -> None:
    """Where the cache cannot go back, Llama reads the prompt again."""
    file = ModelFile(path)
    layers = file.shape.n_head_kv
    mask = np.frombuffer(arch_runs.mask_of(layers), np.uint8)
    profile = Profile(split_heads(mask, layers), window_min=64, window_divisor=0)
    text = [t % 90 + 4 for t in tokens(400)]
    other = [*text[:370], *(t % 90 + 4 for t in tokens(20, 5))]
    llama = Llama(path, razor=profile, n_ctx=1024)
    try:
        llama.eval(other)
        want = llama._last_logits().copy()
        llama.reset()
        llama.prefill(text)
        llama.prefill(other)
        assert llama.n_tokens == len(other)
        np.testing.assert_allclose(llama._last_logits(), want, rtol=0, atol=tolerance(1e-3))
    finally:
        llama.close()


# -- what stays refused --


def test_hybrids_with_sliding_windows_are_refused(tmp_path: Path) -> None:
    """All layers with attention have a window then, so there is nothing to save."""
    extra = {"lfm2.attention.sliding_window": (32, GGUFValueType.UINT32)}
    path = other_models.make_other(tmp_path / "m.gguf", "lfm2", extra)
    sentence = runner.refusal(str(path), Override(b"\0", window=64))
    assert sentence and "hybrid models with sliding windows" in sentence
    assert runner.refusal(str(path), OFF) is None


@pytest.mark.parametrize("arch", ["deepseek2", "deepseek32", "minimax-m3", "nanbeige", "mamba"])
def test_refused_by_name(arch: str) -> None:
    path = arch_models.path_of(arch)
    sentence = arch_runs.refusal(path)
    assert sentence and re.search(rf"^{arch}: .* not supported, switch razor off", sentence)
