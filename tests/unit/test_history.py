"""The history of what was typed in chats."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest

from razor_local import RazorError
from razor_local.cli import history
from razor_local.cli.history import History
from razor_local.common.files import data_folder, new_file


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_texts_are_kept_as_they_are(tmp_path):
    path = tmp_path / "razor_local" / "history"
    texts = ["hello", "several\nlines\n\nof text", "漢字 🙂", "half a \udcc3 character", '"\\']
    one, two = History(path), History(path)
    assert one.texts == []
    for i, text in enumerate(texts):
        (one, two)[i % 2].add(text)
    assert History(path).texts == texts


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_only_the_user_may_read_it_whatever_the_umask(tmp_path, umask):
    path = tmp_path / "new" / "razor_local" / "history"
    (tmp_path / "new").mkdir()
    before = os.umask(umask)
    try:
        History(path).add("hello")
        assert mode(path) == 0o600 and mode(path.parent) == 0o700
        path.chmod(0o644)
        History(path).add("hello again")
        assert mode(path) == 0o600
        with new_file(tmp_path / "private", private=True) as file:
            file.write(b"x")
        assert mode(tmp_path / "private") == 0o600
    finally:
        os.umask(before)
    assert History(path).texts == ["hello", "hello again"]


def test_damaged_lines_are_left_out(tmp_path):
    path = tmp_path / "history"
    path.write_bytes(b'"one"\nnonsense\n\n{"a": 1}\n\xff\xfe\n"two"\n' + b"[" * 9999 + b'\n"cut o')
    history = History(path)
    assert history.texts == ["one", "two"]


def test_the_oldest_texts_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "MAX_BYTES", 4000)
    monkeypatch.setattr(history, "MAX_TEXT_BYTES", 1000)
    path = tmp_path / "history"
    for i in range(500):
        History(path).add(f"{i:04}" * (i % 50))
        assert path.stat().st_size <= 4000 + 1000
    texts = History(path).texts
    assert texts[-1] == "0499" * 49 and texts[-2] == "0498" * 48 and len(texts) < 100
    History(path).add("x" * 1000)
    assert History(path).texts[-1] == "0499" * 49 and mode(path) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["history"]


@pytest.mark.parametrize("kind", ["folder", "named pipe"])
def test_other_things_of_that_name_are_refused(tmp_path, kind):
    path = tmp_path / "history"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(RazorError, match=f"history is a {kind}, expected a history of chats"):
        History(path)
    path.rmdir() if kind == "folder" else path.unlink()
    kept = History(path)
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(OSError):
        kept.add("hello")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other folders")
def test_the_data_folder_of_the_platform(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere")
    assert str(data_folder()) == "/somewhere/razor_local"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_folder() == tmp_path / ".local/share/razor_local"


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path):
    """A line that does not fit would make the next one unreadable, too."""
    code = f"""
import resource, signal
from pathlib import Path
from razor_local.cli.history import History
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
kept = History(Path({str(tmp_path / "history")!r}))
kept.add("one")
resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
kept.add("x" * 100)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
kept.add("two")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert History(tmp_path / "history").texts == ["one", "two"]
