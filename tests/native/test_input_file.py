"""What is not a regular file is refused before it is opened: a named pipe would block for ever."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from razor_local import RazorError
from razor_local.cli.params import DEFAULT_MODEL
from razor_local.common.inputs import open_input, read_text_file

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
MAIN = "from razor_local.cli import main; main(prog_name='razor-local')"
PIPE, MODEL = "PIPE", str(DEFAULT_MODEL)
COMMANDS = [
    (["chat", PIPE], "a GGUF file"),
    (["chat", MODEL, "--sidecar", PIPE], "a GGUF file"),
    (["inspect", PIPE], "a GGUF file"),
    (["inspect", MODEL, "--compare", PIPE], "a profile, a sidecar or a head list"),
    (["fit", PIPE], "a GGUF file"),
    (["convert", PIPE, "-o", "out.gguf"], "a GGUF file"),
    (["convert", MODEL, "-o", "out.gguf", "--scores", PIPE], "a file of scores"),
    (["convert", MODEL, "-o", "out.gguf", "--heads", PIPE], "a head list"),
    (["bench", "--compare", PIPE, PIPE], "a saved run of bench"),
    (["eval", "perplexity", "--text", PIPE], "a text file"),
    (["eval", "needle", "--haystack", "texts"], "a text file"),
    (["eval", "needle", "--policies", f"heads={PIPE}"], "a profile, a sidecar or a head list"),
    (["eval", "longbench", "--data", "bench"], "a text file"),
    (["verify", PIPE], "a GGUF file"),
    (["verify", MODEL, "--text", PIPE], "a text file"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / PIPE)
    for folder, name in (("texts", "a.txt"), ("bench", "qasper.jsonl")):
        (tmp_path / folder).mkdir()
        os.mkfifo(tmp_path / folder / name)
    return tmp_path


@pytest.mark.parametrize(("args", "expected"), COMMANDS, ids=[" ".join(a) for a, _ in COMMANDS])
def test_a_named_pipe_is_refused(args, expected, folder) -> None:
    before = sorted(folder.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *args],
        input="x",
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=60,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].endswith(f" is a named pipe, expected {expected}")
    assert "Traceback" not in done.stderr and sorted(folder.rglob("*")) == before


def test_a_journal_that_is_a_named_pipe_is_refused(folder) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "eval", "needle", "--resume", PIPE],
        input="x",
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=60,
    )
    assert done.returncode == 1 and "PIPE is not a regular file" in done.stderr


def test_other_kinds_are_named(tmp_path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        for path, kind in (
            (tmp_path, "folder"),
            ("/dev/zero", "device"),
            (tmp_path / "s", "socket"),
        ):
            with pytest.raises(RazorError, match=f"is a {kind}, expected a list"):
                open_input(path, "a list")


def test_links_and_text_files_are_read(tmp_path) -> None:
    (tmp_path / "a").write_bytes("é\r\nb\rc\n".encode())
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert read_text_file(tmp_path / "link") == "é\nb\nc\n"
    (tmp_path / "a").write_bytes(b"\xff")
    with pytest.raises(RazorError, match="a is not a text in UTF-8"):
        read_text_file(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        read_text_file(tmp_path / "none")
