"""Model shapes and razor metadata: what is read, and the sentence for everything malformed."""

from __future__ import annotations

import hashlib
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from razor_local.errors import GGUFError, ProfileError, RazorError
from razor_local.gguf.header import read_header
from razor_local.model_file import read_model_shape, read_profile
from razor_local.model_shape import ModelShape, describe_heads, unsupported_feature
from razor_local.profile import KEY_FINGERPRINT, Profile, read_sidecar
from tests.support.gguf_bytes import (
    BOOL,
    F32,
    I8,
    I32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    gguf,
    kv,
    kv_array,
    razor_keys,
    small_model,
    tensor,
)

HEADS = [1, 0, 0, 1]  # of small_model: 2 layers x 2 KV heads


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def llama(path: Path, **keys: bytes | None) -> Path:
    """A file with a llama's shape keys; keyword arguments replace or drop one of them."""
    all_keys = {
        "arch": kv("general.architecture", STRING, "llama"),
        "layers": kv("llama.block_count", U32, 3),
        "embd": kv("llama.embedding_length", U32, 256),
        "ctx": kv("llama.context_length", U32, 4096),
        "heads": kv("llama.attention.head_count", U32, 8),
        "kv_heads": kv("llama.attention.head_count_kv", U32, 2),
        **keys,
    }
    return write(path, gguf([key for key in all_keys.values() if key is not None]))


# -- shape


def test_shape_of_a_plain_model(tmp_path):
    shape = read_model_shape(llama(tmp_path / "m"))
    assert (shape.arch, shape.n_layer, shape.n_head, shape.n_head_kv) == (
        "llama",
        3,
        (8, 8, 8),
        (2, 2, 2),
    )
    assert (shape.head_dim_k, shape.head_dim_v, shape.n_ctx_train) == (32, 32, 4096)


def test_shape_defaults_and_overrides(tmp_path):
    shape = read_model_shape(llama(tmp_path / "mha", kv_heads=None))
    assert shape.n_head_kv == (8, 8, 8)
    dims = {
        "k": kv("llama.attention.key_length", U32, 192),
        "v": kv("llama.attention.value_length", U32, 128),
    }
    shape = read_model_shape(llama(tmp_path / "dims", **dims))
    assert (shape.head_dim_k, shape.head_dim_v) == (192, 128)


def test_heads_per_layer(tmp_path):
    arrays = {
        "heads": kv_array("llama.attention.head_count", I32, [8, 4, 8]),
        "kv_heads": kv_array("llama.attention.head_count_kv", U32, [2, 4, 1]),
    }
    shape = read_model_shape(llama(tmp_path / "m", **arrays))
    assert shape.n_head == (8, 4, 8) and shape.n_head_kv == (2, 4, 1)


def test_next_token_layers_are_left_out(tmp_path):
    shape = read_model_shape(
        llama(
            tmp_path / "m",
            nextn=kv("llama.nextn_predict_layers", U32, 1),
            kv_heads=kv_array("llama.attention.head_count_kv", U32, [2, 4, 1]),
        )
    )
    assert shape.n_layer == 2 and shape.n_head_kv == (2, 4)


