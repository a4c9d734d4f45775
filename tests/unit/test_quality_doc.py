"""docs/quality.md holds the reports that lie in docs/quality/, word for word."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/quality.md"


@pytest.fixture(scope="module")
def quality_doc():
    sys.path.insert(0, str(ROOT / "models"))
    try:
        yield importlib.import_module("quality_doc")
    finally:
        sys.path.remove(str(ROOT / "models"))


def test_a_report_stands_between_its_marks(quality_doc, tmp_path):
    (tmp_path / "some-name.md").write_text("# title\n\nA paragraph.\n\n- a\n\n## b\n\n| c |\n")
    page = "# x\n<!-- some-name -->\nold\n<!-- /some-name -->\nrest\n"
    new = "# x\n<!-- some-name -->\n\n- a\n\n### b\n\n| c |\n\n<!-- /some-name -->\nrest\n"
    assert quality_doc.filled(page, tmp_path) == new
    assert quality_doc.filled(new, tmp_path) == new


def test_the_page_is_up_to_date(quality_doc):
    page = PAGE.read_text(encoding="utf-8")
    assert quality_doc.filled(page) == page
    marked = {match[2] for match in quality_doc.BLOCK.finditer(page)}
    assert marked == {path.stem for path in (ROOT / "docs/quality").glob("*.md")}
