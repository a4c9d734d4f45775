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
    """Return an empty figure to be saved as path.

    Args:
        path: the name of the picture, which ends in .png, .svg or .pdf.
        size: width and height in inches.
        instead: what to do without matplotlib, for the message.

    Raises:
        UnsupportedError: path ends otherwise, or matplotlib is missing.
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
    """Write the picture, and replace a file of that name once it is complete.

    Raises RazorError if path cannot be written, OSError.
    """
    picture = io.BytesIO()  # matplotlib would hide why a file cannot be written
    figure.savefig(picture, format=Path(path).suffix[1:].lower())
    with new_file(path) as file:
        file.write(picture.getbuffer())
    return Path(path)
