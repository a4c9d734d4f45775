"""ALiBi scopes: no attention beyond them, as little as possible within, in numpy and as run."""

from __future__ import annotations

import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from razor_local.converters import alibi
from razor_local.converters.alibi import head_scope, profile_from_weights
from razor_local.converters.head_map import plot_heads, scope_line
from razor_local.converters.write import write_copy

from razor_local import Profile
from razor_local.errors import ConvertError, GGUFError, ProfileError, UnsupportedError
from razor_local.gguf.header import read_header
from razor_local.model_file import read_model_shape, read_profile
from razor_local.model_shape import ModelShape, alibi_max_bias, unsupported_feature
from razor_local.plan import make_plan
from razor_local.profile import read_sidecar
from tests.support import alibi_models, tiny_models
from tests.support.alibi_models import (
    RMS,
    AlibiSpec,
    adversary,
    attention,
    make_weights,
    read_weights,
    write,
)
from tests.support.alibi_scopes import (
    EPSILON,
    SPECS,
    own_scopes,
    passed_distance,
    query_head_scopes,
)
from tests.support.cli import run
from tests.support.gguf_bytes import F32, STRING, U32, kv, kv_array, razor_keys, small_model


@pytest.fixture(scope="module", params=SPECS)
def model(request, tmp_path_factory) -> tuple[Path, AlibiSpec]:
    spec = SPECS[request.param]
    return write(tmp_path_factory.mktemp("alibi") / "m.gguf", spec), spec


# -- the bound, against an independent computation


