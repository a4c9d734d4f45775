"""A disk that is full: one sentence with the name of the file, and nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from razor_local.bench.shape_file import VERSION
from razor_local.cli import main
from razor_local.cli.params import DEFAULT_MODEL
from tests.support.bench import KV, QUICK, SPEC, make_report, saved

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs"),
    pytest.mark.usefixtures("same_commit"),
]


def fill(disk: Path, room: int = 0) -> None:
    """Leaves room bytes."""
    (disk / "ballast").write_bytes(bytes(1 << 20))
    os.truncate(disk / "ballast", (1 << 20) - room)


def run(*args: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, list(map(str, args)))
    return done.exit_code, done.stdout, done.stderr


def files(folder: Path) -> list[str]:
    found = [path.name for path in folder.rglob("*") if path.is_file()]
    return [name for name in found if name != "ballast"]


def test_shape_model(disk, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
    code, stdout, stderr = run("bench", "--shape", "30m", "-d", "0")
    assert (code, stdout) == (1, "")
    assert stderr.splitlines()[-1] == (
        f"Error: {disk}/razor_local/shapes-{VERSION} has 1 MiB free, 30m-q4_0-5heads-seed0.gguf"
        " needs 17 MiB; free some space"
    )
    assert files(disk) == []


@pytest.mark.parametrize(
    ("option", "name"),
    [("-o", "run.json"), ("-o", "run.md"), ("--plot", "run.png"), ("--plot", "run.svg")],
)
def test_report_and_picture(disk, tmp_path, option, name) -> None:
    fill(disk)
    path = saved(make_report(), tmp_path / "saved.json")
    out = ["-o", tmp_path / "out"] if option == "--plot" else []
    kind = ["--json"] if option == "-o" else []
    code, stdout, stderr = run("bench", "--report", path, option, disk / name, *out, *kind)
    assert code == 1 and bool(stdout) == (option == "-o")  # what was measured is not lost
    assert stderr == f"Error: {disk / name}: No space left on device\n"
    assert files(disk) == []


@pytest.mark.parametrize("name", ["fit.png", "fit.svg", "fit.pdf"])
def test_picture_of_fit(disk, name) -> None:
    fill(disk)
    code, _, stderr = run("fit", DEFAULT_MODEL, "--plot", disk / name)
    assert (code, stderr) == (1, f"Error: {disk / name}: No space left on device\n")
    assert files(disk) == []


def test_journal(disk, tiny) -> None:
    """What was measured before is kept, and the run goes on from it."""
    fill(disk, room=8192)  # two pages
    journal = disk / "run.jsonl"
    args = ["bench", tiny(SPEC, KV), "-d", "0,200,400,600,800", "-c", "1024"]
    args += ["--types", "f16,q8_0", *QUICK, "-r", "90", "--resume", journal]
    code, stdout, stderr = run(*args)
    assert (code, stdout) == (1, "")
    assert stderr == f"Error: {journal}: No space left on device\n"
    assert files(disk) == ["run.jsonl"]
    kept = [line for line in journal.read_text().splitlines(keepends=True) if line[-1] == "\n"]
    assert [json.loads(line)["kind"] for line in kept][:2] == ["head", "memory"]
    (disk / "ballast").unlink()
    code, stdout, stderr = run(*args)
    assert code == 0 and "| " in stdout, stderr
    assert journal.read_text().startswith("".join(kept))


def test_journal_without_room_for_its_head(disk, tiny) -> None:
    fill(disk)
    journal = disk / "run.jsonl"
    code, stdout, stderr = run(
        "bench", tiny(SPEC, KV), "-d", "0", "-c", "2048", *QUICK, "--resume", journal
    )
    assert (code, stdout, stderr) == (1, "", f"Error: {journal}: No space left on device\n")
    assert files(disk) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("args", [["--help"], ["--version"], ["chat", "--help"], ["doctor"]])
def test_stdout_without_room(args) -> None:
    code = "from razor_local.cli import main; main(prog_name='razor-local')"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, *args], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "Error: No space left on device"
    assert "Traceback" not in done.stderr
