"""Store the profiles that were measured on this machine, by the fingerprint of the model file.

A profile is a sidecar, FINGERPRINT.gguf. For a model without one, FINGERPRINT.json notes why it has
none, or how long measuring would take. docs/format.md describes both files.
"""

from __future__ import annotations

import json
import os
import time
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
MAX_SECONDS = 1e9  # of measuring
MAX_AGE = 24 * 3600  # seconds for which an estimate holds: the machine may have been busy


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

    A damaged file is ignored, see damaged().
    """
    with suppress(RazorError, OSError):
        if folder().is_dir():  # else no fingerprint is needed
            path = path_of(shape)
            return read_sidecar(path, shape), path
    return None


def damaged(shape: ModelShape) -> Path | None:
    """Return the file of a model's profile if it is there and cannot be used, else None."""
    with suppress(RazorError, OSError):
        if folder().is_dir() and os.path.lexists(path := path_of(shape)) and find(shape) is None:
            return path
    return None


def read_note(shape: ModelShape) -> Note:
    """Return the note on a model, an empty one if there is none.

    A damaged note and an old estimate are ignored.
    """
    unreadable = (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError)
    with suppress(RazorError, OSError, *unreadable):
        if folder().is_dir():
            with open_input(path_of(shape).with_suffix(".json"), "a note") as file:
                fields = json.loads(file.read(MAX_BYTES))
            if (fields.pop("format"), fields.pop("version")) == (FORMAT, VERSION):
                age = time.time() - fields.pop("saved")
                note = Note(**fields)
                fine = isinstance(note.why, str) and 0 <= note.seconds < MAX_SECONDS
                if fine and (note.why or (note.seconds and 0 <= age < MAX_AGE)):
                    return note
    return Note()


def write_note(shape: ModelShape, note: Note) -> None:
    """Save a note on a model. Raises RazorError, OSError."""
    make_folder()
    head = {"format": FORMAT, "version": VERSION, "saved": int(time.time())}
    data = json.dumps(head | asdict(note), indent=1) + "\n"
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
