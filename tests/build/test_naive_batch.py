"""Attention of a batch from the arrays that libllama prepares for GPUs, read on the CPU.

Builds the library with the changes NAIVE of broken_builds.py, where batches go through
naive_batch.h, and runs native tests on it. The breaks of that name show that they would notice.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.native_build import ROOT
from tests.tools import broken_builds

FILES = [
    f"tests/native/test_native_{x}.py"
    for x in ("reference", "stateful", "invariance", "groups", "sequences")
]

# test -> why it cannot pass there
DESELECTED = {
    f"{FILES[2]}::test_window_that_holds_everything_equals_stock[{kv}-fa]": (
        "stock's attention on CPUs rounds q to 8 bits for quantized keys, the naive one does not"
    )
    for kv in ("q8_0", "q4_0")
}


def test_breaks_fit_the_sources() -> None:
    from tests.tools import broken_builds

    broken_builds.check_table()


@pytest.mark.slow
def test_native_tests_pass_with_naive_batches(broken_tree: Path, tmp_path: Path) -> None:
    broken_builds.copy_sources(broken_tree, broken_builds.NAIVE)
    lib = broken_builds.build(broken_tree)
    noted = tmp_path / "noted"
    env = os.environ | {
        "RAZOR_LOCAL_LIB": str(lib),
        "LLAMA_CPP_LIB_PATH": str(lib),
        "RAZOR_NAIVE_BATCH": str(noted),
    }
    for test, reason in DESELECTED.items():
        print(f"deselected: {test}: {reason}")
    options = ["-q", "-p", "no:cacheprovider", *(f"--deselect={t}" for t in DESELECTED)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *FILES],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stderr[-3000:]
    summary = done.stdout.splitlines()[-1]
    assert f"{len(DESELECTED)} deselected" in summary, "a name in DESELECTED is out of date"
    # the operation ran, on tiles of every kind and in several sequences
    expected = {"skipped tile", "whole tile", "tile by cell", "bias", "another stream"}
    assert set(noted.read_text().splitlines()) == expected
