"""convert where it asks the library whether a model can be run (else see unit/test_convert.py)."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from razor_local.model_file import read_model_shape, read_profile
from razor_local.profile import read_sidecar
from tests.support.alibi_models import AlibiSpec, write
from tests.support.cli import run
from tests.support.gguf_bytes import U32, kv, small_model
from tests.support.other_models import MODELS, make_other
from tests.support.tiny_models import TinySpec, make_model

HEADS = "1\t0\n0\t0\n0\t1\n"  # of the tiny model: 3 layers x 2 KV heads


@pytest.fixture
def model(tmp_path) -> Path:
    return make_model(tmp_path / "model.gguf", TinySpec())


@pytest.fixture
def heads(tmp_path) -> Path:
    path = tmp_path / "heads.tsv"
    path.write_text(HEADS)
    return path


def test_killed_process_leaves_no_output(model, heads, tmp_path):
    """SIGKILL and Ctrl-C between two chunks of a slow copy."""
    out = tmp_path / "new" / "out.gguf"
    out.parent.mkdir()
    script = f"""
import signal, sys, time
from razor_local.converters import write
from razor_local.cli import main
# a shell starts background jobs, and so perhaps this test, with SIGINT ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
write.CHUNK = 1024
copy = write._copy
def slow(src, dst, start, end, done=None):
    def step(n):
        dst.flush()
        print("writing", flush=True)
        time.sleep(0.2)
    copy(src, dst, start, end, step)
write._copy = slow
main(["convert", {str(model)!r}, "-o", {str(out)!r}, "--heads", {str(heads)!r}])
"""
    for kill, left in ((signal.SIGKILL, 1), (signal.SIGINT, 0)):
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for _ in range(5):
            assert process.stdout.readline() == "writing\n", process.stderr.read()
        assert any(p.stat().st_size for p in out.parent.iterdir())
        process.send_signal(kill)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode != 0 and not out.exists()
        assert "Traceback" not in stderr
        parts = list(out.parent.iterdir())
        assert len(parts) == left and all(p.name.endswith(".part") for p in parts)
        for part in parts:
            part.unlink()


def test_command_writes_a_copy_and_a_sidecar(model, heads, tmp_path):
    out, side = tmp_path / "out.gguf", tmp_path / "side.gguf"
    code, stdout, stderr = run(
        "convert", model, "-o", out, "--heads", heads, "--sinks", 8, "--window-min", 99,
        "--window-divisor", 0, "--no-compensation", "--no-proof",
    )  # fmt: skip
    assert (code, stderr) == (0, "")
    lines = stdout.splitlines()
    assert lines[0] == f"{out}: 2 of 6 KV heads are retrieval heads (33.3%)"
    assert re.fullmatch(r"KV cache at 1,024 tokens: .* MiB instead of .* MiB \(-\d\d %\)", lines[1])
    assert lines[2:] == [f"Next: razor-local chat {out}"]
    profile = read_profile(out)
    assert (profile.sink_tokens, profile.window_min, profile.window_divisor) == (8, 99, 0)
    assert profile.compensation is False
    code, stdout, _ = run("convert", model, "-o", side, "--heads", heads, "--sidecar")
    assert code == 0 and stdout.endswith(f"Next: razor-local chat {model} --sidecar {side}\n")
    assert read_sidecar(side, read_model_shape(model)).sink_tokens == 4


def test_models_that_razor_does_not_run_get_no_profile(heads, tmp_path):
    model = tmp_path / "m.gguf"
    model.write_bytes(small_model([kv("llama.attention.key_length_mla", U32, 64)], n_layer=3))
    code, _, stderr = run("convert", model, "-o", tmp_path / "o.gguf", "--heads", heads)
    assert code == 1 and not (tmp_path / "o.gguf").exists()
    assert stderr == (
        f"Error: {model}: the model has multi-head latent attention (MLA), which razor does not"
        " support\n"
    )


@pytest.mark.parametrize("arch", sorted(MODELS))
def test_convert_is_offered_where_it_works(tmp_path, arch):
    path = make_other(tmp_path / "m.gguf", arch)
    inspected, out, _ = run("inspect", path)
    offered = "'razor-local convert' adds one" in out
    options = [] if arch == "mpt" else ["--budget", 0.5, "--no-proof"]
    code, _, error = run("convert", path, "-o", tmp_path / "o.gguf", *options)
    assert offered == (code == 0), error
    if inspected == 0 and not offered:
        assert "'razor-local convert' refuses to add one (the model has" in out
        assert "'razor-local convert' refuses to make one" in run("inspect", path, "--heads")[2]


def test_mpt_with_learned_positions_is_an_ordinary_model(tmp_path):
    mpt = write(tmp_path / "mpt.gguf", AlibiSpec("mpt", max_bias=0.0))
    code, _, stderr = run("convert", mpt, "-o", tmp_path / "o.gguf", "--tokens", 64, "--budget", 1)
    assert code == 0, stderr
    assert read_profile(tmp_path / "o.gguf").method == "rope"
