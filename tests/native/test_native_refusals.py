"""What cannot run is refused by name, in one sentence; bad metadata never crashes the library.

Everything that feeds the library a damaged file runs in a process of its own.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType

from tests.support import runner
from tests.support.other_models import MODELS, make_other
from tests.support.tiny_models import TinySpec, make_model, razor_kv

U8, I8, U32, I32 = (getattr(GGUFValueType, x) for x in ("UINT8", "INT8", "UINT32", "INT32"))
U64, F32, BOOL, STR = (getattr(GGUFValueType, x) for x in ("UINT64", "FLOAT32", "BOOL", "STRING"))
ARRAY = GGUFValueType.ARRAY

SPEC = TinySpec("llama", 2, 4, 2, 32, n_embd=32, n_ff=32, n_vocab=32, seed=41)
MASK = ((0, 1), (0, 0))
MISSING = object()

# name: (key, (value, type) or MISSING, what the sentence must say beside the key)
MALFORMED: dict[str, tuple[str, Any, str]] = {
    "version missing": ("razor.version", MISSING, "u32"),
    "version 0": ("razor.version", (0, U32), "0"),
    "version 3": ("razor.version", (3, U32), "3"),
    "version max": ("razor.version", (2**32 - 1, U32), str(2**32 - 1)),
    "version i32": ("razor.version", (1, I32), "i32"),
    "version u64": ("razor.version", (1, U64), "u64"),
    "version str": ("razor.version", ("1", STR), "str"),
    "version array": ("razor.version", (np.array([1], np.uint32), ARRAY), "u32"),
    "method missing": ("razor.method", MISSING, "str"),
    "method unknown": ("razor.method", ("ROPE", STR), "ROPE"),
    "method empty": ("razor.method", ("", STR), "rope"),
    "method of two lines": ("razor.method", ("ro\npe\x7f\x1b[1m", STR), "ro?pe"),
    "method long": ("razor.method", ("x" * 10**6, STR), "rope"),
    "method u32": ("razor.method", (1, U32), "u32"),
    "sinks missing": ("razor.sink_tokens", MISSING, "u32"),
    "sinks 4097": ("razor.sink_tokens", (4097, U32), "4097"),
    "sinks max": ("razor.sink_tokens", (2**32 - 1, U32), "4096"),
    "sinks f32": ("razor.sink_tokens", (4.0, F32), "f32"),
    "window_min missing": ("razor.window_min", MISSING, "u32"),
    "window_min 0": ("razor.window_min", (0, U32), "0"),
    "window_min large": ("razor.window_min", (2**30 + 1, U32), str(2**30)),
    "window_min i32": ("razor.window_min", (-1, I32), "i32"),
    "divisor missing": ("razor.window_divisor", MISSING, "u32"),
    "divisor u64": ("razor.window_divisor", (5, U64), "u64"),
    "compensation missing": ("razor.compensation", MISSING, "bool"),
    "compensation u8": ("razor.compensation", (1, U8), "u8"),
    "compensation str": ("razor.compensation", ("true", STR), "str"),
    "mask missing": ("razor.head.retrieval", MISSING, "u8"),
    "mask short": ("razor.head.retrieval", (bytes(3), ARRAY), "3"),
    "mask long": ("razor.head.retrieval", (bytes(5), ARRAY), "5"),
    "mask of query heads": ("razor.head.retrieval", (bytes(8), ARRAY), "8"),
    "mask value 2": ("razor.head.retrieval", (bytes([0, 2, 0, 0]), ARRAY), "2"),
    "mask value 255": ("razor.head.retrieval", (bytes([0, 0, 0, 255]), ARRAY), "255"),
    "mask i8": ("razor.head.retrieval", (np.zeros(4, np.int8), ARRAY), "i8"),
    "mask bool": ("razor.head.retrieval", (np.zeros(4, np.bool_), ARRAY), "bool"),
    "mask u32": ("razor.head.retrieval", (np.zeros(4, np.uint32), ARRAY), "u32"),
    "mask f32": ("razor.head.retrieval", (np.zeros(4, np.float32), ARRAY), "f32"),
    "mask strings": ("razor.head.retrieval", (["0", "1", "0", "0"], ARRAY), "str"),
    "mask scalar": ("razor.head.retrieval", (0, U8), "u8"),
    "mask str": ("razor.head.retrieval", ("0100", STR), "str"),
    "echo short": ("razor.head.echo_score", (np.zeros(4, np.float32), ARRAY), "8"),
    "echo u8": ("razor.head.echo_score", (bytes(8), ARRAY), "f32"),
    "echo NaN": ("razor.head.echo_score", (np.full(8, np.nan, np.float32), ARRAY), "[0]"),
    "induction infinite": (
        "razor.head.induction_score",
        (np.array([0] * 7 + [-np.inf], np.float32), ARRAY),
        "[7]",
    ),
    "induction long": ("razor.head.induction_score", (np.zeros(9, np.float32), ARRAY), "8"),
    "induction str": ("razor.head.induction_score", ("x", STR), "f32"),
    "scope count": ("razor.head.scope", (np.zeros(8, np.uint32), ARRAY), "4"),
    "unknown head key": ("razor.head.budget", (np.zeros(4, np.uint32), ARRAY), "unknown"),
}


def is_sentence(text: str | None) -> bool:
    return bool(text) and 10 < len(text) < 400 and text.isprintable()


@pytest.fixture(scope="module")
def process() -> Iterator[runner.Worker]:
    with runner.Worker(None) as worker:
        yield worker


def test_valid_metadata_is_accepted(tmp_path: Path, process) -> None:
    """The table's other end: the same file without damage loads, and leaves no error behind."""
    extra = {
        "razor.head.echo_score": (np.zeros(8, np.float32), ARRAY),
        "razor.head.induction_score": (np.ones(8, np.float32), ARRAY),
        "razor.head.scope": (np.zeros(4, np.uint32), ARRAY),
        "razor.calibration.seed": (7, U32),
        "razor.calibration.tool_version": ("x", STR),
    }
    path = make_model(tmp_path / "m.gguf", SPEC, razor_kv(MASK, window_min=16) | extra)
    assert process(runner.refusal, str(path)) is None
    for key, ends in (
        ("sink_tokens", (0, 4096)),
        ("window_min", (1, 2**30)),
        ("window_divisor", (0, 2**30)),
    ):
        for value in ends:
            limits = make_model(tmp_path / "limits.gguf", SPEC, razor_kv(MASK, **{key: value}))
            assert process(runner.refusal, str(limits)) is None, f"{key} {value}"
    with runner.Model(path) as model, runner.Context(model) as ctx:
        assert ctx.stats().active == 1
        assert runner.last_error() == ""


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_metadata(name: str, tmp_path: Path, process) -> None:
    key, value, says = MALFORMED[name]
    kv = razor_kv(MASK)
    if value is MISSING:
        del kv[key]
    else:
        kv[key] = value
    path = make_model(tmp_path / "m.gguf", SPEC, kv)
    sentence = process(runner.refusal, str(path))
    assert is_sentence(sentence), f"refused with {sentence!r}"
    assert key in sentence
    assert says in sentence


