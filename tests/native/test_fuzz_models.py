"""The fuzzing target of whole models: a little of it in every run, and that it notices."""

from __future__ import annotations

import pytest

from tests.fuzz import model_files


def test_mutated_models():
    """A little of tests/fuzz/model_files.py: readers, fit, loading and a conversation."""
    done = model_files.fuzz({"read": 1500, "run": 400}, seed=7, seconds=40)
    for target in ("read", "run"):
        assert done[f"{target}: fine"] and done[f"{target}: refused"], done


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("os.abort()", "the process ended with -6"),
        ("raise IndexError('list index')", "IndexError: list index"),
        ("print('said', file=sys.stderr, flush=True)", "wrote to stderr: said"),
        ("raise RazorError('')", "read: $"),
        ("time.sleep(30)", "no answer in"),
    ],
)
def test_what_a_model_must_not_do_is_noticed(tmp_path, monkeypatch, code, told):
    monkeypatch.setattr(model_files, "SECONDS", 0.2 if "sleep" in code else 10)
    bad = (
        "import os, sys, time\nfrom razor_local import RazorError\n"
        "from razor_local.gguf import header\n"
        f"def read_header(path):\n    {code}\n    raise RazorError('refused')\n"
        "header.read_header = read_header\n"
    )
    (tmp_path / "sitecustomize.py").write_text(bad)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = model_files.Worker(tmp_path, 0)
    try:
        with pytest.raises(model_files.Finding, match=told):
            worker.use("read", b"GGUF")
    finally:
        worker.close()
