"""Write files that appear under their name only when they are complete and on disk."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import RazorError

# A context manager around the writing of incomplete files, called with their temporary paths. The
# command line sets it to remove the files when a signal ends the process.
guard: Callable[[list[Path]], AbstractContextManager[Any]] = nullcontext


def cache_folder() -> Path:
    """Return razor_local's folder in the user's cache, which the build uses too."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "razor_local"


@contextmanager
def new_file(
    path: str | os.PathLike[str], n_bytes: int = 0, replace: bool = True, private: bool = False
) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes path when the block ends, or is removed if the block raises.

    Args:
        path: the name of the complete file
        n_bytes: number of bytes to write, as far as known
        replace: whether to replace a file of that name
        private: whether only its owner may read it, whatever the umask

    Raises:
        RazorError: path cannot be written, or the disk has too little room.
        FileExistsError: replace is False and path exists at the end.
        OSError: writing failed.
    """
    path = Path(path)
    check_new_file(path, n_bytes=n_bytes)
    fd, part = create_part(path, 0o600 if private else 0o666)
    try:
        if private and hasattr(os, "fchmod"):  # the umask may have removed even these bits
            os.fchmod(fd, 0o600)
        with open(fd, "wb") as file, guard([part]):
            yield file
            file.flush()
            os.fsync(fd)
        publish(part, path, replace)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(part)
        if isinstance(error, OSError) and not error.filename:
            error.filename = str(path)  # the error of a full disk has no name
        raise


def create_part(path: Path, mode: int = 0o666) -> tuple[int, Path]:
    """Create a hidden file beside path, to be renamed to it. Return its descriptor and name.

    The umask applies to its mode, as for any new file. Raises OSError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        part = path.parent / f".{path.name[:100]}.{secrets.token_hex(4)}.part"
        try:
            return os.open(part, flags, mode), part
        except FileExistsError:
            continue
        except OSError as error:
            error.filename = str(path)
            raise


def publish(part: Path, path: Path, replace: bool) -> None:
    """Rename part to path.

    Raises FileExistsError if replace is False and path exists, even if another process has just
    created it.
    """
    if replace:
        os.replace(part, path)
        return
    try:
        os.link(part, path)  # unlike a rename this fails if the name is taken
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
    except (OSError, AttributeError, NotImplementedError):  # a file system without hard links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(part, path)
    else:
        os.unlink(part)


def check_new_file(
    path: str | os.PathLike[str], error: type[RazorError] = RazorError, n_bytes: int = 0
) -> None:
    """Raise error if a file of that name and size cannot be created.

    Call this before a long computation. Raises OSError for a name that the system refuses.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise error(f"the folder {path.parent} does not exist; make it first")
    with suppress(FileNotFoundError):
        os.stat(path)  # raises for a name that is too long, for example
    if path.is_dir():
        raise error(f"{path} is a folder, expected the name of a file")
    if path.exists() and not path.is_file():  # a rename would replace a device or a pipe
        raise error(f"{path} is not a regular file; choose another name")
    try:
        # Checking permissions is not enough: root has them in /proc and on read-only disks.
        fd, part = create_part(path)
    except OSError as reason:
        raise error(
            f"the folder {path.parent} cannot be written to ({reason.strerror}); choose another"
        ) from None
    os.close(fd)
    os.unlink(part)
    check_room(path, n_bytes, error)


def check_room(
    path: str | os.PathLike[str], n_bytes: int, error: type[RazorError] = RazorError
) -> None:
    """Raise error if the disk of a new file has less than n_bytes free."""
    path = Path(path)
    free = shutil.disk_usage(path.parent).free
    if free < n_bytes:
        for unit, size in (("MiB", 2**20), ("KiB", 2**10), ("bytes", 1)):
            there, needed = (f"{n / size:,.0f} {unit}" for n in (free, n_bytes))
            if there != needed and round(free / size):  # else a smaller unit
                break
        raise error(f"{path.parent} has {there} free, {path.name} needs {needed}; free some space")


def check_outputs(
    outputs: Iterable[str | os.PathLike[str] | None],
    inputs: Iterable[str | os.PathLike[str] | None],
) -> None:
    """Check all outputs of a run with check_new_file(). None means that a file was not given.

    Raises RazorError also if an output is the same file as an input or another output.
    """
    taken = [(Path(path), "is read by this command") for path in inputs if path is not None]
    for path in outputs:
        if path is None:
            continue
        path = Path(path)
        check_new_file(path)
        for other, what in taken:
            if _is_same(path, other):
                raise RazorError(f"{path} {what}; choose another name for what is written")
        taken.append((path, "is named for two results"))


def _is_same(path: Path, other: Path) -> bool:
    if path.exists() and other.exists():
        return path.samefile(other)
    return os.path.realpath(path) == os.path.realpath(other)


def data_folder() -> Path:
    """Return razor_local's folder for the user's data, such as conversations.

    Raises RazorError if the user has no home folder.
    """
    try:
        if sys.platform == "win32":
            base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local"
        elif sys.platform == "darwin":
            base = Path.home() / "Library/Application Support"
        else:
            base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share"
    except RuntimeError:
        raise RazorError("there is no home folder to store data in; set XDG_DATA_HOME") from None
    return Path(base) / "razor_local"


def make_private_folder(path: Path) -> None:
    """Create a folder that only its owner may use, unless it exists. Raises OSError."""
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        path.chmod(0o700)  # the umask may have removed even these bits