def test_only_an_unknown_razor_key(tmp_path: Path, process) -> None:
    path = make_model(tmp_path / "m.gguf", SPEC, {"razor.something": (1, U32)})
    sentence = process(runner.refusal, str(path))
    assert is_sentence(sentence) and "razor.version" in sentence


def test_switched_off_malformed_metadata_is_not_read(tmp_path: Path) -> None:
    """RAZOR_LOCAL_DISABLE is the way out of a file that does not load."""
    path = make_model(tmp_path / "m.gguf", SPEC, razor_kv(MASK) | {"razor.version": (9, U32)})
    with runner.Worker(None, {"RAZOR_LOCAL_DISABLE": "1"}) as worker:
        assert worker(runner.refusal, str(path)) is None


def mask_offset(data: bytes) -> int:
    """Offset of the element type of the mask's array value."""
    key = b"razor.head.retrieval"
    at = data.index(struct.pack("<Q", len(key)) + key) + 8 + len(key)
    assert struct.unpack_from("<I", data, at) == (int(ARRAY),)
    return at + 4


def test_lying_array_lengths(tmp_path: Path, process) -> None:
    """An array that claims more elements than the file has bytes; nested and unknown types."""
    data = make_model(tmp_path / "good.gguf", SPEC, razor_kv(MASK)).read_bytes()
    at = mask_offset(data)
    for elem, n in (
        (0, 2**20),
        (0, 2**40),
        (0, 2**63),
        (0, 2**64 - 1),
        (8, 2**40),
        (9, 1),
        (9, 2**40),
        (13, 4),
        (2**32 - 1, 4),
    ):
        bad = bytearray(data)
        struct.pack_into("<IQ", bad, at, elem, n)
        path = tmp_path / "bad.gguf"
        path.write_bytes(bad)
        assert process(runner.refusal, str(path)) is not None, f"element type {elem}, {n} elements"


