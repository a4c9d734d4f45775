"""The profiles that were measured on this machine, by the fingerprint of the model file.

A profile is a sidecar, FINGERPRINT.gguf. Where there is none, FINGERPRINT.json keeps what is known:
that no head stands out, or how long measuring takes. docs/format.md describes both.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from .common.files import cache_folder, make_private_folder, new_file
from .common.inputs import open_input
from .errors import RazorError
from .model_shape import ModelShape
from .profile import Profile, read_sidecar

FORMAT = "razor measurement"
VERSION = 1
MAX_BYTES = 1 << 16  # of a note


@dataclass(frozen=True)
class Note:
    """What is known about a model without a profile.

    Attributes:
        why: why it has none; "" if it was not measured.
        seconds: how long measuring takes; 0 if it was not estimated.
        setting: the options for which seconds holds.
    """

    why: str = ""
    seconds: float = 0.0
    setting: str = ""


def folder() -> Path:
    """The folder of the profiles. Raises RazorError where the user has no home folder."""
    try:
        return cache_folder() / "profiles"
    except RuntimeError:
        raise RazorError(
            "there is no home folder to keep profiles in; set XDG_CACHE_HOME"
        ) from None


def path_of(shape: ModelShape) -> Path:
    """The file of a model's profile, which need not exist. Raises RazorError, OSError."""
    return folder() / f"{shape.fingerprint}.gguf"


def make_folder() -> None:
    """Make the folder, which its owner alone may use. Raises RazorError, OSError."""
    make_private_folder(folder())


def find(shape: ModelShape) -> tuple[Profile, Path] | None:
    """Return the profile of a model and its file, None without one that can be read.

    A damaged file counts as none: it is measured again.
    """
    with suppress(RazorError, OSError):
        if folder().is_dir():  # else no fingerprint is needed
            path = path_of(shape)
            return read_sidecar(path, shape), path
    return None


def read_note(shape: ModelShape) -> Note:
    """Return what is known about a model; an empty note if that is nothing."""
    unreadable = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
    with suppress(RazorError, OSError, *unreadable):
        if folder().is_dir():
            with open_input(path_of(shape).with_suffix(".json"), "a note") as file:
                fields = json.loads(file.read(MAX_BYTES))
            if (fields.pop("format"), fields.pop("version")) == (FORMAT, VERSION):
                note = Note(**fields)
                if isinstance(note.why, str) and isinstance(note.seconds, (int, float)):
                    return note
    return Note()


def write_note(shape: ModelShape, note: Note) -> None:
    """Keep what is known about a model. Raises RazorError, OSError."""
    make_folder()
    data = json.dumps({"format": FORMAT, "version": VERSION} | asdict(note), indent=1) + "\n"
    with new_file(path_of(shape).with_suffix(".json"), private=True) as file:
        file.write(data.encode())


def remove(shape: ModelShape) -> bool:
    """Remove the profile of a model and what is known about it; return whether it had one.

    Raises RazorError, OSError.
    """
    if not folder().is_dir():
        return False
    path = path_of(shape)
    had_one = path.exists()
    for name in (path, path.with_suffix(".json")):
        name.unlink(missing_ok=True)
    return had_one
