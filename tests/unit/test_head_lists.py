"""Head lists: the three published formats, how heads are chosen, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from razor_local.converters.heads import (
    choose_by_rank,
    parse_heads,
    profile_from_heads,
)
from razor_local.converters.write import write_copy

from razor_local.errors import ProfileError
from razor_local.model_file import read_model_shape, read_profile
from razor_local.model_shape import ModelShape
from tests.support.tiny_models import TinySpec, make_model

# a folder of published head lists (*.tsv, *.json, in folders of any depth), for those who have one
PUBLISHED = os.environ.get("RAZOR_HEAD_LISTS")


def read_heads(path, shape: ModelShape, budget: float | None = None) -> tuple[np.ndarray, ...]:
    return profile_from_heads(path, shape, budget=budget).retrieval


def shape(*n_head_kv: int, group: int = 1) -> ModelShape:
    n_head = tuple(n * group for n in n_head_kv)
    return ModelShape("llama", len(n_head), n_head, n_head_kv, 64, 64, 4096)


def heads(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "heads.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "1\t0\n0\t1\n0\t0\n",
        "1.0\t0.0\r\n0.0\t1.0\r\n0.0\t0.0\r\n\r\n",
        "\ufeff1 0\n0 1\n0 0",
        "1\t0\t\n0\t1\t\n0\t0\t\n\n\n",
        "1.000000000000000000e+00\t0.000000000000000000e+00\n0\t1\n0\t-0.0\n",
    ],
)
def test_spellings_of_one_list(tmp_path, text):
    layers = read_heads(heads(tmp_path, text), shape(2, 2, 2))
    assert [layer.tolist() for layer in layers] == [[1, 0], [0, 1], [0, 0]]
    assert {layer.dtype.name for layer in layers} == {"uint8"}


def test_layers_with_different_numbers_of_heads(tmp_path):
    layers = read_heads(heads(tmp_path, "1\n0\t1\t0\n"), shape(1, 3))
    assert [layer.tolist() for layer in layers] == [[1], [0, 1, 0]]


def test_profile_records_where_it_comes_from(tmp_path):
    path = heads(tmp_path, "1\t0\n")
    profile = profile_from_heads(path, shape(2), sink_tokens=8, window_min=100, window_divisor=0)
    assert (profile.sink_tokens, profile.window_min, profile.window_divisor) == (8, 100, 0)
    assert profile.compensation is True and profile.echo_score is None
    assert profile.calibration["source"] == "head list heads.txt"
    assert profile.calibration["tool_version"].startswith("razor-local ")
    with pytest.raises(ProfileError, match=r"window_min is 0, expected 1 to"):
        profile_from_heads(path, shape(2), window_min=0)


# -- gates and scores: an order of the heads, and a share of them

GATES = "0.1\t1\n0.9\t-0.0014\n1\t0.5\n"


def chosen(profile) -> list[list[int]]:
    return [layer.tolist() for layer in profile.retrieval]


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0, [[0, 0], [0, 0], [0, 0]]),
        (0.01, [[0, 1], [0, 0], [0, 0]]),  # rounded up to one head; the first of two equal ones
        (1 / 3, [[0, 1], [0, 0], [1, 0]]),
        (0.5, [[0, 1], [1, 0], [1, 0]]),
        (0.51, [[0, 1], [1, 0], [1, 1]]),
        (1, [[1, 1], [1, 1], [1, 1]]),
    ],
)
def test_gates_by_rank(tmp_path, share, expected):
    profile = profile_from_heads(heads(tmp_path, GATES), shape(2, 2, 2), budget=share)
    assert chosen(profile) == expected
    assert profile.calibration["source"] == "gates heads.txt"
    assert profile.calibration["budget"] == f"{share:g}"
    assert ("ties" in profile.calibration) == (share == 0.01)


def test_gates_are_clipped_before_they_are_compared(tmp_path):
    gates = parse_heads(heads(tmp_path, "-0.0014\t0\n1.001\t1\n"))
    assert [layer.tolist() for layer in gates.layers] == [[0, 0], [1, 1]]


def test_tied_heads_are_spread_over_the_layers():
    """80 of 256 saturated gates: as in the published lists of models with grouped queries."""
    values = np.linspace(0, 0.9, 256)
    tied = np.arange(0, 240, 3)
    values[tied] = 1.0
    before = np.zeros(256, np.uint8)
    for n in range(1, 81):
        mask, taken, n_tied = choose_by_rank(values, n)
        assert (mask.sum(), taken, n_tied) == (n, n, 80)
        assert set(np.flatnonzero(mask)) <= set(tied)
        assert (mask >= before).all()  # a larger share keeps what a smaller one kept
        before = mask
        # every run of the tied heads has its share of those taken
        quarters = mask[tied].reshape(4, 20).sum(axis=1)
        assert np.abs(quarters - n / 4).max() <= 2, n
    mask, taken, n_tied = choose_by_rank(values, 81)
    assert (mask.sum(), taken, n_tied) == (81, 1, 1) and mask[255] == 1
    assert choose_by_rank(values, 256)[0].all()
    assert choose_by_rank(np.zeros(0), 0)[0].shape == (0,)


def test_scores_of_query_heads(tmp_path):
    """The mean of a list; the highest mean of a group of query heads; entries in any order."""
    scores = {
        "1-3": 0.1,
        "0-0": [0, 0.5],
        "0-1": [0.2],
        "0-2": [0, 0, 3],
        "0-3": 0,
        "1-0": [0.3, 0.3],
        "1-1": 0.29,
        "1-2": [0, 1],
    }
    path = heads(tmp_path, json.dumps(scores))
    assert parse_heads(path).values(shape(2, 2, group=2)).tolist() == [0.25, 1, 0.3, 0.5]
    for share, expected in ((0.25, [0, 1, 0, 0]), (0.5, [0, 1, 0, 1]), (0.75, [0, 1, 1, 1])):
        profile = profile_from_heads(path, shape(2, 2, group=2), budget=share)
        assert profile.flat().tolist() == expected
    assert profile.calibration["source"] == "head scores heads.txt"
    assert parse_heads(path).values(shape(4, 4)).tolist() == [
        0.25, 0.2, 1, 0, 0.3, 0.29, 0.5, 0.1,
    ]  # fmt: skip


def test_scores_of_layers_with_different_numbers_of_heads(tmp_path):
    path = heads(tmp_path, json.dumps({"0-0": 1, "1-0": 2, "1-1": 3}))
    assert [layer.tolist() for layer in read_heads(path, shape(1, 2), 0.5)] == [[0], [1, 1]]


def test_order_needs_a_share_and_a_list_refuses_one(tmp_path):
    for text in (GATES, json.dumps({f"{i}-{j}": 0.5 for i in range(3) for j in range(2)})):
        path = heads(tmp_path, text)
        with pytest.raises(ProfileError, match="only order the heads; say which share .*--budget"):
            read_heads(path, shape(2, 2, 2))
        for share in (-0.1, 1.1, float("nan")):
            with pytest.raises(ProfileError, match="budget is .*, expected a share of the KV"):
                read_heads(path, shape(2, 2, 2), share)
    path = heads(tmp_path, "1\t0\n")
    with pytest.raises(ProfileError, match="says itself which heads are retrieval heads"):
        read_heads(path, shape(2), 0.5)


# -- what is refused

SCORES_EXPECTED = 'expected {"layer-head": score or [scores], ...}'
BAD = {
    "underscore": ("0_1\t1\n", "row 1, column 1 is '0_1', expected 0 or 1 (or a gate value"),
    "other digits": ("\u0661\t1\n", "row 1, column 1 is '\u0661', expected 0 or 1"),
    "negative": ("1\t-0.02\n", "row 1, column 2 is '-0.02', expected 0 or 1"),
    "infinite": ("1\tinf\n", "row 1, column 2 is 'inf', expected 0 or 1"),
    "two": ("1\t0\n0\t2\n", "row 2, column 2 is '2', expected 0 or 1"),
    "nan": ("nan\t0\n", "row 1, column 1 is 'nan', expected 0 or 1"),
    "words": ("head\t0\n", "row 1, column 1 is 'head', expected 0 or 1"),
    "commas": ("1,0\n", "row 1, column 1 is '1,0', expected 0 or 1"),
    "terminal codes": ("\x1b[2J\t0\n", r"row 1, column 1 is '\x1b[2J', expected 0 or 1"),
    "empty": ("\n \n", "is empty, expected a row of numbers per layer"),
    "binary": (b"GGUF\xff\xfe\0", "is not a text file"),
    "few rows": ("1\t0\n", "lists 1 layers x 2 KV heads, the model has 2 layers x 3 KV heads"),
    "swapped": ("1\t0\n0\t0\n0\t0\n", "its rows and columns are swapped"),
    "ragged": ("1\t0\t0\n0\t0\n", "lists 2 layers x 2 to 3 KV heads, the model has 2 layers x 3"),
    "gap": ("1\t0\t0\n\n0\t0\t0\n", "lists 3 layers x 0 to 3 KV heads"),
    "long": ("1\n" * 513, "has more than 512 rows, expected one per layer"),
    "wide": ("1\t" * 4097, "row 1 has more than 4096 columns"),
    "huge": (b"0" * (9 << 20), "is larger than 8 MiB"),
    "gates of another model": (
        "0.5\t0\n",
        "lists 1 layers x 2 KV heads, the model has 2 layers x 3 KV heads; it is for another model",
    ),
    "scores of another model": (
        '{"0-0": 1, "0-1": 2}',
        "lists 1 layers x 2 query heads, the model has 2 layers x 6 query heads",
    ),
    "scores of KV heads": (
        json.dumps({f"{i}-{j}": 0.5 for i in range(2) for j in range(3)}),
        "lists 2 layers x 3 query heads, the model has 2 layers x 6 query heads",
    ),
    "a head is missing": ('{"0-0": 1, "0-2": 2, "1-0": 1}', "has no head '0-1' among its 2 layers"),
    "a layer is missing": ('{"0-0": 1, "2-0": 2}', "lists 3 layers x 0 to 1 query heads"),
    "cut json": ('{"0-0": [1, 2', "is not valid JSON; " + SCORES_EXPECTED),
    "deep json": ("[" * 100_000, "is not valid JSON"),
    "json list": ("[1, 2]", "is not a JSON object of heads"),
    "json without heads": ("{}", "is not a JSON object of heads"),
    "other json": ('{"model": "llama"}', "has the entry 'model'; " + SCORES_EXPECTED),
    "negative layer": ('{"-1-0": 1}', "has the entry '-1-0'"),
    "other digits in json": ('{"\u0661-0": 1}', "has the entry '\u0661-0'"),
    "many layers": ('{"9999-0": 1}', "has the entry '9999-0', more than 512 layers of 4096 heads"),
    "many heads": (
        json.dumps({f"{i % 512}-{i // 512}": 1 for i in range(65_537)}),
        "has 65537 entries, more than any model has heads",
    ),
    "twice": ('{"0-0": 1, "0-0": 2}', "names a head twice"),
    "twice, spelt differently": ('{"0-0": 1, "00-0": 2}', "names head '0-0' twice"),
    "no scores": ('{"0-0": []}', "has no finite number for head '0-0'"),
    "a word": ('{"0-0": "1"}', "has no finite number for head '0-0'"),
    "a truth": ('{"0-0": [true]}', "has no finite number for head '0-0'"),
    "nan in json": ('{"0-0": NaN}', "has no finite number for head '0-0'"),
    "infinite in json": ('{"0-0": [1, 1e999]}', "has no finite number for head '0-0'"),
    "large whole number": ('{"0-0": 1' + "0" * 400 + "}", "has no finite number for head '0-0'"),
    "too many digits": ('{"0-0": ' + "1" * 5000 + "}", "is not valid JSON"),
    "nested": ('{"0-0": [[1]]}', "has no finite number for head '0-0'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_list_is_one_sentence(tmp_path, case):
    text, expected = BAD[case]
    path = heads(tmp_path, text)
    with pytest.raises(ProfileError) as error:
        parse_heads(path).values(shape(3, 3, group=2))
    assert expected in str(error.value) and str(path) in str(error.value)
    assert str(error.value).isprintable()


def test_folder_and_missing_file(tmp_path):
    with pytest.raises(ProfileError, match="is a folder, expected a head list"):
        parse_heads(tmp_path)
    with pytest.raises(FileNotFoundError):
        parse_heads(tmp_path / "missing.tsv")


# -- lists in files


def round_trip(path: Path, folder: Path, group: int) -> None:
    """Imports a list onto a model of its shape; the mask in the new file is the list's."""
    found = parse_heads(path)
    n_head = found.n_heads[0]
    n_kv = n_head // group if found.kind == "scores" else n_head
    spec = TinySpec(n_layer=len(found.layers), n_head=n_kv * group, n_head_kv=n_kv, head_dim=4)
    model = make_model(folder / "model.gguf", spec)
    model_shape = read_model_shape(model)
    share = None if found.kind == "heads" else 0.25
    profile = profile_from_heads(path, model_shape, budget=share)
    out = write_copy(model, folder / "out.gguf", profile, force=True)
    mask = np.array(GGUFReader(out).fields["razor.head.retrieval"].contents())
    np.testing.assert_array_equal(mask, read_profile(out).flat())
    if found.kind == "scores":
        means = {k: np.mean(v) for k, v in json.loads(path.read_text()).items()}
        n_layer = len(found.layers)
        per_query = [means[f"{il}-{ih}"] for il in range(n_layer) for ih in range(n_head)]
        values = np.reshape(per_query, (-1, group)).max(axis=1)
    else:
        values = np.loadtxt(path, ndmin=2).clip(0, 1).ravel()
    if found.kind == "heads":
        np.testing.assert_array_equal(mask, values)
    else:
        assert mask.sum() == -(-len(mask) // 4)
        assert values[mask == 1].min() >= values[mask == 0].max()
    for other in (
        ModelShape("llama", spec.n_layer + 1, *[(n_kv,) * (spec.n_layer + 1)] * 2, 4, 4, 4096),
        ModelShape("llama", spec.n_layer, *[(n_head + 1,) * spec.n_layer] * 2, 4, 4, 4096),
    ):
        with pytest.raises(ProfileError, match=rf"lists {spec.n_layer} layers x .* the model has "):
            read_heads(path, other, share)


@pytest.mark.parametrize("kind", ["heads", "gates", "scores"])
def test_round_trip(tmp_path, kind):
    """Lists of the shape of a published one: 32 layers of 8 KV heads, 32 query heads."""
    rng = np.random.default_rng(0)
    path = tmp_path / f"{kind}.txt"
    if kind == "heads":
        np.savetxt(path, rng.random((32, 8)) < 0.15, delimiter="\t", fmt="%.1f")
    elif kind == "gates":
        np.savetxt(path, (rng.random((32, 8)) * 1.5).clip(-0.001, 1), delimiter="\t")
    else:
        scores = {f"{i}-{j}": list(rng.random(20)) for i in range(32) for j in range(32)}
        path.write_text(json.dumps(scores))
    round_trip(path, tmp_path, group=4)


@pytest.mark.skipif(not PUBLISHED, reason="RAZOR_HEAD_LISTS names no folder of head lists")
def test_published_lists(tmp_path):
    paths = sorted(p for p in Path(PUBLISHED).rglob("*") if p.suffix in (".tsv", ".json"))
    assert paths
    for path in paths:
        layers = parse_heads(path).layers
        assert len(set(map(len, layers))) == 1 and len(layers) in (28, 32, 40, 48, 60, 64, 80), path
        if parse_heads(path).kind == "heads":
            assert 0.1 < np.mean(layers) < 0.2, path  # 14 % induction and 1 % echo heads
        round_trip(path, tmp_path, group=4)
