"""The header reader: what it reads, and that no file makes it crash, hang or eat memory."""

from __future__ import annotations

import random
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from razor_local.errors import GGUFError
from razor_local.gguf.header import MAX_KEYS, MAX_STRINGS, MAX_TENSORS, TENSOR_TYPES, read_header
from tests.support.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    gguf,
    kv,
    kv_array,
    small_model,
    string,
    tensor,
    u32,
    u64,
)
from tests.support.tiny_models import TinySpec, make_model

ONE_KEY = kv("a", U32, 1)
HUGE = 2**63


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def test_reads_every_value_type(tmp_path):
    values = [
        (U8, 255), (1, -1), (U16, 65535), (3, -2), (U32, 2**32 - 1), (I32, -3), (F32, 0.5),
        (BOOL, 1), (STRING, "text \N{SNOWMAN}"), (U64, 2**64 - 1), (11, -(2**63)), (12, 0.25),
    ]  # fmt: skip
    keys = [kv(f"key{kind}", kind, value) for kind, value in values]
    header = read_header(write(tmp_path / "f", gguf(keys)))
    assert {k: (e.kind, e.value) for k, e in header.entries.items()} == {
        f"key{kind}": (kind, value) for kind, value in values
    }
    assert header.tensors == () and header.version == 3 and header.alignment == 32


def test_reads_arrays_on_request(tmp_path):
    keys = [
        kv_array("u8", U8, [0, 1, 1]),
        kv_array("f32", F32, [0.5, 1.5]),
        kv_array("names", STRING, ["x" * 300, "", "y"]),
        kv_array("empty", U32, []),
        kv("after", U32, 7),
    ]
    header = read_header(write(tmp_path / "f", gguf(keys)))
    np.testing.assert_array_equal(header.array("u8", U8, 3), [0, 1, 1])
    np.testing.assert_array_equal(header.array("f32", F32, 3), [0.5, 1.5])
    assert header.array("empty", U32, 3).shape == (0,)
    assert header.array("missing", U8, 3) is None
    assert header.entries["names"].count == 3 and header.entries["names"].value is None
    assert header.number("after", (U32,)) == 7
    with pytest.raises(GGUFError, match=r"key 'u8' should be f32\[\], found u8\[\]"):
        header.array("u8", F32, 3)
    with pytest.raises(GGUFError, match="has 3 elements, expected at most 2"):
        header.array("u8", U8, 2)
    with pytest.raises(GGUFError, match="key 'after' should be string, found u32"):
        header.string("after")


def test_places_tensors_and_keeps_byte_ranges(tmp_path):
    raw = small_model()
    header = read_header(write(tmp_path / "f", raw))
    a, b = header.tensors
    assert (a.name, a.dims, a.kind, a.offset, a.nbytes) == ("a.weight", (4, 3), 0, 0, 48)
    assert (b.name, b.dims, b.kind, b.offset, b.nbytes) == ("b.weight", (32,), 8, 64, 34)
    assert header.data_end == len(raw) == header.file_size
    start = header.data_start + b.offset
    assert raw[start : start + b.nbytes] == bytes(range(100, 134))
    rebuilt = raw[:24] + b"".join(raw[e.start : e.end] for e in header.entries.values())
    assert rebuilt == raw[: header.metadata[1]]


def test_agrees_with_gguf_on_a_real_model(tmp_path):
    from gguf import GGUFReader

    path = make_model(tmp_path / "m.gguf", TinySpec())
    ours, theirs = read_header(path), GGUFReader(path)
    assert set(ours.entries) == {k for k in theirs.fields if not k.startswith("GGUF.")}
    assert [(t.name, t.offset + ours.data_start, t.nbytes) for t in ours.tensors] == [
        (t.name, t.data_offset, t.n_bytes) for t in theirs.tensors
    ]


def test_tensor_sizes_are_those_of_gguf():
    from gguf.constants import GGML_QUANT_SIZES

    for kind, size in GGML_QUANT_SIZES.items():
        if kind.name != "Q8_1":  # gguf counts its scales as f32, ggml stores them as f16
            assert TENSOR_TYPES[int(kind)] == size, kind.name


