"""Store the profiles that were measured on this machine, by the fingerprint of the model file.

A profile is a sidecar, FINGERPRINT.gguf. For a model without one, FINGERPRINT.json notes why it has
none, or how long measuring would take. docs/format.md describes both files.
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
    """A note on a model without a profile.

    Attributes:
        why: why it has none; "" if it was not measured.
        seconds: how long measuring would take; 0 if that was not estimated.
        setting: the options for which seconds holds.
    """

    why: str = ""
    seconds: float = 0.0
    setting: str = ""


def folder() -> Path:
    """Return the folder of the profiles. Raises RazorError if the user has no home folder."""
    try:
        return cache_folder() / "profiles"
    except RuntimeError:
        raise RazorError(
            "there is no home folder to keep profiles in; set XDG_CACHE_HOME"
        ) from None


def path_of(shape: ModelShape) -> Path:
    """Return the path of a model's profile, which may not exist. Raises RazorError, OSError."""
    return folder() / f"{shape.fingerprint}.gguf"


def make_folder() -> None:
    """Create the folder, which only its owner may use. Raises RazorError, OSError."""
    make_private_folder(folder())


def find(shape: ModelShape) -> tuple[Profile, Path] | None:
    """Return the profile of a model and its path, None if there is none.

    A file that cannot be read is ignored.
    """
    with suppress(RazorError, OSError):
        if folder().is_dir():  # else no fingerprint is needed
            path = path_of(shape)
            return read_sidecar(path, shape), path
    return None


def read_note(shape: ModelShape) -> Note:
    """Return the note on a model, an empty one if there is none."""
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
    """Save a note on a model. Raises RazorError, OSError."""
    make_folder()
    data = json.dumps({"format": FORMAT, "version": VERSION} | asdict(note), indent=1) + "\n"
    with new_file(path_of(shape).with_suffix(".json"), private=True) as file:
        file.write(data.encode())


def remove(shape: ModelShape) -> bool:
    """Remove the profile of a model and the note on it. Return whether it had a profile.

    Raises RazorError, OSError.
    """
    if not folder().is_dir():
        return False
    path = path_of(shape)
    had_one = path.exists()
    for name in (path, path.with_suffix(".json")):
        name.unlink(missing_ok=True)
    return had_one
