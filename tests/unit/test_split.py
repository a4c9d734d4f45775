"""Models of several files: read as one, copied file by file, never half a set that opens."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from razor_local.converters import write as writer
from razor_local.converters.write import write_copy, write_sidecar

from razor_local.errors import ConvertError, GGUFError, ProfileError
from razor_local.gguf.header import read_header
from razor_local.gguf.split import part_paths, read_parts
from razor_local.model_file import read_model_shape, read_profile
from razor_local.profile import Profile, read_sidecar
from tests.support.gguf_bytes import I32, U16, U32, gguf, kv, small_model, tensor
from tests.support.tiny_models import TinySpec, make_model, make_split_model

PROFILE = Profile((np.array([1, 0]), np.array([0, 0]), np.array([0, 1])), calibration={"seed": 3})
OTHER = Profile((np.array([0, 0]), np.array([1, 1]), np.array([0, 0])))


@pytest.fixture(params=[True, False], ids=["tensors in the first file", "metadata alone in it"])
def split(tmp_path, request) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    first = make_split_model(folder, TinySpec(), tensors_in_first=request.param)
    assert len(list(folder.iterdir())) > 2
    return first


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensor_bytes(*paths: Path) -> dict[str, bytes]:
    """Raw bytes of the tensors of all files, by gguf's own reader."""
    return {t.name: t.data.tobytes() for path in paths for t in GGUFReader(path).tensors}


def test_names():
    assert [p.name for p in part_paths(Path("a/m.gguf"), 2)] == [
        "m-00001-of-00002.gguf",
        "m-00002-of-00002.gguf",
    ]
    assert part_paths(Path("a/m-00001-of-00002.gguf"), 2) == part_paths(Path("a/m.gguf"), 2)
    assert part_paths(Path("a/m.gguf"), 1) == (Path("a/m.gguf"),)


