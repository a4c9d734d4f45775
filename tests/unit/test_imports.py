"""What is loaded by whom: slow packages only where they are used. (Times say little on a busy
machine, and these modules are where the time goes.)
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from razor_local.cli import COMMANDS
from razor_local.cli.chat import DEFAULT_MODEL
from tests.support.loaded import CALL, slow_packages
from tests.support.native_build import ROOT

PLAN = (
    "import razor_local as r, razor_local.plan\n"
    f"r.make_plan(r.read_model_shape({str(DEFAULT_MODEL)!r}), None, 512)"
)
CASES = {  # code, and what of SLOW it may load
    "import razor_local": ("import razor_local; razor_local.RazorError", set()),
    "import chat": ("import razor_local.chat, razor_local.cli.terminal", set()),
    "a plan": (PLAN, {"numpy"}),
    "--help": (CALL.format(["--help"]), set()),
    "--version": (CALL.format(["--version"]), set()),
    **{f"{name} --help": (CALL.format([name, "--help"]), set()) for name in COMMANDS},
    "inspect": (CALL.format(["inspect", str(DEFAULT_MODEL)]), {"numpy", "rich"}),
}


@pytest.mark.parametrize(("code", "allowed"), CASES.values(), ids=CASES)
def test_slow_packages_are_loaded_where_they_are_used(code, allowed, tmp_path) -> None:
    assert slow_packages(code, tmp_path) <= allowed


ROOMS = (
    "printable", "errors", "common", "gguf", "plan", "model_shape", "profile", "scores",
    "model_file", "model_setup", "models", "prompt", "chat", "native", "bindings", "ownership",
    "completion", "memory", "fit", "llama_options", "evaluation", "sampling", "state", "llama",
    "sessions", "converters", "evals", "bench", "verify", "cli", "__main__",
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


def modules() -> Iterator[tuple[str, Path]]:
    """The modules of razor_local and their files."""
    for folder, package in (
        ("razor_local", "razor_local"),
        ("converters", "razor_local.converters"),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            yield ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts]), path


def test_rooms_import_from_lower_rooms_alone() -> None:
    """See docs/architecture.md. An import in a function counts, too."""
    found = set()
    for module, path in modules():
        room = module.split(".")[1]
        if room == "__init__":  # its names are looked up when they are used
            continue
        found.add(room)
        for imported in imports_of(path, module):
            parts = imported.split(".")
            if parts[0] == "razor_local" and len(parts) > 1 and parts[1] in ROOMS:
                assert ROOMS.index(parts[1]) <= ROOMS.index(room), f"{module} imports {imported}"
    assert found == set(ROOMS), "a room is missing in ROOMS, or in the package"


# functions of the signal module that change what a signal does, and what is called in a process
# that the library has started for itself: there they change nothing for anyone else
HANDLERS = ("signal", "setitimer", "sigaction", "siginterrupt", "set_wakeup_fd", "pthread_sigmask")
IN_A_CHILD = {
    # the child that renders chat templates ends itself with SIGPROF
    ("razor_local.prompt.templates", "setitimer"),
    # the child that measures leaves Ctrl-C to its parent
    ("razor_local.bench.worker", "signal"),
}


def test_the_command_line_alone_handles_signals_and_uses_click() -> None:
    """A library does not decide what Ctrl-C does in somebody's program; it is given stop()."""
    found = set()
    for module, path in modules():
        if module.startswith("razor_local.cli."):
            continue
        assert not {name.split(".")[0] for name in imports_of(path, module)} & {"click", "rich"}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "signal":
                found.add((module, node.attr))
            assert not (isinstance(node, ast.ImportFrom) and node.module == "signal"), module
    assert {(module, name) for module, name in found if name in HANDLERS} == IN_A_CHILD
