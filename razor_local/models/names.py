"""Parse a MODEL argument: a path, a name of the catalog, or a model on Hugging Face."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from ..errors import RazorError
from . import catalog
from .quants import choose, split_parts

HUB = "hf:"
# letters, digits, "_", and "." and "-" between them, as the hub has it
_PART = r"[A-Za-z0-9_]+(?:[.-][A-Za-z0-9_]+)*"
_HUB_NAME = re.compile(rf"({_PART}/{_PART})(?:/(.+\.gguf)|:([A-Za-z0-9_.-]+))?")
_ADDRESS = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(.*)", re.I | re.DOTALL)
_INSIDE = re.compile(r"(?:tree|blob|resolve)/([^/]+)/?(.*)", re.DOTALL)  # a revision, a path in it


@dataclass(frozen=True)
class HubName:
    """A Hugging Face repository, with a quantization ("": the default one) or a file in it."""

    repo: str
    quant: str = ""
    file: str = ""

    def __str__(self) -> str:
        if self.file:
            return f"{HUB}{self.repo}/{self.file}"
        return f"{HUB}{self.repo}:{self.quant}" if self.quant else HUB + self.repo

    def choose(self, paths: list[str]) -> list[str]:
        """The files of the model among the paths of the repository, see quants.choose."""
        if self.file:
            return split_parts(self.file, paths) if self.file in paths else []
        return choose(paths, self.quant)


ModelName = HubName | catalog.Entry


def parse(text: str) -> Path | ModelName:
    """Return what a MODEL argument means; a file that exists always comes before a name.

    Raises RazorError if it is none of these.
    """
    if os.path.exists(text):
        return Path(text)
    named = text.removeprefix(HUB)
    address = _ADDRESS.fullmatch(named)
    if address is not None:
        return _hub_name(text, _without_revision(text, address[1]))
    if "://" in named:
        raise RazorError(f"'{text}' is not a Hugging Face URL; download the file and pass its path")
    if is_path(text):
        return Path(text)
    if text.startswith(HUB):
        return _hub_name(text, named)
    entry = catalog.find(text)
    if entry is None:
        similar = catalog.nearest(text)
        hint = f"similar names: {', '.join(similar)}; " if similar else ""
        raise RazorError(
            f"'{text}' is neither a file nor the name of a model; {hint}"
            "'razor-local models search' shows all names, and hf:OWNER/REPO is any repository of"
            " Hugging Face with GGUF files"
        )
    return entry


def _hub_name(text: str, name: str) -> HubName:
    """Parse OWNER/REPO, OWNER/REPO:QUANT or OWNER/REPO/FILE.gguf.

    Raises RazorError for any other name. The message quotes text.
    """
    match = _HUB_NAME.fullmatch(name)
    if match is None or len(match[1]) > 96 or match[1].endswith(".git") or ".." in name.split("/"):
        raise RazorError(
            f"'{text}' is not the name of a repository, expected hf:OWNER/REPO or"
            " hf:OWNER/REPO:QUANT, or the URL of a model or GGUF file on Hugging Face"
        )
    return HubName(match[1], match[3] or "", match[2] or "")


def _without_revision(text: str, path: str) -> str:
    """Return OWNER/REPO, with :QUANT or /FILE.gguf if present, from the path of a URL.

    Raises RazorError for a revision other than main. The message quotes text.
    """
    address = urlsplit(path)
    owner, _, rest = unquote(address.path).strip("/").partition("/")
    repo, _, inside = rest.partition("/")
    match = _INSIDE.fullmatch(inside)
    if match is not None:
        revision, inside = match.groups()
        if revision != "main":
            raise RazorError(
                f"'{text}' names the revision {revision}, but models are downloaded from main;"
                " download the file yourself and pass its path"
            )
    # a repository's page can show one of its files in a panel
    inside = inside or parse_qs(address.query).get("show_file_info", [""])[0]
    return "/".join(part for part in (owner, repo, inside) if part)


def is_path(text: str) -> bool:
    """Return True if text looks like a path rather than a name."""
    separators = {os.sep, os.altsep or "/", "/"}
    return not text.startswith(HUB) and (text.endswith(".gguf") or bool(separators & set(text)))
