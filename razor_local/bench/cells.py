"""Format the cells of benchmark tables; a missing measurement is an empty cell."""

from __future__ import annotations

from typing import Any


def kv(row: dict[str, Any]) -> str:
    return row["type_k"] if row["type_k"] == row["type_v"] else f"{row['type_k']}/{row['type_v']}"


def number(value: float | None) -> str:
    """Format a number with about four significant digits."""
    if value is None:
        return ""
    digits = next((n for limit, n in ((1, 3), (100, 2), (1000, 1)) if abs(value) < limit), 0)
    return f"{value:,.{digits}f}"


def count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def ratio(row: dict[str, Any], name: str) -> str:
    if row[name] is None:
        return ""
    return f"{row[name]:.2f}x ({row[f'{name}_q1']:.2f}-{row[f'{name}_q3']:.2f})"


def seconds(value: float | None) -> str:
    return "" if value is None else f"{number(value)} s"


def mib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:,.1f}"