def test_huge_mask(tmp_path: Path, process) -> None:
    """An array of 10 million entries that really are in the file."""
    data = make_model(tmp_path / "good.gguf", SPEC, razor_kv(MASK)).read_bytes()
    at = mask_offset(data)
    path, n = tmp_path / "bad.gguf", 10_000_004  # the tensors stay aligned
    with path.open("wb") as file:
        file.write(data[: at + 4] + struct.pack("<Q", n))
        file.write(bytes(n))
        file.write(data[at + 12 + 4 :])
    sentence = process(runner.refusal, str(path))
    path.unlink()
    assert is_sentence(sentence) and "razor.head.retrieval" in sentence and str(n) in sentence


def test_truncated_files(tmp_path: Path, process) -> None:
    """Cut anywhere in the metadata: the load fails, the process lives."""
    data = make_model(tmp_path / "good.gguf", SPEC, razor_kv(MASK)).read_bytes()
    start = data.index(b"razor.version")
    end = mask_offset(data) + 32
    path = tmp_path / "bad.gguf"
    for size in (0, 3, 4, 20, *range(start, end, 5), len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        assert process(runner.refusal, str(path)) is not None, f"{size} of {len(data)} bytes"


def test_flipped_bits(tmp_path: Path, process) -> None:
    """Random damage of the razor keys is refused or harmless, and never ends the process."""
    data = make_model(tmp_path / "good.gguf", SPEC, razor_kv(MASK, window_min=16)).read_bytes()
    start = data.index(b"razor.version")
    end = mask_offset(data) + 16
    rng = np.random.default_rng(0)
    path = tmp_path / "bad.gguf"
    for _ in range(150):
        bad = bytearray(data)
        bad[rng.integers(start, end)] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(bad)
        process(runner.refusal, str(path))


# arch of other_models -> what the sentence calls the reason
UNSUPPORTED = {
    "mpt": "ALiBi",
    "mamba": "recurrent",
    "deepseek2": "MLA",
}


def n_kv_heads(path: Path) -> int:
    with runner.Model(path) as model:
        return sum(model.layers())


@pytest.mark.parametrize("arch", UNSUPPORTED)
def test_unsupported_architecture(arch: str, tmp_path: Path) -> None:
    """By override and by metadata; without razor the model runs (test_native_stock)."""
    path = make_other(tmp_path / "m.gguf", arch)
    n = n_kv_heads(path)
    override = runner.Override(bytes(max(n, 1)), window=16)
    sentences = [runner.refusal(str(path), override)]
    if n > 0:  # there is no empty mask to write into a file
        with_keys = make_other(tmp_path / "k.gguf", arch, razor_kv([[0] * n], window_min=16))
        sentences.append(runner.refusal(str(with_keys)))
        assert runner.refusal(str(with_keys), runner.OFF) is None
    for sentence in sentences:
        assert is_sentence(sentence), f"refused with {sentence!r}"
        assert arch in sentence and UNSUPPORTED[arch].lower() in sentence.lower()
        assert "razor off" in sentence, "says what to do instead"


@pytest.mark.parametrize("arch", sorted(set(MODELS) - set(UNSUPPORTED)))
def test_other_architectures_run(arch: str, tmp_path: Path) -> None:
    """Those that are not in the list of refusals: razor really runs there."""
    path = make_other(tmp_path / "m.gguf", arch)
    n = n_kv_heads(path)
    with runner.Model(path) as model:
        with runner.Context(model, runner.Override(bytes(n), window=16)) as ctx:
            assert ctx.stats().active == 1
            assert np.isfinite(ctx.decode([1] * 300)).all()
            assert ctx.seq().n_folded > 0


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"n_seq_max": 4, "kv_unified": True}, "kv_unified"),
        ({"attention_type": 1}, "non-causal"),
    ],
    ids=["unified sequences", "non-causal"],
)
def test_unsupported_context(params: dict[str, Any], says: str, tiny) -> None:
    override = runner.Override(bytes(4), window=16)
    sentence = runner.refusal(str(tiny(SPEC)), override, **params)
    assert is_sentence(sentence) and says in sentence
    with runner.Model(tiny(SPEC)) as model, runner.Context(model, runner.OFF, **params) as ctx:
        assert ctx.stats().active == 0
        assert runner.last_error() == ""


