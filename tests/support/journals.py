"""Damage the journals of long runs."""

from __future__ import annotations

import json
from collections.abc import Iterator


def damaged(lines: list[str]) -> Iterator[list[str]]:
    """Yield the lines of a journal with one field of one record missing or changed.

    One record of each kind is damaged.
    """
    kinds = [json.loads(line)["kind"] for line in lines]
    for kind in dict.fromkeys(kinds):
        i = kinds.index(kind)
        record = json.loads(lines[i])
        for field in record:
            for value in (None, [], {}, "x", -1, 10**400, float("nan"), float("inf"), ...):
                changed = record | {field: value}
                if value is ...:
                    del changed[field]
                yield [*lines[:i], json.dumps(changed) + "\n", *lines[i + 1 :]]
