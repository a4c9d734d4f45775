"""Run every example of the help and of the pages, on the built-in model and small files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from razor_local.converters.write import write_sidecar

from razor_local import read_model_shape, read_profile
from tests.support import alibi_models, embedded_model
from tests.support.bench import make_report
from tests.support.commands import all_examples
from tests.support.texts import FACT, QUESTION, text_with

MODEL = embedded_model.PATH
NAMES = r"-hf \S+|\b(smollm2:135m|llama3\.2:1b|hf:\S+)"  # models that would be downloaded
# commands that measure: the options to remove, and those to use instead
LESS = {
    "bench (model|--shape)": ("-c|-d|--shape", "-d 0,512 -r 3 --seconds 0.05 --only decode,memory"),
    "convert": ("--no-option", "--force"),
    "eval needle": ("-c|--samples", "-c 512 --samples 1 --depths 50"),
    "eval ruler": ("-c|--samples", "-c 1k --samples 1"),
    "eval perplexity": ("-c|--prompt", "-c 512 --windows 1"),
    "eval longbench": ("-c", "-c 2k"),
    "tune": (
        "-c|-o|--max-kl|--memory|--vram|--resume",
        "-c 512 --tokens 64 --plans 2 -o tuned.gguf --force",
    ),
    "verify": ("-c|-n", "-c 2048 -n 1000"),
}
# run by test_model_hub.py, test_cli_serve.py and test_rpc.py
ELSEWHERE = re.compile(r"razor-local (models (pull|path|rm)|serve|rpc-server)|--rpc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with the files that examples name."""
    folder = tmp_path_factory.mktemp("examples")
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    embedded_model.write_variant(folder / "model.gguf", template)
    embedded_model.write_without_template(folder / "base.gguf")
    for name in ("model-razor.gguf", "smollm2-razor.gguf"):
        (folder / name).write_bytes(MODEL.read_bytes())
    profile, shape = read_profile(MODEL), read_model_shape(MODEL)
    write_sidecar(folder / "model.gguf", folder / "model.razor.gguf", profile)
    alibi_models.write(folder / "bloom.gguf", alibi_models.AlibiSpec())
    for name in ("heads.tsv", "other.tsv"):
        np.savetxt(folder / name, np.array(profile.retrieval), fmt="%d", delimiter="\t")
    gates = np.random.default_rng(0).random((shape.n_layer, shape.n_head_kv[0]))
    np.savetxt(folder / "gates.tsv", gates, fmt="%.4f", delimiter="\t")
    (folder / "text.txt").write_text(text_with(FACT), encoding="utf-8")
    (folder / "question.txt").write_text(QUESTION, encoding="utf-8")
    (folder / "book.txt").write_text(text_with(FACT, 3000), encoding="utf-8")
    for name in ("run", "before", "after"):
        (folder / f"{name}.json").write_text(json.dumps(make_report().to_dict()), encoding="utf-8")
    (folder / "books").mkdir()
    (folder / "books/book.txt").write_text(text_with(FACT, 20000), encoding="utf-8")
    data = folder / "LongBench/data"
    data.mkdir(parents=True)
    item = {"context": FACT, "input": QUESTION, "answers": ["48213"], "all_classes": None}
    for name in ("hotpotqa", "qasper"):
        (data / f"{name}.jsonl").write_text(json.dumps(item) + "\n", encoding="utf-8")
    return folder


def runs(line: str, folder: Path) -> subprocess.CompletedProcess:
    line = re.sub(NAMES, "model.gguf", line)
    for command, (options, instead) in LESS.items():
        if re.match(f"razor-local {command}", line):
            shape = " --shape 30m" if "--shape" in line else ""
            line = f"{re.sub(f' ({options}) [^ ]+', '', line)} {instead}{shape}"
    (folder / "run.jsonl").unlink(missing_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=os.environ | {"PATH": path}, input="Hello",
        capture_output=True, text=True,
    )  # fmt: skip


def is_slow(line: str) -> bool:
    return any(re.match(f"razor-local {command}", line) for command in LESS)


EXAMPLES = [line for line in all_examples() if not ELSEWHERE.search(line)]


@pytest.mark.parametrize("line", [line for line in EXAMPLES if not is_slow(line)])
def test_examples(line, folder):
    done = runs(line, folder)
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", LESS)
def test_examples_that_measure(command, folder):
    """Run them in their order, because some read the output of earlier ones."""
    for line in EXAMPLES:
        if re.match(f"razor-local {command}", line):
            done = runs(line, folder)
            assert done.returncode == 0, f"{line}: {done.stderr}"
