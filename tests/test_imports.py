"""What is loaded by whom: slow packages only where they are used. (Times say little on a busy
machine, and these modules are where the time goes.)
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from native_build import ROOT

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
    "import chat": ("import razor_local.chat, razor_local.cli.terminal", set()),
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


ROOMS = (
    "printable", "errors", "common", "gguf", "plan", "profile", "scores", "model_setup", "state",
    "prompt", "completion", "sessions", "chat", "native", "bindings", "ownership", "fit", "llama",
    "converters", "evals", "bench", "verify", "cli", "__main__",
)  # fmt: skip


def imports_of(path: Path, module: str) -> Iterator[str]:
    """The modules of razor_local that a file imports, but for its types."""
    package = module.split(".")[:-1]
    tree = ast.parse(path.read_text())
    for node in [node for node in ast.walk(tree) if isinstance(node, ast.If)]:
        if ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield from (f"{found}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def test_rooms_import_from_lower_rooms_alone() -> None:
    """See docs/architecture.md. An import in a function counts, too."""
    files = {}
    for folder, package in (
        ("razor_local", "razor_local"),
        ("converters", "razor_local.converters"),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            files[".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts])] = (
                path
            )
    found = set()
    for module, path in files.items():
        room = module.split(".")[1]
        if room == "__init__":  # its names are looked up when they are used
            continue
        found.add(room)
        for imported in imports_of(path, module):
            parts = imported.split(".")
            if parts[0] == "razor_local" and len(parts) > 1 and parts[1] in ROOMS:
                assert ROOMS.index(parts[1]) <= ROOMS.index(room), f"{module} imports {imported}"
    assert found == set(ROOMS), "a room is missing in ROOMS, or in the package"
