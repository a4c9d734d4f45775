"""The models on this machine: the built-in one, and those in two caches.

The caches are Hugging Face's and razor_local's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import RazorError
from ..model_setup import DEFAULT_MODEL
from . import catalog, hub, wheels
from .names import HubName, ModelName
from .quants import choose, model_files, quant_of, split_parts


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine.

    Attributes:
        name: the MODEL argument that means this file, "" if there is only its path
        path: the file, or the first file of a split model
        n_bytes: bytes of all its files
        profile: the source of its razor profile (see FoundProfile.source); "" if it has none; None
            if the file or its sidecar is damaged
        license: the license that the catalog or the file names, or ""
    """

    name: str
    path: Path
    n_bytes: int
    profile: str | None
    license: str


def find(model: ModelName) -> Path | None:
    """Return the file of a model if it is on this machine, whole."""
    for files in hub.snapshots(model.repo):
        chosen = model.choose(list(files))
        if chosen:
            return files[chosen[0]]
    if isinstance(model, catalog.Entry) and model.wheel is not None:
        path = wheels.path_of(model)
        return path if path.is_file() else None
    return None


def list_models() -> list[LocalModel]:
    """Return all models on this machine, the built-in one first."""
    found = [_describe("", [DEFAULT_MODEL], "")]
    names = {(entry.repo, entry.file): entry for entry in catalog.entries().values()}
    seen = set()
    for repo in hub.cached_repos():
        for files in hub.snapshots(repo):
            for path in model_files(list(files)):
                parts = split_parts(path, list(files))
                if not parts or (repo, path) in seen:
                    continue
                seen.add((repo, path))
                entry = names.get((repo, path))
                name = entry.name if entry else _hub_name(repo, path, list(files))
                license_name = entry.license if entry else ""
                found.append(_describe(name, [files[part] for part in parts], license_name))
    for entry in catalog.entries().values():
        file = wheels.path_of(entry)
        if entry.wheel is not None and file.is_file() and find(entry) == file:
            found.append(_describe(entry.name, [file], entry.license))
    return found


def unfinished() -> Iterator[tuple[HubName, int]]:
    """Yield the repositories with interrupted downloads, and the bytes that are stored of them."""
    for repo in hub.cached_repos():
        parts = hub.unfinished(repo)
        if parts:
            yield HubName(repo), sum(part.stat().st_size for part in parts)


def remove(model: ModelName) -> int:
    """Remove the files of a model and its measured profile; return the bytes freed.

    Without such files, remove the interrupted downloads of the repository. Raises RazorError if
    there is nothing to remove, OSError.
    """
    from .. import profile_cache
    from ..model_file import read_model_shape

    freed, found = 0, False
    path = find(model)
    if path is not None:
        with suppress(RazorError, OSError):
            profile_cache.remove(read_model_shape(path))
    for files in hub.snapshots(model.repo):
        chosen = model.choose(list(files))
        if chosen:
            freed, found = hub.remove(model.repo, chosen), True
            break
    if isinstance(model, catalog.Entry) and model.wheel is not None:
        path = wheels.path_of(model)
        if path.is_file():
            freed, found = freed + path.stat().st_size, True
            path.unlink()
    if not found:
        if not hub.unfinished(model.repo):
            raise RazorError(f"{model} is not on this machine; 'razor-local models' shows what is")
        freed = hub.remove(model.repo, [])
    return freed


def _describe(name: str, parts: list[Path], license_name: str) -> LocalModel:
    from ..model_file import ModelFile

    profile: str | None = None
    try:
        file = ModelFile(parts[0])
        license_name = license_name or file.header.string("general.license") or ""
        found = file.find_profile()
        profile = "" if found is None else found.source
    except (RazorError, OSError):
        pass
    n_bytes = sum(part.stat().st_size for part in parts)
    return LocalModel(name, parts[0], n_bytes, profile, license_name)


def _hub_name(repo: str, path: str, paths: list[str]) -> str:
    """Return a name that means only this file of its repository, "" if there is none."""
    for quant in (quant_of(path), Path(path).stem, ""):
        if choose(paths, quant)[:1] == [path]:
            return str(HubName(repo, quant))
    return ""
