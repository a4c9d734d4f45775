"""Tests of the check of CUDA wheels in .ci/wheels, with one-line libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.native_build import wheels_script

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs ldd")
CALLS = "void cublasCreate_v2(void), cuMemCreate(void); void f(void) { %s }"


def compile(path: Path, source: str, *options: str | Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["cc", "-w", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{path.name}"]
    command += ["-x", "none", "-Wl,--no-as-needed", "-o", path, *options]
    subprocess.run(command, input=source, text=True, check=True)
    return path


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    return compile(tmp_path / "stub/libcuda.so.1", "")


@pytest.fixture
def cublas(tmp_path: Path) -> Path:
    """Return a library in the folder where pip installs NVIDIA's."""
    source = "void cublasCreate_v2(void) {}"
    return compile(tmp_path / "nvidia/cu13/lib/libcublas.so.13", source)


def backend(tree: Path, calls: str, *libraries: Path) -> Path:
    rpath = "-Wl,-rpath,$ORIGIN/../../nvidia/cu13/lib"
    return compile(tree / "razor_local/lib/libggml-cuda.so", CALLS % calls, rpath, *libraries)


def test_libraries_find_those_of_nvidia(tmp_path: Path, driver: Path, cublas: Path) -> None:
    file = backend(tmp_path, "cublasCreate_v2(); cuMemCreate();", cublas, driver)
    wheels_script().check_links(file, driver.parent, tmp_path)
    cublas.rename(tmp_path / "gone")
    with pytest.raises(SystemExit, match="lib/libggml-cuda.so needs .*libcublas.so.13"):
        wheels_script().check_links(file, driver.parent, tmp_path)


def test_undefined_symbols_are_named(tmp_path: Path, driver: Path, cublas: Path) -> None:
    file = backend(tmp_path, "cudaMalloc();", cublas, driver)
    with pytest.raises(SystemExit, match="needs what NVIDIA's packages lack: cudaMalloc$"):
        wheels_script().check_links(file, driver.parent, tmp_path)
    file = backend(tmp_path, "cuMemCreate();", cublas)  # not linked to the driver's library
    with pytest.raises(SystemExit, match="lack: cuMemCreate$"):
        wheels_script().check_links(file, driver.parent, tmp_path)


def test_libraries_of_the_machine_are_refused(tmp_path: Path, driver: Path) -> None:
    elsewhere = compile(tmp_path / "opt/libcublas.so.13", "void cublasCreate_v2(void) {}")
    tree = tmp_path / "tree"
    rpath = f"-Wl,-rpath,{elsewhere.parent}"
    file = backend(tree, "cublasCreate_v2();", elsewhere, driver, rpath)
    with pytest.raises(SystemExit, match="uses libraries of this machine: .*/opt/libcublas.so.13"):
        wheels_script().check_links(file, driver.parent, tree)
