"""Profiles of RoPE models in which each KV head has a scope: files, scores, convert, inspect."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from razor_local.converters.heads import profile_from_scopes
from razor_local.converters.write import write_copy

from razor_local.errors import ProfileError
from razor_local.model_file import read_model_shape, read_profile
from razor_local.model_setup import ModelSetup
from razor_local.model_shape import ModelShape
from razor_local.plan import make_plan
from razor_local.profile import Profile, scopes_text
from razor_local.scores import (
    Scores,
    head_strength,
    profile_from_scores,
    profile_scores,
    save_scores,
    with_budget,
    with_scopes_by_score,
)
from tests.support.cli import run
from tests.support.gguf_bytes import small_model

TABLE = "0\t100\n1500 20\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(small_model())
    return path


def table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "scopes.tsv"
    path.write_text(text)
    return path


# -- files


def test_a_file_of_scopes_becomes_a_profile_and_back(model: Path, tmp_path: Path) -> None:
    shape = read_model_shape(model)
    profile = profile_from_scopes(table(tmp_path, TABLE), shape, sink_tokens=9)
    assert [layer.tolist() for layer in profile.retrieval] == [[1, 0], [0, 0]]
    assert profile.version == 2 and profile.calibration["source"] == "scopes scopes.tsv"
    read = read_profile(write_copy(model, tmp_path / "out.gguf", profile))
    assert read is not None and (read.version, read.method, read.sink_tokens) == (2, "rope", 9)
    assert [layer.tolist() for layer in read.scope] == [[0, 100], [1500, 20]]
    plan = make_plan(shape, read, 4096)
    assert [layer.windows for layer in plan.layers] == [(0, 128), (1536, 128)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty, expected a row of numbers per layer"),
        ("0 1\n", "lists 1 layers x 2 KV heads, the model has 2 layers x 2 KV heads"),
        ("0 1\n\n3 4\n", "row 2 is empty, expected a number per KV head"),
        ("0 1 2\n3 4 5\n", "lists 2 layers x 3 KV heads, the model has 2 layers x 2 KV heads"),
        (
            "0 -1\n3 4\n",
            "row 1, column 2 is '-1', expected a number of tokens from 0 to 1073741824",
        ),
        ("0 1\n3 4.5\n", "row 2, column 2 is '4.5', expected a number of tokens"),
        ("0 1\n3 1073741825\n", "row 2, column 2 is '1073741825', expected a number of tokens"),
        ("0 1\n3 99999999999999999999\n", "row 2, column 2 is '9999"),
        ("0 1\n3 x\x1b[2J\n", "row 2, column 2 is 'x\\x1b[2J', expected a number of tokens"),
        ("0 1\n" * 600, "has more than 512 rows"),
    ],
)
def test_bad_files_of_scopes_are_one_sentence(text: str, says: str, model, tmp_path) -> None:
    path = table(tmp_path, text)
    with pytest.raises(ProfileError) as error:
        profile_from_scopes(path, read_model_shape(model))
    assert says in str(error.value) and str(path) in str(error.value)
    code, stdout, stderr = run("convert", model, "-o", tmp_path / "o.gguf", "--scopes", path)
    assert code == 1 and says in stderr and stderr.count("\n") == 1


def test_options_of_a_run_replace_scopes(model: Path, tmp_path: Path) -> None:
    profile = profile_from_scopes(table(tmp_path, TABLE), read_model_shape(model))
    out = write_copy(model, tmp_path / "out.gguf", profile)
    assert ModelSetup(str(out)).read()[1].scope is not None
    for changes in ({"window_min": 70}, {"window_divisor": 3}):
        assert ModelSetup(str(out), **changes).read()[1].scope is None
    assert ModelSetup(str(out), sink_tokens=1).read()[1].scope is not None
    with pytest.raises(ProfileError, match="holds a scope for each head"):
        with_budget(profile, read_model_shape(model), 0.5)


def test_scopes_in_words() -> None:
    texts = {1: "scopes of 1 token", 2: "scopes of 2 tokens"}
    for scope, text in texts.items():
        profile = Profile((np.array([1, 0], np.uint8),), scope=(np.array([0, scope]),))
        assert scopes_text(profile) == text


def test_scopes_belong_to_local_heads() -> None:
    mask = (np.array([1, 0], np.uint8),)
    for scope in ((0, 0), (5, 5), (5, 0)):
        with pytest.raises(ProfileError, match="is 0 .the whole context. for other KV heads"):
            Profile(mask, scope=(np.array(scope),))
    assert Profile(mask).version == 1 and Profile(mask, scope=(np.array([0, 5]),)).version == 2


# -- by score


def by_score(
    n_layer: int, n_kv: int, seed: int, n_ctx: int, budget: float = 0.2
) -> tuple[ModelShape, Profile, Profile]:
    """Return a shape, its profile with one window, and its profile with scopes by score."""
    rng = np.random.default_rng(seed)
    heads = (n_kv,) * n_layer
    shape = ModelShape("llama", n_layer, heads, heads, 64, 64, n_ctx)
    echo, induction = (rng.random((2, n_layer * n_kv), np.float32)) ** 8
    record = {"model_fingerprint": shape.fingerprint, "tokens": 2500}
    scores = Scores(echo, induction, heads, heads, record)
    profile = profile_from_scores(scores, budget=budget, window_min=300, window_divisor=5)
    return shape, profile, with_scopes_by_score(profile, shape, n_ctx)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(2, 8),
    st.integers(0, 99),
    st.sampled_from([1024, 4096, 32768, 131072]),
)
def test_windows_grow_with_the_score_at_no_more_bytes(n_layer, n_kv, seed, n_ctx) -> None:
    shape, profile, scoped = by_score(n_layer, n_kv, seed, n_ctx)
    window = max(300, n_ctx // 5)
    plans = [make_plan(shape, p, n_ctx) for p in (profile, scoped)]
    assert plans[1].kv_bytes <= plans[0].kv_bytes
    # the remaining bytes are too few for a larger factor
    assert plans[1].kv_bytes >= 0.8 * plans[0].kv_bytes
    local = profile.flat() == 0
    scope = np.concatenate(scoped.scope)
    strength = head_strength(profile_scores(profile, shape))
    order = np.argsort(strength[local], kind="stable")
    assert (np.diff(scope[local][order].astype(np.int64)) >= 0).all()
    assert (scope[local] >= window // 2).all() and not scope[~local].any()
    assert scoped.calibration["scopes"] == "score"
    assert scoped.calibration["scopes_tokens"] == n_ctx


def test_a_context_that_saves_nothing_has_no_windows_to_share() -> None:
    shape, profile, _ = by_score(2, 4, 0, 1024)
    with pytest.raises(
        ProfileError,
        match="up to 512 tokens of context, so there are no .* n_ctx, or fewer retrieval heads$",
    ):
        with_scopes_by_score(profile, shape, 256)
    with pytest.raises(ProfileError, match="has no head scores"):
        with_scopes_by_score(replace(profile, echo_score=None), shape, 1024)


def test_heads_without_any_score_get_the_same_window() -> None:
    heads = (4,) * 2
    shape = ModelShape("llama", 2, heads, heads, 64, 64, 4096)
    zero = np.zeros(8, np.float32)
    scores = Scores(zero, zero, heads, heads, {"model_fingerprint": "x"})
    profile = profile_from_scores(scores, budget=0.25, window_min=600)
    scope = np.concatenate(with_scopes_by_score(profile, shape, 4096).scope)
    assert len(np.unique(scope[scope > 0])) == 1 and scope.max() >= 600


# -- commands


def test_convert_and_inspect_scopes(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    code, stdout, stderr = run("convert", model, "-o", out, "--scopes", table(tmp_path, TABLE))
    assert code == 0, stderr
    assert stdout.startswith(
        f"{out}: 1 of 4 KV heads are retrieval heads (25.0%), the others have scopes of 20 to 1,500"
        " tokens\n"
    )
    shown = run("inspect", out, "-c", 4096)[1]
    assert "4 sinks, scopes of 20 to 1,500 tokens, compensation on" in shown
    assert "1 KV heads keep 4,096 tokens; 1 keep 4 sinks and the last 1,536 (1,792 cells" in shown
    assert " 2 keep 4 sinks and the last 128 (512 cells each, folded in blocks of 128)" in shown
    assert "100" in run("inspect", out, "--heads")[1]
    found = json.loads(run("inspect", out, "-c", 4096, "--json")[1])
    assert [group["window"] for group in found["groups"]] == [1536, 128]


@pytest.mark.usefixtures("built_library")
def test_convert_scopes_by_score(model: Path, tmp_path: Path) -> None:
    shape = read_model_shape(model)
    record = {"model_fingerprint": shape.fingerprint, "tokens": 2500}
    values = np.linspace(0, 0.5, 8, dtype=np.float32)
    save_scores(Scores(values, values, shape.n_head, shape.n_head_kv, record), tmp_path / "s.json")
    out = tmp_path / "out.gguf"
    code, stdout, stderr = run(
        "convert", model, "-o", out, "--scores", tmp_path / "s.json", "--no-proof",
        "--budget", 0.25, "--scope-by", "score", "--window-min", 400, "-c", 4096,
    )  # fmt: skip
    assert code == 0, stderr
    profile = read_profile(out)
    assert profile is not None and profile.scope is not None
    assert scopes_text(profile) in stdout
    assert profile.calibration["scopes_tokens"] == 4096


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--scopes", "t", "--heads", "h"], "--scopes and --heads exclude each other"),
        (["--scopes", "t", "--budget", "0.2"], "--scopes and --budget exclude each other"),
        (["--scopes", "t", "--window-min", "100"], "--scopes and --window-min exclude each other"),
        (["--scopes", "t", "--scope-by", "score"], "--scopes and --scope-by exclude each other"),
        (["--scopes", "t", "--no-proof"], "--scopes and --no-proof exclude each other"),
        (["--scope-by", "score", "--heads", "h"], "--scope-by and --heads exclude each other"),
        (["-c", "4096"], "--ctx-size needs --scope-by"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, says, model, tmp_path) -> None:
    code, stdout, stderr = run("convert", model, "-o", tmp_path / "o.gguf", *options)
    assert code == 2 and says in stderr
