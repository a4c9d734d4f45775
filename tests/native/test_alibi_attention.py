"""ALiBi models as the library runs them: attention stays within the scopes; razor is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType
from razor_local.converters.alibi import alibi_slopes, profile_from_weights
from razor_local.converters.write import write_copy, write_sidecar

from razor_local import Llama
from razor_local.errors import ProfileError, UnsupportedError
from razor_local.model_file import read_model_shape
from razor_local.native import tensors
from razor_local.plan import make_plan
from tests.support import alibi_models, other_models, runner, tiny_models
from tests.support.alibi_models import AlibiSpec, adversary, make_weights, write
from tests.support.alibi_scopes import (
    EPSILON,
    SPECS,
    own_scopes,
    passed_distance,
    query_head_scopes,
)


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


def test_scopes_cannot_be_run_yet(tmp_path):
    spec = AlibiSpec("bloom", 2)
    model = write(tmp_path / "m.gguf", spec)
    profile = profile_from_weights(model)
    copy = write_copy(model, tmp_path / "copy.gguf", profile)
    side = write_sidecar(model, tmp_path / "side.gguf", profile)
    assert "bloom: ALiBi not supported" in runner.refusal(str(copy))
    assert runner.refusal(str(copy), runner.OFF) is None
    # whatever the architecture, the method is refused when a context is created, not before
    keys = tiny_models.razor_kv([[0, 0]] * 3) | {
        "razor.method": ("alibi", GGUFValueType.STRING),
        "razor.head.scope": (np.full(6, 9, np.uint32), GGUFValueType.ARRAY),
    }
    llama = tiny_models.make_model(tmp_path / "llama.gguf", tiny_models.TinySpec(), keys)
    assert "razor.method is 'alibi', and only 'rope' can be run" in runner.refusal(str(llama))
    assert runner.refusal(str(llama), runner.Override(None, window=16)) is not None
    assert runner.refusal(str(llama), runner.OFF) is None
    assert runner.refusal(str(llama), runner.Override(bytes(6), window=16)) is None
    with pytest.raises(UnsupportedError, match="profiles of the method 'alibi', only of 'rope'"):
        Llama(copy, n_ctx=256)
    with pytest.raises(UnsupportedError, match="profiles of the method 'alibi', only of 'rope'"):
        Llama(model, n_ctx=256, razor=side)
    with pytest.raises(UnsupportedError, match="profiles of the method 'alibi', only of 'rope'"):
        make_plan(read_model_shape(model), profile, 512)
    with pytest.raises(ProfileError, match="holds a scope for each head"):
        Llama(copy, n_ctx=256, retrieval=0.5)
    llama = Llama(copy, n_ctx=256, razor=False)
    llama.eval([1, 2, 3])
    assert llama.n_tokens == 3


def test_old_models_are_still_refused_natively(tmp_path):
    """The architecture is refused as well as the profile."""
    path = other_models.make_other(tmp_path / "m.gguf", "mpt", tiny_models.razor_kv([[0, 0]] * 2))
    assert "ALiBi" in runner.refusal(str(path))