def test_non_causal_attention_after_creation(tiny) -> None:
    """Switched on later, it makes decoding fail until it is switched off again."""
    override = runner.Override(bytes(4), window=16)
    tokens = runner.random_tokens(300, SPEC.n_vocab, 1)
    want = runner.logits(tiny(SPEC), tokens, override)
    with runner.Model(tiny(SPEC)) as model, runner.Context(model, override) as ctx:
        first = ctx.decode(tokens[:200])
        runner.bindings().llama_set_causal_attn(ctx.ptr, False)
        assert ctx.try_decode(tokens[200:])[0] != 0
        assert "causal" in runner.last_error()
        runner.bindings().llama_set_causal_attn(ctx.ptr, True)
        got = np.concatenate([first, ctx.decode(tokens[200:])])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_second_sequence_in_a_batch(tiny) -> None:
    """A token of another sequence is refused, the cache stays."""
    llama = runner.bindings()
    with runner.Model(tiny(SPEC)) as model:
        with runner.Context(model, runner.Override(bytes(4), window=16)) as ctx:
            ctx.decode([1, 2, 3])
            batch = llama.llama_batch_init(1, 0, 1)
            batch.n_tokens, batch.token[0], batch.pos[0] = 1, 1, 0
            batch.n_seq_id[0], batch.seq_id[0][0], batch.logits[0] = 1, 1, 1
            assert llama.llama_decode(ctx.ptr, batch) != 0
            llama.llama_batch_free(batch)
            assert ctx.seq().n_tokens == 3


OVERRIDES: dict[str, tuple[runner.Override, str]] = {
    "sinks": (runner.Override(bytes(4), sink_tokens=4097), "sink_tokens"),
    "window": (runner.Override(bytes(4), window=2**30 + 1), "window"),
    "window_min": (runner.Override(bytes(4), window_min=0), "window_min"),
    "mask value": (runner.Override(bytes([0, 0, 3, 0]), window=16), "3"),
    "mask of another model": (runner.Override(bytes(6), window=16), "6"),
    "huge mask": (runner.Override(bytes(1_000_000), window=16), "1000000"),
    "no mask anywhere": (runner.Override(None, window=16), "metadata"),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_bad_override(name: str, tiny) -> None:
    override, says = OVERRIDES[name]
    sentence = runner.refusal(str(tiny(SPEC)), override)
    assert is_sentence(sentence) and says in sentence
    # and the next context is not affected
    assert runner.refusal(str(tiny(SPEC))) is None


def test_struct_sizes_are_checked(tiny) -> None:
    api = runner.razor_api()
    params = runner.raw_params(runner.Override(bytes(4), window=16))
    params.size -= 4
    assert not api.llama_razor_set_override(ctypes.byref(params))
    assert is_sentence(runner.last_error())
    params = runner.raw_params(runner.Override(None, window=16))
    params.n_retrieval = 4  # and no pointer
    assert not api.llama_razor_set_override(ctypes.byref(params))
    assert is_sentence(runner.last_error())
    with runner.Model(tiny(SPEC)) as model, runner.Context(model) as ctx:
        stats = runner.Stats(ctypes.sizeof(runner.Stats) + 8)
        assert not api.llama_razor_get_stats(ctx.ptr, ctypes.byref(stats))
        assert is_sentence(runner.last_error())


def test_version_and_build_info() -> None:
    api = runner.razor_api()
    assert api.llama_razor_api_version() == 10
    version, sha256, *options = api.llama_razor_build_info().decode().split(" ")
    pin = (Path(__file__).parents[2] / "native" / "llama-cpp-python.txt").read_text()
    assert version in pin and re.fullmatch("[0-9a-f]{64}", sha256) and sha256 in pin
    assert options


def test_header_constants_match() -> None:
    """The numbers that tests and Python repeat are those of the header."""
    header = (Path(__file__).parents[2] / "native" / "src" / "llama-razor.h").read_text()
    from tests.support import reference

    assert re.search(rf"LLAMA_RAZOR_SLACK\s+{reference.SLACK}\b", header)
    assert os.environ.get("RAZOR_LOCAL_DISABLE", "") in ("", "0"), "the tests need razor"
