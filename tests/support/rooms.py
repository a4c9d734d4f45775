"""The rooms of razor_local: which module may import which, and a diagram of them.

`python -m tests.support.rooms` writes the diagram into docs/architecture.md.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.support.native_build import ROOT

# from the lowest to the highest: a module imports from its own room and from lower ones
ROOMS = (
    "printable", "errors", "hooks", "common", "gguf", "plan", "layer_caches", "model_shape",
    "profile", "scores", "profile_cache", "known_profiles", "model_file", "model_setup", "models",
    "prompt", "chat", "native", "bindings", "ownership", "json_schema", "completion_request",
    "completion", "memory", "available_memory", "rewind_log", "fit", "llama_options",
    "checkpoints", "evaluation", "sampling", "state", "llama", "sessions", "converters", "evals",
    "auto_profile", "bench", "verify", "server", "pyinstaller", "cli", "__main__",
)  # fmt: skip


def imports_of(path: Path, module: str) -> Iterator[str]:
    """Yield the modules of razor_local that a file imports, except for type annotations."""
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
    """Yield the modules of razor_local and their files."""
    for folder, package in (
        ("razor_local", "razor_local"),
        ("converters", "razor_local.converters"),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            yield ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts]), path


def edges() -> list[tuple[str, str, str]]:
    """Return each import as (room, imported room, sentence that names the modules)."""
    found = []
    for module, path in modules():
        room = module.split(".")[1]
        if room == "__init__":  # its names are looked up when they are used
            continue
        for imported in imports_of(path, module):
            parts = imported.split(".")
            if parts[0] == "razor_local" and len(parts) > 1 and parts[1] in ROOMS:
                found.append((room, parts[1], f"{module} imports {imported}"))
    return found


GROUPS = {
    "common": ("printable", "errors", "hooks", "common"),
    "profile": (
        "plan", "model_shape", "profile", "scores", "profile_cache", "known_profiles",
        "model_file", "model_setup",
    ),
    "native": ("native", "bindings"),
    "llama": (
        "ownership", "json_schema", "completion_request", "completion", "memory", "rewind_log",
        "llama_options", "checkpoints", "evaluation", "sampling", "state", "llama",
    ),
    "fit": ("available_memory", "fit"),
    "chat": ("chat", "sessions"),
    "cli": ("cli", "__main__"),
}  # fmt: skip
BEGIN, END = "<!-- rooms -->\n", "<!-- /rooms -->"


def picture() -> str:
    """Return a Mermaid graph of the rooms, without arrows that follow from others."""
    group = {room: name for name, rooms in GROUPS.items() for room in rooms}
    arrows: dict[str, set[str]] = {group.get(room, room): set() for room in ROOMS}
    for room, other, _ in edges():
        a, b = group.get(room, room), group.get(other, other)
        if a != b:
            arrows[a].add(b)

    def reached(name: str) -> set[str]:
        return arrows[name].union(*map(reached, arrows[name]))

    lines = ["```mermaid", "flowchart TD"]
    for a, below in sorted(arrows.items()):
        for b in sorted(below):
            if not any(b in reached(other) for other in below - {b}):
                lines.append(f"    {a} --> {b}")
    return "\n".join([*lines, "```\n"])


if __name__ == "__main__":
    page = ROOT / "docs/architecture.md"
    before, rest = page.read_text().split(BEGIN)
    page.write_text(before + BEGIN + picture() + END + rest.split(END)[1])
