"""Models of Hugging Face: the files of a repository, downloads, and the shared cache.

huggingface_hub provides the endpoint, the tokens, the proxies and the folder. Its own downloads
start over after an interruption and verify no checksum, so files are fetched here. The data goes
into BLOB.incomplete, which a later download resumes, and a file gets its name only when its sha256
is right. The layout of the cache is huggingface_hub's:

    models--OWNER--REPO/blobs/SHA256             the file
    models--OWNER--REPO/snapshots/COMMIT/NAME    a link to it
    models--OWNER--REPO/refs/main                the commit that was downloaded last
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from ..common.files import check_room
from ..common.progress import Progress, silent
from ..errors import RazorError

SHA256 = re.compile(r"[0-9a-f]{64}")
CHUNK = 1 << 20


class HubError(RazorError):
    """A repository that cannot be read or downloaded from."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. size: bytes. sha256: "" where the hub does not name it."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Repo:
    """A repository at its newest commit. license: "" if it names none."""

    name: str
    commit: str
    files: dict[str, RemoteFile]
    license: str


def endpoint() -> str:
    """The address of the hub: HF_ENDPOINT, or Hugging Face itself."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def is_offline() -> bool:
    """Return True if HF_HUB_OFFLINE forbids downloads."""
    from huggingface_hub import constants

    return constants.is_offline_mode()


# -- the cache


def cache_folder() -> Path:
    """The cache of huggingface_hub: HF_HUB_CACHE, or what HF_HOME makes of it."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cached_repos() -> list[str]:
    """The names of all model repositories in the cache."""
    folders = sorted(cache_folder().glob("models--*--*"))
    return [folder.name.removeprefix("models--").replace("--", "/", 1) for folder in folders]


def repo_folder(repo: str) -> Path:
    """The folder of a repository in the cache."""
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def snapshots(repo: str) -> list[dict[str, Path]]:
    """Files in the cache by their paths in the repository: a dict per commit, refs/main first."""
    folder = repo_folder(repo)
    try:
        main = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        main = ""
    commits = sorted((folder / "snapshots").glob("*"), key=lambda path: path.name != main)
    return [
        {
            path.relative_to(commit).as_posix(): path
            for path in sorted(commit.rglob("*.gguf"))
            if path.is_file()
        }
        for commit in commits
    ]


def unfinished(repo: str) -> list[Path]:
    """Return the files that interrupted downloads from a repository left behind."""
    return sorted((repo_folder(repo) / "blobs").glob("*.incomplete"))


def remove(repo: str, paths: list[str]) -> int:
    """Remove files of a repository from the cache, from all its commits; return the bytes freed.

    Without paths the rests of interrupted downloads are removed.
    """
    folder = repo_folder(repo)
    links = [link for link in (folder / "snapshots").glob("*/**/*") if not link.is_dir()]
    gone = [link for link in links if "/".join(link.relative_to(folder).parts[2:]) in paths]
    blobs = {_blob(link) for link in gone} if paths else set(unfinished(repo))
    blobs -= {_blob(link) for link in links if link not in gone}
    freed = 0
    for path in {*gone, *blobs}:
        if os.path.lexists(path):
            freed += path.lstat().st_size
            path.unlink()
    _remove_empty(folder)
    return freed


def _blob(link: Path) -> Path:
    """Return the target of a snapshot file. A blob may be a link itself and is not followed."""
    return Path(os.path.normpath(link.parent / os.readlink(link))) if link.is_symlink() else link


