"""Head lists: which KV heads of a model are retrieval heads.

A list is a text file with one row per layer and one column per KV head, separated by tabs (or
spaces), 1 = retrieval head, 0 = local head. The published RazorAttention lists look like this.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ..errors import ProfileError
from ..profile import (
    DEFAULT_COMPENSATION,
    DEFAULT_SINKS,
    DEFAULT_WINDOW_DIVISOR,
    DEFAULT_WINDOW_MIN,
    MAX_HEADS,
    MAX_LAYERS,
    ModelShape,
    Profile,
    describe_heads,
)

MAX_BYTES = 8 << 20


def read_heads(path: str | os.PathLike[str], shape: ModelShape) -> tuple[np.ndarray, ...]:
    """Retrieval heads for the model: one uint8 array [n_head_kv] of 0/1 per layer.

    Raises ProfileError where the file is no list of 0 and 1, or is one of another shape; OSError.
    """
    layers = parse_heads(path)
    found = tuple(len(layer) for layer in layers)
    if found != shape.n_head_kv:
        transposed = found == (shape.n_layer,) * shape.n_head_kv[0]
        raise ProfileError(
            f"{path} lists {describe_heads(found)},"
            f" the model has {describe_heads(shape.n_head_kv)};"
            + (" its rows and columns are swapped" if transposed else " it is for another model")
        )
    return layers


def profile_from_heads(
    path: str | os.PathLike[str],
    shape: ModelShape,
    *,
    sink_tokens: int = DEFAULT_SINKS,
    window_min: int = DEFAULT_WINDOW_MIN,
    window_divisor: int = DEFAULT_WINDOW_DIVISOR,
    compensation: bool = DEFAULT_COMPENSATION,
) -> Profile:
    """Profile of a head list, with a record of where it comes from. Raises as read_heads does."""
    return Profile(
        retrieval=read_heads(path, shape),
        sink_tokens=sink_tokens,
        window_min=window_min,
        window_divisor=window_divisor,
        compensation=compensation,
        calibration={
            "source": f"head list {Path(path).name}"[:1000],
            "tool_version": f"razor-local {version('razor-local')}",
            "model_fingerprint": shape.fingerprint,
        },
    )


def parse_heads(path: str | os.PathLike[str]) -> tuple[np.ndarray, ...]:
    """The rows of a head list as uint8 arrays, whatever the model. Raises ProfileError, OSError."""
    path = Path(path)
    if path.is_dir():
        raise ProfileError(f"{path} is a folder, expected a head list")
    with open(path, "rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ProfileError(f"{path} is larger than {MAX_BYTES >> 20} MiB, no head list is")
    try:
        lines = raw.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ProfileError(f"{path} is not a text file, expected a head list") from None
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ProfileError(f"{path} is empty, expected a row of 0 and 1 per layer")
    if len(lines) > MAX_LAYERS:
        raise ProfileError(f"{path} has {len(lines)} rows, expected at most {MAX_LAYERS} layers")
    layers = []
    for il, line in enumerate(lines):
        cells = line.split()
        if len(cells) > MAX_HEADS:
            raise ProfileError(f"{path}: row {il + 1} has {len(cells)} columns, too many KV heads")
        layers.append(np.array([_cell(path, il, ih, c) for ih, c in enumerate(cells)], np.uint8))
    return tuple(layers)


def _cell(path: Path, il: int, ih: int, text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = None
    if value not in (0, 1):
        hint = "; scores must be turned into 0 and 1 first" if value is not None else ""
        raise ProfileError(
            f"{path}: row {il + 1}, column {ih + 1} is {text[:40]!r}, expected 0 or 1{hint}"
        )
    return int(value)
