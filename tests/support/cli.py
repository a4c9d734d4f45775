"""Run the command line in this process, and chat in a separate one."""

from __future__ import annotations

import subprocess
import sys

from click.testing import CliRunner

from razor_local.cli import main

MAIN = "from razor_local.cli import main; main(prog_name='razor-local')"


def run(*args: object) -> tuple[int, str, str]:
    """Run razor-local with these arguments and return the exit code, stdout and stderr."""
    result = CliRunner().invoke(main, [str(a) for a in args], prog_name="razor-local")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def piped(message: str, cwd, code: str = MAIN) -> subprocess.CompletedProcess:
    """Run chat in a separate process, in a folder."""
    command = [sys.executable, "-c", code, "chat"]
    return subprocess.run(command, input=message, capture_output=True, text=True, cwd=cwd)