def _remove_empty(folder: Path) -> None:
    """Remove the empty folders of a repository; all of it if no file of any commit is left."""
    for path in sorted((folder / "snapshots").rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    if not any((folder / "snapshots").glob("*")) and not any((folder / "blobs").glob("*")):
        shutil.rmtree(folder)


# -- the hub


def read_repo(name: str) -> Repo:
    """Ask the hub what a repository has. Raises HubError."""
    from huggingface_hub import HfApi, constants

    with _explained(name, f"{endpoint()} cannot be reached", "connect to the network"):
        try:
            info = HfApi(library_name="razor-local").model_info(
                name, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
            files = {
                file.rfilename: RemoteFile(
                    file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else ""
                )
                for file in info.siblings or ()
            }
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, OSError):
                raise
            raise HubError(
                f"{endpoint()} does not answer as a Hugging Face hub does; correct HF_ENDPOINT"
            ) from error
    card = info.card_data
    license_name = str(getattr(card, "license_name", "") or getattr(card, "license", "") or "")
    return Repo(name, info.sha or "", files, license_name)


def bytes_missing(repo: Repo, files: list[RemoteFile]) -> int:
    """Return the bytes that a download would fetch."""
    blobs = repo_folder(repo.name) / "blobs"
    there = 0
    for file in files:
        part = _part(blobs / file.sha256)
        if (blobs / file.sha256).exists():
            there += file.size
        elif part.exists():
            there += min(part.stat().st_size, file.size)
    return sum(file.size for file in files) - there


def download(repo: Repo, files: list[RemoteFile], progress: Progress | None = None) -> Path:
    """Download the files of a model into the cache; return the path of the first one.

    An interrupted download can be continued: what has arrived is kept. Raises HubError for what the
    hub refuses and for damaged files, RazorError for a full disk, OSError.
    """
    folder = repo_folder(repo.name)
    blobs, snapshot = folder / "blobs", folder / "snapshots" / repo.commit
    for file in files:
        path = PurePosixPath(file.path)
        if path.is_absolute() or ".." in path.parts:
            raise HubError(f"{repo.name} has a file that is called {file.path}; use another one")
        if not SHA256.fullmatch(file.sha256):
            raise HubError(
                f"{endpoint()} names no sha256 of {file.path} in {repo.name}, so that a download"
                " could not be checked; download it by other means and pass its path"
            )
    if not re.fullmatch(r"[0-9a-f]{40}", repo.commit):
        raise HubError(f"{endpoint()} names no commit of {repo.name}; correct HF_ENDPOINT")
    blobs.mkdir(parents=True, exist_ok=True)
    check_room(cache_folder() / Path(files[0].path).name, bytes_missing(repo, files))
    report = progress or silent
    total, done = sum(file.size for file in files), 0
    for file in files:

        def show(n: int, done: int = done) -> None:
            report(done + n, total, f"downloading {repo.name}")

        _fetch(repo, file, blobs / file.sha256, show)
        done += file.size
    for file in files:
        _link(blobs / file.sha256, snapshot / file.path)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(repo.commit, encoding="utf-8")
    return snapshot / files[0].path


def _part(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _fetch(repo: Repo, file: RemoteFile, blob: Path, show: Callable[[int], object]) -> None:
    """Bring a file into the cache. Another process that fetches it is waited for."""
    from huggingface_hub.utils import WeakFileLock

    lock = cache_folder() / ".locks" / repo_folder(repo.name).name / f"{blob.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        part = _part(blob)
        try:
            digest = _receive(repo, file, part, show)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise RazorError(
                f"{cache_folder()}: {error.strerror}; what was downloaded of {file.path} is kept,"
                " free some space and run the same command again"
            ) from error
        if digest != file.sha256:
            part.unlink()
            raise HubError(
                f"{file.path} of {repo.name} arrived damaged (its sha256 is {digest[:12]}…,"
                f" expected {file.sha256[:12]}…); run the same command again"
            )
        os.replace(part, blob)


def _receive(repo: Repo, file: RemoteFile, part: Path, show: Callable[[int], object]) -> str:
    """Write the rest of a file to part; return the sha256 of the whole."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    broken = f"the connection to {endpoint()} broke off"
    with open(part, "r+b" if part.exists() else "w+b") as raw:
        target = _HashedFile(raw, file, show)
        with _explained(repo.name, broken, "run the same command again, it goes on from there"):
            try:
                if target.n_bytes < file.size:
                    http_get(
                        hf_hub_url(repo.name, file.path, revision=repo.commit),
                        cast(BinaryIO, target),
                        resume_size=target.n_bytes,
                        headers=build_hf_headers(library_name="razor-local"),
                        tqdm_class=_no_bar(),
                    )
            finally:
                raw.flush()
                os.fsync(raw.fileno())
    if target.n_bytes < file.size:
        raise HubError(
            f"{endpoint()} sent {target.n_bytes:,} bytes of {file.path}, expected {file.size:,};"
            " run the same command again"
        )
    return target.sha256.hexdigest()


class _HashedFile:
    """A file that computes its sha256 as it grows; what it holds already is read first."""

    def __init__(self, raw: BinaryIO, file: RemoteFile, show: Callable[[int], object]) -> None:
        self._raw, self._file, self._show = raw, file, show
        self._rehash()

    def _rehash(self) -> None:
        self.sha256, self.n_bytes = hashlib.sha256(), 0
        self._raw.seek(0)
        while data := self._raw.read(CHUNK):
            self._count(data)

    def _count(self, data: bytes) -> None:
        self.sha256.update(data)
        self.n_bytes += len(data)
        self._show(self.n_bytes)

    def write(self, data: bytes) -> int:
        if self.n_bytes + len(data) > self._file.size:
            raise HubError(
                f"{endpoint()} sent more than the {self._file.size:,} bytes of {self._file.path};"
                " run the same command again"
            )
        n = self._raw.write(data)
        self._count(data)
        return n

    def tell(self) -> int:
        return self._raw.tell()

    def seek(self, position: int) -> int:
        return self._raw.seek(position)

    def truncate(self) -> None:
        """Cut the file here: a server that cannot continue sends it from its beginning."""
        self._raw.truncate()
        self._rehash()


def _link(blob: Path, path: Path) -> None:
    """Make a path of a snapshot a link to its blob; a copy where the disk has no links."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a link to a blob that was removed
    try:
        path.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:
        if not path.exists():  # else another process has made it
            shutil.copyfile(blob, path)


def _no_bar() -> type:
    """A progress bar for http_get that shows nothing."""
    from tqdm import tqdm

    class NoBar(tqdm):  # type: ignore[misc]  # it has no types
        def __init__(self, *_: object, **__: object) -> None:
            super().__init__(disable=True)

    return NoBar


@contextmanager
def _explained(repo: str, broken: str, what_to_do: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub into HubErrors of one sentence, and its warnings off.

    Args:
        broken: what to say where the network fails
        what_to_do: what to do then
    """
    import httpx2
    from huggingface_hub import errors
    from huggingface_hub.utils import logging

    host, verbosity = endpoint(), logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{repo} is gated: accept its terms at {host}/{repo}, then set HF_TOKEN to an access"
            " token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(_explain_status(repo, host, 401, "")) from error
    except errors.HfHubHTTPError as error:
        message = error.response.headers.get("X-Error-Message", "")
        raise HubError(_explain_status(repo, host, error.response.status_code, message)) from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise HubError(f"{broken} ({reason}); {what_to_do}") from error
    except OSError as error:
        if error.errno is not None:  # of the disk
            raise
        raise HubError(f"{broken} ({str(error).splitlines()[0]}); {what_to_do}") from error
    finally:
        logging.set_verbosity(verbosity)


def _explain_status(repo: str, host: str, status: int, message: str) -> str:
    if status == 401:  # also for what does not exist, so that nobody learns what does
        if message.startswith("Invalid credentials"):
            return f"{host} does not accept the access token; correct HF_TOKEN or unset it"
        return (
            f"{host} has no public model {repo}; correct the name, or set HF_TOKEN if it is private"
        )
    if status == 403:
        return f"{host} does not let this account read {repo}; use another token in HF_TOKEN"
    if status == 404:
        return f"{host} has no such repository or file in {repo}; correct the name or HF_ENDPOINT"
    if status == 429:
        return f"{host} takes no more requests for now; wait some minutes, or set HF_TOKEN"
    return f"{host} answers with status {status} for {repo}; try later"
