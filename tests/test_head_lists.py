"""Head lists: the published RazorAttention format, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from razor_local.converters.heads import parse_heads, profile_from_heads, read_heads

from razor_local.errors import ProfileError
from razor_local.profile import ModelShape

# a folder of published head lists (*.tsv), for those who have one
PUBLISHED = os.environ.get("RAZOR_HEAD_LISTS")


def shape(*n_head_kv: int) -> ModelShape:
    return ModelShape("llama", len(n_head_kv), n_head_kv, n_head_kv, 64, 64, 4096)


def heads(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "heads.tsv"
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
    assert profile.calibration["source"] == "head list heads.tsv"
    assert profile.calibration["tool_version"].startswith("razor-local ")
    with pytest.raises(ProfileError, match=r"window_min is 0, expected 1 to"):
        profile_from_heads(path, shape(2), window_min=0)


BAD = {
    "gate values": ("0.5\t1\n", "row 1, column 1 is '0.5', expected 0 or 1; scores must be turned"),
    "nearly 1": ("1\t9.9e-1\n", "row 1, column 2 is '9.9e-1', expected 0 or 1"),
    "two": ("1\t0\n0\t2\n", "row 2, column 2 is '2', expected 0 or 1"),
    "nan": ("nan\t0\n", "row 1, column 1 is 'nan', expected 0 or 1"),
    "words": ("head\t0\n", "row 1, column 1 is 'head', expected 0 or 1"),
    "commas": ("1,0\n", "row 1, column 1 is '1,0', expected 0 or 1"),
    "terminal codes": ("\x1b[2J\t0\n", r"row 1, column 1 is '\x1b[2J', expected 0 or 1"),
    "empty": ("\n \n", "is empty, expected a row of 0 and 1 per layer"),
    "binary": (b"GGUF\xff\xfe\0", "is not a text file"),
    "few rows": ("1\t0\n", "lists 1 layers x 2 KV heads, the model has 2 layers x 3 KV heads"),
    "swapped": ("1\t0\n0\t0\n0\t0\n", "its rows and columns are swapped"),
    "ragged": ("1\t0\t0\n0\t0\n", "lists 2 layers x 2 to 3 KV heads, the model has 2 layers x 3"),
    "gap": ("1\t0\t0\n\n0\t0\t0\n", "lists 3 layers x 0 to 3 KV heads"),
    "long": ("1\n" * 513, "has 513 rows, expected at most 512 layers"),
    "wide": ("1\t" * 4097, "row 1 has 4097 columns"),
    "huge": (b"0" * (9 << 20), "is larger than 8 MiB"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_list_is_one_sentence(tmp_path, case):
    text, expected = BAD[case]
    path = heads(tmp_path, text)
    with pytest.raises(ProfileError) as error:
        read_heads(path, shape(3, 3))
    assert expected in str(error.value) and str(path) in str(error.value)
    assert str(error.value).isprintable()


def test_folder_and_missing_file(tmp_path):
    with pytest.raises(ProfileError, match="is a folder, expected a head list"):
        parse_heads(tmp_path)
    with pytest.raises(FileNotFoundError):
        parse_heads(tmp_path / "missing.tsv")


@pytest.mark.skipif(not PUBLISHED, reason="RAZOR_HEAD_LISTS names no folder of head lists")
def test_published_lists():
    """About 15 % retrieval heads each: 14 % induction and 1 % echo heads."""
    paths = sorted(Path(PUBLISHED).glob("*.tsv"))
    assert paths
    for path in paths:
        layers = parse_heads(path)
        total = sum(len(layer) for layer in layers)
        assert len({len(layer) for layer in layers}) == 1
        assert 0.1 < sum(int(layer.sum()) for layer in layers) / total < 0.2, path