BAD_SHAPES = {
    "no arch": ({"arch": None}, "has no general.architecture"),
    "arch type": ({"arch": kv("general.architecture", U32, 1)}, "should be string, found u32"),
    "another arch": ({"arch": kv("general.architecture", STRING, "x")}, "has no x.block_count"),
    "arch with a line break": (
        {"arch": kv("general.architecture", STRING, "a\nb")},
        "has no general.architecture",
    ),
    "no layers": ({"layers": None}, "has no llama.block_count"),
    "0 layers": ({"layers": kv("llama.block_count", U32, 0)}, "is 0, expected 1 to 512"),
    "many layers": ({"layers": kv("llama.block_count", U32, 2**32 - 1)}, "expected 1 to 512"),
    "layers as text": ({"layers": kv("llama.block_count", STRING, "3")}, "found string"),
    "negative": ({"layers": kv("llama.block_count", I32, -3)}, "is -3, expected 1 to 512"),
    "no heads": ({"heads": None}, "has no llama.attention.head_count"),
    "0 heads": ({"heads": kv("llama.attention.head_count", U32, 0)}, "has no llama.attention"),
    "many heads": (
        {"heads": kv("llama.attention.head_count", U32, 2**31)},
        "holds 2147483648, expected 0 to 4096",
    ),
    "odd groups": ({"kv_heads": kv("llama.attention.head_count_kv", U32, 3)}, "not a multiple"),
    "short array": (
        {"kv_heads": kv_array("llama.attention.head_count_kv", U32, [2, 2])},
        "has 2 elements for 3 layers",
    ),
    "array of text": (
        {"kv_heads": kv_array("llama.attention.head_count_kv", STRING, ["2"] * 3)},
        "should be u32[], found string[]",
    ),
    "all layers predict": (
        {"nextn": kv("llama.nextn_predict_layers", U32, 4)},
        "is 4, expected 0 to 3",
    ),
    "no size": ({"embd": None}, "has no llama.embedding_length"),
    "huge key": ({"k": kv("llama.attention.key_length", U32, 2**31)}, "expected 1 to 8192"),
}


@pytest.mark.parametrize("case", BAD_SHAPES)
def test_bad_shape_is_one_sentence(tmp_path, case):
    keys, expected = BAD_SHAPES[case]
    path = llama(tmp_path / "m.gguf", **keys)
    with pytest.raises((GGUFError, ProfileError)) as error:
        read_model_shape(path)
    assert expected in str(error.value) and str(error.value).startswith(f"{path}: ")
    assert str(error.value).isprintable()


def test_unsupported_features_are_named(tmp_path):
    def feature(*extra: bytes) -> str | None:
        path = write(tmp_path / "f", gguf(list(extra)))
        return unsupported_feature(read_header(path), ModelShape("a", 1, (1,), (1,), 8, 8, 64))

    assert feature() is None
    assert "MLA" in feature(kv("a.attention.key_length_mla", U32, 192))
    assert "indexer" in feature(kv("a.attention.indexer.key_length", U32, 128))
    assert "recurrent" in feature(kv("a.ssm.state_size", U32, 16))
    assert "encoder" in feature(kv("a.attention.causal", BOOL, 0))
    assert feature(kv("a.attention.causal", BOOL, 1)) is None


# -- fingerprint


def test_fingerprint_knows_the_model_not_the_file(tmp_path):
    def fingerprint(name: str, raw: bytes) -> str:
        return read_model_shape(write(tmp_path / name, raw)).fingerprint

    base = small_model()
    same = fingerprint("a", base)
    assert len(same) == 64 and same == fingerprint("b", base)
    assert same == fingerprint("razor", small_model(razor_keys(HEADS)))
    assert same == fingerprint("more", small_model([kv("general.url", STRING, "x" * 500)]))
    assert same != fingerprint("layers", small_model(n_layer=1))
    assert same != fingerprint("kv heads", small_model(n_kv=4))
    other = bytearray(base)
    other[-17] ^= 1  # in the middle of the last tensor
    assert same != fingerprint("data", bytes(other))
    assert same != fingerprint("name", base.replace(b"b.weight", b"c.weight"))


