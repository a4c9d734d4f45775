"""Escape terminal control codes in text of files and models."""

from __future__ import annotations

import re

# C0 and C1 controls, overrides of the writing direction, halves of surrogate pairs
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, one_line: bool = False) -> str:
    """Return text for a terminal to show: what it would obey is escaped, "\\x1b" for example.

    Line breaks and tabs are kept, unless one_line says that the text is a name or a sentence.
    """

    def escape(match: re.Match[str]) -> str:
        keep = not one_line and match[0] in "\n\t"
        return match[0] if keep else match[0].encode("unicode_escape").decode("ascii")

    return _UNPRINTABLE.sub(escape, text if one_line else text.replace("\r\n", "\n"))
