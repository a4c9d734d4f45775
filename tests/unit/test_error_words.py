"""Messages name arguments of Llama in Python, and options in the command line."""

from __future__ import annotations

import ast
import re

import pytest

from razor_local.cli import OPTIONS, main
from razor_local.errors import command_line, option, options
from tests.support.commands import commands
from tests.support.rooms import modules

ARGUMENTS = re.compile(
    r"\b(n_ctx|n_batch|n_ubatch|n_threads|n_gpu_layers|type_[kv]|flash_attn)\b|\brazor=\w"
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def test_arguments_of_python_and_options_of_the_command_line() -> None:
    def written() -> tuple[str, ...]:
        return (
            option("n_ctx"),
            option("window"),
            options(n_ctx=4096, type_k="q8_0", type_v="q8_0"),
            options(razor=False),
            options(n_ctx="auto"),
            options(flash_attn=True),
        )

    python = (
        "n_ctx",
        "window",
        "n_ctx=4096, type_k='q8_0', type_v='q8_0'",
        "razor=False",
        "n_ctx='auto'",
        "flash_attn=True",
    )
    assert written() == python
    with command_line(OPTIONS):
        cli = "-c", "window", "-c 4096 -ctk q8_0 -ctv q8_0", "--no-razor", "-c auto", "-fa on"
        assert written() == cli
    assert written() == python


def test_the_options_are_those_of_chat_and_convert() -> None:
    params = [p for name in ("chat", "convert") for p in commands()[name].params]
    known = {name for p in params for name in (*p.opts, *p.secondary_opts)}
    assert {text.split()[0] for text in OPTIONS.values()} <= known


def test_no_text_spells_an_argument_out() -> None:
    """Messages that reach the command line must use option() or options()."""
    found = []
    for module, path in modules():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docs = [ast.get_docstring(n, clean=False) for n in nodes if isinstance(n, DOCUMENTED)]
        for node in nodes:
            text = node.value if isinstance(node, ast.Constant) else None
            # the argument of option() is a bare name
            if isinstance(text, str) and " " in text and text not in docs:
                found += [f"{module}:{node.lineno}: {text}"] if ARGUMENTS.search(text) else []
    assert found == []


def test_an_error_of_a_command_names_options(monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from razor_local.cli import doctor
    from razor_local.errors import RazorError

    def fails() -> None:
        raise RazorError(f"use {options(n_ctx=512, type_k='q8_0')}")

    monkeypatch.setattr(doctor, "examine", fails)
    result = CliRunner().invoke(main, ["doctor"])
    assert (result.exit_code, result.stderr) == (1, "Error: use -c 512 -ctk q8_0\n")
    with pytest.raises(RazorError, match="use n_ctx=512, type_k='q8_0'"):
        fails()
