"""Copy reports of docs/quality/ into docs/quality.md, between <!-- NAME --> and <!-- /NAME -->.

python models/quality_doc.py
"""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"(<!-- ([\w-]+) -->\n).*?(<!-- /\2 -->)", re.S)


def report(name: str, folder: Path = DOCS / "quality") -> str:
    """Return docs/quality/NAME.md from its list on, with headings one level down.

    The page's title and first paragraph are left out: the section around it has its own.
    """
    text = (folder / f"{name}.md").read_text(encoding="utf-8")
    body = text[text.index("\n- ") :]
    return re.sub(r"^#", "##", body.strip(), flags=re.M) + "\n"


def filled(text: str, folder: Path = DOCS / "quality") -> str:
    """Return the text of a page with the current reports between its marks."""
    return BLOCK.sub(lambda m: f"{m[1]}\n{report(m[2], folder)}\n{m[3]}", text)


if __name__ == "__main__":
    page = DOCS / "quality.md"
    text = page.read_text(encoding="utf-8")
    marked = {match[2] for match in BLOCK.finditer(text)}
    page.write_text(filled(text), encoding="utf-8")
    if missing := {path.stem for path in (DOCS / "quality").glob("*.md")} - marked:
        raise SystemExit(f"{page} has no marks for {', '.join(sorted(missing))}: add <!-- NAME -->")
