"""Write a razor profile into a copy of a GGUF model, or into a sidecar.

The copy consists of byte ranges of the model: the old metadata without its razor keys, the new
keys, the tensor table, padding and the tensor data. Nothing is decoded and encoded again, so the
tensors and all other keys stay byte-identical, and memory does not grow with the model.

A file appears under its final name only when it is complete, on disk and verified.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from ..common import files
from ..common.files import check_new_file, check_room, create_part, publish
from ..common.progress import Progress, silent
from ..errors import ConvertError, ProfileError
from ..gguf.header import MAGIC, STRING, Header, read_header
from ..gguf.split import part_paths
from ..model_file import ModelFile, open_model
from ..model_shape import model_fingerprint
from ..profile import (
    KEY_FINGERPRINT,
    KEY_PREFIX,
    KEY_RETRIEVAL,
    Profile,
    profile_from_header,
    sidecar_from_header,
)
from .encode import encode, profile_keys

CHUNK = 8 << 20
SIDECAR_VERSION = 3  # GGUF version

# Keys of the model that a sidecar keeps, so that it can be inspected alone.
SHAPE_KEYS = (
    "block_count",
    "nextn_predict_layers",
    "embedding_length",
    "context_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    # which layers have full attention, see layer_caches.py
    "attention.key_length_swa",
    "attention.value_length_swa",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.shared_kv_layers",
    "attention.recurrent_layers",
    "full_attention_interval",
    "feed_forward_length",
    "shortconv.l_cache",
    "ssm.conv_kernel",
    "ssm.group_count",
    "ssm.inner_size",
    "ssm.state_size",
)


def write_copy(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    profile: Profile,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a copy of the model in which the profile replaces any razor keys.

    A split model is copied file by file: out "m.gguf" becomes m-00001-of-00003.gguf and so on.
    After any exception, including Ctrl-C, out is as it was before. Only a split output that is
    overwritten can be lost, if the process ends between two renames.

    Returns:
        The path of the copy, or of its first file.

    Raises:
        ConvertError: the output is refused, or the disk has too little room.
        ProfileError: the profile has another shape than the model.
        GGUFError: the model is damaged.
        OSError: a file cannot be read or written.
    """
    model = open_model(model)
    _check_model(model, profile)
    outs = check_output(model, out, force)
    header, parts, shape = model.header, model.parts, model.shape
    new = profile_keys(profile)
    first = _FirstFile(header, new)
    total = first.size + sum(part.file_size for part in parts[1:])
    report, written = progress or silent, 0

    def done(n: int) -> None:
        nonlocal written
        written += n
        report(written, total, f"writing {outs[0].name}")

    def whole(part: Header) -> Callable[[BinaryIO], None]:
        def write(dst: BinaryIO) -> None:
            with open(part.path, "rb") as src:
                _copy(src, dst, 0, part.file_size, done)

        return write

    def verify(paths: list[Path]) -> None:
        copies = [read_header(path) for path in paths]
        starts = [first.data_start, *(part.data_start for part in parts[1:])]
        for copy, part, start in zip(copies, parts, starts, strict=True):
            if copy.tensors != part.tensors or copy.data_start != start:
                raise ConvertError(f"{outs[0]}: the tensor table of the copy is not the model's")
        _verify_profile(copies[0], profile_from_header(copies[0], shape), profile)
        if model_fingerprint(copies) != shape.fingerprint:
            raise ConvertError(
                f"{outs[0]}: the tensors of the copy are not the model's; check the disk"
            )
        for copy in copies:
            _verify_with_gguf(copy)

    writers = [lambda dst: first.write(dst, done), *map(whole, parts[1:])]
    _write_files(outs, writers, total + header.alignment, header.path, verify, force)
    return outs[0]


