"""The history of what was typed in chats: a file in the user's data folder that only they can read.

Each line is the JSON of a text, the newest last.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from ..common.files import data_folder, make_private_folder, new_file
from ..common.inputs import open_input
from ..errors import RazorError

MAX_BYTES = 4 << 20  # of the file; then the oldest half is dropped
MAX_TEXT_BYTES = 1 << 20  # longer texts are not kept


class History:
    """The input history of this chat and of earlier ones. Several chats may share the file.

    Raises RazorError, OSError where the file cannot be used.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or data_folder() / "history"
        self.texts = self._load()  # the oldest first

    def _load(self) -> list[str]:
        make_private_folder(self.path.parent)
        try:
            with open_input(self.path, "a history of chats") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(max(0, size - MAX_BYTES))
                lines = file.read(MAX_BYTES).splitlines(keepends=True)
        except FileNotFoundError:
            return []
        if size > MAX_BYTES:
            lines = lines[1:]  # it may be cut off
            while sum(map(len, lines)) > MAX_BYTES // 2:
                lines = lines[len(lines) // 8 + 1 :]
            with new_file(self.path, private=True) as file:
                file.writelines(lines)
        return [text for text in map(_text, lines) if text]

    def add(self, text: str) -> None:
        """Append a text to the file. Raises RazorError, OSError where it cannot be written."""
        line = json.dumps(text).encode() + b"\n"
        if len(line) > MAX_TEXT_BYTES:
            return
        # opening a named pipe would wait for a reader
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
        fd = os.open(self.path, flags | getattr(os, "O_BINARY", 0), 0o600)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise RazorError(f"{self.path} is not a file, expected a history of chats")
            if hasattr(os, "fchmod") and stat.S_IMODE(status.st_mode) != 0o600:
                os.fchmod(fd, 0o600)
            if os.write(fd, line) < len(line):  # the disk is full
                os.truncate(fd, status.st_size)
        finally:
            os.close(fd)


def _text(line: bytes) -> str | None:
    """Return the text of a line, None if it is damaged."""
    try:
        text = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return text if isinstance(text, str) else None