def test_fingerprint_is_the_documented_one(tmp_path):
    """Computed here from docs/format.md, on a model of 600 tensors: every second one is sampled."""
    keys = [
        kv("general.architecture", STRING, "llama"),
        kv("llama.block_count", U32, 2),
        kv("llama.embedding_length", U32, 256),
        kv("llama.attention.head_count", U32, 8),
        kv_array("llama.attention.head_count_kv", I32, [2, 4]),
    ]
    size = 5000
    tensors, chunks, expected = [], [], b"razor fingerprint 1\0llama\0"
    expected += b"block_count=2\0nextn_predict_layers=\0embedding_length=256\0"
    expected += b"attention.head_count=8\0attention.head_count_kv=[2, 4]\0"
    expected += b"attention.key_length=\0attention.value_length=\0"
    padded = size + -size % 32
    for i in range(600):
        name = f"t{i}"
        tensors.append(tensor(name, (size, 1), 24, i * padded))
        chunks.append(random.Random(i).randbytes(size) + bytes(padded - size))
        expected += struct.pack("<I", len(name)) + name.encode()
        expected += struct.pack("<IQQIQ", 2, size, 1, 24, i * padded)
    for i in range(0, 600, 2):
        expected += chunks[i][(size - 1024) // 2 :][:1024]
    path = write(tmp_path / "m", gguf(keys, tensors, b"".join(chunks)))
    assert read_model_shape(path).fingerprint == hashlib.sha256(expected).hexdigest()


# -- profile


def test_profile_is_read(tmp_path):
    extra = [
        *razor_keys(HEADS, window_min=kv("razor.window_min", U32, 100)),
        kv_array("razor.head.echo_score", F32, [0.5] * 8),
        kv_array("razor.head.induction_score", F32, list(range(8))),
        kv_array("razor.head.scope", U32, [0] * 4),
        kv("razor.calibration.tokens", U32, 2500),
        kv("razor.calibration.source", STRING, "a test"),
        kv("razor.something_of_the_future", U64, 1),
    ]
    profile = read_profile(write(tmp_path / "m", small_model(extra)))
    assert [layer.tolist() for layer in profile.retrieval] == [[1, 0], [0, 1]]
    assert all(layer.dtype == np.uint8 for layer in profile.retrieval)
    assert profile.flat().tolist() == HEADS
    assert (profile.method, profile.sink_tokens, profile.window_min) == ("rope", 4, 100)
    assert (profile.window_divisor, profile.compensation) == (5, True)
    assert profile.induction_score.tolist() == list(range(8))
    assert profile.calibration == {"tokens": 2500, "source": "a test"}


def test_no_razor_keys_is_no_profile(tmp_path):
    assert read_profile(write(tmp_path / "m", small_model())) is None


BAD_KEYS = {
    "no version": ({"version": None}, "without razor.version"),
    "version 0": ({"version": kv("razor.version", U32, 0)}, "of version 0, this razor-local reads"),
    "version 2": ({"version": kv("razor.version", U32, 2)}, "without razor.head.scope"),
    "version 3": ({"version": kv("razor.version", U32, 3)}, "of version 3, this razor-local reads"),
    "version u8": ({"version": kv("razor.version", U8, 1)}, "should be u32, found u8"),
    "version text": ({"version": kv("razor.version", STRING, "1")}, "should be u32, found string"),
    "no method": ({"method": None}, "without razor.method"),
    "method": ({"method": kv("razor.method", STRING, "magic")}, "is 'magic', expected 'rope'"),
    "long method": ({"method": kv("razor.method", STRING, "m" * 999)}, "holds 999 bytes of text"),
    "terminal codes": (
        {"method": kv("razor.method", STRING, "\x1b[2J\n")},
        r"is '\x1b[2J\n', expected 'rope'",
    ),
    "method type": ({"method": kv("razor.method", U32, 1)}, "should be string, found u32"),
    "no sinks": ({"sink_tokens": None}, "without razor.sink_tokens"),
    "sinks": ({"sink_tokens": kv("razor.sink_tokens", U32, 4097)}, "is 4097, expected 0 to 4096"),
    "sinks i32": ({"sink_tokens": kv("razor.sink_tokens", I32, 4)}, "should be u32, found i32"),
    "sinks array": (
        {"sink_tokens": kv_array("razor.sink_tokens", U32, [4])},
        "should be u32, found u32[]",
    ),
    "window 0": ({"window_min": kv("razor.window_min", U32, 0)}, "is 0, expected 1 to 1073741824"),
    "window": ({"window_min": kv("razor.window_min", U32, 2**30 + 1)}, "expected 1 to 1073741824"),
    "divisor": ({"window_divisor": kv("razor.window_divisor", U32, 2**31)}, "expected 0 to 10737"),
    "divisor f32": ({"window_divisor": kv("razor.window_divisor", F32, 5)}, "u32, found f32"),
    "no compensation": ({"compensation": None}, "without razor.compensation"),
    "compensation 2": ({"compensation": kv("razor.compensation", BOOL, 2)}, "the byte 2, expected"),
    "compensation u8": ({"compensation": kv("razor.compensation", U8, 1)}, "bool, found u8"),
    "no heads": ({"head__retrieval": None}, "without razor.head.retrieval"),
    "few heads": (
        {"head__retrieval": kv_array("razor.head.retrieval", U8, [1, 0, 0])},
        "has 3 elements, the model has 4 KV heads (2 layers x 2 KV heads)",
    ),
    "many heads": (
        {"head__retrieval": kv_array("razor.head.retrieval", U8, [1] * 5)},
        "has 5 elements, the model has 4 KV heads",
    ),
    "no elements": (
        {"head__retrieval": kv_array("razor.head.retrieval", U8, [])},
        "has 0 elements, the model has 4 KV heads",
    ),
    "huge heads": (
        {"head__retrieval": kv_array("razor.head.retrieval", U8, [0] * 2_100_000)},
        "has 2100000 elements, expected at most",
    ),
    "head value": (
        {"head__retrieval": kv_array("razor.head.retrieval", U8, [1, 0, 2, 0])},
        "layer 1 holds other values than 0 and 1",
    ),
    "heads i8": ({"head__retrieval": kv_array("razor.head.retrieval", I8, HEADS)}, "found i8[]"),
    "heads scalar": ({"head__retrieval": kv("razor.head.retrieval", U8, 1)}, "u8[], found u8"),
    "heads text": (
        {"head__retrieval": kv_array("razor.head.retrieval", STRING, ["1"] * 4)},
        "should be u8[], found string[]",
    ),
    "unknown head key": (
        {"x": kv_array("razor.head.budget", U32, [1])},
        "the unknown key 'razor.head.budget'",
    ),
    "echo count": (
        {"x": kv_array("razor.head.echo_score", F32, [1.0] * 4)},
        "has 4 elements, the model has 8 query heads (2 layers x 4 query heads)",
    ),
    "echo type": ({"x": kv_array("razor.head.echo_score", U32, [1] * 8)}, "should be f32[], found"),
    "echo nan": (
        {"x": kv_array("razor.head.induction_score", F32, [float("nan")] * 8)},
        "razor.head.induction_score holds values that are not finite",
    ),
    "scope count": ({"x": kv_array("razor.head.scope", U32, [1])}, "has 1 elements, the model"),
    "calibration type": ({"x": kv("razor.calibration.seed", U16, 1)}, "string or u32, found u16"),
    "calibration text": (
        {"x": kv("razor.calibration.note", STRING, "n" * 5000)},
        "holds 5000 bytes of text, expected at most 4096",
    ),
    "calibration keys": (
        {str(i): kv(f"razor.calibration.k{i}", U32, i) for i in range(65)},
        "has 65 keys razor.calibration.*, expected at most 64",
    ),
    "fingerprint": (
        {"x": kv(KEY_FINGERPRINT, STRING, "abc")},
        "is 'abc', expected 64 hexadecimal digits",
    ),
}


@pytest.mark.parametrize("case", BAD_KEYS)
def test_bad_metadata_is_one_sentence(tmp_path, case):
    changes, expected = BAD_KEYS[case]
    path = write(tmp_path / "m.gguf", small_model(razor_keys(HEADS, **changes)))
    with pytest.raises((GGUFError, ProfileError)) as error:
        read_profile(path)
    text = str(error.value)
    assert expected in text
    assert text.count(str(path)) == 1 and text.isprintable() and len(text) < 400


# -- profiles made in Python


def test_profile_checks_its_values():
    heads = (np.array([1, 0]),)
    for options, expected in (
        ({"sink_tokens": -1}, "razor.sink_tokens is -1"),
        ({"sink_tokens": 1.5}, "is 1.5, expected a whole number"),
        ({"window_min": True}, "is True, expected a whole number"),
        ({"method": "ALiBi"}, "is 'ALiBi', expected 'rope' or 'alibi'"),
        ({"calibration": {"seed": -1}}, "razor.calibration.seed is -1"),
    ):
        with pytest.raises(ProfileError, match=expected.replace(".", r"\.")):
            Profile(heads, **options)
    for bad in ([2], [0.5], [[1, 0]]):
        with pytest.raises(ProfileError, match="layer 0 holds other values"):
            Profile((np.array(bad),))


def test_describe_heads():
    assert describe_heads((8,) * 32) == "32 layers x 8 KV heads"
    assert describe_heads((2, 4, 1)) == "3 layers x 1 to 4 KV heads"


# -- sidecars


def sidecar(fingerprint: str | None, heads: list[int] = HEADS) -> bytes:
    keys = [kv("general.architecture", STRING, "llama"), kv("general.name", STRING, "other")]
    if fingerprint is not None:
        keys.append(kv(KEY_FINGERPRINT, STRING, fingerprint))
    return gguf(keys + razor_keys(heads))


def test_sidecar_of_this_model(tmp_path):
    shape = read_model_shape(write(tmp_path / "m", small_model()))
    path = write(tmp_path / "s", sidecar(shape.fingerprint))
    assert read_sidecar(path, shape).flat().tolist() == HEADS


def test_sidecar_refusals(tmp_path):
    shape = read_model_shape(write(tmp_path / "m", small_model()))
    cases = {
        "another": (sidecar("0" * 64), "is the sidecar of another model file ('other'"),
        "none": (sidecar(None), "is not a sidecar (it has no razor.model.fingerprint)"),
        "model": (small_model(razor_keys(HEADS)), "is not a sidecar"),
        "shape": (sidecar(shape.fingerprint, [1, 0]), "has 2 elements, the model has 4 KV heads"),
        "type": (
            gguf([kv(KEY_FINGERPRINT, U32, 1), *razor_keys(HEADS)]),
            "should be string, found u32",
        ),
    }
    for name, (raw, expected) in cases.items():
        path = write(tmp_path / name, raw)
        with pytest.raises((ProfileError, GGUFError)) as error:
            read_sidecar(path, shape)
        assert expected in str(error.value) and str(path) in str(error.value)


VALID = small_model(
    [
        *razor_keys(HEADS),
        kv_array("razor.head.echo_score", F32, [0.5] * 8),
        kv("razor.calibration.seed", U32, 1),
    ]
)
RAZOR_START = VALID.index(b"razor.version")


@settings(max_examples=500, deadline=2000, suppress_health_check=list(HealthCheck))
@given(
    edits=st.lists(
        st.tuples(
            st.integers(RAZOR_START, VALID.index(b"a.weight")), st.binary(min_size=1, max_size=8)
        ),
        min_size=1,
        max_size=3,
    )
)
def test_mutated_profiles_are_read_or_refused(tmp_path, edits):
    raw = bytearray(VALID)
    for at, patch in edits:
        raw[at : at + len(patch)] = patch
    path = write(tmp_path / "fuzz.gguf", bytes(raw))
    try:
        profile = read_profile(path)
        assert profile is None or (
            len(profile.flat()) == 4
            and set(profile.flat()) <= {0, 1}
            and 0 <= profile.sink_tokens <= 4096
        )
    except RazorError as error:
        assert str(error).isprintable()


def test_tensors_do_not_matter_to_a_profile(tmp_path):
    raw = gguf(
        [
            kv("general.architecture", STRING, "llama"),
            kv("llama.block_count", U32, 1),
            kv("llama.embedding_length", U32, 64),
            kv("llama.attention.head_count", U32, 2),
            *razor_keys([1, 0]),
        ],
        [tensor("t", (8,))],
        bytes(32),
    )
    assert read_profile(write(tmp_path / "m", raw)).flat().tolist() == [1, 0]