def test_inputs_made_for_it_stay_within_and_barely(model):
    """The bound holds, and is not larger than it must be."""
    path, spec = model
    weights, slopes = read_weights(path), alibi_models.slopes(spec)
    for il in range(0, spec.n_layer, 13):
        for ih, scope in enumerate(own_scopes(path, spec, il)):
            worst = adversary(spec, weights, il, ih)
            for distance in (scope, scope + 1, scope + 17, 2 * scope):
                assert attention(spec, weights, il, worst.text(distance))[ih, 0] <= EPSILON
            for distance in (scope // 4, passed_distance(scope, slopes[ih])):
                assert attention(spec, weights, il, worst.text(distance))[ih, 0] > EPSILON


def test_a_kv_head_has_the_scope_of_its_farthest_query_head(model):
    path, spec = model
    profile = profile_from_weights(path)
    for il in range(0, spec.n_layer, 13):
        own = np.array(own_scopes(path, spec, il)).reshape(spec.n_head_kv, -1)
        assert profile.scope[il].tolist() == own.max(axis=1).tolist()
    assert len(profile.scope) == spec.n_layer


def test_random_texts_stay_within(model):
    path, spec = model
    weights, scopes = read_weights(path), query_head_scopes(spec, profile_from_weights(path))
    rng = np.random.default_rng(1)
    n = int(min(scopes[0].max(), 600)) + 50
    for size in (0.01, 1, 100):
        residual = size * rng.standard_normal((n, spec.n_embd))
        paid = attention(spec, weights, 0, residual)
        for ih, scope in enumerate(scopes[0]):
            beyond = paid[ih, : max(n - scope, 0)]
            assert (beyond <= EPSILON).all()


@settings(max_examples=25, deadline=None)
@given(
    arch=st.sampled_from(["bloom", "mpt", "jais", "refact"]),
    n_head=st.sampled_from([1, 2, 3, 5, 8]),
    head_dim=st.sampled_from([4, 8, 16]),
    gain=st.floats(0.05, 3),
    bias=st.sampled_from([0.0, 0.3, 2.0]),
    max_bias=st.floats(0.5, 12),
    epsilon=st.floats(1e-6, 0.2),
    clamp=st.sampled_from([0.0, 0.5, 3.0, 100.0]),
    qk_norm=st.booleans(),
    seed=st.integers(0, 99),
)
def test_scopes_hold(tmp_path_factory, arch, epsilon, seed, clamp, qk_norm, max_bias, **options):
    """For any model: at the scope, inputs that look for attention get at most epsilon."""
    n_kv = options["n_head"] if arch != "refact" else 1
    mpt = arch == "mpt"
    spec = AlibiSpec(
        arch,
        n_head_kv=n_kv,
        seed=seed,
        clamp=clamp if mpt else 0,
        qk_norm=mpt and qk_norm,
        max_bias=max_bias if arch in alibi_models.HAS_KEY else 8.0,
        fused=arch != "refact",
        **options,
    )
    path = write(tmp_path_factory.mktemp("any") / "m.gguf", spec)
    weights, rng = read_weights(path), np.random.default_rng(seed)
    for ih, scope in enumerate(own_scopes(path, spec, 0, epsilon)):
        texts = [adversary(spec, weights, 0, ih, seed)]
        texts += [alibi_models.Adversary(*rng.standard_normal((3, spec.n_embd)), 0) for _ in "123"]
        for worst in texts:
            q, k = alibi_models.queries_and_keys(spec, weights, 0, worst.text(1))
            difference = q[ih, 1] @ (k[ih, 0] - k[ih, 1]) - alibi_models.slopes(spec)[ih] * scope
            assert 1 / (1 + math.exp(min(-difference, 700))) <= epsilon * (1 + 1e-6)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    n=st.integers(1, 14),
    seed=st.integers(0, 10**6),
    constant=st.sampled_from([0.0, 1e-9, 1.0, 50.0]),
    twin=st.sampled_from([0, 1, -1]),
)
def test_linear_range_is_the_maximum(rows, n, seed, constant, twin):
    """Never below a value that random and climbing vectors reach, also with fewer inputs than
    rows, equal projections, opposite ones, and none at all."""
    rng = np.random.default_rng(seed)
    u, v = rng.standard_normal((2, rows, n))
    v = v if twin == 0 else twin * u
    f = constant * rng.standard_normal(rows)
    bound = alibi.linear_range(u, v, f, n)
    z = rng.standard_normal((300, n))
    z *= np.sqrt(n) * rng.uniform(0, 1, (300, 1)) / np.linalg.norm(z, axis=1, keepdims=True)
    reached = -np.inf
    for _ in range(60):
        wanted = (z @ u.T + f) @ v
        y = np.sqrt(n) * wanted / np.maximum(np.linalg.norm(wanted, axis=1, keepdims=True), 1e-12)
        reached = max(reached, float((wanted * (y - z)).sum(axis=1).max()))
        z = z + 0.2 * ((y - z) @ v.T @ u - wanted) / max(np.linalg.norm(u.T @ v, 2), 1e-12)
        z *= np.minimum(1, np.sqrt(n) / np.linalg.norm(z, axis=1, keepdims=True))
    assert bound >= reached * (1 - 1e-9) - 1e-9
    assert bound <= reached * 1.03 + 1e-6
    assert alibi.linear_range(0 * u, v, f, n) >= 2 * np.sqrt(n) * np.linalg.norm(f @ v) * 0.999
    assert alibi.linear_range(u, 0 * v, f, n) == 0


def test_a_clamp_that_never_acts_changes_nothing(tmp_path):
    spec = SPECS["mpt with biases"]
    plain = profile_from_weights(write(tmp_path / "a.gguf", spec)).scope[0]
    wide = profile_from_weights(write(tmp_path / "b.gguf", replace(spec, clamp=1e4))).scope[0]
    tight = profile_from_weights(write(tmp_path / "c.gguf", replace(spec, clamp=0.1))).scope[0]
    assert wide.tolist() == plain.tolist() and (tight < plain / 4).all()


