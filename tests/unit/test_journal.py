"""Journals of long runs: what is kept, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from razor_local import RazorError
from razor_local.common.journal import Journal

HEAD = {"version": 1, "model": {"name": "é\u2028", "sizes": [1, 2.5, None]}}


def open_journal(path, head=HEAD):
    return Journal(path, head, "a test", lambda head: {"version": head["version"]})


@pytest.fixture
def path(tmp_path):
    """A journal of three records."""
    path = tmp_path / "run.jsonl"
    with open_journal(path) as journal:
        journal.begin(HEAD)
        for i in range(3):
            journal.add({"kind": "answer", "i": i, "score": i / 7, "text": "zwölf\u2028\n"})
    return path


def test_records_come_back(path):
    with open_journal(path) as journal:
        assert journal.head == HEAD
        assert [record["score"] for record in journal.records] == [0, 1 / 7, 2 / 7]
        journal.add({"kind": "answer", "i": 3})
    journal = open_journal(path)
    assert [record["i"] for record in journal.records] == [0, 1, 2, 3]


@given(n=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_what_was_cut_off_is_forgotten(tmp_path_factory, n):
    path = tmp_path_factory.mktemp("cut") / "run.jsonl"
    with open_journal(path) as journal:
        journal.begin(HEAD)
        journal.add({"kind": "answer", "i": 0})
        journal.add({"kind": "answer", "i": 1})
    data = path.read_bytes()
    cut = data[: n % (len(data) + 1)]
    path.write_bytes(cut)
    n_whole = cut.count(b"\n")
    if n_whole == 0:
        with pytest.raises(RazorError, match="is not a journal of a test"):
            open_journal(path)
        assert path.read_bytes() == cut
        return
    journal = open_journal(path)
    assert len(journal.records) == n_whole - 1
    journal.add({"kind": "answer", "i": 9})
    lines = path.read_bytes().splitlines()
    assert lines[:-1] == data.splitlines()[:n_whole] and json.loads(lines[-1])["i"] == 9


def test_wrong_fields_are_refused(path):
    def check(head, records):
        for record in records:
            _ = record["score"] / head["version"]

    before = path.read_bytes()
    Journal(path, HEAD, "a test", lambda head: {"version": head["version"]}, check).close()
    for old, new in (('"score": 0.0', '"scare": 0.0'), ('"score": 0.0', '"score": []')):
        changed = before.replace(old.encode(), new.encode())
        assert changed != before
        path.write_bytes(changed)
        with pytest.raises(
            RazorError, match="is not a valid journal of a test: .*choose a new file"
        ):
            Journal(path, HEAD, "a test", lambda head: {"version": head["version"]}, check)
        assert path.read_bytes() == changed


def test_deeply_nested_json_is_no_journal(path):
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(RazorError, match="is not a journal of a test"):
        open_journal(path)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_a_second_process_is_refused(path):
    journal = open_journal(path)
    before = path.read_bytes()
    code = (
        "import sys\nfrom pathlib import Path\nfrom razor_local.common.journal import Journal\n"
        f"Journal(Path(sys.argv[1]), {HEAD!r}, 'a test', lambda head: {{'version': 1}})"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 1 and "is the journal of a run in progress" in done.stderr
    assert path.read_bytes() == before
    with journal:
        journal.add({"kind": "answer", "i": 3})
    with open_journal(path) as journal:
        assert len(journal.records) == 4


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_two_runs_that_begin_at_once(tmp_path):
    path = tmp_path / "run.jsonl"
    with open_journal(path) as one, open_journal(path) as two:
        one.begin(HEAD)
        with pytest.raises(RazorError, match="is the journal of a run in progress"):
            two.begin(HEAD)
    with pytest.raises(RazorError, match="was just created by another run"):
        two.begin(HEAD)
    with open_journal(path) as journal:
        assert journal.head == HEAD and journal.records == []
