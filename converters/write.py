"""Writes a razor profile into a copy of a GGUF model, or into a sidecar.

The copy is made of byte ranges of the model: the old metadata without its razor keys, the new
keys, the tensor table, padding, the tensor data. Nothing is decoded and encoded again, so the
tensors and all other keys stay byte-identical, and memory does not grow with the model.

A file appears under its final name only when it is complete, on disk and verified.
"""

from __future__ import annotations

import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import ConvertError, ProfileError
from ..gguf_header import ARRAY, BOOL, F32, MAGIC, STRING, U8, U16, U32, Header, read_header
from ..profile import (
    KEY_CALIBRATION_PREFIX,
    KEY_COMPENSATION,
    KEY_ECHO,
    KEY_FINGERPRINT,
    KEY_INDUCTION,
    KEY_METHOD,
    KEY_PREFIX,
    KEY_RETRIEVAL,
    KEY_SINK_TOKENS,
    KEY_VERSION,
    KEY_WINDOW_DIVISOR,
    KEY_WINDOW_MIN,
    VERSION,
    ModelShape,
    Profile,
    profile_from_header,
    read_sidecar,
    shape_from_header,
)

CHUNK = 8 << 20
SIDECAR_VERSION = 3  # GGUF version
Progress = Callable[[int, int], None]  # bytes written, bytes in all

# what a sidecar keeps of the model, so that it can be inspected alone
SHAPE_KEYS = (
    "block_count", "nextn_predict_layers", "embedding_length", "context_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length",
)  # fmt: skip


