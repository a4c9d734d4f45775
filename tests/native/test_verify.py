"""verify passes what is right and fails what is broken.

Broken here are the data: the profile that the reference is given, and the reference's folds, while
the native side runs as it is. The slow tests break the library instead.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from razor_local.converters.write import write_copy, write_sidecar

from razor_local import native
from razor_local.cli import main
from razor_local.errors import ProfileError, RazorError, Stopped, UnsupportedError
from razor_local.model_file import ModelFile, read_model_shape, read_profile
from razor_local.plan import KV_TYPES, head_windows
from razor_local.verify import compare as compare_module
from razor_local.verify import reference
from razor_local.verify import run as module
from razor_local.verify.compare import compare_layer, kl_divergence
from razor_local.verify.result import Errors, GroupResult
from razor_local.verify.run import sample_positions, verify
from tests.support.tiny_models import TinySpec, model_kv, razor_kv, write_gguf
from tests.tools import broken_builds

DEFAULT = Path(str(files("razor_local") / "data" / "razor-default.gguf"))
SHAPE = read_model_shape(DEFAULT)
QUICK = {"n_threads": 1, "n_tokens": 450, "n_ctx": 2048}
FOLDER = TemporaryDirectory()
# the embedded model with retrieval and local heads in one layer
MIXED = write_copy(
    DEFAULT,
    Path(FOLDER.name) / "mixed.gguf",
    replace(
        read_profile(DEFAULT),
        retrieval=tuple([int(il == 1 and h < 3) for h in range(4)] for il in range(SHAPE.n_layer)),
    ),
)
COMMAND = ["-t", "1", "-n", "450", "-c", "2048"]  # the same
KV = [
    ("f16", "f16", True),
    ("f16", "f16", False),
    ("q8_0", "q8_0", True),
    ("q8_0", "f16", False),
    ("q4_0", "q4_0", True),
    ("q4_0", "f16", False),
]


@pytest.mark.parametrize(("type_k", "type_v", "flash_attn"), KV)
def test_the_embedded_model_passes(type_k: str, type_v: str, flash_attn: bool) -> None:
    result = verify(DEFAULT, type_k=type_k, type_v=type_v, flash_attn=flash_attn, **QUICK)
    assert result.passed and result.verdict.startswith("pass"), result.verdict
    kept = [int(sum(layer)) for layer in read_profile(DEFAULT).retrieval]
    groups = [
        (il, group, n)
        for il, n_kept in enumerate(kept)
        for group, n in (("retrieval", n_kept), ("local", 4 - n_kept))
        if n
    ]
    assert [(g.il, g.group, g.kv_heads) for g in result.groups] == groups
    assert (result.n_tokens, result.n_rows, result.n_folded) == (450, 450, 448 - 256 - 4)
    assert result.buffers == ("CPU",)
    # in step with the full cache, whose kernels are the same
    for group in result.groups:
        assert 0 < group.errors.worst_rms <= 1.5 * group.full.worst_rms
        assert 0 < group.errors.rms <= group.errors.worst_rms <= group.errors.largest
    assert 0 < result.kl.mean < 0.2 and result.kl.mean <= result.kl.largest
    assert result.kl.same_top > 0.75


@st.composite
def contexts(draw) -> tuple[TinySpec, list[list[int]], dict, dict]:
    """A model, its mask, the metadata of a profile, and how to run it."""
    arch = draw(st.sampled_from(["llama", "qwen2", "qwen3", "gpt2"]))
    n_kv = draw(st.sampled_from([1, 2, 3]))
    group = 1 if arch == "gpt2" else draw(st.sampled_from([1, 2]))
    head_dim = draw(st.sampled_from([32, 64, 128]))
    spec = TinySpec(arch, 2, n_kv * group, n_kv, head_dim, n_ctx_train=4096, seed=600)
    mask = draw(
        st.lists(
            st.lists(st.integers(0, 1), min_size=n_kv, max_size=n_kv), min_size=2, max_size=2
        ).filter(lambda rows: not all(map(all, rows)))
    )
    window = draw(st.sampled_from([1, 64, 100, 513, 1030]))  # blocks of 64, 128 and 256
    profile = razor_kv(
        mask,
        sink_tokens=draw(st.sampled_from([0, 4, 65])),
        window_min=window,
        window_divisor=0,
        compensation=draw(st.booleans()),
    )
    flash_attn = draw(st.booleans())
    types = list(KV_TYPES)
    options = {
        "type_k": draw(st.sampled_from(types)),
        "type_v": draw(st.sampled_from(types if flash_attn else ["f32", "f16", "bf16"])),
        "type_k_local": draw(st.sampled_from([None, *types])),
        "type_v_local": draw(st.sampled_from([None, *(types if flash_attn else ["f32", "f16"])])),
        "flash_attn": flash_attn,
        "n_ubatch": draw(st.sampled_from([7, 64, 100, 512])),
        "n_ctx": 2048,
        "n_tokens": 256 * -(-(window + 65) // 256) + draw(st.integers(1, 300)),
        "rows": draw(st.sampled_from([0, 100, 300])),
        "seed": draw(st.integers(0, 9)),
    }
    return spec, mask, profile, options


@settings(derandomize=True, deadline=None, max_examples=15)
@given(contexts())
def test_any_context_passes(tiny, drawn) -> None:
    """Shapes, groupings, masks, windows, blocks, KV types, ubatch sizes, with and without flash
    attention."""
    spec, mask, profile, options = drawn
    result = verify(tiny(spec, profile), n_threads=1, **options)
    assert result.passed, result.verdict
    assert result.n_folded > 0
    kinds = [[g.group for g in result.groups if g.il == il] for il in range(2)]
    assert kinds == [["retrieval"] * any(row) + ["local"] * (not all(row)) for row in mask]


def test_layers_with_other_numbers_of_heads_pass(tiny) -> None:
    spec = TinySpec("deci", 3, 4, (2, 0, 1), 32, seed=601)
    path = tiny(spec, razor_kv(((1, 0), (), (0,)), window_min=100, window_divisor=0))
    result = verify(path, n_threads=1)
    assert result.passed, result.verdict
    assert [g.il for g in result.groups] == [0, 0, 2]


# -- broken data


@pytest.fixture(scope="module")
def seen() -> tuple[module.Capture, list[tuple]]:
    """One run of the embedded model: its capture, and the arguments of every compare_layer()."""
    kept, captures = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module, "compare_layer", lambda *args: kept.append(args) or compare_layer(*args)
        )
        misplaced = module.Capture.misplaced
        patch.setattr(
            module.Capture, "misplaced", lambda *args: captures.append(args[0]) or misplaced(*args)
        )
        assert verify(MIXED, **QUICK).passed
    assert len(kept) == SHAPE.n_layer
    return captures[0], kept


def compare(kept: list[tuple]) -> list[GroupResult]:
    return [group for args in kept for group in compare_layer(*args)]


def test_comparing_again_gives_the_same(seen) -> None:
    assert all(group.passed for group in compare(seen[1]))


def test_a_fold_without_log_n_fails(seen, monkeypatch) -> None:
    fold = reference.fold

    def without(*args):
        k, v, log = fold(*args)
        return k, v, np.zeros_like(log)

    monkeypatch.setattr(reference, "fold", without)
    failed = {(g.il, g.group) for g in compare(seen[1]) if not g.passed}
    # not all: some heads hardly look at what was folded
    assert {group for _, group in failed} == {"local"} and len(failed) > SHAPE.n_layer / 2


@pytest.mark.parametrize("what", ["rows of a fold", "the last fold of v"])
def test_a_dropped_fold_fails(what: str, seen, monkeypatch) -> None:
    fold = reference.fold

    def without(k, v, frontiers, sink_tokens):
        assert len(frontiers) == 3
        if what == "rows of a fold":
            lost = slice(frontiers[0], frontiers[1])
            k, v = k.copy(), v.copy()
            k[lost] = v[lost] = 0
        k_mean, v_mean, log = fold(k, v, frontiers, sink_tokens)
        if what == "the last fold of v":
            v_mean[-1] = v_mean[-2]
        return k_mean, v_mean, log

    monkeypatch.setattr(reference, "fold", without)
    failed = {(g.il, g.group) for g in compare(seen[1]) if not g.passed}
    assert {group for _, group in failed} == {"local"}


def flipped(il: int, head: int):
    profile = read_profile(MIXED)
    layers = [layer.copy() for layer in profile.retrieval]
    layers[il][head] ^= 1
    return replace(profile, retrieval=tuple(layers))


def windows(profile, n_ctx: int = 2048) -> list[tuple[int, ...]]:
    return head_windows(profile, n_ctx)[0]


@pytest.mark.parametrize("head", range(4))
@pytest.mark.parametrize("il", range(SHAPE.n_layer))
def test_any_flipped_head_is_found_where_keys_are_stored(il: int, head: int, seen) -> None:
    """Also the heads of layer 0, whose output is the same either way: they look at the last tokens
    alone."""
    (sentence,) = seen[0].misplaced(windows(flipped(il, head)))
    assert sentence.startswith(f"layer {il} keeps the whole context for the KV heads")
    assert seen[0].misplaced(windows(read_profile(MIXED))) == ()


@pytest.mark.parametrize(("il", "head"), [(1, 0), (1, 3), (2, 1), (3, 2)])
def test_a_flipped_head_fails_by_its_output_too(il: int, head: int, seen) -> None:
    _, razor, full, _, plan = seen[1][il]
    failed = [
        g
        for g in compare_layer(il, razor, full, windows(flipped(il, head))[il], plan)
        if not g.passed
    ]
    assert {g.errors.worst_head * 4 // razor.q.shape[1] for g in failed} == {head}


def test_heads_stored_in_another_order_are_found(seen) -> None:
    capture, profile = seen[0], read_profile(MIXED)
    place = (1, 0)
    right = capture.stored[place]
    assert right.shape == (3, 4) and (right == np.eye(4, dtype=bool)[:3]).all()
    capture.stored[place] = right[[1, 0, 2]]
    try:
        (sentence,) = capture.misplaced(windows(profile))
    finally:
        capture.stored[place] = right
    assert "for the KV heads 1, 0, 2 and a window for 3, but the profile says" in sentence
    assert sentence.endswith("the profile says 0, 1, 2 and 3")


def test_a_file_with_another_mask_than_the_reference_fails(monkeypatch) -> None:
    """The library reads the file, the reference is given another profile."""
    other = flipped(2, 1)
    monkeypatch.setattr(ModelFile, "profile", property(lambda _: other))
    result = verify(MIXED, **QUICK)
    assert not result.passed
    assert result.verdict == (
        "FAIL: layer 2 keeps the whole context for the KV heads none and a window for 0, 1, 2, 3,"
        " but the profile says 1 and 0, 2, 3"
    )
    assert [(g.il, g.group) for g in result.groups if not g.passed] == [(2, "retrieval")]
    done = CliRunner().invoke(main, ["verify", str(MIXED), *COMMAND])
    assert done.exit_code == 1
    assert done.stderr == f"Error: {result.verdict.removeprefix('FAIL: ')}\n"
    assert done.stdout.count("FAIL") == 1


SCOPES = [[0, 64, 256, 120], [64, 64, 0, 300], [128] * 4] * (SHAPE.n_layer // 3)


def scoped_model(folder: Path, scopes: list[list[int]]) -> Path:
    profile = replace(
        read_profile(DEFAULT),
        retrieval=tuple(np.array([x == 0 for x in row], np.uint8) for row in scopes),
        scope=tuple(np.array(row, np.uint32) for row in scopes),
    )
    return write_copy(DEFAULT, folder / "scoped.gguf", profile)


@pytest.mark.parametrize(
    "kv", [("f32", "f32", False), ("f16", "f16", True), ("q8_0", "q8_0", True)]
)
def test_several_windows_pass(kv: tuple[str, str, bool], tmp_path: Path) -> None:
    type_k, type_v, flash_attn = kv
    path = scoped_model(tmp_path, SCOPES)
    result = verify(path, **QUICK, type_k=type_k, type_v=type_v, flash_attn=flash_attn)
    assert result.passed, result.verdict
    assert [g.group for g in result.groups if g.il < 2] == [
        "retrieval", "local (256)", "local (128)", "local (64)",
        "retrieval", "local (320)", "local (64)",
    ]  # fmt: skip
    assert result.n_folded == 448 - 64 - 4
    if kv[0] == "f32":
        assert max(g.errors.largest for g in result.groups) <= 1e-4


LOCAL = [
    (("f16", "f16"), ("q8_0", "q8_0"), True),
    (("q8_0", "q8_0"), ("q4_0", "q4_0"), True),
    (("f32", "f32"), ("q8_0", "f16"), False),
]


@pytest.mark.parametrize("scoped", [False, True], ids=["window", "scopes"])
@pytest.mark.parametrize(("types", "local", "flash_attn"), LOCAL)
def test_other_types_of_local_heads_pass(
    types: tuple[str, str],
    local: tuple[str, str],
    flash_attn: bool,
    scoped: bool,
    tmp_path: Path,
    monkeypatch,
) -> None:
    """Verification fails if the library runs other types than the reference."""
    scopes = [[0, 64, 256, 64], *SCOPES[1:3]] * (SHAPE.n_layer // 3)
    path = scoped_model(tmp_path, scopes) if scoped else MIXED
    options = QUICK | {"type_k": types[0], "type_v": types[1], "flash_attn": flash_attn}
    options |= {"type_k_local": local[0], "type_v_local": local[1]}
    result = verify(path, **options)
    assert result.passed, result.verdict
    assert f"{local[0]}/{local[1]} of local heads" in result.verdict
    make_params = module.native.make_params
    other = "q4_0" if local[0] == "q8_0" else "q8_0"
    monkeypatch.setattr(
        module.native,
        "make_params",
        lambda profile, **names: make_params(
            profile, type_k_local=other, type_v_local=names.get("type_v_local")
        ),
    )
    result = verify(path, **options)
    failed = {group.group.split()[0] for group in result.groups if not group.passed}
    assert failed == {"local"}


def test_windows_of_other_heads_fail(tmp_path: Path, monkeypatch) -> None:
    """The library reads the file, and the reference gets two heads with exchanged windows."""
    path = scoped_model(tmp_path, SCOPES)
    profile = read_profile(path)
    swapped = [layer.copy() for layer in profile.scope]
    swapped[1][[1, 3]] = swapped[1][[3, 1]]
    other = replace(profile, scope=tuple(swapped))
    monkeypatch.setattr(ModelFile, "profile", property(lambda _: other))
    result = verify(path, **QUICK)
    assert result.verdict == (
        "FAIL: layer 1 keeps the whole context for the KV heads 2 and a window of 320 for 3 and a"
        " window of 64 for 0, 1, but the profile says 2 and 1 and 0, 3"
    )
    failed = {(g.il, g.group) for g in result.groups if not g.passed}
    assert failed == {(1, "local (320)"), (1, "local (64)")}


def test_what_is_not_a_number_fails(seen) -> None:
    il, razor, full, retrieval, plan = seen[1][2]
    for value in (np.nan, np.inf):
        out = razor.out.copy()
        out[-1, 3, 0] = value
        (group,) = compare_layer(il, replace(razor, out=out), full, retrieval, plan)
        assert not group.passed and group.errors.worst_head == 3


def test_one_wrong_number_fails(seen) -> None:
    il, razor, full, retrieval, plan = seen[1][3]
    out = razor.out.copy()
    out[200, 5, 7] += 0.5 * np.sqrt((out[:, 5] ** 2).mean())
    (group,) = compare_layer(il, replace(razor, out=out), full, retrieval, plan)
    assert not group.passed and group.errors.largest > group.limit_largest
    verdict = replace(verify(MIXED, **QUICK), groups=(group,)).verdict
    assert f"largest error {group.errors.largest:.1e} of the output where 5.0e-02 is" in verdict


def test_the_bound_does_not_hide_behind_the_full_cache(seen) -> None:
    """A full cache that is wrong itself is no excuse for numbers that are no numbers."""
    il, razor, full, retrieval, plan = seen[1][3]
    nothing = replace(full, out=np.full_like(full.out, np.nan))
    (group,) = compare_layer(il, razor, nothing, retrieval, plan)
    assert group.passed and group.limit_rms == compare_module.BOUNDS["f16"][0]


def test_heads_that_give_nothing_have_no_error() -> None:
    zero = np.zeros((5, 2, 4))
    assert compare_module._errors(zero, zero, np.arange(2)) == Errors(0, 0, 0, 0)
    one = zero.copy()
    one[0, 1, 0] = 1e-9
    assert compare_module._errors(one, zero, np.arange(2)).worst_rms == np.inf


# -- what is sampled and how logits are compared


@given(st.integers(1, 5000), st.integers(0, 600), st.integers(0, 9))
def test_rows_are_spread_over_the_text(n: int, rows: int, seed: int) -> None:
    positions = sample_positions(n, rows, seed)
    assert (np.diff(positions) > 0).all() and 0 <= positions[0] and positions[-1] == n - 1
    assert len(positions) == (min(n, rows) if rows else n)
    if rows > 64 and n > rows:
        assert (positions[-64:] == np.arange(n - 64, n)).all()
        assert np.diff(positions).max() <= 2 * (n / (rows - 64) + 1)


def test_rows_decide_nothing_but_what_is_compared() -> None:
    results = [verify(MIXED, rows=rows, **QUICK) for rows in (0, 100)]
    assert [r.n_rows for r in results] == [450, 100]
    assert all(r.passed for r in results)


@given(st.integers(0, 99))
def test_kl_divergence_by_its_definition(seed: int) -> None:
    full, razor = np.random.default_rng(seed).normal(0, 4, (2, 40, 30)).astype(np.float32)
    p, q = (np.exp(x.astype(float)) for x in (full, razor))
    p, q = (x / x.sum(axis=1, keepdims=True) for x in (p, q))
    np.testing.assert_allclose(kl_divergence(full, razor), (p * np.log(p / q)).sum(axis=1))
    np.testing.assert_allclose(kl_divergence(full, full + 3), 0, atol=1e-6)


# -- files, options and refusals


def test_text_and_sidecar(tmp_path, tiny) -> None:
    spec = TinySpec("llama", 2, 4, 2, 32, seed=602)
    mask = ((0, 1), (0, 0))
    path = tiny(spec)
    with_profile = tiny(spec, razor_kv(mask, window_min=100, window_divisor=0))
    sidecar = tmp_path / "sidecar.gguf"
    write_sidecar(path, sidecar, read_profile(with_profile))
    with pytest.raises(ProfileError, match="has no razor profile"):
        verify(path, n_threads=1)
    result = verify(path, sidecar=sidecar, n_threads=1)
    assert result.passed, result.verdict
    assert [g.errors for g in result.groups] == [
        g.errors for g in verify(with_profile, n_threads=1).groups
    ]
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        verify(with_profile, text="x", n_threads=1)

    text = "The code of Marlow is 48213. " * 60
    result = verify(MIXED, text=text, n_ctx=2048, n_threads=1, rows=100)
    assert result.passed and result.n_tokens > 450
    assert result.n_text == result.n_tokens
    result = verify(MIXED, text=text, **QUICK)
    assert (result.n_tokens, result.n_text) == (450, result.to_dict()["n_text"])
    assert result.n_text > 450


def test_what_is_left_out_of_a_text_is_told(tmp_path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("The code of Marlow is 48213. " * 60)
    args = ["verify", str(MIXED), *COMMAND, "--rows", "64", "--text", str(path)]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0, done.output
    found = re.search(r"^The last ([0-9,]+) tokens of the text were left out\.$", done.stderr, re.M)
    whole = verify(MIXED, text=path.read_text(), n_ctx=2048, n_threads=1, rows=64).n_tokens
    assert int(found[1].replace(",", "")) == whole - 450


def test_more_tokens_than_the_context_holds_are_refused_at_once() -> None:
    args = ["verify", str(MIXED), "-t", "1", "-c", "2048", "-n", "100000000000"]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 1
    assert "100,000,000,000 tokens do not fit into a context of 2,048" in done.stderr


def test_the_command(tmp_path) -> None:
    args = ["verify", str(MIXED), *COMMAND, "-ub", "64", "--rows", "200"]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == "layer heads KV rms worst limit full max limit".split()
    n_groups = SHAPE.n_layer + 1
    assert [line.split()[-1] for line in lines[1 : n_groups + 1]] == ["pass"] * n_groups
    assert lines[-1].startswith(
        f"pass: all {n_groups} groups of heads agree with the reference (450 tokens"
    )

    done = CliRunner().invoke(main, [*args, "--json", "-ctk", "q8_0", "-ctv", "q8_0"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["passed"] is True and result["n_rows"] == 200
    assert result["plan"]["window"] == 256 and result["plan"]["type_k"] == "q8_0"
    assert len(result["groups"]) == n_groups and result["groups"][1]["errors"]["worst_head"] < 6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"n_ctx": 512}, "razor would not be active in a context of 512 tokens"),
        ({"n_tokens": 320}, "the first fold (window 256, block 64) needs 321 tokens, found 320"),
        ({"n_tokens": 2049}, "2,049 tokens do not fit into a context of 2,048"),
        ({"text": "too short"}, "needs 321 tokens"),
        ({"text": "short", "n_tokens": 400}, "tokens, expected at least 400"),
        ({"type_v": "q8_0", "flash_attn": False}, "a quantized V cache (q8_0) needs flash"),
        ({"n_batch": 8, "n_ubatch": 16}, "the batch has 8 tokens and the ubatch 16"),
    ],
)
def test_what_cannot_be_verified_is_refused(options: dict, sentence: str) -> None:
    with pytest.raises(RazorError) as error:
        verify(MIXED, **{"n_threads": 1, "n_ctx": 2048} | options)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_razor_that_is_switched_off_is_no_pass(monkeypatch) -> None:
    monkeypatch.setenv(native.DISABLE_ENV, "1")
    with pytest.raises(RazorError, match="runs a full cache instead of razor"):
        verify(MIXED, **QUICK)


@pytest.mark.parametrize("label", ["loading the model", "running", "checking"])
def test_stop_ends_it(label: str) -> None:
    reached = False

    def progress(done: float, total: float, what: str) -> None:
        nonlocal reached
        reached = reached or what == label

    with pytest.raises(Stopped):
        verify(MIXED, progress=progress, stop=lambda: reached, **QUICK)
    assert verify(MIXED, **QUICK).passed


def test_errors_in_progress_are_raised() -> None:
    def progress(done: float, total: float, label: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(MIXED, progress=progress, **QUICK)


def test_a_layer_that_is_not_seen_is_no_pass(monkeypatch) -> None:
    finish = module.Capture._finish

    def without(capture, il: int, pointer: int) -> None:
        finish(capture, il, pointer)
        capture.layers.pop(2, None)

    monkeypatch.setattr(module.Capture, "_finish", without)
    with pytest.raises(UnsupportedError, match="layer 2 of this model .* shows its"):
        verify(MIXED, **QUICK)


def test_errors_in_callbacks_are_raised(monkeypatch) -> None:
    def fail(*_args):
        raise UnsupportedError("seen in a callback")

    monkeypatch.setattr(module.Capture, "_finish", fail)
    with pytest.raises(UnsupportedError, match="seen in a callback"):
        verify(MIXED, **QUICK)


# -- slow


@pytest.fixture(scope="module")
def model_1b(tmp_path_factory) -> Path:
    """Random weights in the shape of Llama 3.2 1B, in Q4_0, 20 % of the KV heads retrieval heads.

    Every weight is random (those of models for timing repeat), with mean 0 and the usual variance,
    so that attention means something in every layer.
    """
    spec = TinySpec(
        "llama", 16, 32, 8, 64, 2048, 8192, 32000, 131072, tied=True, rope_base=500000.0
    )
    rng = np.random.default_rng(0)

    def matrix(n_out: int, n_in: int, std: float) -> np.ndarray:
        blocks = np.frombuffer(rng.bytes(n_out * n_in // 32 * 18), np.uint8).copy()
        blocks = blocks.reshape(n_out, n_in // 32, 18)
        # 4 bits are -8 to 7, with a mean of -1/2: scales of both signs take it out
        scale = rng.choice([-1, 1], blocks.shape[:2]) * std / 4.6
        blocks[:, :, :2] = scale.astype(np.float16)[:, :, None].view(np.uint8)
        return blocks.reshape(n_out, -1)

    def tensors():
        d, ff, n_kv = spec.n_embd, spec.n_ff, spec.kv_heads[0] * spec.head_dim
        q4_0 = GGMLQuantizationType.Q4_0
        yield "token_embd.weight", matrix(spec.n_vocab, d, 0.1), q4_0  # less than the layers add
        for il in range(spec.n_layer):
            for name, n_out, n_in, gain in (
                ("attn_q", d, d, 1.0),
                ("attn_k", n_kv, d, 1.0),
                ("attn_v", n_kv, d, 1.0),
                ("attn_output", d, d, 2.0),
                ("ffn_gate", ff, d, 1.0),
                ("ffn_up", ff, d, 1.0),
                ("ffn_down", d, ff, 1.0),
            ):
                yield f"blk.{il}.{name}.weight", matrix(n_out, n_in, gain / n_in**0.5), q4_0
            for name in ("attn_norm", "ffn_norm"):
                yield f"blk.{il}.{name}.weight", np.ones(d, np.float32), None
        yield "output_norm.weight", np.full(d, 30 / d**0.5, np.float32), None

    mask = (rng.random((16, 8)) < 0.2).astype(int).tolist()
    profile = razor_kv(mask, window_min=256, window_divisor=0)
    path = tmp_path_factory.mktemp("1b") / "model.gguf"
    return write_gguf(path, "llama", model_kv(spec) | profile, tensors())


@pytest.mark.slow
@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
def test_a_model_of_1b_shape_passes(kv_type: str, model_1b) -> None:
    result = verify(model_1b, n_ctx=2048, type_k=kv_type, type_v=kv_type)
    print(result.verdict)
    for g in result.groups:
        print(g.il, g.group, f"{g.errors.worst_rms:.1e}", f"{g.full.worst_rms:.1e}")
    assert result.passed, result.verdict
    assert len({g.il for g in result.groups}) == 16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["head-flipped", "mask-without-log-n", "fold-dropped"])
def test_broken_builds_fail(name: str, broken_tree, model_1b) -> None:
    """Three libraries, each broken in one place, on the embedded model and one of 1B shape."""
    (broken,) = [b for b in broken_builds.BREAKS if b.name == name]
    broken_builds.copy_sources(broken_tree, [(broken.file, broken.old, broken.new)])
    lib = broken_builds.build(broken_tree)
    env = os.environ | {native.LIB_ENV: str(lib), "LLAMA_CPP_LIB_PATH": str(lib)}
    command = "from razor_local.cli import main; main(prog_name='razor-local')"
    runs = [(DEFAULT, kv_type, []) for kv_type in ("f16", "q8_0", "q4_0")]
    runs.append((model_1b, "q4_0", ["-c", "2048", "-n", "400"]))  # the type with the widest bounds
    for model, kv_type, options in runs:
        done = subprocess.run(
            [sys.executable, "-c", command, "verify", str(model), *options,
             "-ctk", kv_type, "-ctv", kv_type],
            env=env, capture_output=True, text=True,
        )  # fmt: skip
        print(name, model.name, kv_type, done.stderr.strip())
        assert done.returncode == 1, done.stdout
        assert done.stderr.count("\n") == 1
        expected = "keeps the whole context" if name == "head-flipped" else "local heads"
        assert expected in done.stderr
