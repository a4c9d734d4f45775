"""Parse a MODEL argument: a path, a name of the catalog, or hf:OWNER/REPO[:QUANT]."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import RazorError
from . import catalog
from .quants import choose

HUB = "hf:"
# letters, digits, "_", and "." and "-" between them, as the hub has it
_PART = r"[A-Za-z0-9_]+(?:[.-][A-Za-z0-9_]+)*"
_HUB_NAME = re.compile(rf"({_PART}/{_PART})(?::([A-Za-z0-9_.-]+))?")


@dataclass(frozen=True)
class HubName:
    """A repository of Hugging Face and a quantization in it; "": the default one."""

    repo: str
    quant: str = ""

    def __str__(self) -> str:
        return f"{HUB}{self.repo}:{self.quant}" if self.quant else HUB + self.repo

    def choose(self, paths: list[str]) -> list[str]:
        """The files of the model among the paths of the repository, see quants.choose."""
        return choose(paths, self.quant)


ModelName = HubName | catalog.Entry


def parse(text: str) -> Path | ModelName:
    """Return what a MODEL argument means; a file that exists always comes before a name.

    Raises RazorError where it is none of the three.
    """
    if os.path.exists(text) or is_path(text):
        return Path(text)
    if text.startswith(HUB):
        match = _HUB_NAME.fullmatch(text[len(HUB) :])
        if match is None or len(match[1]) > 96 or match[1].endswith(".git"):
            raise RazorError(
                f"'{text}' is not the name of a repository, expected hf:OWNER/REPO or"
                " hf:OWNER/REPO:QUANT"
            )
        return HubName(match[1], match[2] or "")
    entry = catalog.entries().get(text.lower())
    if entry is None:
        similar = catalog.nearest(text)
        hint = f"similar names: {', '.join(similar)}; " if similar else ""
        raise RazorError(
            f"'{text}' is neither a file nor the name of a model; {hint}"
            "'razor-local models search' shows all names, and hf:OWNER/REPO is any repository of"
            " Hugging Face with GGUF files"
        )
    return entry


def is_path(text: str) -> bool:
    """Return True if text looks like a path rather than a name."""
    separators = {os.sep, os.altsep or "/", "/"}
    return not text.startswith(HUB) and (text.endswith(".gguf") or bool(separators & set(text)))
