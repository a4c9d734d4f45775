"""Models that this package writes run: copies of split models, shapes with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from razor_local.converters.write import write_copy, write_sidecar

from razor_local import Llama
from razor_local.bench.shape_file import write_shape_model
from razor_local.bench.shapes import SHAPES
from razor_local.model_file import read_model_shape
from razor_local.profile import Profile
from tests.support.small_shapes import SMALL, small_shape
from tests.support.tiny_models import TinySpec, make_model, make_split_model

PROFILE = Profile((np.array([1, 0]), np.array([0, 0]), np.array([0, 1])), calibration={"seed": 3})


@pytest.fixture(params=[True, False], ids=["tensors in the first file", "metadata alone in it"])
def split(tmp_path, request) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    first = make_split_model(folder, TinySpec(), tensors_in_first=request.param)
    assert len(list(folder.iterdir())) > 2
    return first


def test_llama_cpp_runs_the_copy(split, tmp_path):
    """The split copy, the split model with a sidecar and a copy in one file: the same logits."""
    profile = replace(PROFILE, window_min=64, window_divisor=0)
    one = make_model(tmp_path / "one.gguf", TinySpec())
    side = write_sidecar(split, tmp_path / "side.gguf", profile)
    results = []
    for path, razor in (
        (write_copy(one, tmp_path / "one-razor.gguf", profile), True),
        (write_copy(split, tmp_path / "out.gguf", profile), True),
        (split, side),
    ):
        llama = Llama(path, n_ctx=1024, razor=razor, n_threads=1)
        assert llama.plan.active
        llama.eval([7 * i % 120 + 1 for i in range(600)])
        logits = np.ctypeslib.as_array(llama._ctx.get_logits_ith(-1), (llama.n_vocab(),)).copy()
        results.append(logits)
        llama.close()
    assert results[0].std() > 0.1
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])


@pytest.mark.parametrize("arch", SMALL)
def test_a_shape_can_be_run(tmp_path, arch: str) -> None:
    shape = small_shape(arch)
    path = write_shape_model(tmp_path / "m.gguf", shape, retrieval=0.5)
    assert read_model_shape(path).n_head_kv == shape.heads_in_full_layers
    llama = Llama(path, n_ctx=512, window=64, razor=True, logits_all=False)
    assert llama.plan.active
    llama.eval([t % 190 + 1 for t in range(300)])
    logits = np.array(llama._ctx.get_logits()[: shape.n_vocab])
    assert np.isfinite(logits).all() and 0.1 < logits.std() < 10
    llama.close()


def test_every_architecture_of_a_shape_is_run() -> None:
    assert {shape.arch for shape in SHAPES.values()} == {"llama", *SMALL}
