"""Find the slow packages that a piece of code loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SLOW = {
    "numpy", "llama_cpp", "numba", "matplotlib", "gguf", "rich", "prompt_toolkit", "jinja2",
    "huggingface_hub", "httpx2",
}  # fmt: skip
CALL = "from razor_local.cli import main; main({!r}, standalone_mode=False)"


def slow_packages(code: str, folder: Path) -> set[str]:
    """Run code in a folder, in a separate process, and return the packages of SLOW it loaded."""
    code += "\nimport sys; print('\\n', *sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=True
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "razor_local" in loaded
    return loaded & SLOW
