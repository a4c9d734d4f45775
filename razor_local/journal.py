"""The journal of a long run: its finished records in a file, from which the run is resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import RazorError
from .safe_write import check_new_file, new_file


class Journal:
    """Finished records of a run, in a file of JSON lines if path is not None.

    The first line is the head. A last line that was cut off, by a killed process, is forgotten.
    head None: the run has not begun. what: the kind of run, for errors. identity(head): by name
    what has to be equal for a run to be resumed; of any dict, because a file may hold anything.
    Raises RazorError for a file of another run, OSError.
    """

    def __init__(
        self,
        path: Path | None,
        head: dict[str, Any],
        what: str,
        identity: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> None:
        self.path = path
        self.head: dict[str, Any] | None = None
        self.records: list[dict[str, Any]] = []
        if path is None:
            return
        check_new_file(path)
        if path.exists():
            self._take(path, head, what, identity)

    def _take(
        self,
        path: Path,
        head: dict[str, Any],
        what: str,
        identity: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> None:
        try:
            text = path.read_text(encoding="utf-8")
            lines = text[: text.rfind("\n") + 1].splitlines()
            found, *records = map(json.loads, lines)
            if found.pop("kind") != "head" or not all("kind" in record for record in records):
                raise ValueError
            there = identity(found)
        except (ValueError, AttributeError, KeyError, TypeError):
            raise RazorError(f"{path} is no journal of {what}; name a new file") from None
        for name, here in identity(head).items():
            if json.loads(json.dumps(here)) != there[name]:
                raise RazorError(
                    f"{path} is of a run with another {name}; resume it with the same command, code"
                    " and machine, or name a new file"
                )
        self.head, self.records = found, records
        self._write(path, lines)

    @staticmethod
    def _write(path: Path, lines: list[str]) -> None:
        with new_file(path) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())

    def begin(self, head: dict[str, Any]) -> None:
        self.head = head
        if self.path is not None:
            self._write(self.path, [json.dumps({"kind": "head"} | head)])

    def has(self, key: dict[str, Any]) -> bool:
        return any(all(r.get(k) == v for k, v in key.items()) for r in self.records)

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.path is not None:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                error.filename = str(self.path)  # a full disk does not say which
                raise
