"""convert: byte-identical tensors, a file under its final name only when it is complete."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from razor_local.converters import write as writer
from razor_local.converters.heads import profile_from_heads
from razor_local.converters.write import check_output, write_copy, write_sidecar

from razor_local.errors import ConvertError, ProfileError
from razor_local.gguf.header import read_header
from razor_local.model_file import read_model_shape, read_profile
from razor_local.profile import Profile, read_sidecar
from tests.support.cli import run
from tests.support.gguf_bytes import (
    F32,
    STRING,
    U8,
    U32,
    gguf,
    kv,
    kv_array,
    razor_keys,
    small_model,
    tensor,
)
from tests.support.tiny_models import TinySpec, make_model, razor_kv

HEADS = "1\t0\n0\t0\n0\t1\n"  # of the tiny model: 3 layers x 2 KV heads
PROFILE = Profile((np.array([1, 0]), np.array([0, 0]), np.array([0, 1])), calibration={"seed": 3})


@pytest.fixture
def model(tmp_path) -> Path:
    return make_model(tmp_path / "model.gguf", TinySpec())


@pytest.fixture
def heads(tmp_path) -> Path:
    path = tmp_path / "heads.tsv"
    path.write_text(HEADS)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensor_bytes(path: Path) -> dict[str, bytes]:
    """Raw bytes of each tensor, read by gguf's own reader."""
    return {t.name: t.data.tobytes() for t in GGUFReader(path).tensors}


def other_keys(path: Path) -> dict[str, bytes]:
    """Raw bytes of each key that is not razor's."""
    raw = path.read_bytes()
    return {
        key: raw[e.start : e.end]
        for key, e in read_header(path).entries.items()
        if not key.startswith("razor.")
    }


# -- copies


def test_copy_differs_in_razor_keys_alone(model, heads, tmp_path):
    out = tmp_path / "out.gguf"
    before = digest(model)
    profile = profile_from_heads(heads, read_model_shape(model), window_min=77)
    assert write_copy(model, out, profile) == out
    assert digest(model) == before
    assert tensor_bytes(out) == tensor_bytes(model)
    assert other_keys(out) == other_keys(model)
    assert list(other_keys(out)) == list(other_keys(model))
    header = read_header(out)
    assert header.data_start % header.alignment == 0
    read = read_profile(out)
    assert [layer.tolist() for layer in read.retrieval] == [[1, 0], [0, 0], [0, 1]]
    assert read.window_min == 77 and read.calibration == profile.calibration
    assert read_model_shape(out).fingerprint == read_model_shape(model).fingerprint


def test_keys_have_the_documented_types(model, tmp_path):
    scores = np.linspace(0, 1, 12, dtype=np.float32)
    profile = Profile(
        PROFILE.retrieval,
        echo_score=scores,
        induction_score=scores[::-1],
        calibration={"source": "test", "tokens": 2500},
    )
    write_copy(model, tmp_path / "out.gguf", profile)
    entries = read_header(tmp_path / "out.gguf").entries
    assert {k: e.type_name for k, e in entries.items() if k.startswith("razor.")} == {
        "razor.version": "u32",
        "razor.method": "string",
        "razor.sink_tokens": "u32",
        "razor.window_min": "u32",
        "razor.window_divisor": "u32",
        "razor.compensation": "bool",
        "razor.head.retrieval": "u8[]",
        "razor.head.echo_score": "f32[]",
        "razor.head.induction_score": "f32[]",
        "razor.calibration.source": "string",
        "razor.calibration.tokens": "u32",
    }
    fields = GGUFReader(tmp_path / "out.gguf").fields
    assert fields["razor.head.retrieval"].contents() == [1, 0, 0, 0, 0, 1]
    np.testing.assert_array_equal(fields["razor.head.echo_score"].contents(), scores)


