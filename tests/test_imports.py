"""What is loaded by whom: slow packages only where they are used. (Times say little on a busy
machine, and these modules are where the time goes.)
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from razor_local.cli import COMMANDS
from razor_local.cli.chat import DEFAULT_MODEL

SLOW = {"numpy", "llama_cpp", "numba", "matplotlib", "gguf", "rich", "prompt_toolkit", "jinja2"}
CALL = "from razor_local.cli import main; main({!r}, standalone_mode=False)"
LLAMA = "from razor_local import Llama"
RUN = f"{LLAMA}\nnext(Llama({str(DEFAULT_MODEL)!r}).create_completion('a', stream=True))"
PLAN = (
    "import razor_local as r, razor_local.plan\n"
    f"r.make_plan(r.read_model_shape({str(DEFAULT_MODEL)!r}), None, 512)"
)
NATIVE = {"numpy", "llama_cpp", "jinja2"}
CASES = {  # code, and what of SLOW it may load
    "import razor_local": ("import razor_local; razor_local.RazorError", set()),
    "import chat": ("import razor_local.chat, razor_local.terminal", set()),
    "a plan": (PLAN, {"numpy"}),
    "import Llama": (LLAMA, NATIVE),
    "run Llama": (RUN, NATIVE),
    "--help": (CALL.format(["--help"]), set()),
    "--version": (CALL.format(["--version"]), set()),
    **{f"{name} --help": (CALL.format([name, "--help"]), set()) for name in COMMANDS},
    "inspect": (CALL.format(["inspect", str(DEFAULT_MODEL)]), {"numpy", "rich"}),
    "fit": (CALL.format(["fit", str(DEFAULT_MODEL)]), {"rich", *NATIVE}),
}


@pytest.mark.parametrize(("code", "allowed"), CASES.values(), ids=CASES)
def test_slow_packages_are_loaded_where_they_are_used(code, allowed, tmp_path) -> None:
    code += "\nimport sys; print('\\n', *sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "razor_local" in loaded
    assert loaded & SLOW <= allowed
