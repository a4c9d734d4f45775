"""razor_local.server.build, with sources of a few lines. tests/native/test_server.py builds the
real ones."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from razor_local.errors import RazorError, Stopped
from razor_local.server import build
from razor_local.server.build import build_server, find_server, has_web_ui

FILES = {
    "razor/main.cpp": '#include "a.h"\nint main() { return a() + c(); }\n',
    "common/a.cpp": '#include "a.h"\nint a() { return answer() - 42; }\n',
    "common/a.h": 'int a();\nint answer();\nextern "C" int c();\n',
    "vendor/c.c": "int c(void) { int class = 0; return class; }\n",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with a library of one function."""
    for name, text in FILES.items():
        path = tmp_path / "share/llama-server" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    library = tmp_path / "lib"
    library.mkdir()
    (tmp_path / "answer.cpp").write_text("int answer() { return 42; }")
    command = ["c++", "-shared", "-fPIC", "-o", "lib/libllama.so", "answer.cpp"]
    subprocess.run(command, cwd=tmp_path, check=True)
    monkeypatch.setattr(build, "library_folder", lambda: library)
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


def compiler(package: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a script as the compiler. Return the file in which it notes its calls."""
    path, calls = package / "compiler", package / "calls"
    path.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{script}\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return calls


def left(package: Path) -> set[str]:
    """Return the names of the files that a build has left in the cache."""
    return {path.name for path in (package / "cache").rglob("*") if path.is_file()}


def test_the_web_page_is_found(package):
    header = package / "share/llama-server/razor/ui.h"
    header.write_text("/* #undef LLAMA_UI_HAS_ASSETS */\n")
    assert not has_web_ui()
    header.write_text("#define LLAMA_UI_HAS_ASSETS 1\n")
    assert has_web_ui()


def test_it_is_built_once(package, monkeypatch):
    assert find_server() is None
    seen = []
    server = build_server(lambda done, total, label: seen.append(done / total))
    assert subprocess.run([server]).returncode == 0
    assert left(package) == {"llama-server", "lock"}
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] < 1
    monkeypatch.setenv("CXX", "/no/compiler")
    assert find_server() == build_server() == server

    (package / "share/llama-server/common/a.h").write_text(FILES["common/a.h"] + "// changed\n")
    assert find_server() is None


def test_that_of_the_tools_is_used(package):
    tool = package / "bin/llama-server"
    tool.parent.mkdir()
    tool.touch()
    assert find_server() == build_server() == tool


def test_no_compiler(package, monkeypatch):
    monkeypatch.setenv("PATH", str(package))
    with pytest.raises(RazorError, match="no C.. compiler was found: install one .*apt install"):
        build_server()
    monkeypatch.setenv("CXX", "no-such-c++ -O2")
    with pytest.raises(RazorError, match=r"was found \(CXX is 'no-such-c\+\+ -O2'\): install one"):
        build_server()


def test_no_sources(package):
    (package / "share/llama-server/razor/main.cpp").unlink()
    (package / "share/llama-server/razor").rmdir()
    with pytest.raises(RazorError, match="sources of llama-server are missing in .*reinstall"):
        build_server()


def test_a_compiler_that_fails(package, monkeypatch):
    (package / "share/llama-server/common/a.cpp").write_text("int a() { return b; }\n")
    with pytest.raises(RazorError, match=r"could not be built: common/a\.cpp: .*error: .*b"):
        build_server()
    assert left(package) == {"lock"}
    compiler(package, "kill -9 $$", monkeypatch)
    with pytest.raises(RazorError, match="compiler was killed by signal 9 at .*memory"):
        build_server()
    assert left(package) == {"lock"}


def test_a_linker_that_fails(package):
    (package / "lib/libllama.so").unlink()
    with pytest.raises(RazorError, match="llama-server: .*undefined reference"):
        build_server()
    assert left(package) == {"lock"}


def test_stopping_ends_the_compilers(package, monkeypatch):
    calls = compiler(package, "sleep 60", monkeypatch)
    with pytest.raises(Stopped):
        build_server(stop=lambda: calls.exists())
    assert left(package) == {"lock"}
    assert (
        f"{package}"
        not in subprocess.run(["ps", "-e", "-o", "args="], capture_output=True).stdout.decode()
    )


def test_two_at_once(package, monkeypatch):
    calls = compiler(package, 'sleep 0.2; exec c++ "$@"', monkeypatch)
    labels = set()
    with ThreadPoolExecutor(2) as threads:
        built = [
            threads.submit(build_server, lambda done, total, label: labels.add(label))
            for _ in range(2)
        ]
        assert built[0].result() == built[1].result()
    assert len(calls.read_text().splitlines()) == 4  # three files, and the linker
    assert "waiting for another process that builds llama-server" in labels


def test_waiting_can_be_stopped(package, monkeypatch):
    compiler(package, 'sleep 1; exec c++ "$@"', monkeypatch)
    first = threading.Thread(target=build_server)
    first.start()
    while "lock" not in left(package):
        time.sleep(0.01)
    time.sleep(0.2)
    with pytest.raises(Stopped):
        build_server(stop=lambda: True)
    first.join()
    assert left(package) == {"lock", "llama-server"}


def test_the_rest_of_a_killed_build_is_removed(package):
    build_server().unlink()
    (folder,) = (package / "cache/server").iterdir()
    (folder / "x.part").mkdir()
    (folder / "x.part/0.o").write_text("half")
    build_server()
    assert left(package) == {"llama-server", "lock"}


def test_a_folder_that_cannot_be_written_to(package):
    (package / "cache").write_text("a file")
    with pytest.raises(OSError):
        build_server()
    assert os.path.isfile(package / "cache")