def test_old_razor_keys_are_replaced(tmp_path):
    extra = razor_kv([[1, 1]] * 3, sink_tokens=9)
    model = make_model(tmp_path / "m.gguf", TinySpec(), extra)
    write_copy(model, tmp_path / "out.gguf", PROFILE)
    assert read_profile(tmp_path / "out.gguf").flat().tolist() == [1, 0, 0, 0, 0, 1]
    assert read_profile(tmp_path / "out.gguf").sink_tokens == 4
    assert tensor_bytes(tmp_path / "out.gguf") == tensor_bytes(model)
    # converting again changes nothing but the name
    write_copy(tmp_path / "out.gguf", tmp_path / "again.gguf", PROFILE)
    assert digest(tmp_path / "again.gguf") == digest(tmp_path / "out.gguf")


@pytest.mark.parametrize("alignment", [1, 8, 32, 64, 4096])
@pytest.mark.parametrize("version", [2, 3])
def test_alignments_versions_and_key_order(tmp_path, alignment, version):
    """Razor keys between other keys, tensors whose size is no multiple of the alignment."""
    keys = [
        kv("general.alignment", U32, alignment),
        *razor_keys([0, 0])[:3],
        kv("general.architecture", STRING, "llama"),
        *razor_keys([0, 0])[3:],
        kv("llama.block_count", U32, 1),
        kv("llama.embedding_length", U32, 64),
        kv("llama.attention.head_count", U32, 2),
        kv("general.name", STRING, "x" * 77),
    ]
    second = -(-12 // alignment) * alignment
    data = bytes(range(12)).ljust(second, b"\0") + bytes(range(20, 25))
    tensors = [tensor("a", (3,)), tensor("b", (5,), 24, second)]
    model = tmp_path / "m.gguf"
    model.write_bytes(gguf(keys, tensors, data, version=version, alignment=alignment))
    out = tmp_path / "out.gguf"
    write_copy(model, out, Profile((np.array([1, 0]),)))
    header, raw = read_header(out), out.read_bytes()
    assert header.version == version and header.data_start % alignment == 0
    assert len(raw) % alignment == 0
    assert [raw[header.data_start + t.offset :][: t.nbytes] for t in header.tensors] == [
        bytes(range(12)),
        bytes(range(20, 25)),
    ]
    assert other_keys(out) == other_keys(model)


def test_large_copy_needs_little_memory(tmp_path):
    """64 MiB of tensors through a buffer of 8; the peak of Python's own allocations is measured."""
    import tracemalloc

    n = 64 << 20
    keys = [
        kv("general.architecture", STRING, "llama"),
        kv("llama.block_count", U32, 1),
        kv("llama.embedding_length", U32, 64),
        kv("llama.attention.head_count", U32, 2),
    ]
    model = tmp_path / "m.gguf"
    model.write_bytes(gguf(keys, [tensor("t", (n,), 24)]))
    with open(model, "ab") as file:
        file.truncate(model.stat().st_size + n)
    calls = []
    tracemalloc.start()
    write_copy(
        model,
        tmp_path / "o.gguf",
        Profile((np.array([1, 0]),)),
        progress=lambda *a: calls.append(a),
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20
    assert calls == sorted(calls) and len(calls) == 9  # the header, 8 buffers
    assert calls[-1][0] == calls[-1][1] == (tmp_path / "o.gguf").stat().st_size


# -- sidecars


def test_sidecar(model, tmp_path):
    out = tmp_path / "side.gguf"
    write_sidecar(model, out, PROFILE)
    assert out.stat().st_size < 4096
    shape = read_model_shape(model)
    read = read_sidecar(out, shape)
    assert read.flat().tolist() == [1, 0, 0, 0, 0, 1] and read.calibration == {"seed": 3}
    alone = read_model_shape(out)
    assert (alone.n_head_kv, alone.n_head, alone.head_dim_k, alone.name) == (
        shape.n_head_kv,
        shape.n_head,
        shape.head_dim_k,
        shape.name,
    )
    other = make_model(tmp_path / "other.gguf", TinySpec(seed=1))
    with pytest.raises(ProfileError, match="sidecar of another model file"):
        read_sidecar(out, read_model_shape(other))
    # the profile may go into a copy as well, the sidecar still fits that copy
    write_copy(model, tmp_path / "copy.gguf", PROFILE)
    read_sidecar(out, read_model_shape(tmp_path / "copy.gguf"))


# -- refusals: nothing is written, nothing is left


def test_output_that_is_the_model(model, tmp_path):
    before = digest(model)
    (tmp_path / "soft.gguf").symlink_to(model)
    os.link(model, tmp_path / "hard.gguf")
    (tmp_path / "folder").symlink_to(tmp_path)
    for name in ("model.gguf", "soft.gguf", "hard.gguf", "folder/model.gguf", "./model.gguf"):
        for function in (write_copy, write_sidecar):
            with pytest.raises(ConvertError, match="is the model itself"):
                function(model, tmp_path / name, PROFILE, force=True)
    # and the other way round: the model is named through a link
    with pytest.raises(ConvertError, match="is the model itself"):
        write_copy(tmp_path / "soft.gguf", model, PROFILE, force=True)
    assert digest(model) == before


def test_existing_output_needs_force(model, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_text("precious")
    with pytest.raises(ConvertError, match="exists; choose another name or pass --force"):
        write_copy(model, out, PROFILE)
    assert out.read_text() == "precious"
    write_copy(model, out, PROFILE, force=True)
    assert read_profile(out) is not None
    (tmp_path / "dangling.gguf").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConvertError, match="exists"):
        write_copy(model, tmp_path / "dangling.gguf", PROFILE)


def test_a_pipe_is_not_replaced(model, tmp_path):
    pipe = tmp_path / "pipe.gguf"
    try:
        os.mkfifo(pipe)
    except (AttributeError, OSError):
        pytest.skip("no named pipes here")
    for write in (write_copy, write_sidecar):
        with pytest.raises(ConvertError, match="is not a regular file; choose another name"):
            write(model, pipe, PROFILE, force=True)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_other_refusals_leave_no_file(model, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    wrong = Profile((np.array([1, 0]),))
    cases = [
        (ConvertError, "is a folder", tmp_path, PROFILE, model),
        (ConvertError, "does not exist; make it first", tmp_path / "no" / "o.gguf", PROFILE, model),
        (ProfileError, "for 1 layers x 2 KV heads, the model has 3", empty / "o", wrong, model),
    ]
    for kind, text, out, profile, source in cases:
        with pytest.raises(kind, match=text):
            write_copy(source, out, profile)
    write_sidecar(model, tmp_path / "side.gguf", PROFILE)
    for function in (write_copy, write_sidecar):
        with pytest.raises(ConvertError, match="has no tensors"):
            function(tmp_path / "side.gguf", empty / "o", PROFILE)
    assert list(empty.iterdir()) == []


def test_full_disk_is_seen_before_writing(model, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    size = model.stat().st_size
    out = tmp_path / "new" / "out.gguf"
    out.parent.mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(size, 0, size - 1))
    expected = f"has {size - 1:,} bytes free, out.gguf needs {size:,} bytes; free some space"
    with pytest.raises(ConvertError, match=expected):
        write_copy(model, out, PROFILE)
    assert list(out.parent.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(size, 0, size + 4096))
    write_copy(model, out, PROFILE)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc here")
@pytest.mark.parametrize("sidecar", [False, True])
def test_a_folder_without_files_is_seen_before_measuring(model, sidecar):
    """Its permissions say that root may write to it."""
    with pytest.raises(ConvertError, match="folder /proc cannot be written to .*choose another"):
        check_output(model, "/proc/x.gguf", sidecar=sidecar)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("write", [write_copy, write_sidecar])
def test_what_another_process_made_meanwhile_is_not_replaced(
    model, tmp_path, monkeypatch, write, links
):
    out = tmp_path / "new" / "out.gguf"
    out.parent.mkdir()
    verify = writer._verify_with_gguf

    def made(part) -> None:
        verify(part)
        out.write_text("theirs")

    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(writer, "_verify_with_gguf", made)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(ConvertError, match="out.gguf was created by another process"):
        write(model, out, PROFILE)
    assert out.read_text() == "theirs" and len(list(out.parent.iterdir())) == 1
    write(model, out, PROFILE, force=True)
    assert out.read_bytes()[:4] == b"GGUF" and len(list(out.parent.iterdir())) == 1
    out.unlink()
    monkeypatch.setattr(writer, "_verify_with_gguf", verify)
    write(model, out, PROFILE)
    assert len(list(out.parent.iterdir())) == 1


def test_failures_while_writing_leave_nothing(model, tmp_path, monkeypatch):
    out = tmp_path / "new" / "out.gguf"
    out.parent.mkdir()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def flipped(src, dst, start, end, done=None) -> None:
        """A disk that returns other bytes than were written."""
        src.seek(start)
        raw = bytearray(src.read(end - start))
        raw[len(raw) // 2] ^= 1
        dst.write(raw)

    for attribute, replacement, error in (
        ("_copy", full, OSError),
        ("_copy", interrupted, KeyboardInterrupt),
        ("_copy", flipped, (ConvertError, ValueError)),
        ("_verify_profile", interrupted, KeyboardInterrupt),
        ("_verify_with_gguf", interrupted, KeyboardInterrupt),
    ):
        out.write_text("before")
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(writer, attribute, replacement)
            write_copy(model, out, PROFILE, force=True)
        assert [p.name for p in out.parent.iterdir()] == ["out.gguf"]
        assert out.read_text() == "before"


def test_verification_sees_a_flipped_tensor_byte(model, tmp_path, monkeypatch):
    copy = writer._copy

    def flipped(src, dst, start, end, done=None) -> None:
        copy(src, dst, start, end, done)
        if done is not None:  # the tensor data: flip a byte of a small tensor's sample
            header = read_header(model)
            norm = next(t for t in header.tensors if t.nbytes <= 1024)
            dst.seek(norm.offset - (end - start), os.SEEK_CUR)
            dst.write(b"\xff")
            dst.seek(0, os.SEEK_END)

    monkeypatch.setattr(writer, "_copy", flipped)
    with pytest.raises(ConvertError, match="tensors of the copy are not the model's"):
        write_copy(model, tmp_path / "out.gguf", PROFILE, progress=lambda *_: None)
    assert not (tmp_path / "out.gguf").exists()


def test_truncated_model_is_refused(model, tmp_path):
    raw = model.read_bytes()
    model.write_bytes(raw[:-100])
    code, stdout, stderr = run(
        "convert", model, "-o", tmp_path / "o.gguf", "--heads", tmp_path / "none.tsv"
    )
    assert code == 1 and stdout == ""
    assert "the file ends inside tensor" in stderr and stderr.count("\n") == 1


def test_copy_can_be_read_by_whoever_reads_the_model(model, tmp_path):
    model.chmod(0o640)
    write_copy(model, tmp_path / "out.gguf", PROFILE)
    assert stat.S_IMODE((tmp_path / "out.gguf").stat().st_mode) == 0o640


def test_threads_do_not_share_temporary_files(model, tmp_path):
    errors = []

    def work() -> None:
        try:
            write_copy(model, tmp_path / "out.gguf", PROFILE, force=True)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert tensor_bytes(tmp_path / "out.gguf") == tensor_bytes(model)
    assert not list(tmp_path.glob(".*.part"))


# -- the command


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--sinks", "-1"], "--sink-tokens is -1, expected 0 to 4096"),
        (["--sinks", "5000"], "--sink-tokens is 5000, expected 0 to 4096"),
        (["--window-min", "0"], "--window-min is 0, expected 1 to 1073741824"),
        (["--window-divisor", "-5"], "--window-divisor is -5, expected 0 to 1073741824"),
    ],
)
def test_command_refuses_values_out_of_range(model, heads, tmp_path, args, text):
    out = tmp_path / "o.gguf"
    code, stdout, stderr = run("convert", model, "-o", out, "--heads", heads, *args)
    assert (code, stdout, stderr) == (1, "", f"Error: {text}\n")
    assert not out.exists()


def test_command_names_both_shapes(model, tmp_path):
    other = tmp_path / "other.tsv"
    other.write_text("1\t0\t0\t0\n" * 28)
    code, _, stderr = run("convert", model, "-o", tmp_path / "o.gguf", "--heads", other)
    assert code == 1
    assert stderr == (
        f"Error: {other} lists 28 layers x 4 KV heads, the model has 3 layers x 2 KV heads;"
        " it is for another model\n"
    )


@pytest.mark.usefixtures("built_library")
def test_command_takes_gates_and_a_share(model, tmp_path):
    gates, out = tmp_path / "gates.tsv", tmp_path / "out.gguf"
    gates.write_text("1\t1\n1\t0\n0.5\t1\n")
    code, stdout, stderr = run(
        "convert", model, "-o", out, "--heads", gates, "--budget", 0.5, "--no-proof"
    )
    assert (code, stdout) == (
        0,
        f"{out}: 3 of 6 KV heads are retrieval heads (50.0%)\n"
        "KV cache at 1,024 tokens: RazorAttention saves nothing\n"
        f"Next: razor-local chat {out}\n",
    )
    assert stderr == "Note: took 3 of 4 heads with the value 1, spread evenly over the layers.\n"
    assert read_profile(out).flat().sum() == 3
    code, _, stderr = run("convert", model, "-o", tmp_path / "o.gguf", "--heads", gates)
    assert code == 1 and "say which share of the KV heads keeps every token" in stderr
    code, _, stderr = run(
        "convert", model, "-o", tmp_path / "o.gguf", "--heads", gates, "--induction", 0.1
    )
    assert code == 2 and "--heads and --induction exclude each other" in stderr


def test_command_on_missing_files(model, heads, tmp_path):
    missing = tmp_path / "missing"
    for args in (["convert", missing, "--heads", heads], ["convert", model, "--heads", missing]):
        code, _, stderr = run(*args, "-o", tmp_path / "o.gguf")
        assert (code, stderr) == (1, f"Error: {missing}: No such file or directory\n")


def test_unknown_array_types_are_copied(tmp_path):
    """Keys of every kind pass through as bytes, arrays of strings too."""
    extra = [
        kv_array("tokenizer.ggml.more", STRING, ["a" * 1000, ""]),
        kv_array("x.u8", U8, [1, 2]),
        kv_array("x.none", F32, []),
    ]
    model = tmp_path / "m.gguf"
    model.write_bytes(small_model(extra))
    write_copy(model, tmp_path / "o.gguf", Profile((np.array([1, 0]), np.array([0, 0]))))
    assert other_keys(tmp_path / "o.gguf") == other_keys(model)


def test_documentation_names_every_key_and_its_type(model, tmp_path):
    """docs/format.md is the contract: its table is checked against what is really written."""
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `razor.")]
    documented = {row[1].strip(" `"): row[2].strip() for row in rows}
    scores = np.zeros(12, np.float32)
    profile = Profile(PROFILE.retrieval, echo_score=scores, induction_score=scores)
    write_sidecar(model, tmp_path / "s.gguf", profile)
    written = read_header(tmp_path / "s.gguf").entries
    for key, entry in written.items():
        if key.startswith("razor."):
            assert documented[key] == entry.type_name
    assert set(documented) - set(written) == {"razor.head.scope", "razor.calibration.*"}
    mask = (tmp_path / "s.gguf").read_bytes()
    entry = written["razor.head.retrieval"]
    example = text[text.index("14 00 00 00") :].split("```")[0].splitlines()
    octets = bytes.fromhex("".join(line[: line.rindex("  ")].strip() for line in example if line))
    assert mask[entry.start : entry.data][:-8] == octets[:-12]


def test_file_is_on_disk_before_it_gets_its_name(model, tmp_path, monkeypatch):
    """A power cut must not leave an empty file under the final name."""
    steps = []
    for name in ("fsync", "link", "replace"):
        real = getattr(os, name)

        def call(*args, name=name, real=real):
            steps.append(name)
            return real(*args)

        monkeypatch.setattr(os, name, call)
    write_copy(model, tmp_path / "out.gguf", PROFILE)
    assert steps == ["fsync", "link", "fsync"]  # the file, its new name, the folder
    write_copy(model, tmp_path / "out.gguf", PROFILE, force=True)
    assert steps[3:] == ["fsync", "replace", "fsync"]
