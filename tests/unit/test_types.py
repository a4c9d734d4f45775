"""A type checker finds the types of the installed package, as its users run it."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

import razor_local
from tests.support.installed import ENTRY_POINTS, PACKAGES, make_environment
from tests.support.native_build import ROOT

SCRIPT = '''
"""Summarize texts with a local model."""

import sys
from collections.abc import Iterator
from pathlib import Path

from razor_local import Chat, Llama, Memory, RazorError, Sampling


def show(part: float) -> bool:
    print(f"loading: {part:.0%}", file=sys.stderr)
    return True


def answer(chat: Chat, text: str) -> Iterator[str]:
    for piece in chat.say(text, stop=lambda: False):
        yield piece.upper()


def main(model: Path, texts: list[str]) -> int:
    try:
        llama = Llama(model, n_ctx=4096, type_k="q8_0", n_threads=2, progress=show)
    except (RazorError, OSError) as error:
        sys.exit(str(error))
    chat = Chat(llama, system="Summarize.", sampling=Sampling(temp=0.2, seed=1), max_tokens=64)
    for text in texts:
        print("".join(answer(chat, text)))
    messages = [{"role": "user", "content": "Hi"}]
    whole = llama.create_chat_completion([{"role": "user", "content": "Hi"}], max_tokens=8)
    print(whole["choices"][0]["message"]["content"])
    for chunk in llama.create_completion("Once", stream=True, temperature=0):
        print(chunk["choices"][0]["text"], end="")
    memory: Memory = llama.memory()
    saved: int = memory.kv_bytes_full - memory.kv_bytes
    print(len(messages), saved, chat.last.answer_per_second if chat.last else 0, llama.piece(1))
    return saved


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
'''
MISTAKES = {  # a line, and what mypy says about it
    "import razor_local; razor_local.Lama": 'Module has no attribute "Lama"',
    "from razor_local import Llama; Llama('', n_thread=2)": 'keyword argument "n_thread"',
    "from razor_local import Llama; x: str = Llama('a').memory()": 'has type "Memory"',
    "from razor_local import Llama; y: str = Llama('a').n_ctx()": 'has type "int"',
    "from razor_local import Sampling; Sampling(temp='hot')": 'incompatible type "str"',
    "from razor_local import make_plan; make_plan(1)": 'incompatible type "int"',
}


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """Return check(code) -> the lines of mypy --strict on a script of that code."""
    folder = tmp_path_factory.mktemp("user")
    python = make_environment(folder / "env")

    def check(code: str) -> list[str]:
        script = folder / "script.py"
        script.write_text(code)
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, script],
            cwd=folder, capture_output=True, text=True,
        )  # fmt: skip
        return (done.stdout + done.stderr).splitlines()

    return check


def test_a_script_of_a_user(check):
    assert check(SCRIPT) == ["Success: no issues found in 1 source file"]


def test_mistakes_are_found(check):
    lines = check("\n".join(MISTAKES))
    for number, (code, message) in enumerate(MISTAKES.items(), 1):
        found = [line for line in lines if f"script.py:{number}: error" in line]
        assert any(message in line for line in found), (code, found)


def test_type_checkers_know_the_names_of_the_package():
    tree = ast.parse(Path(razor_local.__file__).read_text(encoding="utf-8"))
    (block,) = (
        node for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )  # fmt: skip
    imported = {
        name.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert imported == razor_local._EXPORTS


def normal(hint: Any) -> Any:
    """Return a type with one spelling of unions and lists."""
    if get_origin(hint) in (Union, UnionType):
        return frozenset(map(normal, get_args(hint)))
    return (get_origin(hint), *map(normal, get_args(hint))) if get_args(hint) else hint


@pytest.mark.parametrize(
    ("arguments", "method", "left_out"),
    [
        ("LoadArguments", "__init__", {"model_path", "kwargs"}),
        ("SampleArguments", "sample", set()),
        ("GenerateArguments", "generate", {"tokens"}),
        ("CompletionArguments", "create_completion", {"prompt", "stream"}),
        ("ChatArguments", "create_chat_completion", {"messages", "stream"}),
    ],
)
def test_arguments_are_those_of_the_bindings(arguments, method, left_out, built_library):
    """Compare the annotations of razor_local.llama_arguments with those of llama_cpp.Llama."""
    from razor_local import Llama, llama_arguments
    from razor_local.native.loaded import llama_cpp

    modules = ("llama", "llama_types", "llama_chat_format", "llama_speculative", "llama_tokenizer")
    known: dict[str, Any] = {}
    for name in modules:
        known |= vars(sys.modules[f"llama_cpp.{name}"])
    expected = get_type_hints(getattr(llama_cpp.Llama, method), known)
    ours = inspect.signature(Llama.__init__).parameters if method == "__init__" else {}
    expected = {
        name: normal(hint)
        for name, hint in expected.items()
        if name not in left_out | set(ours) | {"self", "return"}
    }
    if method == "generate":
        expected["seed"] = normal(int | None)  # not in the base class
    found = get_type_hints(getattr(llama_arguments, arguments), localns=known)
    assert {name: normal(hint) for name, hint in found.items()} == expected


def test_the_environment_has_what_the_wheel_has():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["scikit-build"]["wheel"]["packages"] == PACKAGES
    assert (ROOT / "razor_local" / "py.typed").is_file()
    assert project["tool"]["mypy"]["strict"] is True
    ((name, points),) = project["project"]["entry-points"].items()
    lines = [f"[{name}]", *(f"{key} = {value}" for key, value in points.items())]
    assert ENTRY_POINTS.splitlines() == lines
