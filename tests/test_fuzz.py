"""The readers' fuzzing target: what it found before, its seeds, and a little of it in every run."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))
import readers

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
        time.sleep(0.2)

    def message(path, data):
        raise readers.errors.ProfileError("two\nlines")

    for target, error, text in (
        (crash, IndexError, "out of range"),
        (hang, AssertionError, "hang took 0.2 s"),
        (message, AssertionError, "two.*lines"),
    ):
        monkeypatch.setattr(readers, "SECONDS", 0.1 if target is hang else 100)
        monkeypatch.setattr(readers, "TARGETS", (target,))
        with pytest.raises(error, match=text):
            readers.check(b"\0")
