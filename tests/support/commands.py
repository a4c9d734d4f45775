"""The commands of razor-local, their help and their examples.

`python -m tests.support.commands` writes docs/help.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
from click.testing import CliRunner

from razor_local.cli import main
from tests.support.native_build import ROOT

PAGE = ROOT / "docs/help.md"
HEAD = """\
# Command reference

This page is the output of `--help` for every command. `python -m tests.support.commands` writes it,
and a test checks it.
"""
PAGES = (
    "README.md",
    "docs/chat.md",
    "docs/models.md",
    "docs/server.md",
    "docs/evaluation.md",
    "docs/verification.md",
)


def commands(command: click.Command = main, name: str = "") -> dict[str, click.Command]:
    """Return all commands by name, including subcommands such as "eval needle"; "" is the group."""
    found = {name: command}
    if isinstance(command, click.Group):
        context = click.Context(command)
        for sub in command.list_commands(context):
            one = command.get_command(context, sub)
            assert one is not None
            found |= commands(one, f"{name} {sub}".strip())
    return found


def help_of(name: str) -> str:
    """Return the output of --help in 100 columns."""
    args = [*name.split(), "--help"]
    return (
        CliRunner()
        .invoke(main, args, prog_name="razor-local", terminal_width=100, max_content_width=100)
        .output
    )


def page() -> str:
    """Return the text of docs/help.md."""
    parts = [HEAD]
    for name in commands():
        parts.append(f"## razor-local {name}".rstrip() + f"\n\n```\n{help_of(name)}```\n")
    return "\n".join(parts)


def examples(command: click.Command) -> list[str]:
    """Return the examples in the help of a command, one line each."""
    _, _, block = (command.epilog or "").partition("Examples:\n")
    block = re.sub(r"\\\n *", "", block.split("\n\n")[0])
    return [re.split(r"  +", line.strip())[0] for line in block.splitlines()]


def page_examples(path: Path) -> Iterator[str]:
    """Yield the command lines in the shell blocks of a page."""
    for block in re.findall(r"^```sh\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S):
        for line in re.sub(r"\\\n *", "", block).splitlines():
            line = line.partition(" #")[0].strip().replace("uv run razor-local", "razor-local")
            if re.match(r"(cat .*\| )?razor-local ", line):
                yield line


def all_examples() -> list[str]:
    """Return every example of the help and of the pages, without repetitions."""
    found = [line for command in commands().values() for line in examples(command)]
    for name in PAGES:
        found += page_examples(ROOT / name)
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
