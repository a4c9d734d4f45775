"""Run the command line in this process, and chat in a separate one."""

from __future__ import annotations

import subprocess
import sys

from click.testing import CliRunner

from razor_local.cli import main

MAIN = "from razor_local.cli import main; main(prog_name='razor-local')"

# answers that continue until the context is full, slowly enough to be stopped
ENDLESS = f"""
import time
from razor_local import llama
generate = llama.Llama._UNGUARDED["generate"]
def slowly(self, *args, **kwargs):
    for token in generate(self, *args, **kwargs):
        time.sleep(0.01)
        yield token
llama.Llama._UNGUARDED["generate"] = slowly
is_end, endless = llama.Llama.is_end, [True]
llama.Llama.is_end = lambda self, token: not endless[0] and is_end(self, token)
set_seed = llama.Llama.set_seed
def end_from_the_second_turn(self, seed):
    endless[0] = seed == 7
    set_seed(self, seed)
llama.Llama.set_seed = end_from_the_second_turn
{MAIN}
"""


def run(*args: object) -> tuple[int, str, str]:
    """Run razor-local with these arguments and return the exit code, stdout and stderr."""
    result = CliRunner().invoke(main, [str(a) for a in args], prog_name="razor-local")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def piped(message: str, cwd, code: str = MAIN) -> subprocess.CompletedProcess:
    """Run chat in a separate process, in a folder."""
    command = [sys.executable, "-c", code, "chat"]
    return subprocess.run(command, input=message, capture_output=True, text=True, cwd=cwd)
