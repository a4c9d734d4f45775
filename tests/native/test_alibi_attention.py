"""ALiBi models in the library: attention stays within the scopes, and razor runs the models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from razor_local.converters.alibi import alibi_slopes, profile_from_weights
from razor_local.converters.calibrate import calibrate
from razor_local.converters.write import write_copy, write_sidecar

from razor_local import Llama
from razor_local.cli.chat_status import _heads as status_heads
from razor_local.errors import ProfileError, RazorError, UnsupportedError
from razor_local.evals.policies import make_policies
from razor_local.model_file import read_model_shape
from razor_local.model_setup import ModelSetup
from razor_local.native import tensors
from razor_local.plan import make_plan
from razor_local.verify.run import verify
from tests.support import alibi_models, runner
from tests.support.alibi_models import AlibiSpec, adversary, make_weights, write
from tests.support.alibi_scopes import (
    EPSILON,
    SPECS,
    own_scopes,
    passed_distance,
    query_head_scopes,
)
from tests.support.cli import run
from tests.support.device import tolerance

# scopes that save something in a context of 1,024 tokens
RUN = {
    "bloom": AlibiSpec("bloom", 2, gain=0.15),
    "mpt": AlibiSpec("mpt", 2, 3, 3, 32, max_bias=4.0, gain=0.15),
    "jais": AlibiSpec("jais", 2, gain=0.4),
    "refact": AlibiSpec("refact", 2, 6, 3, gain=0.1),
    "baichuan": AlibiSpec("baichuan", 40, head_dim=16, fused=False, gain=0.1),
}


@pytest.fixture(scope="module", params=SPECS)
def model(request, tmp_path_factory) -> tuple[Path, AlibiSpec]:
    spec = SPECS[request.param]
    return write(tmp_path_factory.mktemp("alibi") / "m.gguf", spec), spec


def measured(path: Path, tokens: list[int], n_ctx: int = 1024) -> list[np.ndarray]:
    """Attention after softmax of each layer: f32 [n_head, n_tokens, n_tokens], by llama.cpp."""
    C = runner.bindings()
    tensors.bind(C._lib)
    found: dict[int, np.ndarray] = {}

    def on_eval(tensor: int, ask: bool, _data: int | None) -> bool:
        name = C._lib.ggml_get_name(tensor)
        if not name.startswith(b"kq_soft_max-"):
            return False
        if not ask:
            rows = tensors.read(C._lib, tensor)[0][:, : len(tokens), : len(tokens)]
            found[int(name.split(b"-")[1])] = rows
        return True

    callback = C.ggml_backend_sched_eval_callback(on_eval)
    sizes = {"n_ctx": n_ctx, "n_batch": n_ctx, "n_ubatch": n_ctx}
    with runner.Model(path) as model, runner.Context(model, **sizes, cb_eval=callback) as ctx:
        ctx.decode(tokens)
    return [found[il] for il in sorted(found)]


def test_no_attention_beyond_the_scopes(model):
    path, spec = model
    scopes = query_head_scopes(spec, profile_from_weights(path))
    rng, checked = np.random.default_rng(3), 0
    layers = measured(path, rng.integers(0, spec.n_vocab, 600).tolist())
    assert len(layers) == spec.n_layer
    distance = np.arange(600)[:, None] - np.arange(600)
    for il, layer in enumerate(layers):
        np.testing.assert_allclose(layer.sum(axis=-1), 1, atol=1e-4)
        for ih in range(spec.n_head):
            beyond = layer[ih][distance >= scopes[il, ih]]
            checked += beyond.size
            assert (beyond <= EPSILON).all()
    assert checked > 1000, "no scope was shorter than the text"


@pytest.mark.parametrize("name", ["bloom", "mpt", "jais", "refact"])
def test_the_running_model_reaches_the_bound_and_keeps_it(name, tmp_path):
    """Tokens whose embeddings are the worst inputs of layer 0: they pass a smaller scope."""
    spec = SPECS[name]
    weights = make_weights(spec)
    doubles = {key: value.astype(np.float64) for key, value in weights.items()}
    tokens = {}
    for ih in range(spec.n_head):
        worst = adversary(spec, doubles, 0, ih)
        tokens[ih] = [3 * ih, 3 * ih + 1, 3 * ih + 2]
        for token, vector in zip(
            tokens[ih], (worst.target, worst.filler, worst.query), strict=True
        ):
            weights["token_embd.weight"][token] = vector
    path, slopes = write(tmp_path / "m.gguf", spec, weights), alibi_models.slopes(spec)
    tried = 0
    for ih, scope in enumerate(own_scopes(path, spec, 0)):
        if scope > 1000:
            continue
        target, filler, query = tokens[ih]
        for n in (scope // 4, passed_distance(scope, slopes[ih]), scope):
            layer = measured(path, [target] + [filler] * (n - 1) + [query])[0]
            assert (layer[ih, -1, 0] > EPSILON) == (n < scope)
        tried += 1
    assert tried


@pytest.mark.parametrize("n_head", [1, 2, 3, 5, 6, 8, 12])
@pytest.mark.parametrize("max_bias", [8.0, 3.5])
def test_slopes_are_the_library_s(n_head, max_bias, tmp_path):
    """Without queries attention falls by the slope alone."""
    spec = AlibiSpec("mpt", 1, n_head, n_head, 4, bias=0, max_bias=max_bias)
    weights = make_weights(spec)
    weights["blk.0.attn_qkv.weight"][: spec.n_embd] = 0
    path = write(tmp_path / "m.gguf", spec, weights)
    (layer,) = measured(path, list(range(8)), n_ctx=256)
    fall = np.log(layer[:, 7, 7].astype(np.float64) / layer[:, 7, 0]) / 7
    np.testing.assert_allclose(alibi_slopes(n_head, max_bias), fall, rtol=1e-4)
    np.testing.assert_allclose(alibi_slopes(n_head, max_bias), alibi_models.slopes(spec), rtol=1e-5)
    assert alibi_slopes(0, max_bias).size == 0


@pytest.mark.parametrize("flash_attn", [True, False], ids=["fa", "nofa"])
@pytest.mark.parametrize("name", RUN)
def test_each_layer_equals_the_reference(name: str, flash_attn: bool, tmp_path) -> None:
    """Profiles that `convert` computes pass `verify` with an F32 cache."""
    model = write(tmp_path / "m.gguf", RUN[name])
    side = write_sidecar(model, tmp_path / "side.gguf", profile_from_weights(model))
    types = {"type_k": "f32", "type_v": "f32"}
    result = verify(model, n_ctx=1024, sidecar=side, rows=100, flash_attn=flash_attn, **types)
    assert result.passed and result.plan.groups
    assert max(group.errors.worst_rms for group in result.groups) <= tolerance(1e-4)


def test_llama_runs_the_scopes(tmp_path):
    """The metadata, a sidecar and the profile cache give contexts with the planned bytes."""
    model = write(tmp_path / "m.gguf", RUN["bloom"])
    profile = profile_from_weights(model)
    copy = write_copy(model, tmp_path / "copy.gguf", profile)
    side = write_sidecar(model, tmp_path / "side.gguf", profile)
    code, _, stderr = run("convert", model)
    assert code == 0, stderr
    plan = make_plan(read_model_shape(model), profile, 1024)
    assert plan.active and not plan.compensation and plan.sink_tokens == 0
    for path, razor in ((copy, True), (model, side), (model, "auto")):
        llama = Llama(path, n_ctx=1024, razor=razor)
        try:
            memory = llama.memory()
            assert memory.active and memory.kv_bytes == plan.kv_bytes
            llama.eval([1, 2, 3])
            words = status_heads(llama)
            last = f"keep the last {plan.windows_text}, and drop those before (0 so far)"
            assert words.endswith(last)
        finally:
            llama.close()


def test_options_of_a_run(tmp_path):
    """A window replaces the scopes; compensation and another budget are refused."""
    model = write(tmp_path / "m.gguf", RUN["bloom"])
    profile = profile_from_weights(model)
    copy = write_copy(model, tmp_path / "copy.gguf", profile)
    llama = Llama(copy, n_ctx=1024, window=100)
    try:
        assert [group.window for group in llama.plan.groups] == [100]
        assert llama.memory().kv_bytes == llama.plan.kv_bytes
    finally:
        llama.close()
    setup = ModelSetup(str(copy), window_min=100, window_divisor=0)
    assert make_plan(*setup.read(), 1024).window == 100
    shape, policies = make_policies(ModelSetup(str(copy)), ("full", "razor", "razor-no-comp"))
    assert [policy.plan(shape, 1024).active for policy in policies] == [False, True, True]
    for name in ("local", "streaming", "random-heads"):
        with pytest.raises(RazorError, match="the scopes of ALiBi heads follow from the weights"):
            make_policies(ModelSetup(str(copy)), (name,))
    with pytest.raises(UnsupportedError, match="scopes of ALiBi heads are computed from"):
        calibrate(model)
    with pytest.raises(UnsupportedError, match="compensation token in models with ALiBi \\(bloom"):
        Llama(copy, n_ctx=1024, compensation=True)
    with pytest.raises(ProfileError, match="holds a scope for each head"):
        Llama(copy, n_ctx=1024, retrieval=0.5)
    llama = Llama(copy, n_ctx=256, razor=False)
    llama.eval([1, 2, 3])
    assert llama.n_tokens == 3
    llama.close()


def test_without_a_profile(tmp_path):
    """The full cache runs, and the reason names the command."""
    model = write(tmp_path / "m.gguf", RUN["bloom"])
    llama = Llama(model, n_ctx=1024, razor="auto")
    assert not llama.memory().active
    assert "'razor-local convert' computes the scopes" in llama.memory().why
    llama.close()
    code, stdout, stderr = run("fit", model, "-c", 512)
    assert code == 0, stderr
    assert "profile  none, so only full caches are planned" in " ".join(stdout.split("\n"))
