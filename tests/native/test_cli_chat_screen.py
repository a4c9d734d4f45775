"""The screen of a chat that uses every command."""

from __future__ import annotations

import difflib

import pytest

from razor_local.models import parse
from razor_local.models.local import find
from tests.support.chat_screen import EXPECTED, transcript


def compare(rows: str) -> None:
    expected = EXPECTED.read_text(encoding="utf-8").splitlines()
    assert not list(difflib.unified_diff(expected, rows.splitlines(), lineterm=""))


def test_the_built_in_model():
    compare(transcript())


@pytest.mark.slow
def test_a_chat_model():
    model = find(parse("smollm2:135m"))
    if model is None:
        pytest.skip("smollm2:135m is not on this machine: razor-local models pull smollm2:135m")
    compare(transcript(str(model)))
