"""The examples of docs/embedding.md run, and a type checker accepts them and the README's."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.support import embedded_model
from tests.support.native_build import ROOT

PAGE = (ROOT / "docs/embedding.md").read_text(encoding="utf-8")
BLOCKS = {
    section.splitlines()[0]: re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    for section in re.split(r"^#+ ", PAGE, flags=re.M)[1:]
}
NAMES = [name for name, blocks in BLOCKS.items() if blocks]
PRINTS = {  # what the output of a section's example contains
    "Embedding razor_local in an application": ["48213", "3 messages"],
    "Threads": ["is still answering an earlier request", "[1"],
    "Cancel": ["stopped 0"],
    "Progress": ["loading 100%", "reading the prompt: ", "progress() returned False"],
    "Memory": ["KV cache 16,283,648 bytes instead of 50,331,648", "of 8192 tokens"],
    "Close": ["this Llama is closed; make a new one"],
    "asyncio": ["48213"],
    "Processes": ["The code", "forked from one in which razor_local had computed"],
}


@pytest.mark.parametrize("name", NAMES)
def test_examples(name, tmp_path):
    (tmp_path / "model.gguf").write_bytes(embedded_model.PATH.read_bytes())
    (code,) = BLOCKS[name]
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    for text in PRINTS.get(name, ()):
        assert text in done.stdout


def test_types_of_the_examples(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (in_readme,) = re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S)
    for i, code in enumerate([in_readme, *(BLOCKS[name][0] for name in NAMES)]):
        (tmp_path / f"example_{i}.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", tmp_path],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