def test_the_printed_formula_is_no_bound(tmp_path):
    """docs/alibi.md: with weights of the normalization that are not equal, L_h of the paper (its
    norms of gamma and b) can be passed with nearly all of the attention."""
    spec = AlibiSpec("mpt", n_head=1, n_head_kv=1, head_dim=64, bias=0)
    weights = make_weights(spec)
    d = spec.n_embd
    gamma = np.full(d, 0.01, np.float32)
    gamma[0] = 1
    weights["blk.0.attn_norm.weight"] = gamma
    qkv = np.zeros((3 * d, d), np.float32)
    qkv[0, 0], qkv[d, 0] = 2, -2
    weights["blk.0.attn_qkv.weight"] = qkv
    path = write(tmp_path / "m.gguf", spec, weights)
    (slope,), norm = alibi_models.slopes(spec), 4 / math.sqrt(d)  # 1 / sqrt(head_dim) inside
    printed = math.ceil((2 * norm * float(gamma @ gamma) - math.log(EPSILON)) / slope)
    weights = read_weights(path)
    worst = adversary(spec, weights, 0, 0)
    assert attention(spec, weights, 0, worst.text(printed))[0, 0] > 0.99
    (scope,) = profile_from_weights(path).scope[0]
    assert scope > printed
    assert attention(spec, weights, 0, worst.text(int(scope)))[0, 0] <= EPSILON


def test_scope_of_a_head():
    assert head_scope(0, 1, math.exp(-5)) == 5
    assert head_scope(3, 0.5, math.exp(-5)) == 16
    assert head_scope(3.001, 0.5, math.exp(-5)) == 17
    # flash attention rounds distances above 2048 to 11 bits
    scope = head_scope(1e4, 1, math.exp(-1))
    assert float(np.float16(scope)) >= 10001 and scope < 10001 * 1.001
    assert head_scope(1e30, 1e-3, EPSILON) == 0
    assert head_scope(1, 0.0, EPSILON) == 0


# -- reading models


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q5_1])
def test_quantized_weights_count_as_their_values(kind, tmp_path):
    spec = AlibiSpec("bloom", 2, kind=kind)
    path = write(tmp_path / "q.gguf", spec)
    assert {t.tensor_type for t in GGUFReader(path).tensors if "qkv.weight" in t.name} == {kind}
    values = {name: data.astype(np.float32) for name, data in read_weights(path).items()}
    plain = write(tmp_path / "f32.gguf", replace(spec, kind=Q.F32), values)
    for a, b in zip(
        profile_from_weights(path).scope, profile_from_weights(plain).scope, strict=True
    ):
        assert a.tolist() == b.tolist()


def test_fused_and_separate_projections_are_the_same(tmp_path):
    spec = SPECS["refact"]
    one = profile_from_weights(write(tmp_path / "a.gguf", spec))
    both = profile_from_weights(write(tmp_path / "b.gguf", replace(spec, fused=True)))
    assert one.scope[0].tolist() == both.scope[0].tolist()


def test_split_models(tmp_path):
    spec = AlibiSpec("bloom", 2)
    whole = profile_from_weights(write(tmp_path / "m.gguf", spec))
    write(tmp_path / "s.gguf", spec, split_max_tensors=9)
    first = tmp_path / "s-00001-of-00004.gguf"
    profile = profile_from_weights(first)
    assert [a.tolist() for a in profile.scope] == [a.tolist() for a in whole.scope]
    out = write_copy(first, tmp_path / "out.gguf", profile)
    assert out.name == "out-00001-of-00004.gguf" and read_profile(out).method == "alibi"


