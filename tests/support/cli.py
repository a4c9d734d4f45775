"""The command line in a process of its own."""

from __future__ import annotations

import subprocess
import sys

MAIN = "from razor_local.cli import main; main(prog_name='razor-local')"


def piped(message: str, cwd, code: str = MAIN) -> subprocess.CompletedProcess:
    """chat in a process of its own, in a folder."""
    command = [sys.executable, "-c", code, "chat"]
    return subprocess.run(command, input=message, capture_output=True, text=True, cwd=cwd)
