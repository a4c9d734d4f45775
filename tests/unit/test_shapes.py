"""Random models in known shapes: the right size, the same for the same seed, loadable, and either
whole or not there.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGUFReader

from razor_local.bench import shape_file
from razor_local.bench.shape_file import cached_shape_model, is_random, write_shape_model
from razor_local.bench.shapes import SHAPES, Shape, tensors_of
from razor_local.common import files as safe_write
from razor_local.errors import RazorError, UnsupportedError
from razor_local.gguf.header import read_header
from razor_local.model_file import read_model_shape, read_profile
from razor_local.profile import Profile

SMALL = Shape("qwen3", 2, 64, 4, 2, 32, 96, 200, 4096, 1e6, qk_norm=True)

# parameters of the models that the shapes are named after, in billions
PARAMETERS = {
    "30m": 0.029,
    "llama-3.2-1b": 1.236,
    "llama-3.2-3b": 3.213,
    "llama-3.1-8b": 8.030,
    "llama-2-7b": 6.738,
    "mistral-7b-v0.3": 7.248,
    "qwen3-0.6b": 0.596,
    "qwen3-4b": 4.022,
    "qwen3-8b": 8.191,
    "qwen3.6-27b": 26.896,  # without images and predicted tokens, as the next one
    "qwen3.6-35b-a3b": 34.661,
    "gemma-3-270m": 0.268,
    "gemma-3-12b": 11.766,  # without images
    "gemma-4-31b": 30.697,  # without images
    "gpt-oss-20b": 20.915,
}


@pytest.mark.parametrize("name", SHAPES)
def test_shape_has_as_many_parameters_as_its_model(name: str) -> None:
    n = sum(math.prod(tensor.dims) for tensor in tensors_of(SHAPES[name]))
    assert n / 1e9 == pytest.approx(PARAMETERS[name], abs=0.0006)


@pytest.mark.parametrize("quant", shape_file.QUANTS)
def test_file_is_a_model_that_says_it_is_random(tmp_path, quant: str) -> None:
    path = write_shape_model(tmp_path / "m.gguf", SMALL, quant=quant, retrieval=0.5, seed=3)
    assert is_random(read_header(path))
    shape, profile = read_model_shape(path), read_profile(path)
    assert (shape.n_head_kv, shape.head_dim_k, shape.n_ctx_train) == ((2, 2), 32, 4096)
    assert "random weights" in shape.name and profile.flat().sum() == 2
    tensors = {t.name: t for t in GGUFReader(path).tensors}
    assert tensors["blk.1.ffn_down.weight"].tensor_type.name == quant.upper()
    assert list(tensors["output.weight"].shape) == [64, 200]
    assert np.all(tensors["blk.0.attn_k_norm.weight"].data == 1)
    from gguf.quants import dequantize

    weights = dequantize(tensors["blk.0.attn_q.weight"].data, tensors["output.weight"].tensor_type)
    # products of vectors of order 1 stay of order 1
    assert 0.5 < np.linalg.norm(weights, axis=1).mean() < 2


def test_seed_and_share_choose_the_heads(tmp_path) -> None:
    def make(**options):
        path = write_shape_model(tmp_path / "m.gguf", "30m", **options)
        return path.read_bytes(), read_profile(path).flat().tolist()

    first, heads = make()
    assert sum(heads) == round(0.15 * 32) and make()[0] == first
    other, other_heads = make(seed=1)
    assert other != first and other_heads != heads
    assert sum(make(retrieval=0.0)[1]) == 0 and sum(make(retrieval=1.0)[1]) == 32
    assert sum(make(retrieval=0.001)[1]) == 1


def test_profile_of_ones_own(tmp_path) -> None:
    profile = Profile((np.array([1, 0]), np.array([0, 0])), window_min=256, window_divisor=0)
    found = read_profile(write_shape_model(tmp_path / "m.gguf", SMALL, profile=profile))
    assert found.flat().tolist() == [1, 0, 0, 0]
    assert (found.window_min, found.window_divisor) == (256, 0)


def test_cached_file_is_not_written_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shape_file, "cache_folder", lambda: tmp_path)
    path = cached_shape_model("30m")
    before = path.stat()
    assert cached_shape_model("30m") == path and path.stat().st_mtime_ns == before.st_mtime_ns
    assert cached_shape_model("30m", seed=1) != path


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gpt-5", {}, "'gpt-5' is not a known shape; expected 30m, llama-3.2-1b"),
        (
            "30m",
            {"quant": "q9_9"},
            "'q9_9' is not a weight type for a shape; expected q4_0, q8_0, f16",
        ),
        ("30m", {"retrieval": 1.5}, "share of retrieval heads is 1.5"),
    ],
)
def test_what_cannot_be_made_is_refused(tmp_path, name, options, message) -> None:
    with pytest.raises(UnsupportedError, match=message):
        write_shape_model(tmp_path / "m.gguf", name, **options)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_nothing(tmp_path, monkeypatch) -> None:
    usage = os.statvfs(tmp_path)
    assert usage.f_bavail
    monkeypatch.setattr(safe_write.shutil, "disk_usage", lambda _: type("U", (), {"free": 1 << 20}))
    with pytest.raises(RazorError, match="has 1 MiB free, m.gguf needs 17 MiB"):
        write_shape_model(tmp_path / "m.gguf", "30m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits")
def test_disk_that_fills_up_while_it_is_written_leaves_nothing(tmp_path) -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, 5 << 20));"
        "from razor_local.cli import main; main()"
    )
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, "bench", "--shape", "30m"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "30m-q4_0-5heads-seed0.gguf: File too large" in done.stderr
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_interrupted_writing_leaves_nothing(tmp_path) -> None:
    def stop(done: float, total: float, label: str) -> None:
        assert total > done
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shape_model(tmp_path / "m.gguf", "30m", progress=stop)
    assert list(tmp_path.iterdir()) == []
