"""Build other versions of the native library for tests, in the user's cache folder.

stock.py, broken_builds.py and sanitizers.py use this module.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = Path(__file__).resolve().parents[2]


def cache_dir() -> Path:
    """Return the folder in which native/sdist.cmake stores the sdist."""
    if sys.platform == "win32":
        base = Path(os.environ["LOCALAPPDATA"])
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "razor_local"


@contextmanager
def locked(name: str) -> Iterator[Path]:
    """Yield the folder of that name in the cache to one process at a time.

    Windows does not have these locks, so run only one process there.
    """
    folder = cache_dir() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{name}.lock", "w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield folder


def pin() -> tuple[str, str]:
    """Return the version and the sha256 of the pin file."""
    text = (ROOT / "native/llama-cpp-python.txt").read_text()
    match = re.search(r"^llama-cpp-python==(\S+) --hash=sha256:([0-9a-f]{64})$", text, re.M)
    assert match, "the pin file has no pin"
    return match[1], match[2]


def build(
    folder: Path,
    *definitions: str,
    source: Path = ROOT,
    env: Mapping[str, str] | None = None,
) -> None:
    """Configure and build the CMake project `source` in `folder`, incrementally.

    Raises RuntimeError with the end of the output.
    """
    cmake, ninja = tool("cmake"), tool("ninja")
    if cmake is None:
        raise RuntimeError("no cmake found: run with 'uv run --group dev', which installs it")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    run([cmake, "-S", source, "-B", folder, *generator,
         f"-DPython_EXECUTABLE={sys.executable}", *definitions], env)  # fmt: skip
    run([cmake, "--build", folder, "--config", "Release", "--parallel"], env)


def install(folder: Path, prefix: Path, *options: str) -> Path:
    """Install the build in `folder` below `prefix`, and return the folder of the libraries."""
    run([tool("cmake"), "--install", folder, "--prefix", prefix, "--component", "razor", *options])
    return prefix / "razor_local" / "lib"


def run(command: list, env: Mapping[str, str] | None = None) -> None:
    """Run a command of a build. Raises RuntimeError with the end of its output."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )
    if done.returncode:
        name = Path(command[0]).name
        raise RuntimeError(f"{name} {command[1]} failed:\n{done.stdout[-3000:]}")


def tool(name: str) -> str | None:
    """Find a program in this Python environment, or else in PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def wheels_script() -> ModuleType:
    """Import .ci/wheels as a module. This needs none of the packages for building."""
    loader = SourceFileLoader("wheels", str(ROOT / ".ci/wheels"))
    spec = spec_from_loader("wheels", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module
