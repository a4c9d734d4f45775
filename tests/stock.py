"""An unpatched build of the pinned llama.cpp, to compare ours with bit by bit.

Built once by this repository's own CMakeLists.txt with RAZOR_STOCK=ON and otherwise the same
options, then kept in the user's cache folder. RAZOR_STOCK_LIB names a folder to take instead.

    python tests/stock.py    # builds it if need be and prints the folder
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_INPUTS = ["CMakeLists.txt", "native/llama-cpp-python.txt", "native/*.cmake", "native/*.py"]
_OPTIONS = ["RAZOR_CUDA", "RAZOR_METAL", "RAZOR_VULKAN", "RAZOR_NATIVE", "CC", "CXX", "CFLAGS"]
_OPTIONS += ["CXXFLAGS", "CMAKE_ARGS"]


def stock_lib_dir() -> Path:
    """The folder with the stock libllama and its ggml libraries.

    Takes minutes the first time. Raises RuntimeError with the end of the build's output.
    """
    if folder := os.environ.get("RAZOR_STOCK_LIB"):
        if not any(Path(folder).glob("*llama.*")):
            raise RuntimeError(f"RAZOR_STOCK_LIB names {folder}, which holds no libllama: unset it")
        return Path(folder)
    folder = _cache_dir() / f"stock-{_key()}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="stock-", dir=folder.parent) as temp:
            built = _build(Path(temp))
            try:
                built.rename(folder)
            except OSError:  # another run was faster
                if not folder.is_dir():
                    raise
    return folder


def _build(temp: Path) -> Path:
    """Configure, build and install into `temp`; the folder of the installed libraries."""
    print("building a stock llama.cpp to compare with, once (minutes)", file=sys.stderr)
    cmake, ninja = _tool("cmake"), _tool("ninja")
    if cmake is None:
        raise RuntimeError("no cmake found: run the tests with 'uv run pytest', which installs it")
    configure = [cmake, "-S", ROOT, "-B", temp / "build", "-DRAZOR_STOCK=ON", "-DRAZOR_TOOLS=OFF"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    configure += os.environ.get("CMAKE_ARGS", "").split()
    _run(configure)
    _run([cmake, "--build", temp / "build", "--config", "Release", "--parallel"])
    _run([cmake, "--install", temp / "build", "--prefix", temp, "--component", "razor", "--strip"])
    return temp / "razor_local" / "lib"


def _run(command: list) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"building a stock llama.cpp failed:\n{done.stdout[-3000:]}")


def _tool(name: str) -> str | None:
    """A program of this Python environment, else of the PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def _key() -> str:
    """Digest of all that decides what the build gives: inputs, options, compiler and CPU."""
    digest = hashlib.sha256()
    for pattern in _INPUTS:
        for file in sorted(ROOT.glob(pattern)):
            digest.update(file.read_bytes())
    for name in _OPTIONS:
        digest.update(f"{name}={os.environ.get(name, '')}\n".encode())
    compiler = os.environ.get("CXX") or "c++"
    if path := shutil.which(compiler):
        version = subprocess.run([path, "--version"], capture_output=True, check=False)
        digest.update(version.stdout)
    digest.update(f"{platform.machine()} {platform.processor()}".encode())
    cpuinfo = Path("/proc/cpuinfo")  # RAZOR_NATIVE: another CPU may lack instructions of this one
    if cpuinfo.is_file():
        wanted = ("model name", "flags", "Features")
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith(wanted)]
        digest.update("\n".join(sorted(set(lines))).encode())
    return digest.hexdigest()[:16]


def _cache_dir() -> Path:
    """The folder that native/sdist.cmake keeps the sdist in."""
    if sys.platform == "win32":
        base = Path(os.environ["LOCALAPPDATA"])
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "razor_local"


if __name__ == "__main__":
    print(stock_lib_dir())
