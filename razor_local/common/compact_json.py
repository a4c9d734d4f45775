"""Write reports as compact JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def compact_json(report: Mapping[str, Any]) -> str:
    """Return the report with one field per line, and one element per line in a list."""
    return "{\n" + ",\n".join(f"{_line(k)}:{_lines(v)}" for k, v in report.items()) + "\n}\n"


def _lines(value: Any) -> str:
    if isinstance(value, (list, tuple)) and value:
        return "[\n" + ",\n".join(map(_line, value)) + "\n]"
    return _line(value)


def _line(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
