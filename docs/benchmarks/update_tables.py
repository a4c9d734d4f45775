"""Write the tables of docs/benchmarks/README.md from the saved benchmarks.

    python docs/benchmarks/update_tables.py

A table is between the lines "<!-- bench FILE.json -->" and "<!-- /bench -->"; 'razor-local bench -o
FILE.json' has saved FILE.json, whose path is relative to the page.
"""

from __future__ import annotations

import sys
from pathlib import Path

from razor_local.bench.report import readme_block
from razor_local.bench.saved import load_report
from razor_local.common.markdown import save_text
from razor_local.errors import RazorError

START, START_END, END = "<!-- bench ", ".json -->", "<!-- /bench -->"


def updated(page: Path) -> str:
    """Return the text of a page with new tables. Raises RazorError if it has no place for one."""
    out, inside, found = [], False, False
    for line in page.read_text(encoding="utf-8").splitlines():
        inside = inside and line != END
        if not inside:
            out.append(line)
        if line.startswith(START) and line.endswith(START_END):
            name = line.removeprefix(START).removesuffix(" -->")
            out += readme_block(load_report(page.parent / name)).splitlines()
            inside = found = True
    if inside or not found:
        raise RazorError(f"{page} has no lines '{START}FILE{START_END}' and '{END}' for a table")
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    path = Path(__file__).parent / "README.md"
    try:
        save_text(updated(path), path)
    except (RazorError, OSError) as error:
        sys.exit(f"Error: {error}")
