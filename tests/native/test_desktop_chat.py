"""examples/desktop_chat.py in a real window on a virtual screen."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.support.desktop import WHY_MISSING, desktop_session
from tests.support.native_build import ROOT

MAX_GAP = 0.06  # seconds in which the window does not react
TRIES = 3  # on a machine that other tests keep busy


@pytest.mark.skipif(WHY_MISSING is not None, reason=WHY_MISSING or "")
def test_a_session():
    gaps = []
    while not gaps or (gaps[-1] > MAX_GAP and len(gaps) < TRIES):
        seen = desktop_session()
        gaps.append(seen["worst_gap"])
        assert seen["loaded"] == "KV cache 15.5 MiB instead of 48.0 MiB; 0 of 8,192 tokens"
        (n_tokens,) = re.findall(r"; ([\d,]+) of 8,192 tokens", seen["answered"])
        assert int(n_tokens.replace(",", "")) > 3000 and seen["n_ticks"] > 100
        assert seen["text"].count("48213") >= 3  # the question, and two answers
        assert seen["button"] == "Cancel" and "[stopped]" in seen["cancelled"]
        assert "no-such-file.gguf" in seen["refused"] and not seen["alive"]
    assert gaps[-1] < MAX_GAP, gaps


def test_its_types():
    command = [sys.executable, "-m", "mypy", "--strict", "examples/desktop_chat.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
