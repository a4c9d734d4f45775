"""The arithmetic of evals: confidence intervals against known values, scoring, policies' plans."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from razor_local.converters.write import write_copy

from razor_local.cli.params import DEFAULT_MODEL
from razor_local.errors import ProfileError, RazorError, UnsupportedError
from razor_local.evals import needle, ruler
from razor_local.evals.intervals import block_bootstrap, paired_difference, score_interval, wilson
from razor_local.evals.perplexity import BLOCK, Text, Window, log_softmax, make_windows
from razor_local.evals.perplexity_report import position_buckets
from razor_local.evals.policies import DEFAULT, make_policies
from razor_local.evals.questions import Question, Sample
from razor_local.evals.run import open_llama
from razor_local.model_file import read_model_shape, read_profile
from razor_local.model_setup import ModelSetup
from tests.support.embedded_model import model_with_scores

SETUP = ModelSetup(str(DEFAULT_MODEL))

# -- intervals


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe, Statist. Med. 17 (1998) 857, table I, method 3
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_has_the_published_values(right, n, low, high) -> None:
    assert wilson(right / n, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    # Newcombe, Statist. Med. 17 (1998) 2635, table II, method 10: both, only a, only b, neither;
    # the last from Altman and others, Statistics with confidence (2000), table 6.2
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((20, 12, 2, 16), 0.0562, 0.3292),
        ((14, 5, 0, 22), 0.011, 0.226),
    ],
)
def test_paired_difference_has_the_published_values(table, low, high) -> None:
    both, only_a, only_b, neither = table
    a = [1] * both + [1] * only_a + [0] * only_b + [0] * neither
    b = [1] * both + [0] * only_a + [1] * only_b + [0] * neither
    difference, *bounds = paired_difference(a, b)
    assert difference == pytest.approx((only_a - only_b) / sum(table))
    assert bounds == pytest.approx((low, high), abs=6e-4)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1)), min_size=1))
@settings(max_examples=60, deadline=None)
def test_intervals_hold_what_they_are_about(pairs) -> None:
    a, b = ([pair[i] for pair in pairs] for i in (0, 1))
    for scores in (a, b):
        low, high = score_interval(scores)
        assert 0 <= low <= np.mean(scores) + 1e-9 and np.mean(scores) - 1e-9 <= high <= 1
    difference, low, high = paired_difference(a, b)
    assert low - 1e-9 <= difference <= high + 1e-9
    # turned around it is the same
    assert paired_difference(b, a) == pytest.approx((-difference, -high, -low), abs=1e-9)


def test_the_same_answers_do_not_prove_the_same_quality() -> None:
    difference, low, high = paired_difference([1.0] * 20, [1.0] * 20)
    assert difference == 0 and low < -0.1 and high > 0.1
    assert score_interval([0.5] * 20) == wilson(0.5, 20)  # a bootstrap would have no width


def test_bootstrap_covers_the_mean_of_blocks_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for seed in range(60):
        weights = rng.integers(50, 100, 80).astype(float)
        sums = weights[:, None] * rng.normal(3.0, 1.0, (80, 1))
        low, high = block_bootstrap(weights, sums, seed)
        inside += bool(low[0] <= 3.0 <= high[0])
    assert 50 <= inside <= 60  # of 57 expected
    again = block_bootstrap(weights, sums, seed)
    assert (again[0] == low).all() and (again[1] == high).all()


# -- scoring


def _sample(*questions: Question) -> Sample:
    return Sample("keys", 1024, 50.0, 0, "", questions, 64, 900)


@pytest.mark.parametrize(
    ("answer", "right"),
    [("The code is 48213.", 1), ("48213", 1), ("148213", 0), ("482130", 0), ("4 8 2 1 3", 0),
     ("", 0), ("It was 48214, no, 48213!", 1)],
)  # fmt: skip
def test_a_needle_is_found_when_its_number_is_named(answer, right) -> None:
    assert needle.score(_sample(Question("?", ("48213",))), [answer]) == right


def test_all_values_have_to_be_named_and_questions_count_each() -> None:
    values = _sample(Question("?", ("11111", "22222")))
    assert needle.score(values, ["11111 and 22222"]) == 1
    assert needle.score(values, ["11111"]) == 0
    three = _sample(*(Question("?", (str(n) * 5,)) for n in (1, 2, 3)))
    assert needle.score(three, ["11111", "11111", "33333"]) == pytest.approx(2 / 3)


def test_ruler_counts_the_share_of_strings_in_the_answer() -> None:
    sample = _sample(Question("?", ("ABCDE", "fghij", "12", "zz")))
    assert ruler.score(sample, ["abcde, FGHIJ and 512"]) == 0.75
    assert ruler.score(sample, [""]) == 0


# -- policies


def test_policies_keep_what_their_names_say() -> None:
    setup = replace(SETUP, window_min=100, window_divisor=0, sink_tokens=3)
    shape, policies = make_policies(setup)
    assert tuple(p.name for p in policies) == DEFAULT
    profile = read_profile(DEFAULT_MODEL)
    plans = {p.name: p.plan(shape, 2048) for p in policies}
    full = plans["full-f16"].kv_bytes
    for name, plan in plans.items():
        kind, _, kv_type = name.rpartition("-")
        assert (plan.type_k, plan.type_v) == (kv_type, kv_type)
        assert plan.active == (kind != "full")
        assert plan.kv_bytes < full or name == "full-f16"
        assert plan.compensation == (kind in ("razor", "local", "random-heads")), name
        kept = plan.kv_heads if kind == "full" else int(profile.flat().sum())
        assert plan.retrieval_kv_heads == {"local": 0, "streaming": 0}.get(kind, kept), name
        if plan.active:
            assert (plan.window, plan.sink_tokens) == (100, 3)
    by_name = {p.name: p for p in policies}
    assert (by_name["razor-q8_0"].profile.flat() == profile.flat()).all()
    assert plans["random-heads-f16"].kv_bytes == plans["razor-f16"].kv_bytes
    assert (by_name["random-heads-f16"].profile.flat() != profile.flat()).any()


@pytest.mark.parametrize(
    "name",
    [
        *DEFAULT, "exact", "razor-f16+q8_0", "local-q8_0+q4_0", "razor-q8_0@0.2:64",
        "full-q8_0/q4_0", "razor-q5_1/q4_0+q8_0/q5_0",
    ],
)  # fmt: skip
def test_the_cache_takes_the_bytes_of_the_plan(name) -> None:
    setup = replace(SETUP, window_min=100, window_divisor=0)
    shape, (policy,) = make_policies(setup, [name])
    llama = open_llama(setup, policy, 1024)
    try:
        memory = llama.memory()
        assert memory.kv_bytes == policy.plan(shape, 1024).kv_bytes
        assert memory.n_ctx == 1024
        assert memory.active == (not name.startswith(("exact", "full")))
        assert memory.own_attention == (not name.startswith("full"))
    finally:
        llama.close()


def test_a_window_follows_the_name_of_a_policy() -> None:
    setup = replace(SETUP, window_min=100, window_divisor=5)
    names = ["razor", "razor:64", "local-q8_0+q4_0:32", "razor-q8_0@0.2:64", "random-heads=3:48"]
    shape, policies = make_policies(setup, names)
    assert [(p.name, p.series, p.plan(shape, 2048).window) for p in policies] == [
        ("razor-f16", "razor-f16", 409),
        ("razor-f16:64", "razor-f16:64", 64),
        ("local-q8_0+q4_0:32", "local-q8_0+q4_0:32", 32),
        ("razor-q8_0@0.2:64", "razor-q8_0:64", 64),
        ("random-heads=3-f16:48", "random-heads=3-f16:48", 48),
    ]
    for p in policies:
        assert make_policies(setup, [p.name])[1][0].name == p.name
    assert [p.budget for p in make_policies(setup, ["razor:64"], [0.1, 0.3])[1]] == [None, 0.1, 0.3]
    # a name stands for one policy
    assert [p.name for p in make_policies(setup, ["razor:64", "razor-f16+f16:64"])[1]] == [
        "razor-f16:64"
    ]
    close = ["razor@0.12499999", "razor@0.12500001"]
    assert [p.name for p in make_policies(setup, close)[1]] == [
        "razor-f16@0.12499999",
        "razor-f16@0.12500001",
    ]


def test_random_heads_are_drawn_by_the_seed() -> None:
    names = ["random-heads", "random-heads=5", "random-heads-q8_0"]
    draws = {
        seed: [p.profile.flat().tobytes() for p in make_policies(SETUP, names, seed=seed)[1]]
        for seed in (0, 5, 6)
    }
    for first, fixed, quantized in draws.values():
        assert first == quantized and fixed == draws[5][0]
        assert sum(first) == read_profile(DEFAULT_MODEL).flat().sum()
    assert draws[0][0] != draws[6][0]


def test_budgets_take_the_heads_with_the_best_scores(tmp_path) -> None:
    setup = ModelSetup(str(model_with_scores(tmp_path)))
    shape, policies = make_policies(setup, ["full", "razor-q8_0"], [0.01, 0.1, 0.5, 1.0])
    n = sum(shape.n_head_kv)
    assert [(p.name, p.budget) for p in policies] == [
        ("full-f16", None),
        ("razor-q8_0", None),
        ("razor-q8_0@0.01", 0.01),
        ("razor-q8_0@0.1", 0.1),
        ("razor-q8_0@0.5", 0.5),
        ("razor-q8_0@1", 1.0),
    ]
    counts = [int(p.profile.flat().sum()) for p in policies[1:]]
    assert counts == [counts[0], *(math.ceil(n * share) for share in (0.01, 0.1, 0.5, 1.0))]
    assert policies[2].profile.flat()[5] == 1  # the highest score
    assert not policies[-1].plan(shape, 2048).active
    # the same heads are not measured twice
    shares = (0.1 / n, 0.9 / n)
    assert len(make_policies(setup, [f"razor@{share:.6f}" for share in shares])[1]) == 1


def test_a_head_list_is_a_policy(tmp_path) -> None:
    heads = tmp_path / "a-b.tsv"
    shape = read_model_shape(DEFAULT_MODEL)
    rows = [[1] + [0] * (n - 1) for n in shape.n_head_kv]
    heads.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    _, policies = make_policies(SETUP, [f"heads={heads}", f"heads={heads}-q4_0"])
    assert [p.kv_type for p in policies] == ["f16", "q4_0"]
    assert [layer.tolist() for layer in policies[0].profile.retrieval] == rows


@pytest.mark.parametrize(
    ("names", "budgets", "error", "text"),
    [
        (["rasor"], [], RazorError, "'rasor' is not a policy, expected one of full"),
        (["razor-q9_0"], [], RazorError, "is not a policy"),
        (["razor-f16+q9_0"], [], RazorError, "is not a policy"),
        (
            ["full-f16+q8_0"],
            [],
            RazorError,
            "a KV type can follow",
        ),
        (["full:512"], [], RazorError, "and a window if there are local heads"),
        (["exact-f16:512"], [], RazorError, "'exact-f16:512' is not a policy"),
        (["full-q8_0/q4_0/q4_0"], [], RazorError, "is not a policy"),
        (["razor-q8_0/"], [], RazorError, "is not a policy"),
        (["razor:"], [], RazorError, "'razor:' is not a policy"),
        (["razor:0"], [], ProfileError, "the policy 'razor-f16:0': window is 0, expected 1 to"),
        (["razor:99999999999"], [], ProfileError, "window is 99999999999, expected 1 to"),
        (["razor:٦٤"], [], RazorError, "is not a policy"),
        (["razor@2"], [], RazorError, "is not a share from 0 to 1"),
        (["full"], [0.1], RazorError, "no policy to give budgets to"),
        (["heads=/nowhere.tsv"], [], OSError, "nowhere"),
        (["razor@0.3"], [], ProfileError, "no head scores|scores"),
    ],
)
def test_what_is_no_policy_is_told(names, budgets, error, text, tmp_path) -> None:
    profile = read_profile(DEFAULT_MODEL)
    setup = SETUP
    if names == ["razor@0.3"]:
        profile = replace(profile, echo_score=None, induction_score=None)
        setup = ModelSetup(str(write_copy(DEFAULT_MODEL, tmp_path / "unscored.gguf", profile)))
    with pytest.raises(error, match=text):
        make_policies(setup, names, budgets)


def test_models_without_a_profile_have_full_caches(tiny) -> None:
    from tests.support.tiny_models import TinySpec

    odd = ModelSetup(str(tiny(TinySpec("llama", 2, 2, 1, 40))))
    _, policies = make_policies(odd, ["full"])
    assert [p.name for p in policies] == ["full-f16"]
    with pytest.raises(RazorError, match="has no razor profile"):
        make_policies(odd, ["full", "razor"])
    with pytest.raises(UnsupportedError, match="multiple of 32"):
        make_policies(odd, ["full-q8_0"])


# -- perplexity


@given(st.integers(2 * BLOCK, 9000), st.integers(1, 8), st.integers(1, 16))
@settings(max_examples=80, deadline=None)
def test_tokens_of_a_prompt_do_not_count(n_tokens, n_256, n_128) -> None:
    n_ctx, stride = 256 * n_256, min(BLOCK * n_128, 256 * n_256)
    prompt = min(n_ctx, n_tokens) // 2
    plain = make_windows(n_tokens, n_ctx, stride)
    with_prompt = make_windows(n_tokens, n_ctx, stride, prompt=prompt)
    for one, other in zip(plain, with_prompt, strict=True):
        assert (one.start, one.end) == (other.start, other.end)
        assert other.first == max(one.first, prompt) < other.end - other.start


@given(st.integers(2 * BLOCK, 9000), st.integers(1, 8), st.integers(1, 16))
@settings(max_examples=80, deadline=None)
def test_each_token_counts_once(n_tokens, n_256, n_128) -> None:
    n_ctx, stride = 256 * n_256, min(BLOCK * n_128, 256 * n_256)
    windows = make_windows(n_tokens, n_ctx, stride)
    counted = [t for w in windows for t in range(w.start + w.first, w.end)]
    assert len(set(counted)) == len(counted)
    assert all(w.end - w.start == min(n_ctx, n_tokens) for w in windows)
    assert windows[-1].end > n_tokens - max(stride, 1) or n_tokens < n_ctx
    if stride < n_ctx:
        assert counted == list(range(1, windows[-1].end))


@given(st.lists(st.integers(2 * BLOCK, 3000), min_size=1, max_size=5), st.integers(1, 12))
@settings(max_examples=80, deadline=None)
def test_the_windows_of_several_files_take_turns(lengths, most) -> None:
    files = tuple((f"{i}.txt", n) for i, n in enumerate(lengths))
    text = Text(np.zeros(sum(lengths), np.int32), None, 1000, files)
    windows = text.windows(512, 512, None, 128)
    ends = np.cumsum(lengths)
    owners = [int(np.searchsorted(ends, w.start, "right")) for w in windows]
    for i, n in enumerate(lengths):
        begin = int(ends[i]) - n
        own = [Window(w.start - begin, w.end - begin, w.first)
               for w, owner in zip(windows, owners, strict=True) if owner == i]  # fmt: skip
        assert own == make_windows(n, 512, 512, None, 128)
    turns = [owners[:k].count(owner) for k, owner in enumerate(owners)]
    assert turns == sorted(turns)
    assert text.windows(512, 512, most, 128) == windows[:most]
    with pytest.raises(RazorError, match="short.txt: the text has 10 tokens"):
        Text(text.tokens, None, 1000, (*files, ("short.txt", 10))).windows(512, 512)


def test_windows_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(RazorError, match="the stride is 100 tokens, expected a multiple of 128"):
        make_windows(5000, 1024, 100)
    with pytest.raises(RazorError, match="the stride is 2048"):
        make_windows(5000, 1024, 2048)
    with pytest.raises(RazorError, match="the text has 10 tokens"):
        make_windows(10, 1024, 1024)
    for prompt in (1, 1024):
        with pytest.raises(RazorError, match="expected 2 to 1,023, so that tokens"):
            make_windows(5000, 1024, 1024, prompt=prompt)
    assert make_windows(5000, 1024, 1024, 2) == [Window(0, 1024, 1), Window(1024, 2048, 1)]


def test_positions_are_cut_at_powers_of_two() -> None:
    assert position_buckets(2048) == [(0, 256), (256, 512), (512, 1024), (1024, 2048)]
    assert position_buckets(1280) == [(0, 256), (256, 512), (512, 1024), (1024, 1280)]
    assert position_buckets(256) == [(0, 256)]


def test_log_softmax_is_one() -> None:
    x = np.random.default_rng(0).normal(0, 300, (5, 40)).astype(np.float32)
    assert np.exp(log_softmax(x)).sum(axis=1) == pytest.approx(np.ones(5))
    assert math.isfinite(log_softmax(np.float32([[1e4, -1e4]])).min())
