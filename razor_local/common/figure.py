"""Draw pictures for --plot with matplotlib, an optional dependency."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UnsupportedError
from .files import new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = (".png", ".svg", ".pdf")


def make_figure(path: str | os.PathLike[str], size: tuple[float, float], instead: str) -> Figure:
    """An empty figure of size inches, to be saved as path.

    Raises UnsupportedError where path does not end in .png, .svg or .pdf, or matplotlib is missing;
    instead says then what to do without it.
    """
    if Path(path).suffix.lower() not in PICTURES:
        raise UnsupportedError(
            f"{path} is not the name of a picture, expected one that ends in {', '.join(PICTURES)}"
        )
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError(
            "pictures need matplotlib, which is not installed; install it with"
            f" 'pip install razor-local[plot]', or {instead}"
        ) from None
    return Figure(figsize=size, dpi=120)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes the picture; a file of that name is replaced when it is complete.

    Raises RazorError where path cannot be written to, OSError.
    """
    picture = io.BytesIO()  # what draws into a file hides why it cannot be written
    figure.savefig(picture, format=Path(path).suffix[1:].lower())
    with new_file(path) as file:
        file.write(picture.getbuffer())
    return Path(path)