class _FirstFile:
    """The copy of the model's only or first file: old metadata, new keys, tensors.

    Attributes:
        size: bytes of the copy.
        data_start: byte at which its data section starts.
    """

    def __init__(self, header: Header, new: list[bytes]) -> None:
        kept = [e for e in header.entries.values() if not e.key.startswith(KEY_PREFIX)]
        self.header = header
        self.new = new
        self.head = _head(header.version, len(header.tensors), len(kept) + len(new))
        self.ranges = _merged([(e.start, e.end) for e in kept])
        self.table_end = (
            len(self.head)
            + sum(end - start for start, end in self.ranges)
            + sum(map(len, new))
            + header.tensor_table[1]
            - header.tensor_table[0]
        )
        alignment = header.alignment if header.tensors else 1  # no tensors, no data section
        self.data_start = -(-self.table_end // alignment) * alignment
        data_bytes = header.data_end - header.data_start
        self.padding = -data_bytes % alignment
        self.size = self.data_start + data_bytes + self.padding

    def write(self, dst: BinaryIO, done: Callable[[int], None]) -> None:
        header = self.header
        with open(header.path, "rb") as src:
            dst.write(self.head)
            for start, end in self.ranges:
                _copy(src, dst, start, end)
            for key in self.new:
                dst.write(key)
            _copy(src, dst, *header.tensor_table)
            dst.write(bytes(self.data_start - self.table_end))
            done(self.data_start)
            _copy(src, dst, header.data_start, header.data_end, done)
            if self.padding:
                dst.write(bytes(self.padding))
                done(self.padding)


def write_sidecar(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    profile: Profile,
    force: bool = False,
    private: bool = False,
) -> Path:
    """Write a GGUF without tensors that holds the profile and the model's fingerprint.

    private: only its owner may read it, whatever the umask. Returns its path. Raises what
    write_copy() raises.
    """
    model = open_model(model)
    _check_model(model, profile)
    check_output(model, out, force, sidecar=True)
    header, shape, out = model.header, model.shape, Path(out)
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

    def verify(paths: list[Path]) -> None:
        sidecar = read_header(paths[0])
        _verify_profile(sidecar, sidecar_from_header(sidecar, shape), profile)
        _verify_with_gguf(sidecar)

    needed = sum(map(len, new)) + sum(e.end - e.start for e in kept) + 4096
    _write_files([out], [write], needed, header.path, verify, force, private)
    return out


def _head(version: int, n_tensors: int, n_keys: int) -> bytes:
    return MAGIC + struct.pack("<IQQ", version, n_tensors, n_keys)


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges that touch, so that copying takes a few large reads."""
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
            done(len(chunk))


def _check_model(model: ModelFile, profile: Profile) -> None:
    """Raise ProfileError unless the profile fits the model, ConvertError unless it has tensors."""
    profile.check_shape(model.shape)
    if not any(part.tensors for part in model.parts):
        raise ConvertError(
            f"{model} has no tensors; it is not a model but a sidecar or a vocabulary"
        )


def check_output(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    force: bool = False,
    sidecar: bool = False,
) -> tuple[Path, ...]:
    """Return the files to write for out: one, or as many as a split model has.

    Raises ConvertError if a file must not be written, GGUFError, OSError.
    """
    out = Path(out)
    parts = open_model(model).parts
    outs = (out,) if sidecar else part_paths(out, len(parts))
    n_bytes = 0 if sidecar else sum(part.file_size for part in parts)
    for path in outs:
        check_new_file(path, ConvertError)
        if path.exists() and any(os.path.samefile(path, part.path) for part in parts):
            raise ConvertError(
                f"{path} is the model itself; a model is never changed in place, choose another"
                " name"
            )
        if os.path.lexists(path) and not force:
            raise ConvertError(f"{path} exists; choose another name or pass --force")
    check_room(outs[0], n_bytes, ConvertError)
    return outs


def _write_files(
    outs: Sequence[Path],
    writers: Sequence[Callable[[BinaryIO], None]],
    max_bytes: int,
    model: Path,
    verify: Callable[[list[Path]], None],
    replace: bool,
    private: bool = False,
) -> None:
    """Write temporary files beside outs, sync, verify and rename them.

    No temporary file is left after a failure. Raises ConvertError if replace is False and another
    process has created one of outs in the meantime.
    """
    folder = outs[0].parent
    check_room(outs[0], max_bytes, ConvertError)
    written: list[Path] = []
    try:
        with files.guard(written):
            for out, write in zip(outs, writers, strict=True):
                fd, part = create_part(out, 0o600 if private else 0o666)
                written.append(part)
                with open(fd, "wb") as file:
                    write(file)
                    file.flush()
                    os.fsync(fd)
                    # Permit no more than the umask, and no reader who cannot read the model.
                    mode = os.fstat(fd).st_mode & model.stat().st_mode & 0o666
                    os.chmod(part, mode | stat.S_IRUSR | stat.S_IWUSR)
            verify(written)
            if len(outs) > 1 and replace:
                # A split model is opened by its first file. Remove it while the others are
                # renamed, so that a crash leaves nothing that looks like a model.
                outs[0].unlink(missing_ok=True)
                _sync_folder(folder)
            for i in range(1, len(outs)):
                publish(written[i], outs[i], replace)
                written[i] = outs[i]
            if len(outs) > 1:
                _sync_folder(folder)
            publish(written[0], outs[0], replace)
    except BaseException as error:
        for path in written:
            with suppress(OSError):
                path.unlink()
        if isinstance(error, FileExistsError):
            raise ConvertError(
                f"{error.filename} was created by another process in the meantime; choose another"
                " name or pass --force"
            ) from None
        raise
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Write a folder to disk, which makes its renames permanent."""
    if hasattr(os, "O_DIRECTORY"):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _verify_profile(header: Header, read: Profile | None, profile: Profile) -> None:
    if read is None or profile_keys(read) != profile_keys(profile):
        raise ProfileError(f"{header.path}: the profile reads back differently; check the disk")


def _verify_with_gguf(header: Header) -> None:
    """Check a new file with gguf's reader too."""
    from gguf import GGMLQuantizationType, GGUFReader

    known = {int(kind) for kind in GGMLQuantizationType}
    if any(tensor.kind not in known for tensor in header.tensors):
        return  # a tensor type newer than this gguf
    reader = GGUFReader(header.path)
    tensors = [(t.name, int(t.data_offset) - header.data_start) for t in reader.tensors]
    retrieval = header.entries.get(KEY_RETRIEVAL)  # not in the later files of a split model
    same = (
        tensors == [(t.name, t.offset) for t in header.tensors]
        and set(header.entries) <= set(reader.fields)
        and (retrieval is None or len(reader.fields[KEY_RETRIEVAL].data) == retrieval.count)
    )
    if not same:
        raise ConvertError(
            f"{header.path}: gguf reads the new file differently; nothing was written"
        )
