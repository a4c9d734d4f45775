"""The readers' fuzzing target: what it found before, its seeds, and a little of it in every run."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fuzz import readers

readers.load()


def test_found_before():
    for path in sorted(readers.FOUND.iterdir()):
        readers.check(path.read_bytes())


def test_seeds_reach_every_reader_without_an_error():
    """A seed that is refused would only fuzz the refusal."""
    reached = set()
    for data in readers.seeds():
        readers.check(data)
        target = readers.TARGETS[data[0]]
        try:
            target(Path(readers._folder.name) / "x", data[1:])
        except readers.errors.RazorError:
            continue
        reached.add(target.__name__)
    assert reached == {target.__name__ for target in readers.TARGETS}


@pytest.mark.parametrize(("n", "sparse"), [(3000, False), (30, True)])
def test_mutations(n, sparse):
    """Inputs with 700 MB of zeros behind them can take a second each."""
    target = readers.TARGETS.index(readers.read_sparse_gguf)
    rng, inputs = random.Random(0), [x for x in readers.seeds() if (x[0] == target) == sparse]
    for _ in range(n):
        readers.check(readers.mutated(rng, inputs))


def test_a_crash_a_hang_and_a_bad_message_are_noticed(monkeypatch):
    def crash(path, data):
        raise IndexError("list index out of range")

    def hang(path, data):
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass

    def message(path, data):
        raise readers.errors.ProfileError("")

    for target, error, text in (
        (crash, IndexError, "out of range"),
        (hang, AssertionError, "hang took 0.2 s"),
        (message, AssertionError, "^''"),
    ):
        monkeypatch.setattr(readers, "SECONDS", 0.1 if target is hang else 100)
        monkeypatch.setattr(readers, "TARGETS", (target,))
        with pytest.raises(error, match=text):
            readers.check(b"\0")


LARGE = """
import resource, sys, time
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from razor_local import scores
from razor_local.converters import heads
from razor_local.errors import RazorError
path, n = Path(sys.argv[1]), (8 << 20) - 100
entries = b",".join(b'"%d-%d":1' % (i % 512, i // 512) for i in range(600_000))
for what, data in {
    "lists": b'{"0-0":[' + b"[]," * (n // 3) + b"[]]}",
    "objects": b'{"echo":[' + b"{}," * (n // 3) + b"{}]}",
    "numbers": b'{"0-0":[' + b"1.5," * (n // 4) + b"1]}",
    "digits": b'{"0-0":' + b"9" * n + b"}",
    "deep": b"[" * n,
    "heads": b"{" + entries[: n - 2].rsplit(b",", 1)[0] + b"}",
    "gates": (b".5 " * 4096 + b"\\n") * 512,
    "one row": b"1 " * (n // 2),
    "rows": b"\\n1" * (n // 2),
    "empty rows": b"\\n" * n,
    "spaces": b" " * n,
    "text": "{\\"\U0001d11e".encode() + b"a" * n + b'":1}',
}.items():
    path.write_bytes(data[: 8 << 20])
    for read in (heads.parse_heads, scores.load_scores):
        started = time.process_time()
        try:
            read(path)
        except RazorError as error:
            assert str(error).isprintable()
        took = time.process_time() - started
        assert took < 2, (what, read, took)
print("done", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_large_hostile_lists_take_neither_long_nor_much_memory(tmp_path):
    """Files as large as they may be, which mutations of small seeds never are."""
    result = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path / "x")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0 and result.stdout.startswith("done"), result.stderr[-2000:]