def test_memory_does_not_grow_with_the_matrices(tmp_path):
    """The query, key and value weights of a layer: 6 MiB as f64."""
    path = write(tmp_path / "m.gguf", AlibiSpec("mpt", 1, 16, 16, 32, bias=0))
    profile_from_weights(write(tmp_path / "small.gguf", AlibiSpec()))  # imports
    tracemalloc.start()
    profile_from_weights(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def test_which_models_have_alibi(tmp_path):
    def bias(arch: str, *extra: bytes, n_layer: int = 2) -> float:
        raw = small_model([*extra], n_layer=n_layer).replace(b"llama", arch.encode()[:5].ljust(5))
        path = tmp_path / "m"
        path.write_bytes(raw)
        header, shape = read_header(path), read_model_shape(path)
        assert shape.arch == arch
        assert unsupported_feature(header, shape) is None
        return shape.max_alibi_bias

    assert bias("bloom") == 8 and bias("llama") == 0
    # a key that llama.cpp reads of two architectures alone
    assert bias("llama", kv("llama.attention.max_alibi_bias", F32, 8.0)) == 0
    for arch, n_layer, expected in (
        ("refact", 32, 8),
        ("jina-bert-v2", 12, 8),
        ("baichuan", 40, 8),
        ("baichuan", 32, 0),
        ("mpt", 32, 0),
        ("jais", 24, 0),
        ("falcon", 40, 0),
    ):
        shape = ModelShape(arch, n_layer, (2,) * n_layer, (2,) * n_layer, 8, 8, 512)
        assert alibi_max_bias(read_header(tmp_path / "m"), shape) == expected
    for value, expected in ((8.0, 8), (2.5, 2.5), (0.0, 0), (-1.0, 0)):
        path = write(tmp_path / "k.gguf", AlibiSpec("mpt", max_bias=value))
        assert read_model_shape(path).max_alibi_bias == expected
    for value in (math.nan, math.inf):
        path = write(tmp_path / "k.gguf", AlibiSpec("jais", max_bias=value))
        with pytest.raises(GGUFError, match="max_alibi_bias is .*, expected a finite number"):
            read_header(path)


def test_slopes_of_almost_nothing_mean_the_whole_context(tmp_path):
    path = write(tmp_path / "m.gguf", AlibiSpec("mpt", max_bias=30.0))
    profile = profile_from_weights(path)
    assert profile.scope[0][-1] == 0 and profile.scope[0][0] > 0
    assert profile.retrieval[0].tolist() == [0, 0, 0, 1]
    path = write(tmp_path / "m.gguf", AlibiSpec("mpt", max_bias=6000.0))  # slopes of 0 in f32
    assert profile_from_weights(path).scope[0].tolist() == [0, 0, 0, 0]


def test_progress(tmp_path):
    calls = []
    profile_from_weights(
        write(tmp_path / "m.gguf", AlibiSpec("bloom", 2)), progress=lambda *a: calls.append(a)
    )
    assert calls == [(i, 8, "computing the scopes") for i in range(1, 9)]
    with pytest.raises(KeyboardInterrupt):

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        profile_from_weights(tmp_path / "m.gguf", progress=stop)


def change(weights: dict[str, np.ndarray], case: str) -> dict[str, np.ndarray]:
    if case == "nan":
        weights["blk.0.attn_qkv.weight"][3, 5] = np.nan
    elif case == "missing":
        del weights["blk.0.attn_qkv.weight"]
    elif case == "no norm":
        del weights["blk.0.attn_norm.weight"]
    elif case == "shape":
        weights["blk.0.attn_qkv.weight"] = weights["blk.0.attn_qkv.weight"][:-1]
    elif case == "norm shape":
        weights["blk.0.attn_norm.bias"] = weights["blk.0.attn_norm.bias"][:-1]
    return weights


BAD = {
    "nan": "'blk.0.attn_qkv.weight' holds values that are not finite",
    "missing": "no tensor 'blk.0.attn_k.weight', which bloom models have",
    "no norm": "no tensor 'blk.0.attn_norm.weight'",
    "shape": r"'blk.0.attn_qkv.weight' has the shape \[64, 191\], expected \[64, 192\]",
    "norm shape": r"'blk.0.attn_norm.bias' has the shape \[63\], expected \[64\]",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_weights_are_one_sentence(case, tmp_path):
    weights = change(make_weights(AlibiSpec()), case)
    path = write(tmp_path / "m.gguf", AlibiSpec(), weights)
    with pytest.raises(GGUFError, match=BAD[case]):
        profile_from_weights(path)
    code, stdout, stderr = run("convert", path, "-o", tmp_path / "out.gguf")
    assert code == 1 and stdout == "" and stderr.count("Error: ") == 1
    assert "Traceback" not in stderr and not list(tmp_path.glob("*out*"))


def test_refusals_of_the_function(tmp_path):
    path = write(tmp_path / "m.gguf", AlibiSpec())
    for epsilon in (0, 1, -0.5, math.nan):
        with pytest.raises(ConvertError, match="expected a number between 0 and 1"):
            profile_from_weights(path, epsilon=epsilon)
    llama = tiny_models.make_model(tmp_path / "llama.gguf", tiny_models.TinySpec())
    with pytest.raises(ConvertError, match=r"\(llama\) does not use ALiBi"):
        profile_from_weights(llama)


def test_types_that_gguf_cannot_read(tmp_path, monkeypatch):
    import gguf.quants

    def dequantize(*_):
        raise NotImplementedError

    path = write(tmp_path / "m.gguf", AlibiSpec())
    monkeypatch.setattr(gguf.quants, "dequantize", dequantize)
    with pytest.raises(UnsupportedError, match="has the type 0, which gguf cannot dequantize"):
        profile_from_weights(path)


# -- profiles


def alibi_keys(scope: list[int] | None, retrieval: list[int]) -> list[bytes]:
    extra = [] if scope is None else [kv_array("razor.head.scope", U32, scope)]
    return razor_keys(retrieval, method=kv("razor.method", STRING, "alibi")) + extra


def test_profiles_are_read_and_checked(tmp_path):
    def read(scope: list[int] | None, retrieval: list[int]) -> Profile:
        path = tmp_path / "m.gguf"
        path.write_bytes(small_model(alibi_keys(scope, retrieval)))
        return read_profile(path)

    profile = read([7, 0, 2**30, 1], [0, 1, 0, 0])
    assert [layer.tolist() for layer in profile.scope] == [[7, 0], [2**30, 1]]
    assert profile.scope[0].dtype == np.uint32 and not profile.scope[0].flags.writeable
    for scope, retrieval, expected in (
        (None, [0, 0, 0, 0], "razor.head.scope is missing"),
        ([1, 2, 3], [0, 0, 0, 0], "has 3 elements, the model has 4 KV heads"),
        ([1, 2, 3, 2**30 + 1], [0, 0, 0, 0], f"layer 1 holds {2**30 + 1}, expected 0 to"),
        ([1, 2, 3, 2**32 - 1], [0, 0, 0, 0], f"layer 1 holds {2**32 - 1}, expected 0 to"),
        ([1, 0, 3, 4], [0, 0, 0, 0], "for other KV heads than the retrieval heads"),
        ([1, 2, 3, 4], [0, 1, 0, 0], "for other KV heads than the retrieval heads"),
    ):
        with pytest.raises(ProfileError) as error:
            read(scope, retrieval)
        assert expected in str(error.value) and str(error.value).count("m.gguf") == 1


def test_profiles_made_in_python():
    heads = (np.array([0, 1]),)
    for options, expected in (
        ({"method": "alibi"}, "scope is missing"),
        ({"method": "alibi", "scope": ()}, "has 0 layers"),
        ({"method": "alibi", "scope": (np.array([5]),)}, "for each of 2 KV heads"),
        ({"method": "alibi", "scope": (np.array([5.0, 0]),)}, "for each of 2 KV heads"),
        ({"method": "alibi", "scope": (np.array([-5, 0]),)}, "holds -5"),
    ):
        with pytest.raises(ProfileError, match=expected):
            Profile(heads, **options)


# -- command line


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write(folder / "model.gguf", AlibiSpec("mpt", 2, max_bias=16.0, gain=0.3))
    code, stdout, stderr = run("convert", folder / "model.gguf", "-o", folder / "out.gguf")
    assert code == 0, stderr
    assert stderr == ""
    (folder / "said").write_text(stdout)
    return folder


def test_convert_computes_the_scopes(converted):
    profile = read_profile(converted / "out.gguf")
    expected = profile_from_weights(converted / "model.gguf")
    assert [a.tolist() for a in profile.scope] == [a.tolist() for a in expected.scope]
    assert profile.calibration == expected.calibration
    assert profile.calibration["epsilon"] == "0.001"
    assert profile.calibration["model_fingerprint"] == (
        read_model_shape(converted / "out.gguf").fingerprint
    )
    assert (profile.sink_tokens, profile.compensation) == (0, False)
    shape = read_model_shape(converted / "out.gguf")
    line = scope_line(profile, shape.n_ctx_train)
    said = (converted / "said").read_text().splitlines()
    assert said[0] == f"{converted / 'out.gguf'}: {line}"
    assert said[-1] == f"Next: razor-local chat {converted / 'out.gguf'}"
    entries = read_header(converted / "out.gguf").entries
    assert entries["razor.head.scope"].type_name == "u32[]"
    fields = GGUFReader(converted / "out.gguf").fields
    assert fields["razor.head.scope"].contents() == np.concatenate(expected.scope).tolist()
    before = {t.name: t.data.tobytes() for t in GGUFReader(converted / "model.gguf").tensors}
    assert before == {t.name: t.data.tobytes() for t in GGUFReader(converted / "out.gguf").tensors}


def test_convert_to_a_sidecar_and_another_epsilon(converted, tmp_path):
    model = converted / "model.gguf"
    code, _, stderr = run(
        "convert", model, "-o", tmp_path / "side.gguf", "--sidecar", "--epsilon", 0.05
    )
    assert code == 0, stderr
    profile = read_sidecar(tmp_path / "side.gguf", read_model_shape(model))
    assert profile.calibration["epsilon"] == "0.05"
    nearer, default = (
        np.concatenate(profile.scope),
        np.concatenate(read_profile(converted / "out.gguf").scope),
    )
    assert (nearer <= default).all() and (nearer < default).any()
    code, stdout, _ = run("inspect", model, "--sidecar", tmp_path / "side.gguf")
    assert code == 0 and "attention beyond the scope of a KV head is at most 0.05" in stdout


def test_inspect_shows_the_scopes(converted):
    profile = read_profile(converted / "out.gguf")
    plan = make_plan(read_model_shape(converted / "out.gguf"), profile, 1024)
    group = plan.groups[0]
    code, stdout, _ = run("inspect", converted / "out.gguf")
    assert code == 0
    assert stdout.splitlines()[1:6] == [
        "profile  ALiBi: attention beyond the scope of a KV head is at most 0.001",
        "source   the metadata of the model file",
        "context  1,024 tokens, K f16, V f16, flash attention on",
        f"scopes   {scope_line(profile, 1024)}",
        f"plan     {plan.retrieval_kv_heads} KV heads keep 1,024 tokens;"
        f" {group.n_heads} keep 0 sinks and the last {group.window:,} ({group.cells} cells each,"
        f" dropped in blocks of {plan.block})",
    ]
    code, stdout, _ = run("inspect", converted / "out.gguf", "--heads")
    assert code == 0
    rows = {line.split()[0]: line.split()[1:] for line in stdout.splitlines()[5:7]}
    for il, scopes in enumerate(profile.scope):
        mask = "".join("#" if scope == 0 else "." for scope in scopes)
        assert rows[str(il)] == [mask, *map(str, scopes)]
    code, stdout, _ = run("inspect", converted / "out.gguf", "--heads", "--json", "-c", 512)
    found = json.loads(stdout)
    assert found["profile"]["scope"] == [layer.tolist() for layer in profile.scope]
    assert found["profile"]["method"] == "alibi" and found["scores"] == {}
    assert found["active"] is False and found["kv_bytes"] == found["kv_bytes_full"]
    assert found["why_inactive"] == "RazorAttention saves nothing up to 512 tokens of context"
    code, _, stderr = run("inspect", converted / "out.gguf", "--retrieval", 0.2)
    assert code == 1 and "holds a scope for each head" in stderr


def test_scope_line():
    def profile(*scope: int) -> Profile:
        mask = (np.array([s == 0 for s in scope], np.uint8),)
        return Profile(mask, method="alibi", scope=(np.array(scope, np.uint32),))

    assert scope_line(profile(10, 0, 2000, 30), 100) == (
        "2 of 4 KV heads keep less than 100 tokens: 10 to 30 each; all scopes together are 60.0%"
        " of a full cache"
    )
    assert scope_line(profile(100, 0), 100) == ("none of 2 KV heads keeps less than 100 tokens")


def test_plot(converted, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "heads.png"
    model = converted / "out.gguf"
    plot_heads(read_profile(model), read_model_shape(model), path)
    assert path.read_bytes().startswith(b"\x89PNG")


MEANINGLESS = {
    "--budget": 0.2, "--select": "paper", "--haystack": ".", "--no-proof": None,
    "--induction": 0.1, "--echo": 0.1, "--tokens": 100, "--repeats": 3,
    "--seed": 0, "--scores": "s.json", "--save-scores": "s.json", "--heads": "h.tsv",
    "--max-memory": "1G", "--threads": 1, "--n-gpu-layers": 0, "--sinks": 4, "--window-min": 4000,
    "--window-divisor": 5, "--no-compensation": None,
}  # fmt: skip


@pytest.mark.parametrize("option", MEANINGLESS)
def test_options_that_mean_nothing_are_refused(option, converted, tmp_path):
    value = MEANINGLESS[option]
    given = [option] if value is None else [option, value]
    code, stdout, stderr = run(
        "convert", converted / "model.gguf", "-o", tmp_path / "out.gguf", *given
    )
    assert code == 2 and stdout == ""
    assert f"{option} does not apply to an ALiBi model (mpt)" in stderr
    assert not list(tmp_path.iterdir())


def test_epsilon_is_for_alibi_models(tmp_path):
    model = tiny_models.make_model(tmp_path / "m.gguf", tiny_models.TinySpec())
    code, _, stderr = run("convert", model, "-o", tmp_path / "o.gguf", "--epsilon", 0.01)
    assert code == 2 and "--epsilon applies only to ALiBi models; this model is llama" in stderr
    for epsilon in (0, 1, 2, "x"):
        code, _, stderr = run("convert", model, "-o", tmp_path / "o.gguf", "--epsilon", epsilon)
        assert code == 2 and "--epsilon" in stderr
    assert not (tmp_path / "o.gguf").exists()


def test_encoders_are_refused_by_name(tmp_path):
    path = write(tmp_path / "m.gguf", AlibiSpec("jina-bert-v2"))
    code, _, stderr = run("convert", path, "-o", tmp_path / "o.gguf")
    assert code == 1 and "the scopes of jina-bert-v2 models cannot be computed" in stderr
    assert not (tmp_path / "o.gguf").exists()


def test_rms_norm_is_not_centred(tmp_path):
    """The same weights under the two normalizations: an RMS norm has one direction more."""
    weights = make_weights(AlibiSpec("refact", bias=0))
    weights["blk.0.attn_norm.weight"][:] = 1
    qkv = weights["blk.0.attn_qkv.weight"]
    qkv[:] = 0
    qkv[0], qkv[64] = 1, -1  # q and k of head 0 are the mean of the input
    rms = profile_from_weights(write(tmp_path / "r.gguf", AlibiSpec("refact", bias=0), weights))
    layer = profile_from_weights(write(tmp_path / "l.gguf", AlibiSpec("mpt", bias=0), weights))
    least = math.ceil(-math.log(EPSILON) / 2**-2)
    assert layer.scope[0][0] == least < rms.scope[0][0]
    assert set(RMS) == set(alibi.RMS_NORM)
