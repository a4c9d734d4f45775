"""Puts the reports in docs/quality/ into docs/quality.md, between <!-- NAME --> and <!-- /NAME -->.

python models/quality_doc.py
"""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"(<!-- ([\w-]+) -->\n).*?(<!-- /\2 -->)", re.S)


def report(name: str, folder: Path = DOCS / "quality") -> str:
    """docs/quality/NAME.md without its title, headings one level down."""
    text = (folder / f"{name}.md").read_text(encoding="utf-8")
    _, _, body = text.partition("\n")
    return re.sub(r"^#", "##", body.strip(), flags=re.M) + "\n"


def filled(text: str, folder: Path = DOCS / "quality") -> str:
    return BLOCK.sub(lambda m: f"{m[1]}\n{report(m[2], folder)}\n{m[3]}", text)


if __name__ == "__main__":
    page = DOCS / "quality.md"
    text = page.read_text(encoding="utf-8")
    marked = {match[2] for match in BLOCK.finditer(text)}
    page.write_text(filled(text), encoding="utf-8")
    if missing := {path.stem for path in (DOCS / "quality").glob("*.md")} - marked:
        raise SystemExit(f"{page} has no marks for {', '.join(sorted(missing))}: add <!-- NAME -->")
