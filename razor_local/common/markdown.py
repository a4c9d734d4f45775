"""Write reports in Markdown."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from .files import new_file


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table; all columns but the first are right-aligned."""
    return [
        f"| {' | '.join(titles)} |",
        f"|{'|'.join(['---'] + ['---:'] * (len(titles) - 1))}|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def one_line(text: str) -> str:
    """Replace characters that would break a table or add markup, and cut long texts."""
    return "".join(c if c.isprintable() and c not in "|`<>" else "?" for c in text[:200])


def short_tokens(n_tokens: int) -> str:
    """Format a number of tokens for a label, such as "8k"."""
    return f"{n_tokens / 1024:.3g}k" if n_tokens >= 1024 else str(n_tokens)


def save_text(text: str, path: str | os.PathLike[str]) -> None:
    """Write a text file, and replace an old one once the new one is complete."""
    with new_file(path) as file:
        file.write(text.encode())
