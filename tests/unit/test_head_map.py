"""inspect --heads, --compare, --plot: exact text, JSON, pictures that show the numbers."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from razor_local.converters.head_map import (
    ASCII_SHADES,
    compare_heads,
    map_lines,
    plot_heads,
    query_head_scores,
    read_other_heads,
)
from razor_local.converters.write import write_copy, write_sidecar

from razor_local.errors import ProfileError, UnsupportedError
from razor_local.model_file import read_model_shape, read_profile
from razor_local.profile import Profile
from razor_local.scores import Scores, save_scores
from tests.support.cli import run
from tests.support.gguf_bytes import F32, I32, U32, kv, kv_array, razor_keys, small_model
from tests.support.tiny_models import TinySpec, make_model

MASK = (np.array([1, 0]), np.array([0, 0]), np.array([1, 1]))
INDUCTION = np.array([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.39, 0, 0, 0, 0, 0.01], np.float32)
PROFILE = Profile(MASK, induction_score=INDUCTION, echo_score=np.zeros(12, np.float32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("heads")
    model = make_model(path / "plain.gguf", TinySpec())
    write_copy(model, path / "razor.gguf", PROFILE)
    other = Profile((np.array([0, 0]), np.array([0, 0]), np.array([0, 1])))
    another = make_model(path / "finetune.gguf", TinySpec(seed=1))
    write_sidecar(another, path / "side.gguf", other)
    (path / "heads.tsv").write_text("0\t1\n0\t0\n1\t1\n")
    (path / "gates.tsv").write_text("0.9\t0.8\n0.7\t0\n0\t0.6\n")
    return path


def test_map(folder):
    """Shades in fifths of the highest score; a KV head has that of its higher query head."""
    code, stdout, stderr = run("inspect", folder / "razor.gguf", "--heads")
    assert (code, stderr) == (0, "")
    assert [line.rstrip() for line in stdout.splitlines()] == [
        "model    tiny llama: llama, 3 layers, 4/2 query/KV heads of size 32,"
        " trained for 1,024 tokens",
        "profile  3 of 6 KV heads are retrieval heads (50.0%), 4 sinks,"
        " window max(4,000, context/5), compensation on",
        "source   the metadata of the model file",
        "",
        "layer  retrieval  induction  echo",
        "    0  #.         ░▓         ··",
        "    1  ..         █▓         ··",
        "    2  ##         ··         ··",
        "",
        "# retrieval head, . local head; induction ·░▒▓█ from 0 to 0.5; echo ·░▒▓█ from 0 to 0",
        "induction: 4 KV heads stand out (lowest score 0.1, next 0.01, ratio 10.0)",
        "echo: no KV head stands out, the highest score is 0",
    ]


def test_map_on_a_terminal_without_blocks(folder, monkeypatch):
    import rich.console

    monkeypatch.setattr(rich.console.Console, "encoding", "ascii")
    _, stdout, _ = run("inspect", folder / "razor.gguf", "--heads")
    assert stdout.isascii() and f"induction {ASCII_SHADES} from" in stdout


def test_map_of_a_profile_without_scores(folder):
    shape = read_model_shape(folder / "plain.gguf")
    assert list(map_lines(Profile(MASK), shape)) == [
        "layer  retrieval",
        "    0  #.",
        "    1  ..",
        "    2  ##",
        "",
        "# retrieval head, . local head",
    ]


def uneven(tmp_path):
    """A model with 2, 0 and 1 KV heads in its layers, 4 query heads in each."""
    raw = small_model(
        [
            *razor_keys([1, 0, 1]),
            kv_array("razor.head.induction_score", F32, [0.1, 0.2, 0.3, 0.4] * 3),
        ],
        n_layer=3,
    )
    old = kv("llama.attention.head_count_kv", U32, 2)
    path = tmp_path / "uneven.gguf"
    raw = raw.replace(old, kv_array("llama.attention.head_count_kv", I32, [2, 0, 1]))
    cut = raw.index(b"b.weight") + 32  # the padding before the data changes with the header
    head, data = raw[:cut], bytes(range(48)) + bytes(16) + bytes(range(100, 134))
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def test_layers_with_different_numbers_of_heads(tmp_path):
    path = uneven(tmp_path)
    _, stdout, _ = run("inspect", path, "--heads", "--compare", path)
    lines = [line.rstrip() for line in stdout.splitlines()]
    assert lines[4:8] == [
        "layer  retrieval  induction",
        "    0  #.         ▒█",
        "    1",
        "    2  #          █",
    ]
    assert lines[-4:] == [
        "    0  #.                          1      1     1     1.00",
        "    1                              0      0     0        -",
        "    2  #                           1      1     1     1.00",
        "  all                              2      2     2     1.00",
    ]
    shape = read_model_shape(path)
    assert plot_heads(read_profile(path), shape, tmp_path / "u.png").stat().st_size > 1000


# -- comparison


def test_comparison(folder):
    code, stdout, stderr = run("inspect", folder / "razor.gguf", "--compare", folder / "heads.tsv")
    assert (code, stderr) == (0, "")
    lines = [line.rstrip() for line in stdout.splitlines()]
    assert lines[4:6] == [
        f"here     {folder / 'razor.gguf'}",
        f"there    {folder / 'heads.tsv'}",
    ]
    assert lines[7:] == [
        "layer  # both, < here, > there  here  there  both  Jaccard",
        "    0  <>                          1      1     0     0.00",
        "    1  ..                          0      0     0        -",
        "    2  ##                          2      2     2     1.00",
        "  all                              3      3     2     0.50",
    ]


def test_comparison_as_json(folder):
    _, stdout, _ = run(
        "inspect", folder / "razor.gguf", "--compare", folder / "side.gguf", "--heads", "--json"
    )
    data = json.loads(stdout)
    assert data["comparison"] == {
        "with": str(folder / "side.gguf"),
        "here": 3,
        "there": 1,
        "both": 1,
        "jaccard": pytest.approx(1 / 3),
        "layers": [
            {"here": 1, "there": 0, "both": 0, "jaccard": 0.0},
            {"here": 0, "there": 0, "both": 0, "jaccard": None},
            {"here": 2, "there": 1, "both": 1, "jaccard": 0.5},
        ],
    }
    assert data["scores"]["echo"] == [[0.0] * 4] * 3
    np.testing.assert_array_equal(data["scores"]["induction"], INDUCTION.reshape(3, 4))
    assert data["n_ctx"] == 1024  # the plan is there as without --heads


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("razor.gguf", [[1, 0], [0, 0], [1, 1]]),
        ("side.gguf", [[0, 0], [0, 0], [0, 1]]),  # of another model of the same shape
        ("heads.tsv", [[0, 1], [0, 0], [1, 1]]),
        ("gates.tsv", [[1, 1], [1, 0], [0, 0]]),  # as many as there are here: 3
    ],
)
def test_what_can_be_compared_with(folder, name, expected):
    shape = read_model_shape(folder / "plain.gguf")
    assert [x.tolist() for x in read_other_heads(folder / name, shape, 3)] == expected


def test_scores_can_be_compared_with(folder, tmp_path):
    shape = read_model_shape(folder / "plain.gguf")
    record = {"model_fingerprint": "0" * 64, "tokens": 2500}  # of another quantization
    induction = np.array([0, 0, 0.9, 0, 0.5, 0, 0, 0, 0.4, 0, 0, 0], np.float32)
    scores = Scores(np.zeros(12), induction, (4,) * 3, (2,) * 3, record)
    path = save_scores(scores, tmp_path / "scores.json")
    found = [x.tolist() for x in read_other_heads(path, shape, 3)]
    assert found == [[0, 1], [1, 0], [1, 0]]
    wide = Scores(np.zeros(4), np.zeros(4), (2,) * 2, (2,) * 2, record)
    with pytest.raises(ProfileError, match="only heads of one shape"):
        read_other_heads(save_scores(wide, tmp_path / "scores.json"), shape, 3)


def test_jaccard_against_sets():
    rng = np.random.default_rng(0)
    here = tuple(rng.integers(0, 2, n, np.uint8) for n in (3, 8, 1, 5))
    there = tuple(rng.integers(0, 2, n, np.uint8) for n in (3, 8, 1, 5))
    compared = compare_heads(here, there)
    sets = [
        {(il, ih) for il, layer in enumerate(x) for ih, head in enumerate(layer) if head}
        for x in (here, there)
    ]
    both, either = sets[0] & sets[1], sets[0] | sets[1]
    assert compared.total.both == len(both) == sum(layer.both for layer in compared.layers)
    assert compared.total.jaccard == len(both) / len(either)


def test_refusals(folder, tmp_path):
    other = make_model(tmp_path / "other.gguf", TinySpec(n_layer=2))
    wide = tmp_path / "wide.tsv"
    wide.write_text("1\t0\t0\n" * 3)
    for args, text in (
        ([folder / "plain.gguf", "--heads"], "has no razor profile; make one with"),
        ([folder / "plain.gguf", "--plot", "x.png"], "has no razor profile; make one with"),
        ([folder / "razor.gguf", "--compare", folder / "plain.gguf"], "no razor profile to comp"),
        (
            [folder / "razor.gguf", "--compare", other],
            "has 2 layers x 2 KV heads, the model has 3 layers x 2 KV heads; only heads of one",
        ),
        (
            [folder / "razor.gguf", "--compare", wide],
            "lists 3 layers x 3 KV heads, the model has 3 layers x 2 KV heads",
        ),
        ([folder / "razor.gguf", "--compare", tmp_path], "is a folder, expected a profile, a side"),
        ([folder / "razor.gguf", "--compare", tmp_path / "no"], "No such file or directory"),
        ([folder / "razor.gguf", "--plot", tmp_path / "x.gguf"], "is not the name of a picture"),
        ([folder / "razor.gguf", "--plot", tmp_path / "no" / "x.png"], "no does not exist"),
    ):
        code, stdout, stderr = run("inspect", *args)
        assert (code, stdout) == (1, "") and text in stderr and stderr.count("\n") == 1, stderr


# -- pictures


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".PNG"])
def test_kinds_of_pictures(folder, tmp_path, suffix):
    path = tmp_path / f"heads{suffix}"
    code, stdout, stderr = run("inspect", folder / "razor.gguf", "--plot", path)
    assert (code, stderr) == (0, "") and stdout.endswith(f"plot     {path}\n")
    magic = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix.lower()]
    assert path.read_bytes().startswith(magic)


def test_picture_holds_the_numbers(folder, tmp_path, monkeypatch):
    """The grids that are drawn: chosen KV heads, and scores per query head."""
    from matplotlib.axes import Axes

    drawn = {}
    real = Axes.imshow

    def imshow(self, grid, **options):
        drawn[len(drawn)] = np.array(grid)
        return real(self, grid, **options)

    monkeypatch.setattr(Axes, "imshow", imshow)
    shape, profile = read_model_shape(folder / "razor.gguf"), read_profile(folder / "razor.gguf")
    plot_heads(profile, shape, tmp_path / "x.png")
    np.testing.assert_array_equal(drawn[0], np.stack(MASK))
    np.testing.assert_array_equal(drawn[1], INDUCTION.reshape(3, 4))
    np.testing.assert_array_equal(drawn[2], np.zeros((3, 4)))
    assert list(query_head_scores(profile, shape)) == ["induction", "echo"]


def test_without_matplotlib(folder, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shape = read_model_shape(folder / "razor.gguf")
    with pytest.raises(
        UnsupportedError, match=r"install it with 'pip install razor-local\[plot\]'"
    ):
        plot_heads(PROFILE, shape, tmp_path / "x.png")
    assert run("inspect", folder / "razor.gguf", "--heads")[0] == 0
