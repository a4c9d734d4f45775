"""An unpatched build of the pinned llama.cpp, to compare the patched one with bit by bit.

This repository's CMakeLists.txt builds it once, with RAZOR_STOCK=ON and otherwise the same options.
It is kept in the user's cache folder. RAZOR_STOCK_LIB names another folder to use instead.

    python -m tests.support.stock    # builds it if needed and prints the folder
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support import native_build
from tests.support.native_build import ROOT, cache_dir

_INPUTS = ["CMakeLists.txt", "native/llama-cpp-python.txt", "native/*.cmake", "native/*.py"]
_OPTIONS = ["RAZOR_CUDA", "RAZOR_METAL", "RAZOR_VULKAN", "RAZOR_RPC", "RAZOR_NATIVE", "RAZOR_AVX2"]
_OPTIONS += ["CC", "CXX", "CFLAGS", "CXXFLAGS", "CMAKE_ARGS"]


def stock_lib_dir() -> Path:
    """Return the folder of the stock libllama and its ggml libraries.

    The first call takes minutes. Raises RuntimeError with the end of the build's output.
    """
    if folder := os.environ.get("RAZOR_STOCK_LIB"):
        if not any(Path(folder).glob("*llama.*")):
            raise RuntimeError(
                f"RAZOR_STOCK_LIB is {folder}, which does not contain libllama; unset it"
            )
        return Path(folder)
    name = f"stock-{_key()}"
    if not (cache_dir() / name).is_dir():
        with native_build.locked(name) as folder:
            if not folder.is_dir():  # another process may have built it in the meantime
                with tempfile.TemporaryDirectory(prefix="stock-", dir=folder.parent) as temp:
                    _build(Path(temp)).rename(folder)
    return cache_dir() / name


def _build(temp: Path) -> Path:
    """Configure, build and install into `temp`, and return the folder of the libraries."""
    print("building a stock llama.cpp to compare with, once (minutes)", file=sys.stderr)
    more = os.environ.get("CMAKE_ARGS", "").split()
    native_build.build(temp / "build", "-DRAZOR_STOCK=ON", "-DRAZOR_TOOLS=OFF", *more)
    return native_build.install(temp / "build", temp, "--strip")


def _key() -> str:
    """Return a digest of everything the build depends on: inputs, options, compiler and CPU."""
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


if __name__ == "__main__":
    print(stock_lib_dir())
