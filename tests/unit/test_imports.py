"""What is loaded by whom: slow packages only where they are used. (Times say little on a busy
machine, and these modules are where the time goes.)
"""

from __future__ import annotations

import ast

import pytest

from razor_local.cli import COMMANDS
from razor_local.cli.chat import DEFAULT_MODEL
from tests.support.loaded import CALL, slow_packages
from tests.support.native_build import ROOT
from tests.support.rooms import BEGIN, END, ROOMS, edges, imports_of, modules, picture

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


def test_rooms_import_from_lower_rooms_alone() -> None:
    """See docs/architecture.md. An import in a function counts, too."""
    assert {room for room, _, _ in edges()} | {"printable", "hooks"} == set(ROOMS), (
        "ROOMS is not complete"
    )
    for room, other, why in edges():
        assert ROOMS.index(other) <= ROOMS.index(room), why


def test_the_picture_of_the_rooms_is_up_to_date() -> None:
    """python -m tests.support.rooms draws it."""
    page = (ROOT / "docs/architecture.md").read_text()
    assert page.split(BEGIN)[1].split(END)[0] == picture()


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