def test_a_split_model_is_read_as_one(split, tmp_path):
    one = make_model(tmp_path / "one.gguf", TinySpec())
    parts = read_parts(read_header(split))
    assert [p.path for p in parts] == sorted(split.parent.iterdir())
    assert tensor_bytes(*(p.path for p in parts)) == tensor_bytes(one)
    shape, whole = read_model_shape(split), read_model_shape(one)
    assert (shape.n_head_kv, shape.head_dim_k) == (whole.n_head_kv, whole.head_dim_k)
    fingerprint = shape.fingerprint  # the bytes of every file count
    for part in parts:
        if not part.tensors:
            continue
        raw = bytearray(part.path.read_bytes())
        raw[part.data_start + part.tensors[0].nbytes // 2] ^= 1
        before = part.path.read_bytes()
        part.path.write_bytes(raw)
        assert read_model_shape(split).fingerprint != fingerprint
        part.path.write_bytes(before)
    assert read_model_shape(split).fingerprint == fingerprint


@pytest.mark.parametrize("name", ["out.gguf", "out-00001-of-{:05}.gguf"])
def test_copy_follows_the_scheme_of_names(split, tmp_path, name):
    n = len(list(split.parent.iterdir()))
    folder = tmp_path / "new"
    folder.mkdir()
    before = files(split.parent)
    calls = []
    out = write_copy(split, folder / name.format(n), PROFILE, progress=lambda *a: calls.append(a))
    assert out == folder / f"out-00001-of-{n:05}.gguf"
    assert [p.name for p in sorted(folder.iterdir())] == [p.name for p in part_paths(out, n)]
    assert files(split.parent) == before
    for mine, theirs in zip(part_paths(out, n)[1:], part_paths(split, n)[1:], strict=True):
        assert mine.read_bytes() == theirs.read_bytes()
    assert tensor_bytes(*folder.iterdir()) == tensor_bytes(*split.parent.iterdir())
    assert read_profile(out).flat().tolist() == [1, 0, 0, 0, 0, 1]
    assert read_model_shape(out).fingerprint == read_model_shape(split).fingerprint
    assert calls == sorted(calls) and calls[-1][0] == calls[-1][1]
    assert calls[-1][1] == sum(len(raw) for raw in files(folder).values())


def test_sidecar_of_a_split_model(split, tmp_path):
    write_sidecar(split, tmp_path / "s.gguf", PROFILE)
    assert read_sidecar(tmp_path / "s.gguf", read_model_shape(split)).calibration == {"seed": 3}
    last = sorted(split.parent.iterdir())[-1]
    raw = bytearray(last.read_bytes())
    header = read_header(last)
    raw[header.data_start + header.tensors[0].nbytes // 2] ^= 1
    last.write_bytes(raw)
    with pytest.raises(ProfileError, match="sidecar of another model file"):
        read_sidecar(tmp_path / "s.gguf", read_model_shape(split))


# -- refusals


def test_missing_files_are_named(split, tmp_path):
    paths = sorted(split.parent.iterdir())
    for path in paths[1:]:
        path.rename(tmp_path / path.name)
    for function in (read_model_shape, lambda p: write_copy(p, tmp_path / "o.gguf", PROFILE)):
        with pytest.raises(GGUFError) as error:
            function(split)
        assert all(path.name in str(error.value) for path in paths[1:])
        assert f"first of {len(paths)} files" in str(error.value)


def test_a_later_file_is_no_model(split):
    for path in sorted(split.parent.iterdir())[1:]:
        with pytest.raises(GGUFError, match=f"pass the first one, {split.name}"):
            read_model_shape(path)


def test_other_names_are_refused(split, tmp_path):
    shutil.copy(split, split.with_name("model.gguf"))
    with pytest.raises(GGUFError, match=r"so its name must end in -00001-of-0000\d\.gguf"):
        read_model_shape(split.with_name("model.gguf"))


def parts(folder: Path, *keys: list[bytes], name: str = "b") -> Path:
    """Two files: small_model() with the keys, and one with a tensor of that name."""
    first = folder / "m-00001-of-00002.gguf"
    first.write_bytes(small_model(keys[0]))
    (folder / "m-00002-of-00002.gguf").write_bytes(gguf(keys[1], [tensor(name, (8,))], bytes(32)))
    return first


def split_keys(no: int, count: int = 2, tensors: int = 3) -> list[bytes]:
    return [
        kv("split.no", U16, no),
        kv("split.count", U16, count),
        kv("split.tensors.count", I32, tensors),
    ]


@pytest.mark.parametrize(
    ("first", "second", "name", "text"),
    [
        (split_keys(0), split_keys(0), "b", "expected file 2 of 2 .* are 0 and 2"),
        (split_keys(0), split_keys(1, 3), "b", "expected file 2 of 2 .* are 1 and 3"),
        (split_keys(0), [], "b", "expected file 2 of 2 .* are None and None"),
        (split_keys(0), split_keys(1), "b.weight", "two of its files hold the same tensor"),
        (split_keys(0, 2, 4), split_keys(1), "b", r"hold 3 tensors, but split.tensors.count is 4"),
        (split_keys(0)[1:], split_keys(1), "b", "has split.count but no split.no"),
        ([kv("split.count", U32, 2)], [], "b", "'split.count' should be u16, found u32"),
        (split_keys(0, 60000), [], "b", "one of 60000 files of a split model, expected at most"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path, first, second, name, text):
    with pytest.raises(GGUFError, match=text):
        read_model_shape(parts(tmp_path, first, second, name=name))


def test_files_that_belong_together(tmp_path):
    assert read_model_shape(parts(tmp_path, split_keys(0), split_keys(1))).n_layer == 2


def test_outputs_that_are_the_model_or_exist(split, tmp_path):
    before = files(split.parent)
    for name in (split.name, "split.gguf"):
        with pytest.raises(ConvertError, match="is the model itself"):
            write_copy(split, split.with_name(name), PROFILE, force=True)
    last = sorted(split.parent.iterdir())[-1]
    taken = tmp_path / last.name.replace("split", "out")
    taken.write_text("precious")
    with pytest.raises(ConvertError, match=f"{taken.name} exists; choose another name"):
        write_copy(split, tmp_path / "out.gguf", PROFILE)
    taken.unlink()
    taken.symlink_to(last)
    with pytest.raises(ConvertError, match="is the model itself"):
        write_copy(split, tmp_path / "out.gguf", PROFILE, force=True)
    assert files(split.parent) == before


# -- complete or not there


def opens(first: Path) -> bool:
    try:
        return read_profile(first) is not None
    except (GGUFError, ProfileError, FileNotFoundError):
        return False


def test_a_crash_at_any_step_of_renaming_leaves_no_set_that_opens(split, tmp_path, monkeypatch):
    """Every state of the folder between two steps, with and without a set of another model there.

    Both models have the same tensors, so nothing but the order keeps a mixture from opening.
    """
    folder, another = tmp_path / "new", tmp_path / "another"
    another.mkdir()
    tensors_in_first = bool(read_header(split).tensors)
    another = make_split_model(another, TinySpec(seed=1), tensors_in_first=tensors_in_first)
    folder.mkdir()
    out = write_copy(split, folder / "out.gguf", PROFILE)
    new = files(folder)
    shutil.rmtree(folder)
    for overwrite in (False, True):
        folder.mkdir()
        old = {}
        if overwrite:
            write_copy(another, folder / "out.gguf", OTHER)
            old = files(folder)
            assert old.keys() == new.keys() and not set(old.values()) & set(new.values())
        states = []

        def note(*args, real, folder=folder, states=states):
            states.append(files(folder))
            return real(*args)

        with monkeypatch.context() as patch:
            for name in ("replace", "unlink", "fsync"):
                real = getattr(os, name)
                patch.setattr(os, name, lambda *a, real=real, note=note: note(*a, real=real))
            write_copy(split, folder / "out.gguf", PROFILE, force=True)
        assert files(folder) == new and len(states) > 2 * len(new)
        shutil.rmtree(folder)
        seen = set()
        for state in states:
            folder.mkdir()
            for name, raw in state.items():
                (folder / name).write_bytes(raw)
            visible = {name: raw for name, raw in state.items() if not name.startswith(".")}
            assert opens(out) == (visible in (new, old) and bool(visible))
            seen.add(opens(out))
            shutil.rmtree(folder)
        assert seen == ({False, True})  # before the last step of fsync the set is there


@pytest.mark.parametrize("step", range(6))
def test_failures_leave_what_was_there(split, tmp_path, monkeypatch, step):
    """An error instead of the n-th fsync or rename: no temporary file, no part of a set."""
    folder = tmp_path / "new"
    folder.mkdir()
    calls = []

    def fail(*args, real):
        calls.append(args)
        if len(calls) == step + 1:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for name in ("link", "fsync"):
            real = getattr(os, name)
            patch.setattr(os, name, lambda *a, real=real: fail(*a, real=real))
        write_copy(split, folder / "out.gguf", PROFILE)
    assert list(folder.iterdir()) == []


def test_a_flipped_byte_in_a_later_file_is_seen(split, tmp_path, monkeypatch):
    copy, last = writer._copy, sorted(split.parent.iterdir())[-1]

    def flipped(src, dst, start, end, done=None) -> None:
        copy(src, dst, start, end, done)
        if src.name == str(last):
            header = read_header(last)
            dst.seek(header.data_start + header.tensors[0].nbytes // 2)
            dst.write(b"\xff")

    monkeypatch.setattr(writer, "_copy", flipped)
    with pytest.raises(ConvertError, match="tensors of the copy are not the model's"):
        write_copy(split, tmp_path / "out.gguf", PROFILE)
    assert not list(tmp_path.glob("*out*"))
