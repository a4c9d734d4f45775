"""Files of head scores, and the heads that are chosen by them."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from razor_local.errors import ProfileError
from razor_local.model_shape import ModelShape
from razor_local.profile import Profile, split_heads
from razor_local.scores import (
    FLOOR,
    MAX_SHARE,
    Scores,
    choose_heads,
    find_cut,
    find_cuts,
    head_strength,
    load_scores,
    profile_from_scores,
    profile_scores,
    save_scores,
    with_budget,
)

RECORD = {"model_fingerprint": "0" * 64, "tokens": 2500, "source": "test"}


def scores(echo, induction, n_head=(4, 4), n_head_kv=(2, 2)) -> Scores:
    return Scores(np.float32(echo), np.float32(induction), n_head, n_head_kv, RECORD)


def random_scores(n_layer: int, n_kv: int, group: int, seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    n = n_layer * n_kv * group
    echo, induction = rng.random((2, n), np.float32)
    return scores(echo, induction, (n_kv * group,) * n_layer, (n_kv,) * n_layer)


def chosen(*args, **options) -> list[list[int]]:
    return [layer.tolist() for layer in choose_heads(*args, **options)]


# -- choosing heads


def test_a_kv_head_has_the_largest_score_of_its_group():
    s = scores([0] * 8, [0.1, 0.1, 0.0, 0.9, 0.5, 0.5, 0.5, 0.5])
    assert chosen(s, induction=0.25, echo=0) == [[0, 1], [0, 0]]


def test_all_layers_are_ranked_together_and_both_sets_joined():
    s = scores([0.9, 0, 0, 0, 0, 0, 0, 0.2], [0, 0, 0, 0, 0.3, 0, 0.4, 0])
    assert chosen(s, induction=0.5, echo=0) == [[0, 0], [1, 1]]
    assert chosen(s, induction=0.5, echo=0.25) == [[1, 0], [1, 1]]
    assert chosen(s, induction=0.25, echo=0.5) == [[1, 0], [0, 1]], "one head is in both sets"


# KV heads of SmolLM2-135M-Instruct (Q4_1) with the highest scores, measured with 2,048 tokens
REAL = {
    "echo": [0.1783, 0.1591, 0.083, 0.0121, 0.0095, 0.0091, 0.0068, 0.0065, 0.0021, 0.002],
    "induction": [0.7163, 0.4069, 0.2984, 0.1956, 0.1065, 0.086, 0.0146, 0.013, 0.0075, 0.0063],
}


@pytest.mark.parametrize(("name", "n"), [("echo", 3), ("induction", 6)])
def test_the_cut_of_a_real_model_is_in_its_gap(name, n):
    values = np.float32(REAL[name] + [0.0003] * 80)
    cut = find_cut(values, chance=3 / 2048)
    assert cut.n_above == n and values[n] < cut.value < values[n - 1]
    assert (cut.above, cut.below) == (values[n - 1], values[n]) and 5.8 < cut.ratio < 7


def test_the_best_echo_heads_are_chosen_together():
    """A share of 1 % was one head, whatever the scores of the next ones."""
    echo = np.float32([*REAL["echo"], *[0.0003] * 80])
    induction = np.float32([*[0.0003] * 80, *REAL["induction"]])
    s = scores(echo, induction, (3,) * 30, (3,) * 30)
    flat = np.concatenate(choose_heads(s))
    assert np.flatnonzero(flat).tolist() == [0, 1, 2, *range(80, 86)]
    paper = np.concatenate(choose_heads(s, induction=0.14, echo=0.01))
    assert paper[:80].sum() == 1 and paper[80:].sum() == 10


@pytest.mark.parametrize(
    ("values", "chance", "n"),
    [
        ([], 0, 0),
        ([0.5], 0, 1),
        ([0] * 9, 0, 0),
        ([0.9] * 9, 0, 9),  # a high median must not hide heads that are certain
        ([0.019] * 1 + [0.0001] * 9, 0, 0),  # a large gap, below FLOOR
        ([0.4, 0.1] + [0.09] * 3 + [0.001] * 9, 0, 5),  # the gap below 0.1 decides
        ([0.4, 0.1, 0.03] + [0.025] * 3 + [0.02] * 9, 0, 2),  # the largest gap, not the last
        ([0.4, 0.11, 0.1, 0.02] + [0.001] * 9, 0, 3),
        ([0.2, 0.15] + [0.01] * 9, 3 / 16, 1),  # few tokens: chance is high
    ],
)
def test_where_the_heads_that_stand_out_end(values, chance, n):
    assert find_cut(np.float32(values), chance).n_above == n


@given(
    values=st.lists(st.floats(0, 1, width=32), max_size=40),
    chance=st.sampled_from([0.0, 0.001, 0.02, 0.2]),
)
def test_a_cut_separates_what_it_says(values, chance):
    values = np.array(values, np.float64)
    cut = find_cut(values, chance)
    above = values[values > cut.value]
    assert len(above) == cut.n_above and FLOOR <= cut.value
    assert not (above <= max(chance, FLOOR)).any()
    assert (values[values >= max(0.1, chance + 1e-6)] > cut.value).all()
    if cut.n_above:
        assert cut.above == above.min() and cut.ratio > 1
    rest = values[values <= cut.value]
    assert cut.below == (rest.max() if len(rest) else 0)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 8))
def test_no_more_than_a_quarter_is_chosen_by_score(seed, n_layer, n_kv):
    s = random_scores(n_layer, n_kv, 2, seed)
    flat, strength = np.concatenate(choose_heads(s)), head_strength(s)
    n_out = int((strength > 1).sum())
    assert flat.sum() == min(n_out, max(int(MAX_SHARE * len(flat)), 4))
    if 0 < flat.sum() < len(flat):
        assert strength[flat == 1].min() >= strength[flat == 0].max()


def test_equal_scores_are_taken_in_the_order_of_the_model():
    s = scores([0] * 8, [0.5] * 8)
    assert chosen(s, induction=0.5, echo=0) == [[1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("share", "total", "count"),
    [(0.14, 16, 3), (0.14, 50, 7), (0.14, 100, 14), (0.01, 16, 1), (0.07, 100, 7), (0, 16, 0)]
    + [(0.14, 256, 36), (0.01, 256, 3), (1, 16, 16), (0.29, 100, 29), (1e-6, 16, 1)],
)
def test_counts_are_rounded_up(share, total, count):
    s = random_scores(1, total, 1)
    assert sum(map(sum, chosen(s, induction=share, echo=0))) == count
    assert sum(map(sum, chosen(s, induction=0, echo=share))) == count
    assert sum(map(sum, chosen(s, budget=share))) == count


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("share", [0.01, 0.1, 0.15, 0.25, 0.5, 0.9, 1])
def test_a_budget_is_met_exactly_with_the_heads_that_stand_out_most(seed, share):
    s = random_scores(8, 8, 2, seed)
    flat = np.concatenate(choose_heads(s, budget=share))
    budget = int(np.ceil(share * 64 - 1e-9))
    assert flat.sum() == budget
    cuts = find_cuts(s)
    strength = np.maximum(
        s.echo.reshape(64, 2).max(axis=1) / cuts["echo"].value,
        s.induction.reshape(64, 2).max(axis=1) / cuts["induction"].value,
    )
    assert np.flatnonzero(flat).tolist() == sorted(np.argsort(-strength, kind="stable")[:budget])


def test_layers_without_kv_heads_and_of_different_sizes():
    s = scores([0] * 12, np.linspace(0, 1, 12), (4, 4, 4), (2, 0, 1))
    assert chosen(s, budget=0.5) == [[0, 1], [], [1]]


def test_chance_is_not_chosen_unless_a_budget_asks_for_it():
    # 2,500 tokens: attention spread evenly has a score of 0.0003 to 0.0004
    s = scores([0.0011] * 8, [0.0011, 0, 0, 0, 0.0013, 0, 0, 0])
    assert chosen(s, induction=1, echo=1) == [[0, 0], [1, 0]]
    assert chosen(s, budget=0.5) == [[1, 0], [1, 0]]
    unknown = Scores(s.echo, s.induction, s.n_head, s.n_head_kv, {"model_fingerprint": ""})
    assert chosen(unknown, induction=0.5, echo=0) == [[1, 0], [1, 0]]


@pytest.mark.parametrize("name", ["induction", "echo", "budget"])
@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_are_from_0_to_1(name, share):
    with pytest.raises(ProfileError, match=f"{name} is .*, expected a share"):
        choose_heads(random_scores(2, 2, 1), **{name: share})


# -- profiles


def shape_of(s: Scores, fingerprint: str = "0" * 64) -> ModelShape:
    n = len(s.n_head)
    shape = ModelShape("llama", n, s.n_head, s.n_head_kv, 32, 32, 1024)
    vars(shape)["fingerprint"] = fingerprint  # there is no file to compute it from
    return shape


def test_profile_keeps_scores_and_record():
    s = random_scores(4, 4, 2)
    profile = profile_from_scores(s, window_min=77)
    profile.check_shape(shape_of(s))
    assert profile.window_min == 77
    assert (profile.echo_score == s.echo).all() and (profile.induction_score == s.induction).all()
    assert profile.calibration == RECORD | {"select": "score"}
    by_budget = profile_from_scores(s, budget=0.3)
    assert by_budget.calibration == RECORD | {"select": "budget", "budget": "0.3"}
    paper = RECORD | {"select": "paper", "induction": "0.14", "echo": "0.2"}
    assert profile_from_scores(s, echo=0.2).calibration == paper


def test_another_budget_from_a_profile():
    s = random_scores(4, 4, 2)
    profile = with_budget(profile_from_scores(s, window_min=77), shape_of(s), 0.5)
    assert profile.flat().sum() == 8 and profile.window_min == 77
    assert np.array_equal(profile.flat(), np.concatenate(choose_heads(s, budget=0.5)))


def test_another_budget_begins_with_the_heads_that_convert_chose():
    s = random_scores(4, 4, 2)
    strength = head_strength(s)
    added = int(strength.argmin())
    flat = np.concatenate(choose_heads(s, budget=0.25))
    flat[added] = 1
    record = s.calibration | {"select": "score", "facts": 20, "facts_found": 20}
    profile = replace(
        profile_from_scores(s), retrieval=split_heads(flat, s.n_head_kv), calibration=record
    )
    assert with_budget(profile, shape_of(s), 5 / 16).flat().tolist() == flat.tolist()
    more = with_budget(profile, shape_of(s), 0.5)
    assert more.flat().sum() == 8 and more.flat()[added] == 1
    assert more.calibration == RECORD | {"select": "budget", "budget": "0.5"}, "no facts of others"
    fewer = with_budget(profile, shape_of(s), 4 / 16).flat()
    assert fewer.sum() == 4 and not fewer[added], "the weakest of them goes first"


def test_a_profile_without_scores_says_what_to_do():
    profile = Profile((np.array([1, 0]),) * 2)
    with pytest.raises(ProfileError, match="has no head scores.*measure them with"):
        profile_scores(profile, shape_of(random_scores(2, 2, 2)))


def test_scores_of_another_model_are_refused():
    s = random_scores(2, 2, 2)
    s.check_model(shape_of(s))
    with pytest.raises(ProfileError, match="measured on another model file"):
        s.check_model(shape_of(s, "1" * 64))
    with pytest.raises(ProfileError, match="2 layers x 4 query heads .* 2 layers x 8 query heads"):
        s.check_model(shape_of(random_scores(2, 2, 4)))


# -- files


@pytest.mark.parametrize("name", ["s.json", "s"])
def test_round_trip_is_exact(tmp_path, name):
    s = random_scores(3, 2, 4)
    echo = s.echo.copy()
    echo[:3] = 0, 1e-40, np.nextafter(np.float32(0.1), np.float32(1))
    s = Scores(echo, s.induction, s.n_head, s.n_head_kv, RECORD)
    assert save_scores(s, tmp_path / name) == tmp_path / name
    read = load_scores(tmp_path / name)
    assert read.echo.tobytes() == s.echo.tobytes()
    assert read.induction.tobytes() == s.induction.tobytes()
    assert (read.n_head, read.n_head_kv, read.calibration) == (s.n_head, s.n_head_kv, RECORD)
    assert [p.name for p in tmp_path.iterdir()] == [name], "nothing else is left"


def test_an_earlier_file_stays_when_writing_fails(tmp_path, monkeypatch):
    path = save_scores(random_scores(2, 2, 1), tmp_path / "s.json")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_scores(random_scores(2, 2, 1, seed=1), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


GOOD = {
    "format": "razor scores",
    "version": 1,
    "calibration": RECORD,
    "n_head": [2, 2],
    "n_head_kv": [1, 2],
    "echo": [0, 0.5, 0.25, 1],
    "induction": [0, 0.5, 0.25, 1],
}
BAD = {
    "no format": ({"format": None}, "is not a file of head scores; make one with"),
    "newer": ({"version": 2}, "is of version 2, this razor-local reads version 1"),
    "no version": ({"version": None}, "is of version None"),
    "no record": ({"calibration": None}, "has no calibration record"),
    "too long a record": (
        {"calibration": RECORD | {str(i): i for i in range(40)}},
        "entries, expected at most 32",
    ),
    "record that is not UTF-8": ({"calibration": RECORD | {"a": "\ud800"}}, "calibration record"),
    "key that is not UTF-8": ({"calibration": RECORD | {"\ud800": 1}}, "calibration record"),
    "key with controls": ({"calibration": RECORD | {"a\n": 1}}, "calibration record"),
    "record is a list": ({"calibration": [1]}, "has no calibration record"),
    "record without model": ({"calibration": {"tokens": 1}}, "does not say which model"),
    "record of a list": ({"calibration": RECORD | {"a": [1]}}, "'a' is neither a text nor"),
    "record of a large number": ({"calibration": RECORD | {"a": 2**32}}, "'a' is neither"),
    "record of a long text": ({"calibration": RECORD | {"a": "x" * 5000}}, "'a' is neither"),
    "no echo": ({"echo": None}, "has no list 'echo' of finite numbers"),
    "a text": ({"induction": ["0.5"] * 4}, "has no list 'induction' of finite numbers"),
    "true": ({"induction": [True] * 4}, "has no list 'induction' of finite numbers"),
    "nested": ({"induction": [[0.5] * 4]}, "has no list 'induction' of finite numbers"),
    "nan": ({"echo": [float("nan")] * 4}, "has no list 'echo' of finite numbers"),
    "infinite": ({"echo": [float("inf")] * 4}, "has no list 'echo' of finite numbers"),
    "huge": ({"echo": [10**400] * 4}, "has no list 'echo' of finite numbers"),
    "negative": ({"echo": [0, 0, -0.1, 0]}, "echo score 2 is -0.1"),
    "above 1": ({"induction": [0, 0, 0, 1.01]}, "induction score 3 is 1.01"),
    "too few": ({"echo": [0.5] * 3}, "echo has shape [3], expected 4 scores"),
    "too many": ({"induction": [0.5] * 5}, "induction has shape [5], expected 4 scores"),
    "no layers": ({"n_head": [], "n_head_kv": []}, "scores for 0 layers"),
    "layers differ": ({"n_head_kv": [1, 2, 2]}, "2 layers of query heads and 3 of KV heads"),
    "half heads": ({"n_head": [2.0, 2]}, "has no list 'n_head' of whole numbers"),
    "no group": ({"n_head_kv": [2, 3]}, "layer 1 has scores of 2 query heads for 3 KV heads"),
    "no query heads": ({"n_head": [4, 0]}, "layer 1 has scores of 0 query heads"),
    "negative heads": ({"n_head": [5, -1]}, "layer 1 has scores of -1 query heads"),
    "many layers": ({"n_head": [1] * 600, "n_head_kv": [1] * 600}, "scores for 600 layers"),
}


@pytest.mark.parametrize("change", BAD)
def test_malformed_json(tmp_path, change):
    path = tmp_path / "s.json"
    path.write_text(json.dumps(GOOD))
    assert load_scores(path).n_head == (2, 2)
    fields, text = BAD[change]
    path.write_text(json.dumps(GOOD | fields))
    with pytest.raises(ProfileError) as error:
        load_scores(path)
    assert str(error.value).startswith(f"{path}: ") and text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "raw", [b"", b"\x00\xff", b"1\t0\n", b"[" * 100_000, b"null", b"{}", b"PK", b"PK\x03\x04" * 99]
)
def test_other_files(tmp_path, raw):
    path = tmp_path / "s.json"
    path.write_bytes(raw)
    with pytest.raises(ProfileError, match="is not JSON|is not a file of head"):
        load_scores(path)


def test_damaged_files_are_read_or_refused_but_never_crash(tmp_path):
    good = save_scores(random_scores(2, 2, 2), tmp_path / "s.json").read_bytes()
    rng, path, n_refused = random.Random(0), tmp_path / "damaged", 0
    for _ in range(500):
        raw = bytearray(good[: rng.randint(0, len(good))] if rng.random() < 0.3 else good)
        for _ in range(rng.randint(0, 8) if raw else 0):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(raw)
        try:
            load_scores(path)
        except ProfileError as error:
            n_refused += 1
            assert "\n" not in str(error)
    assert n_refused > 200


def test_a_large_file_is_refused_before_it_is_parsed(tmp_path):
    path = tmp_path / "s.json"
    with open(path, "wb") as file:
        file.truncate((8 << 20) + 1)
    with pytest.raises(ProfileError, match="is larger than 8 MiB"):
        load_scores(path)
