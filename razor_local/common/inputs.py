"""Open input files.

Only regular files are opened, because others can block or never end.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from ..errors import RazorError

_KINDS = (
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "named pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


def check_input(
    path: str | os.PathLike[str], expected: str, error: type[RazorError] = RazorError
) -> None:
    """Raise error unless path is a regular file, OSError where there is none.

    Args:
        path: the file, or a link to it
        expected: what it should be, such as "a GGUF file"
        error: the exception to raise
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "special file")
        raise error(f"{os.fspath(path)} is a {kind}, expected {expected}")


def open_input(
    path: str | os.PathLike[str], expected: str, error: type[RazorError] = RazorError
) -> BinaryIO:
    """Return the file opened for reading. Raises as check_input()."""
    check_input(path, expected, error)  # opening a named pipe would wait for a writer
    return open(path, "rb")


def read_text_file(path: str | os.PathLike[str], max_bytes: int | None = None) -> str:
    """Return the content of a UTF-8 text file, without a BOM.

    Raises RazorError, also for a file of more than max_bytes, and OSError.
    """
    with open_input(path, "a text file") as file:
        data = file.read() if max_bytes is None else file.read(max_bytes + 1)
    if max_bytes is not None and len(data) > max_bytes:
        size = os.stat(path).st_size / 2**20
        raise RazorError(f"{Path(path)} has {size:,.1f} MiB, expected at most {max_bytes:,} bytes")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise RazorError(f"{Path(path)} is not a text in UTF-8") from None
