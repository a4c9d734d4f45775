"""Writes the tables of README.md anew that come from saved benchmarks.

    python docs/benchmarks/update_readme.py

A table stands between the lines "<!-- bench FILE.json -->" and "<!-- /bench -->", FILE.json as
'razor-local bench -o FILE.json' saved it, relative to the README.
"""

from __future__ import annotations

import sys
from pathlib import Path

from razor_local.bench.report import load_report, readme_block
from razor_local.common.markdown import save_text
from razor_local.errors import RazorError

START, START_END, END = "<!-- bench ", ".json -->", "<!-- /bench -->"


def updated(readme: Path) -> str:
    """The text of the readme with new tables. Raises RazorError where it has no place for one."""
    out, inside, found = [], False, False
    for line in readme.read_text(encoding="utf-8").splitlines():
        inside = inside and line != END
        if not inside:
            out.append(line)
        if line.startswith(START) and line.endswith(START_END):
            name = line.removeprefix(START).removesuffix(" -->")
            out += readme_block(load_report(readme.parent / name)).splitlines()
            inside = found = True
    if inside or not found:
        raise RazorError(f"{readme} has no lines '{START}FILE{START_END}' and '{END}' for a table")
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    path = Path(__file__).parents[2] / "README.md"
    try:
        save_text(updated(path), path)
    except (RazorError, OSError) as error:
        sys.exit(f"Error: {error}")
