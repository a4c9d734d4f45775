"""Commands run our own code and the library's, not what the current folder holds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from razor_local.cli.params import DEFAULT_MODEL
from razor_local.common.child import python_command

MAIN = "from razor_local.cli import main; main(prog_name='razor-local')"


@pytest.fixture
def trap(tmp_path):
    """A folder whose modules have the names of others, and leave a mark when they are run."""
    code = "import pathlib\npathlib.Path(__file__).with_name('RUN').touch()\n"
    for name in ("json", "razor_local", "numpy", "signal"):
        (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp/__init__.py").write_text(code.replace(".with", ".parent.with"))
    return tmp_path


@pytest.mark.parametrize(
    "args",
    [
        ["doctor"],
        ["bench", DEFAULT_MODEL, "-d", 0, "--types", "f16", "--only", "memory", "-r", 1, "-t", 1],
    ],
    ids=["doctor", "bench"],
)
def test_modules_of_the_current_folder_are_not_run(trap, args):
    command = python_command(MAIN, *map(str, args))
    done = subprocess.run(command, cwd=trap, capture_output=True, text=True, timeout=300)
    assert not (trap / "RUN").exists(), done.stderr
    assert "Traceback" not in done.stderr and done.returncode in (0, 1), done.stderr


def test_the_trap_is_one(trap):
    subprocess.run([sys.executable, "-c", "import json"], cwd=trap, check=True)
    assert (trap / "RUN").exists()


def test_arguments_and_path():
    code = "import os; print(sys.argv[1:], '' in sys.path, os.getcwd() in sys.path)"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        python_command(code, "a", "b c"), capture_output=True, text=True, env=env, cwd="/"
    )
    assert done.stdout == "['a', 'b c'] False False\n"
