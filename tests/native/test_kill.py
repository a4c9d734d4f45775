"""Killing the converter: at any moment the output is complete, as it was before, or opens not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from razor_local.errors import RazorError
from razor_local.profile import read_profile
from tests.support.gguf_bytes import STRING, U32, gguf, kv, tensor
from tests.support.tiny_models import TinySpec, make_split_model

# One process that has imported everything forks the converters, so that a kill costs no start.
SERVER = """
import json, os, sys
import gguf
from razor_local.cli import main
import razor_local.cli.convert, razor_local.converters.heads, razor_local.converters.write
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        try:
            main(json.loads(line))
        except SystemExit as end:
            os._exit(end.code or 0)  # the time to kill it in is that of its work
    print(pid, flush=True)
    sys.stdin.readline()  # until then the number stays the child's, even if it has ended
    print(os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path_factory.mktemp("server"),
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A model of 8 MB in one file and one in several, each of 3 layers of 2 KV heads, and other
    models of the same tensors, of which there are outputs already."""
    folder = tmp_path_factory.mktemp("models")
    keys = [
        kv("general.architecture", STRING, "llama"),
        kv("llama.block_count", U32, 3),
        kv("llama.embedding_length", U32, 64),
        kv("llama.attention.head_count", U32, 2),
    ]
    data = random.Random(0).randbytes(8 << 20)
    (folder / "one.gguf").write_bytes(gguf(keys, [tensor("t", (len(data),), 24)], data))
    (folder / "heads.tsv").write_text("1\t0\n0\t0\n0\t1\n")
    (folder / "old.tsv").write_text("0\t1\n1\t1\n1\t0\n")
    other = random.Random(1).randbytes(8 << 20)
    (folder / "one-old.gguf").write_bytes(gguf(keys, [tensor("t", (len(data),), 24)], other))
    spec = TinySpec(n_ff=4096, n_vocab=4096)
    (folder / "old").mkdir()
    return {
        "one": folder / "one.gguf",
        "one-old": folder / "one-old.gguf",
        "split": make_split_model(folder, spec, max_tensors=4),
        "split-old": make_split_model(folder / "old", replace(spec, seed=1), max_tensors=4),
    }


def start(server: subprocess.Popen[str], *args: object) -> int:
    server.stdin.write(json.dumps([str(a) for a in args]) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def status(server: subprocess.Popen[str]) -> int:
    server.stdin.write("\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def visible(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def opens(out: Path) -> bool:
    try:
        return read_profile(out) is not None
    except (RazorError, FileNotFoundError):
        return False


KINDS = {
    "copy": ("one", [], "out.gguf"),
    "sidecar": ("one", ["--sidecar"], "out.gguf"),
    "split copy": ("split", [], None),
}


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwritten"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kills", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_any_moment(server, models, tmp_path, capsys, kills, kind, overwrite):
    model, options, name = KINDS[kind]
    model, old_model = models[model], models[f"{model}-old"]
    name = name or model.name.replace("split", "out")
    folder = tmp_path / "out"

    def convert(heads: str) -> int:
        source = old_model if heads == "old.tsv" else model
        path = models["one"].with_name(heads)
        return start(
            server, "convert", source, "-o", folder / name, "--heads", path, "--force", *options
        )

    complete = {}
    times = []
    for heads in ("old.tsv", "heads.tsv", "heads.tsv"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        started = time.monotonic()
        convert(heads)
        assert status(server) == 0
        times.append(time.monotonic() - started)
        complete[heads] = visible(folder)
        assert opens(folder / name)
    before = complete["old.tsv"] if overwrite else {}
    old, new = complete["old.tsv"], complete["heads.tsv"]
    assert old.keys() == new.keys() and not set(old.values()) & set(new.values())

    rng, outcomes, killed = random.Random(kills), Counter(), 0
    for _ in range(kills):
        shutil.rmtree(folder)
        folder.mkdir()
        for file, raw in before.items():
            (folder / file).write_bytes(raw)
        pid = convert("heads.tsv")
        time.sleep(rng.uniform(0, 1.1 * min(times)))
        os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(status(server))
        found = visible(folder)
        if found == complete["heads.tsv"]:
            outcome = "complete"
        elif found == before:
            outcome = "as before"
        else:
            outcome = "files that do not open"
            assert kind == "split copy"  # one file is renamed in one step
            assert not opens(folder / name)
        if found and outcome != "files that do not open":
            assert opens(folder / name)
        outcomes[outcome] += 1
    with capsys.disabled():
        if kills > 50:
            print(f"\n{kind}, {overwrite=}: {killed} of {kills} killed at work, {dict(outcomes)}")
    assert killed > kills / 4
    assert outcomes["as before"] and (kills < 50 or outcomes["complete"])


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("kind", KINDS)
def test_terminated_while_writing(models, tmp_path, kind):
    """SIGTERM when all is written and nothing renamed: what was there is there, and no more."""
    model, options, name = KINDS[kind]
    out = tmp_path / (name or models[model].name.replace("split", "out"))
    out.write_text("mine")
    code = """
import os, signal, sys
import razor_local.converters.write as write
def terminated(*_):
    assert any(name.endswith(".part") for name in os.listdir(sys.argv[1]))
    signal.raise_signal(signal.SIGTERM)
write._verify_profile = terminated
from razor_local.cli import main
main(sys.argv[2:])
"""
    args = ["convert", models[model], "-o", out, "--heads", models["one"].with_name("heads.tsv")]
    args = [sys.executable, "-c", code, tmp_path, *args, "--force", *options]
    assert subprocess.run(args).returncode == -signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert out.read_text() == "mine"