def write_copy(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    profile: Profile,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes a copy of the model with the profile in place of any razor keys it had.

    Returns the path of the copy. Raises ConvertError (output refused, disk too small), ProfileError
    (profile of another shape), GGUFError (damaged model), OSError. Whatever is raised, Ctrl-C
    included, out is as it was before.
    """
    header, shape, out = _checked(model, out, profile, force)
    parts = header.number("split.count", (U16, U32))
    if parts is not None and parts > 1:
        raise ConvertError(
            f"{header.path} is one of {parts} files of a split model; merge them with"
            " llama-gguf-split --merge first, or write a sidecar of the first one"
        )
    if not header.tensors:
        raise ConvertError(
            f"{header.path} has no tensors; it is not a model but a sidecar or a vocabulary"
        )

    kept = [e for e in header.entries.values() if not e.key.startswith(KEY_PREFIX)]
    new = profile_keys(profile)
    head = _head(header.version, len(header.tensors), len(kept) + len(new))
    ranges = _merged([(e.start, e.end) for e in kept])
    table_end = (
        len(head) + sum(end - start for start, end in ranges) + sum(map(len, new))
        + header.tensor_table[1] - header.tensor_table[0]
    )  # fmt: skip
    data_start = -(-table_end // header.alignment) * header.alignment
    data_bytes = header.data_end - header.data_start
    total = data_start + data_bytes

    def write(dst: BinaryIO) -> None:
        with open(header.path, "rb") as src:
            dst.write(head)
            for start, end in ranges:
                _copy(src, dst, start, end)
            for key in new:
                dst.write(key)
            _copy(src, dst, *header.tensor_table)
            dst.write(bytes(data_start - table_end))
            done = None if progress is None else lambda n: progress(data_start + n, total)
            _copy(src, dst, header.data_start, header.data_end, done)
            dst.write(bytes(-data_bytes % header.alignment))

    def verify(path: Path) -> None:
        copy = read_header(path)
        if copy.tensors != header.tensors or copy.data_start != data_start:
            raise ConvertError(f"{out}: the tensor table of the copy is not the model's")
        _verify_profile(copy, shape, profile)
        if shape_from_header(copy).fingerprint != shape.fingerprint:
            raise ConvertError(
                f"{out}: the tensors of the copy are not the model's; check the disk"
            )
        _verify_with_gguf(path, copy)

    _write_file(out, total + header.alignment, header.path, write, verify)
    return out


def write_sidecar(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    profile: Profile,
    force: bool = False,
) -> Path:
    """Writes a GGUF without tensors that holds the profile and the model's fingerprint.

    Returns its path; raises as write_copy does.
    """
    header, shape, out = _checked(model, out, profile, force)
    if not header.tensors:
        raise ConvertError(
            f"{header.path} has no tensors; it is not a model but a sidecar or a vocabulary"
        )
    names = ["general.architecture", "general.name", *(f"{shape.arch}.{k}" for k in SHAPE_KEYS)]
    kept = [header.entries[name] for name in names if name in header.entries]
    new = [*profile_keys(profile), encode(KEY_FINGERPRINT, STRING, shape.fingerprint)]

    def write(dst: BinaryIO) -> None:
        dst.write(_head(SIDECAR_VERSION, 0, len(kept) + len(new)))
        with open(header.path, "rb") as src:
            for entry in kept:
                _copy(src, dst, entry.start, entry.end)
        for key in new:
            dst.write(key)

    def verify(path: Path) -> None:
        read_sidecar(path, shape)
        sidecar = read_header(path)
        _verify_profile(sidecar, shape, profile)
        _verify_with_gguf(path, sidecar)

    needed = sum(map(len, new)) + sum(e.end - e.start for e in kept) + 4096
    _write_file(out, needed, header.path, write, verify)
    return out


def profile_keys(profile: Profile) -> list[bytes]:
    """The razor keys of a profile, encoded, in the order of docs/format.md."""
    keys = [
        encode(KEY_VERSION, U32, VERSION),
        encode(KEY_METHOD, STRING, profile.method),
        encode(KEY_SINK_TOKENS, U32, profile.sink_tokens),
        encode(KEY_WINDOW_MIN, U32, profile.window_min),
        encode(KEY_WINDOW_DIVISOR, U32, profile.window_divisor),
        encode(KEY_COMPENSATION, BOOL, profile.compensation),
        encode_array(KEY_RETRIEVAL, U8, profile.flat()),
    ]
    for key, score in ((KEY_ECHO, profile.echo_score), (KEY_INDUCTION, profile.induction_score)):
        if score is not None:
            keys.append(encode_array(key, F32, score))
    for key, value in profile.calibration.items():
        kind = STRING if isinstance(value, str) else U32
        keys.append(encode(KEY_CALIBRATION_PREFIX + key, kind, value))
    return keys


def encode(key: str, kind: int, value: int | str | bool) -> bytes:
    """One key with a u32, bool or string value, as GGUF stores it."""
    if kind == STRING:
        raw = _string(value)
    else:
        raw = struct.pack("<?" if kind == BOOL else "<I", value)
    return _string(key) + struct.pack("<I", kind) + raw


def encode_array(key: str, element: int, values: np.ndarray) -> bytes:
    """One key with a u8 or f32 array, as GGUF stores it."""
    raw = np.ascontiguousarray(values, {U8: "<u1", F32: "<f4"}[element]).tobytes()
    return _string(key) + struct.pack("<IIQ", ARRAY, element, len(values)) + raw


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _head(version: int, n_tensors: int, n_keys: int) -> bytes:
    return MAGIC + struct.pack("<IQQ", version, n_tensors, n_keys)


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Joins ranges that touch, so that copying is a few large reads."""
    merged: list[tuple[int, int]] = []
    for start, end in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def _copy(
    src: BinaryIO, dst: BinaryIO, start: int, end: int, done: Callable[[int], None] | None = None
) -> None:
    src.seek(start)
    left = end - start
    while left:
        chunk = src.read(min(CHUNK, left))
        if not chunk:
            raise ConvertError("the model became shorter while it was being copied; try again")
        dst.write(chunk)
        left -= len(chunk)
        if done is not None:
            done(end - start - left)


def _checked(
    model: str | os.PathLike[str], out: str | os.PathLike[str], profile: Profile, force: bool
) -> tuple[Header, ModelShape, Path]:
    """Everything that can be refused before a byte is written."""
    header = read_header(model)
    shape = shape_from_header(header)
    profile.check_shape(shape)
    check_output(model, out, force)
    return header, shape, Path(out)


def check_output(
    model: str | os.PathLike[str], out: str | os.PathLike[str], force: bool = False
) -> None:
    """Raises ConvertError where a copy or sidecar of the model is not going to be written."""
    out = Path(out)
    if not out.parent.is_dir():
        raise ConvertError(f"the folder {out.parent} does not exist; make it first")
    if out.is_dir():
        raise ConvertError(f"{out} is a folder, expected the name of the new file")
    if out.exists() and os.path.samefile(out, model):
        raise ConvertError(
            f"{out} is the model itself; a model is never changed in place, choose another name"
        )
    if os.path.lexists(out) and not force:
        raise ConvertError(f"{out} exists; choose another name or pass --force")


def _write_file(
    out: Path,
    max_bytes: int,
    model: Path,
    write: Callable[[BinaryIO], None],
    verify: Callable[[Path], None],
) -> None:
    """Temporary file beside out, fsync, verify, rename. Leaves nothing behind when it fails."""
    free = shutil.disk_usage(out.parent).free
    if free < max_bytes:
        raise ConvertError(
            f"{out.parent} has {free / 2**20:.0f} MiB free, {out.name} needs"
            f" {max_bytes / 2**20:.0f} MiB; free some space or write a sidecar"
        )
    fd, name = tempfile.mkstemp(prefix=f".{out.name[:100]}.", suffix=".part", dir=out.parent)
    try:
        with open(fd, "wb") as file:
            write(file)
            file.flush()
            os.fsync(fd)
        # mkstemp makes private files; readable by whoever can read the model
        os.chmod(name, stat.S_IMODE(model.stat().st_mode) & 0o666 | stat.S_IWUSR)
        verify(Path(name))
        os.replace(name, out)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the rename itself is on disk only when the folder is
        folder = os.open(out.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _verify_profile(header: Header, shape: ModelShape, profile: Profile) -> None:
    read = profile_from_header(header, shape)
    if read is None or profile_keys(read) != profile_keys(profile):
        raise ProfileError(f"{header.path}: the profile reads back differently; check the disk")


def _verify_with_gguf(path: Path, header: Header) -> None:
    """A second opinion on the file by gguf's own reader."""
    from gguf import GGMLQuantizationType, GGUFReader

    known = {int(kind) for kind in GGMLQuantizationType}
    if any(tensor.kind not in known for tensor in header.tensors):
        return  # a tensor type newer than this gguf
    reader = GGUFReader(path)
    tensors = [(t.name, int(t.data_offset) - header.data_start) for t in reader.tensors]
    retrieval = reader.fields[KEY_RETRIEVAL]
    same = (
        tensors == [(t.name, t.offset) for t in header.tensors]
        and set(header.entries) <= set(reader.fields)
        and len(retrieval.data) == header.entries[KEY_RETRIEVAL].count
    )
    if not same:
        raise ConvertError(f"{path}: gguf reads the new file differently; nothing was written")
