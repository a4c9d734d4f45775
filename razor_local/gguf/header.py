"""Read GGUF headers within bounds: metadata and tensor table, never the tensors' data.

Every file is read here before any library opens it, because the readers of those libraries hang or
crash on crafted files. Each count is checked against the bytes left in the file before it is used,
arrays are skipped and read only on request, and every refusal is one GGUFError sentence.

Layout of the format (versions 2 and 3, little-endian):
    magic "GGUF" | u32 version | u64 n_tensors | u64 n_kv
    n_kv      x  string key | u32 type | value   (array: u32 element type | u64 count | elements)
    n_tensors x  string name | u32 n_dims | u64 dims[n_dims] | u32 type | u64 offset
    zero padding to the alignment | data section      (offsets are relative to its start)
    string = u64 length | bytes
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..common.inputs import open_input
from ..errors import GGUFError
from .hyper_parameters import find_fault

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# Each cap is an order of magnitude above the largest real model, so that a crafted file costs
# little time and memory. llama.cpp itself refuses names of 64 bytes and arrays of arrays.
MAX_KEYS = 100_000
MAX_TENSORS = 100_000
MAX_KEY_BYTES = 65_535
MAX_NAME_BYTES = 63
MAX_DIMS = 4
MAX_STRING_BYTES = 64 << 20
MAX_STRINGS = 2_000_000  # elements of all string arrays together; each takes a step in Python
MAX_TEXT_BYTES = 64 << 20  # of key names and kept values; each byte takes up to four in memory
MAX_METADATA_BYTES = 512 << 20
MAX_ALIGNMENT = 1 << 20
MAX_HYPER_PARAMETERS = 100_000  # numbers; each takes a step in Python

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
TYPE_NAMES = (
    "u8 i8 u16 i16 u32 i32 f32 bool string array u64 i64 f64".split()
)  # indexed by the ids above
_SCALARS = {
    U8: "<B", I8: "<b", U16: "<H", I16: "<h", U32: "<I", I32: "<i", F32: "<f",
    BOOL: "<B", U64: "<Q", I64: "<q", F64: "<d",
}  # fmt: skip
_NUMPY = {
    U8: "<u1", I8: "<i1", U16: "<u2", I16: "<i2", U32: "<u4", I32: "<i4", F32: "<f4",
    BOOL: "<u1", U64: "<u8", I64: "<i8", F64: "<f8",
}  # fmt: skip

# ggml type id: (elements per block, bytes per block)
TENSOR_TYPES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    9: (32, 36), 10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18),
    21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8),
    28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
    40: (64, 36), 41: (128, 18), 42: (64, 18),
}  # fmt: skip


def type_name(kind: int, element: int | None = None) -> str:
    """Return the name of a metadata type, for example "u32" or "u8[]" (an array of u8)."""
    if kind == ARRAY and element is not None:
        return f"{TYPE_NAMES[element]}[]"
    return TYPE_NAMES[kind]


@dataclass(frozen=True)
class Entry:
    """One metadata key: the position of its bytes in the file, and its value if it is small.

    Attributes:
        kind, element: type ids above; element is None unless kind is ARRAY.
        count: elements of an array, 1 otherwise.
        start, end: bytes of the whole pair (key, type, value) in the file.
        data: first byte of the value itself (of the first element of an array).
        value: int, float, or str of at most 64 KiB; None for arrays and longer strings.
    """

    key: str
    kind: int
    element: int | None
    count: int
    start: int
    data: int
    end: int
    value: int | float | str | None = field(repr=False)

    @property
    def type_name(self) -> str:
        return type_name(self.kind, self.element)


@dataclass(frozen=True)
class Tensor:
    """One row of the tensor table; offset is relative to the data section, nbytes unpadded."""

    name: str
    dims: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A checked header. All offsets are bytes from the start of the file.

    Attributes:
        metadata: [start, end) of the key/value section.
        tensor_table: [start, end) of the tensor table.
        data_start: first byte of the data section.
        data_end: end of the last tensor, without padding.
    """

    path: Path
    version: int
    entries: dict[str, Entry]
    tensors: tuple[Tensor, ...]
    metadata: tuple[int, int]
    tensor_table: tuple[int, int]
    alignment: int
    data_start: int
    data_end: int
    file_size: int

    def number(self, key: str, kinds: tuple[int, ...]) -> int | float | None:
        """Return a number whose type must be one of kinds, None if the key is missing."""
        entry = self._checked(key, kinds)
        return None if entry is None else entry.value  # type: ignore[return-value]

    def string(self, key: str, max_bytes: int = 65_536) -> str | None:
        """Return a string, None if the key is missing. Raises GGUFError beyond max_bytes."""
        entry = self._checked(key, (STRING,))
        if entry is None:
            return None
        if entry.value is None or entry.end - entry.data > max_bytes:
            raise GGUFError(
                f"{self.path}: key '{key}' holds {entry.end - entry.data} bytes of text,"
                f" expected at most {max_bytes}"
            )
        return str(entry.value)

    def array(self, key: str, element: int, max_count: int) -> np.ndarray | None:
        """Read an array as a new numpy array [count]; return None if the key is missing.

        Raises GGUFError for another type or element type, or more than max_count elements.
        """
        entry = self.entries.get(key)
        if entry is None:
            return None
        if entry.kind != ARRAY or entry.element != element:
            raise GGUFError(
                f"{self.path}: key '{key}' should be {type_name(ARRAY, element)},"
                f" found {entry.type_name}"
            )
        if entry.count > max_count:
            raise GGUFError(
                f"{self.path}: key '{key}' has {entry.count} elements, expected at most {max_count}"
            )
        with open(self.path, "rb") as file:
            file.seek(entry.data)
            raw = file.read(entry.end - entry.data)
        if len(raw) != entry.end - entry.data:
            raise GGUFError(f"{self.path}: the file shrank while it was being read")
        values: np.ndarray = np.frombuffer(raw, dtype=_NUMPY[element]).copy()
        return values

    def _checked(self, key: str, kinds: tuple[int, ...]) -> Entry | None:
        entry = self.entries.get(key)
        if entry is not None and entry.kind not in kinds:
            expected = " or ".join(TYPE_NAMES[kind] for kind in kinds)
            raise GGUFError(
                f"{self.path}: key '{key}' should be {expected}, found {entry.type_name}"
            )
        return entry


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a GGUF file.

    A vocabulary of 150,000 tokens takes well under a second. Memory is bounded by the number of
    keys and tensors. Raises GGUFError for anything malformed, OSError if the file cannot be read.
    """
    path = Path(path)
    with open_input(path, "a GGUF file", GGUFError) as file:
        size = os.fstat(file.fileno()).st_size
        return _Reader(path, file, size).header()


class _Reader:
    """A cursor over the file with a window of bytes, so that skipping does not mean reading."""

    WINDOW = 1 << 20

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.file = file
        self.size = size
        self.base = 0  # file offset of buffer[0]
        self.buffer = b""
        self.at = 0  # read position inside the buffer
        self.text_left = MAX_TEXT_BYTES

    # -- bytes

    def fail(self, text: str) -> GGUFError:
        return GGUFError(f"{self.path}: {text}")

    @property
    def pos(self) -> int:
        return self.base + self.at

    def need(self, n: int, what: str) -> None:
        """Raise GGUFError if fewer than n bytes are left, before anything is read or allocated."""
        if n > self.size - self.pos:
            raise self.fail(
                f"the file ends inside {what} (needs {n} bytes at offset {self.pos},"
                f" {self.size - self.pos} are left); it is damaged or its download was cut"
            )
        if self.pos + n > MAX_METADATA_BYTES:
            raise self.fail(
                f"its header is longer than the limit of {MAX_METADATA_BYTES >> 20} MiB"
            )

    def fill(self, n: int, what: str) -> None:
        """Buffer n bytes at the cursor (n is small: a scalar, a key, a kept string)."""
        if self.at + n <= len(self.buffer):
            return
        self.need(n, what)
        self.base = self.pos
        self.file.seek(self.base)
        self.buffer = self.file.read(max(n, min(self.WINDOW, self.size - self.base)))
        self.at = 0
        if len(self.buffer) < n:
            raise self.fail("the file shrank while it was being read")

    def take(self, n: int, what: str) -> bytes:
        self.fill(n, what)
        raw = self.buffer[self.at : self.at + n]
        self.at += n
        return raw

    def text(self, n: int, what: str) -> bytes:
        """Take bytes that are kept as long as the header."""
        self.text_left -= n
        if self.text_left < 0:
            raise self.fail(f"{what}: its keys hold more than {MAX_TEXT_BYTES >> 20} MiB of text")
        return self.take(n, what)

    def skip(self, n: int, what: str) -> None:
        self.need(n, what)
        self.at += n
        if self.at > len(self.buffer):
            self.base += self.at
            self.buffer = b""
            self.at = 0

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def name(self, cap: int, what: str) -> str:
        length = self.u64(what)
        if length > cap:
            raise self.fail(f"{what} is {length} bytes long, expected at most {cap}")
        raw = self.text(length, what)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not valid UTF-8") from None
        if not text.isprintable():  # messages print names: no line breaks, no terminal codes
            raise self.fail(f"{what} holds control characters")
        return text

    # -- the header

    def header(self) -> Header:
        if self.size < 4 or self.take(4, "the magic") != MAGIC:
            raise self.fail('not a GGUF file (it does not begin with "GGUF")')
        version = self.u32("the version")
        if version not in VERSIONS:
            if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
                raise self.fail("a big-endian GGUF, but only little-endian files are supported")
            raise self.fail(
                f"GGUF version {version}, expected 2 or 3; convert the model again"
                " with a current converter"
            )
        n_tensors = self.count("tensors", MAX_TENSORS, 8 + 4 + 4 + 8)
        n_keys = self.count("metadata keys", MAX_KEYS, 8 + 1 + 4 + 1)

        metadata_start = self.pos
        self.strings_left = MAX_STRINGS
        entries: dict[str, Entry] = {}
        for i in range(n_keys):
            entry = self.entry(i)
            if entry.key in entries:
                raise self.fail(f"metadata key '{entry.key[:80]}' appears twice")
            entries[entry.key] = entry
        metadata_end = self.pos

        alignment = self.alignment(entries)
        rows = [self.tensor_row(i) for i in range(n_tensors)]
        table_end = self.pos
        data_start = -(-table_end // alignment) * alignment if rows else table_end
        tensors, data_end = self.place(rows, alignment, data_start)
        self.check_hyper_parameters(entries)
        return Header(
            path=self.path,
            version=version,
            entries=entries,
            tensors=tensors,
            metadata=(metadata_start, metadata_end),
            tensor_table=(metadata_end, table_end),
            alignment=alignment,
            data_start=data_start,
            data_end=data_end,
            file_size=self.size,
        )

    def count(self, what: str, cap: int, min_bytes: int) -> int:
        n = self.u64(f"the number of {what}")
        if n > cap:
            raise self.fail(f"claims {n} {what}, expected at most {cap}")
        self.need(n * min_bytes, f"its {n} {what}")
        return n

    def entry(self, i: int) -> Entry:
        start = self.pos
        key = self.name(MAX_KEY_BYTES, f"the name of metadata key {i}")
        if not key:
            raise self.fail(f"the name of metadata key {i} is empty")
        what = f"the value of key '{key[:80]}'"
        kind = self.kind(key)
        element, count, value = None, 1, None
        if kind == ARRAY:
            element = self.kind(key)
            if element == ARRAY:
                raise self.fail(
                    f"key '{key[:80]}' is an array of arrays, which llama.cpp does not support"
                )
            count = self.u64(what)
            data = self.pos
            if element == STRING:
                self.skip_strings(count, what)
            else:
                self.skip(count * struct.calcsize(_SCALARS[element]), what)
        elif kind == STRING:
            length = self.u64(what)
            if length > MAX_STRING_BYTES:
                raise self.fail(f"{what} is {length} bytes long, more than {MAX_STRING_BYTES}")
            data = self.pos
            if length <= 65_536:
                # Unlike names of keys, free text may hold any bytes.
                value = self.text(length, what).decode("utf-8", errors="replace")
            else:
                self.skip(length, what)
        else:
            data = self.pos
            fmt = _SCALARS[kind]
            value = struct.unpack(fmt, self.take(struct.calcsize(fmt), what))[0]
        return Entry(key, kind, element, count, start, data, self.pos, value)

    def kind(self, key: str) -> int:
        kind = self.u32(f"the type of key '{key[:80]}'")
        if kind >= len(TYPE_NAMES):
            raise self.fail(f"key '{key[:80]}' has the unknown type {kind}")
        return kind

    def skip_strings(self, count: int, what: str) -> None:
        self.need(count * 8, what)
        self.strings_left -= count
        if self.strings_left < 0:
            raise self.fail(f"{what}: more than {MAX_STRINGS} strings, the limit of a vocabulary")
        buffer, at = self.buffer, self.at  # local: half a million steps in a large vocabulary
        end, number = len(buffer), int.from_bytes
        for _ in range(count):
            if at + 8 > end:
                self.at = at
                self.fill(8, what)
                buffer, at = self.buffer, self.at
                end = len(buffer)
            at += 8 + number(buffer[at : at + 8], "little")
            if at > end:
                self.at = end
                self.skip(at - end, what)
                buffer, at = self.buffer, self.at
                end = len(buffer)
        self.at = at

    def alignment(self, entries: dict[str, Entry]) -> int:
        entry = entries.get("general.alignment")
        if entry is None:
            return DEFAULT_ALIGNMENT
        if entry.kind != U32:
            raise self.fail(f"key 'general.alignment' should be u32, found {entry.type_name}")
        n = entry.value
        assert isinstance(n, int)
        if n == 0 or n & (n - 1) or n > MAX_ALIGNMENT:
            raise self.fail(f"the alignment {n} is not a power of two up to {MAX_ALIGNMENT}")
        return n

    def tensor_row(self, i: int) -> tuple[str, tuple[int, ...], int, int]:
        name = self.name(MAX_NAME_BYTES, f"the name of tensor {i}")
        what = f"the description of tensor '{name}'"
        n_dims = self.u32(what)
        if n_dims > MAX_DIMS:
            raise self.fail(f"tensor '{name}' has {n_dims} dimensions, expected at most {MAX_DIMS}")
        dims = tuple(self.u64(what) for _ in range(n_dims))
        return name, dims, self.u32(what), self.u64(what)

    def place(
        self, rows: list[tuple[str, tuple[int, ...], int, int]], alignment: int, data_start: int
    ) -> tuple[tuple[Tensor, ...], int]:
        """Check that the tensors follow one another inside the file, as llama.cpp requires."""
        if rows and data_start > self.size:
            raise self.fail("the file ends before its tensors; its download was cut")
        tensors, names, offset, data_end = [], set(), 0, data_start
        for name, dims, kind, claimed in rows:
            if name in names:
                raise self.fail(f"tensor '{name}' appears twice")
            names.add(name)
            if kind not in TENSOR_TYPES:
                raise self.fail(f"tensor '{name}' has the unknown type {kind}")
            block, block_bytes = TENSOR_TYPES[kind]
            row = dims[0] if dims else 1
            if row % block:
                raise self.fail(
                    f"tensor '{name}' has rows of {row} elements, not a multiple of its type's"
                    f" block of {block}"
                )
            elements = 1
            for n in dims:
                elements *= n
            nbytes = elements // block * block_bytes
            if claimed != offset:
                raise self.fail(f"tensor '{name}' is at offset {claimed}, expected {offset}")
            data_end = data_start + offset + nbytes
            if data_end > self.size:
                raise self.fail(
                    f"the file ends inside tensor '{name}' ({self.size} bytes, at least {data_end}"
                    " expected); it is damaged or its download was cut"
                )
            tensors.append(Tensor(name, dims, kind, offset, nbytes))
            offset += -(-nbytes // alignment) * alignment
        return tuple(tensors), data_end

    def check_hyper_parameters(self, entries: dict[str, Entry]) -> None:
        """Raise GGUFError for numbers that would make llama.cpp crash or compute nonsense."""
        arch = entries.get("general.architecture")
        if arch is None or not isinstance(arch.value, str):
            return
        prefix = f"{arch.value}."
        values: dict[str, int | float | str | list[int | float]] = {}
        left = MAX_HYPER_PARAMETERS
        for key, entry in entries.items():
            if not key.startswith(prefix):
                continue
            if entry.kind == ARRAY and entry.element in _NUMPY:
                left -= entry.count
                if left < 0:
                    raise self.fail(
                        f"its keys '{prefix}*' hold more than the limit of {MAX_HYPER_PARAMETERS}"
                        " numbers"
                    )
                self.file.seek(entry.data)
                raw = self.file.read(entry.end - entry.data)
                if len(raw) != entry.end - entry.data:
                    raise self.fail("the file shrank while it was being read")
                values[key[len(prefix) :]] = np.frombuffer(raw, _NUMPY[entry.element]).tolist()
            elif entry.value is not None:
                values[key[len(prefix) :]] = entry.value
        fault = find_fault(arch.value, values)
        if fault is not None:
            raise self.fail(f"{fault}; its metadata is damaged, get or convert the model again")
