"""razor_local.native.cpu, with libraries of a few lines in the place of ggml's CPU backends."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from razor_local.errors import LibraryError
from razor_local.native import best_backend, use_best_backend
from razor_local.server import command

REGISTRY = """
static const char * cpu = "linked";
const void * ggml_backend_reg_by_name(const char * name) { return cpu; }
const void * ggml_backend_load(const char * path) { return cpu[0] == 'l' ? "loaded" : cpu; }
void ggml_backend_unload(const void * reg) { cpu = reg == cpu && cpu[0] == 'l' ? "best" : "none"; }
void ggml_log_get(void ** callback, void ** data) { *callback = *data = 0; }
void ggml_log_set(void * callback, void * data) {}
const char * registered(void) { return cpu; }
"""


def compile(path: Path, source: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = ["-x", "c", "-", "-w", "-shared", "-fPIC", "-o", str(path)]
    subprocess.run(["cc", *options], input=source, text=True, check=True)
    return path


def backend(package: Path, name: str, score: int) -> Path:
    path = package / "cpu" / name / "libggml-cpu.so"
    return compile(path, f"int ggml_backend_score(void) {{ return {score}; }}")


def test_a_build_for_one_machine_has_one_backend(tmp_path: Path) -> None:
    assert best_backend(tmp_path / "lib") is None
    use_best_backend(ctypes.CDLL(None), tmp_path / "lib")  # which has none of ggml's functions


def test_the_backend_with_the_highest_score_is_used(tmp_path: Path) -> None:
    backend(tmp_path, "a", 0)
    assert best_backend(tmp_path / "lib") is None
    best = backend(tmp_path, "b", 30)
    backend(tmp_path, "c", 4)
    assert best_backend(tmp_path / "lib") == best


def test_the_linked_backend_is_replaced_once(tmp_path: Path) -> None:
    backend(tmp_path, "a", 1)
    lib = ctypes.CDLL(str(compile(tmp_path / "lib/libggml.so", REGISTRY)))
    lib.registered.restype = ctypes.c_char_p
    for _ in range(2):
        use_best_backend(lib, tmp_path / "lib")
        assert lib.registered() == b"best"


def test_a_damaged_backend(tmp_path: Path) -> None:
    path = backend(tmp_path, "a", 1)
    path.write_bytes(b"")
    with pytest.raises(LibraryError, match=f"{path} cannot be loaded .*; reinstall razor-local"):
        best_backend(tmp_path / "lib")


def test_a_server_uses_the_best_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.native, "library_folder", lambda: tmp_path / "lib")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    assert command.library_environment() == {}
    folder = backend(tmp_path, "a", 1).parent
    assert command.library_environment() == {"LD_LIBRARY_PATH": str(folder)}
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/lib/x")
    assert command.library_environment() == {"LD_LIBRARY_PATH": f"{folder}:/usr/lib/x"}