def test_alignment_key_moves_the_data(tmp_path):
    raw = gguf([kv("general.alignment", U32, 128)], [tensor("t", (3,))], b"\1" * 12, alignment=128)
    header = read_header(write(tmp_path / "f", raw))
    assert header.data_start == 128 and header.alignment == 128


def test_version_2_is_read(tmp_path):
    assert read_header(write(tmp_path / "f", gguf([ONE_KEY], version=2))).version == 2


# what is wrong: (the file, words that the sentence must contain)
MALFORMED = {
    "empty": (b"", "not a GGUF file"),
    "magic": (b"GGML" + bytes(20), "not a GGUF file"),
    "magic only": (b"GGUF", "the file ends inside the version"),
    "version 0": (gguf([], version=0), "GGUF version 0, expected 2 or 3"),
    "version 1": (gguf([], version=1), "GGUF version 1, expected 2 or 3"),
    "version 4": (gguf([], version=4), "GGUF version 4, expected 2 or 3"),
    "big-endian": (b"GGUF" + (3).to_bytes(4, "big") + bytes(16), "big-endian"),
    "too many keys": (gguf([], n_keys=MAX_KEYS + 1), "claims 100001 metadata keys"),
    "too many tensors": (gguf([], n_tensors=MAX_TENSORS + 1), "claims 100001 tensors"),
    "endless keys": (gguf([], n_keys=HUGE), "metadata keys, expected at most"),
    "endless tensors": (gguf([], n_tensors=2**64 - 1), "tensors, expected at most"),
    "keys beyond the file": (gguf([ONE_KEY], n_keys=50), "the file ends inside its 50 metadata"),
    "tensors beyond the file": (gguf([ONE_KEY], n_tensors=50), "the file ends inside its 50 tens"),
    "key name beyond the file": (gguf([u64(60_000) + b"a" * 30]), "the file ends inside the name"),
    "huge key name": (gguf([u64(HUGE) + b"a" * 30]), f"is {HUGE} bytes long, expected at most"),
    "empty key name": (gguf([kv("", U32, 1)]), "the name of metadata key 0 is empty"),
    "key name not UTF-8": (gguf([kv(b"\xff\xfe", U32, 1)]), "not valid UTF-8"),
    "key name with terminal codes": (gguf([kv("a\x1b[2J", U32, 1)]), "holds control characters"),
    "same key twice": (gguf([ONE_KEY, ONE_KEY]), "metadata key 'a' appears twice"),
    "unknown type": (gguf([string("a") + u32(13) + u32(1)]), "key 'a' has the unknown type 13"),
    "huge type": (gguf([string("a") + u32(2**32 - 1) + u32(1)]), "the unknown type 4294967295"),
    "unknown element type": (
        gguf([string("a") + u32(ARRAY) + u32(99) + u64(0)]),
        "key 'a' has the unknown type 99",
    ),
    "array of arrays": (
        gguf([string("a") + u32(ARRAY) + u32(ARRAY) + u64(1) + bytes(40)]),
        "array of arrays",
    ),
    "huge array": (
        gguf([kv_array("a", U32, [1], count=HUGE)]),
        "the file ends inside the value of key 'a'",
    ),
    "huge array of strings": (
        gguf([kv_array("a", STRING, ["x"], count=HUGE)]),
        "the file ends inside the value of key 'a'",
    ),
    "string in an array beyond the file": (
        gguf([string("a") + u32(ARRAY) + u32(STRING) + u64(2) + u64(HUGE) + bytes(30)]),
        "the file ends inside the value of key 'a'",
    ),
    "huge string": (
        gguf([string("a") + u32(STRING) + u64(HUGE)]),
        "the value of key 'a' is 9223372036854775808 bytes long",
    ),
    "string beyond the file": (
        gguf([string("a") + u32(STRING) + u64(5000) + b"short"]),
        "the file ends inside the value of key 'a'",
    ),
    "alignment 0": (gguf([kv("general.alignment", U32, 0)]), "the alignment 0 is not a power"),
    "alignment 33": (gguf([kv("general.alignment", U32, 33)]), "the alignment 33 is not a power"),
    "huge alignment": (gguf([kv("general.alignment", U32, 2**31)]), "the alignment 2147483648"),
    "alignment type": (
        gguf([kv("general.alignment", STRING, "32")]),
        "key 'general.alignment' should be u32, found string",
    ),
    "long tensor name": (gguf([], [tensor("n" * 64, (1,))], bytes(4)), "is 64 bytes long"),
    "tensor twice": (
        gguf([], [tensor("t", (8,)), tensor("t", (8,), offset=32)], bytes(64)),
        "tensor 't' appears twice",
    ),
    "five dimensions": (gguf([], [tensor("t", (1,) * 5)], bytes(4)), "has 5 dimensions"),
    "endless dimensions": (
        gguf([], [string("t") + u32(2**32 - 1) + bytes(20)], bytes(64)),
        "has 4294967295 dimensions",
    ),
    "unknown tensor type": (gguf([], [tensor("t", (1,), 4)], bytes(4)), "the unknown type 4"),
    "row not of whole blocks": (
        gguf([], [tensor("t", (33,), 8)], bytes(64)),
        "rows of 33 elements, not a multiple of its type's block of 32",
    ),
    "huge tensor": (
        gguf([], [tensor("t", (2**40, 2**40))], bytes(64)),
        "the file ends inside tensor 't'",
    ),
    "overflowing tensor": (
        gguf([], [tensor("t", (2**63, 2**63, 2**63, 2**63))], bytes(64)),
        "the file ends inside tensor 't'",
    ),
    "tensor outside": (
        gguf([], [tensor("t", (1,), offset=HUGE)], bytes(4)),
        f"tensor 't' is at offset {HUGE}, expected 0",
    ),
    "tensors overlap": (
        gguf([], [tensor("t", (32,)), tensor("u", (32,), offset=32)], bytes(256)),
        "tensor 'u' is at offset 32, expected 128",
    ),
    "no data": (gguf([], [tensor("t", (8,))]), "the file ends inside tensor 't'"),
    "no padding": (
        gguf([], [tensor("t", (0,))], alignment=1),
        "the file ends before its tensors",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_one_sentence(tmp_path, case):
    raw, expected = MALFORMED[case]
    path = write(tmp_path / "bad.gguf", raw)
    start = time.perf_counter()
    with pytest.raises(GGUFError) as error:
        read_header(path)
    assert time.perf_counter() - start < 1
    text = str(error.value)
    assert expected in text
    assert text.startswith(f"{path}: ") and "\n" not in text and len(text) < 400


NAN, INF = float("nan"), float("inf")
EXPERTS = {"expert_count": (U32, 8), "expert_used_count": (U32, 2)}

# (keys of arch "llama" unless another is named, what the sentence says)
HYPER_PARAMETERS = [
    *(
        ({f"attention.{key}_epsilon": (F32, value)}, f"is {value:g}, expected {expected}")
        for key in ("layer_norm", "layer_norm_rms", "group_norm")
        for value, expected in ((-1, "0 to 1"), (2, "0 to 1"), (NAN, "a fin"), (-INF, "a fin"))
    ),
    ({"rope.freq_base": (F32, 0)}, "llama.rope.freq_base is 0, expected above 0"),
    ({"rope.freq_base_swa": (F32, -1)}, "llama.rope.freq_base_swa is -1, expected above 0"),
    ({"rope.scaling.factor": (F32, -2)}, "llama.rope.scaling.factor is -2, expected 0 or more"),
    ({"rope.scaling.type": (STRING, "x")}, "is 'x', expected one of none, linear, yarn, longrope"),
    ({"rope.scaling.attn_factor": (F32, INF)}, "attn_factor is inf, expected a finite number"),
    ({"attention.scale": (F32, NAN)}, "llama.attention.scale is nan, expected a finite number"),
    ({"logit_scale": (F32, NAN)}, "llama.logit_scale is nan, expected a finite number"),
    ({"swiglu_clamp_exp": [1.0, NAN]}, "llama.swiglu_clamp_exp is nan, expected a finite number"),
    ({"context_length": (U32, 2**31)}, "context_length is 2147483648, expected 0 to 2147483647"),
    ({"vocab_size": (U32, 2**32 - 1)}, "vocab_size is 4294967295, expected 0 to 2000000"),
    ({"rope.dimension_count": (U32, 31)}, "is 31, expected an even number up to the head size 32"),
    ({"rope.dimension_count": (U32, 34)}, "is 34, expected an even number up to the head size 32"),
    (
        {"rope.dimension_count_swa": (U32, 34)},
        "dimension_count_swa is 34, expected an even number up to the head size 32",
    ),
    ({"expert_count": (U32, 4)}, "expert_used_count is 0, expected 1 to 4 (expert_count is 4)"),
    ({"expert_used_count": (U32, 1)}, "expert_used_count is 1, expected 0 to 0"),
    ({"expert_count": (U32, 513)}, "llama.expert_count is 513, expected 0 to 512"),
    (EXPERTS | {"expert_group_count": (U32, 8)}, "is 8, expected less than expert_count (8)"),
    (EXPERTS | {"expert_group_count": (U32, 3)}, "is 3, expected a divisor of expert_count (8)"),
    (EXPERTS | {"expert_group_count": (U32, 4)}, "expert_group_used_count is 0, expected 1 to 3"),
    ({"wkv.head_size": (U32, 0), "arch": "rwkv6"}, "rwkv6.wkv.head_size is 0, expected 1 or more"),
    ({"ssm.group_count": (U32, 0), "arch": "mamba2"}, "group_count is 0, expected 1 or more"),
    ({"rope.dimension_sections": [0] * 4, "arch": "qwen2vl"}, "is [0, 0, 0, 0], expected numbers"),
    ({"rope.dimension_sections": [20, 20, 0, 0]}, "together at most the head size 32"),
]


def hyper_parameters(keys: dict) -> bytes:
    keys = {"embedding_length": (U32, 128), "attention.head_count": (U32, 4)} | keys
    arch = keys.pop("arch", "llama")
    written = [kv("general.architecture", STRING, arch)]
    for key, value in keys.items():
        if isinstance(value, list):
            kind = I32 if isinstance(value[0], int) else F32
            written.append(kv_array(f"{arch}.{key}", kind, value))
        else:
            written.append(kv(f"{arch}.{key}", *value))
    return gguf(written)


@pytest.mark.parametrize(("keys", "says"), HYPER_PARAMETERS)
def test_numbers_that_llama_cpp_cannot_compute_with_are_refused(keys, says, tmp_path):
    with pytest.raises(GGUFError) as refused:
        read_header(write(tmp_path / "m.gguf", hyper_parameters(dict(keys))))
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_unusual_numbers_of_real_models_are_read(tmp_path):
    for keys in (
        {"attention.layer_norm_rms_epsilon": (F32, 0)},
        {"attention.head_count": (U32, 0), "ssm.time_step_rank": (U32, 8), "arch": "mamba"},
        {"ssm.group_count": (U32, 0), "arch": "plamo2"},
        {"rope.scaling.factor": (F32, 0), "rope.scaling.type": (STRING, "yarn")},
        {"rope.dimension_sections": [0] * 4, "arch": "glm4"},
        {"rope.dimension_sections": [8, 4, 4, 0], "arch": "qwen2vl"},
        EXPERTS | {"expert_group_count": (U32, 4), "expert_group_used_count": (U32, 2)},
        {"expert_count": (U32, 8), "expert_used_count": [0, 2]},
        {"attention.key_length": (U32, 64), "rope.dimension_count": (U32, 64)},
        {"rope.dimension_count": (U32, 0)},
    ):
        read_header(write(tmp_path / "m.gguf", hyper_parameters(dict(keys))))


def test_many_hyper_parameters_cost_no_time(tmp_path):
    path = write(tmp_path / "m.gguf", hyper_parameters({"x": [0] * 200_000}))
    with pytest.raises(GGUFError, match="hold more than the limit of 100000 numbers"):
        read_header(path)


def test_crafted_counts_cost_no_memory(tmp_path):
    """A sparse file makes huge claims look possible; the caps hold all the same."""
    claims = {
        "strings": kv_array("a", STRING, [], count=MAX_STRINGS + 1),
        "bytes": kv_array("a", U8, [], count=2**33),
        "string": string("a") + u32(STRING) + u64(2**33),
    }
    for name, claim in claims.items():
        path = write(tmp_path / name, gguf([claim]))
        with open(path, "r+b") as file:
            file.truncate(2**34)  # sparse: takes no disk
        tracemalloc.start()
        start = time.perf_counter()
        with pytest.raises(GGUFError):
            read_header(path)
        assert time.perf_counter() - start < 2
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
        tracemalloc.stop()


def test_text_is_kept_up_to_a_limit(tmp_path):
    """Half a GB of values that fit one by one would take 2 GB: a letter of four bytes in each."""
    path, text = tmp_path / "text.gguf", "\U0001d11e" + "a" * 65_000
    keys = [kv(f"k{i}", STRING, text) for i in range(1100)]
    write(path, gguf(keys[:1000]))
    assert len(read_header(path).entries) == 1000
    write(path, gguf(keys))
    with pytest.raises(GGUFError, match="key 'k1032': its keys hold more than 64 MiB of text"):
        read_header(path)


def test_every_truncation_is_refused(tmp_path):
    raw = small_model()
    path = tmp_path / "cut.gguf"
    for n in range(len(raw)):
        path.write_bytes(raw[:n])
        with pytest.raises(GGUFError, match="the file ends|not a GGUF"):
            read_header(path)


def test_folder_and_missing_file(tmp_path):
    with pytest.raises(GGUFError, match="is a folder"):
        read_header(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "missing.gguf")


def test_large_vocabulary_is_fast(tmp_path):
    """150,000 tokens and 300,000 merges in a second (best of three: machines are busy)."""
    rng = random.Random(0)
    tokens = [string("t" * rng.randrange(1, 16)) for _ in range(150_000)]
    merges = [string("m" * rng.randrange(3, 20)) for _ in range(300_000)]
    head = string("tokens") + u32(ARRAY) + u32(STRING) + u64(len(tokens))
    more = string("merges") + u32(ARRAY) + u32(STRING) + u64(len(merges))
    raw = gguf([head + b"".join(tokens), more + b"".join(merges), kv("last", U32, 5)])
    path = write(tmp_path / "vocab.gguf", raw)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        header = read_header(path)
        times.append(time.perf_counter() - start)
    assert header.entries["last"].value == 5 and header.entries["merges"].count == 300_000
    assert min(times) < 1


VALID = small_model([kv_array("u", U16, [1, 2, 3]), kv("s", STRING, "s" * 200)])


@settings(max_examples=800, deadline=2000, suppress_health_check=list(HealthCheck))
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, len(VALID) - 1),
            st.one_of(
                st.binary(min_size=1, max_size=9),
                st.sampled_from([u64(2**64 - 1), u64(2**63), u64(2**31), u32(9), u32(8)]),
            ),
        ),
        min_size=1,
        max_size=4,
    ),
    cut=st.one_of(st.none(), st.integers(0, len(VALID))),
)
def test_mutated_files_are_read_or_refused(tmp_path, edits, cut):
    """Only GGUFError may come out, within the deadline, whatever the bytes."""
    raw = bytearray(VALID)
    for at, patch in edits:
        raw[at : at + len(patch)] = patch
    path = write(tmp_path / "fuzz.gguf", bytes(raw[:cut]))
    try:
        header = read_header(path)
        assert header.data_end <= header.file_size
        for key, entry in header.entries.items():
            if entry.kind == ARRAY and entry.element in (U8, U16, U32, F32):
                assert len(header.array(key, entry.element, 10**6)) == entry.count
    except GGUFError as error:
        assert str(error).isprintable()
