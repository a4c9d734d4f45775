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

# Wraps the writing of files that are not complete yet, given their paths as they are then. The
# command line, which handles signals, sets it to remove them when it is terminated.
guard: Callable[[list[Path]], AbstractContextManager[Any]] = nullcontext


def cache_folder() -> Path:
    """razor_local's folder in the user's cache, the one that the build uses."""
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
    """Yield a binary file to write; it becomes path when the block ends well.

    When the block raises, nothing is left. Raises RazorError where path cannot be written to or the
    disk is too small, OSError; without replace, FileExistsError where path exists by then.

    Args:
        path: the name of the complete file
        n_bytes: how many are going to be written, as far as known
        replace: whether to replace a file of that name
        private: whether its owner alone may read it, whatever the umask
    """
    path = Path(path)
    check_new_file(path, n_bytes=n_bytes)
    fd, part = create_part(path, 0o600 if private else 0o666)
    try:
        if private and hasattr(os, "fchmod"):  # a umask may take even more away
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
            error.filename = str(path)  # a full disk does not say which
        raise


def create_part(path: Path, mode: int = 0o666) -> tuple[int, Path]:
    """Create a hidden file beside path, to be renamed to it; its descriptor and name.

    The umask is taken from its mode, as that of any new file. Raises OSError.
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
    """Rename part to path. Without replace raise FileExistsError where path exists, even if another
    process made it just now."""
    if replace:
        os.replace(part, path)
        return
    try:
        os.link(part, path)  # unlike a rename it fails where the name is taken
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
    """Raise error where no file of that name and size can be made; for before a long computation.

    Raises OSError for a name that the system refuses.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise error(f"the folder {path.parent} does not exist; make it first")
    with suppress(FileNotFoundError):
        os.stat(path)  # a name that is too long, for example
    if path.is_dir():
        raise error(f"{path} is a folder, expected the name of a file")
    if path.exists() and not path.is_file():  # a device or a pipe: it would be replaced by the file
        raise error(f"{path} is not a regular file; choose another name")
    try:
        # permissions are not enough: root has them in /proc and on read-only disks
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
    """Raise error where the disk of a new file has less than n_bytes free."""
    path = Path(path)
    free = shutil.disk_usage(path.parent).free
    if free < n_bytes:
        raise error(
            f"{path.parent} has {free / 2**20:,.0f} MiB free, {path.name} needs"
            f" {n_bytes / 2**20:,.0f} MiB; free some space"
        )


def check_outputs(
    outputs: Iterable[str | os.PathLike[str] | None],
    inputs: Iterable[str | os.PathLike[str] | None],
) -> None:
    """The same for all outputs of a run that reads inputs; None: not given.

    Raises RazorError also where an output is one of the inputs, or the same file as another output.
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
    """razor_local's folder for what a user keeps, such as conversations.

    Raises RazorError where the user has no home folder.
    """
    try:
        if sys.platform == "win32":
            base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local"
        elif sys.platform == "darwin":
            base = Path.home() / "Library/Application Support"
        else:
            base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share"
    except RuntimeError:
        raise RazorError("there is no home folder to keep data in; set XDG_DATA_HOME") from None
    return Path(base) / "razor_local"


def make_private_folder(path: Path) -> None:
    """Make a folder that its owner alone may use, unless it exists. Raises OSError."""
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        path.chmod(0o700)  # a umask may have taken even more away
