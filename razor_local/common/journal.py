"""The journal of a long run: a file of its finished records, from which the run resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import RazorError
from .files import check_new_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# the exceptions of Python for data with unexpected fields or types
WRONG = (ValueError, LookupError, TypeError, AttributeError, RecursionError, ArithmeticError)

Check = Callable[[dict[str, Any], list[dict[str, Any]]], object]


class Journal:
    """The finished records of a run, kept in a file of JSON lines unless path is None.

    The first line is the head. An incomplete last line, left by a killed process, is dropped. Where
    the system has locks, only one journal may use the file until it is closed, for example by a
    with block. self.head is None until the run begins.

    Args:
        path: the file
        head: the head of this run, for identity
        what: the kind of run, for messages
        identity: maps a head to the fields that must match before a run may be resumed. Accepts any
            dict: files are untrusted.
        check: takes the head and the records of a file, and raises one of WRONG if such a run does
            not write them, for example because they cannot be formatted

    Raises:
        RazorError: the file is of another run, has wrong fields, or is in use.
        OSError: the file cannot be read or written.
    """

    def __init__(
        self,
        path: Path | None,
        head: dict[str, Any],
        what: str,
        identity: Callable[[dict[str, Any]], dict[str, Any]],
        check: Callable[[dict[str, Any], list[dict[str, Any]]], object] = lambda head, records: (
            None
        ),
    ) -> None:
        self.path = path
        self.head: dict[str, Any] | None = None
        self.records: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        if path is None:
            return
        check_new_file(path)
        if path.exists():
            self._open(path)
            try:
                self._take(path, head, what, identity, check)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, so that others may use it. All records are on disk already."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, path: Path) -> None:
        # Do not buffer: after a full disk, closing would try to write the rest again.
        self._file = open(path, "ab", buffering=0)
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise RazorError(
                f"{path} is the journal of a run in progress; wait for it, or choose a new file"
            ) from None
        except OSError:
            pass  # a file system without locks

    def _take(
        self,
        path: Path,
        head: dict[str, Any],
        what: str,
        identity: Callable[[dict[str, Any]], dict[str, Any]],
        check: Check | None,
    ) -> None:
        try:
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            found, *records = map(json.loads, whole.decode().splitlines())
            if found.pop("kind") != "head" or not all("kind" in record for record in records):
                raise ValueError
            there = identity(found)
        except WRONG:
            raise RazorError(f"{path} is not a journal of {what}; choose a new file") from None
        for name, here in identity(head).items():
            if json.loads(json.dumps(here)) != there[name]:
                raise RazorError(
                    f"{path} is from another run (different {name}); resume it with the same"
                    " command, code and machine, or choose a new file"
                )
        try:
            if check is not None:
                check(found, records)
        except WRONG as error:
            raise RazorError(
                f"{path} is not a valid journal of {what}: a field is missing or has a wrong value"
                f" ({type(error).__name__}: {' '.join(str(error).split())[:80]}); choose a new file"
            ) from None
        self.head, self.records = found, records
        os.truncate(path, len(whole))

    def begin(self, head: dict[str, Any]) -> None:
        """Write the head of a new run."""
        self.head = head
        if self.path is None:
            return
        self._open(self.path)
        if self.path.stat().st_size:  # the file did not exist when this run started
            self.close()
            raise RazorError(f"{self.path} was just created by another run; choose a new file")
        try:
            self._write({"kind": "head"} | head)
        except BaseException:
            self.close()
            with suppress(OSError):
                os.unlink(self.path)
            raise

    def has(self, key: dict[str, Any]) -> bool:
        """Return True if a record has all fields of key."""
        return any(all(r.get(k) == v for k, v in key.items()) for r in self.records)

    def add(self, record: dict[str, Any]) -> None:
        """Add a finished record and write it to disk."""
        self.records.append(record)
        if self.path is not None:
            self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        assert self._file is not None
        line = json.dumps(record).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            error.filename = str(self.path)  # the error of a full disk has no name
            raise
