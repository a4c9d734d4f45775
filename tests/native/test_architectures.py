"""Every architecture of the pinned llama.cpp: what Python reads from the header is what the library
does, and docs/architectures.json is still right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from razor_local.converters.write import write_sidecar

from razor_local.model_file import ModelFile
from razor_local.model_shape import unsupported_feature
from razor_local.plan import make_plan
from razor_local.profile import Profile, split_heads
from tests.support import arch_models, arch_runs, runner
from tests.support.runner import OFF, Context, Model, Override
from tests.tools.architectures import RESULTS, RUNS, UNTRIED, Workers, examine

FOUND = json.loads(RESULTS.read_text())
TRIED = sorted(arch for arch, found in FOUND.items() if found["result"] != UNTRIED)


@pytest.mark.parametrize("arch", TRIED)
def test_the_header_says_what_the_library_does(arch: str, tmp_path: Path) -> None:
    """KV heads of each layer, whether razor is refused, and the bytes of every part."""
    path = arch_models.path_of(arch)
    file = ModelFile(path)
    shape = file.shape
    refused = arch_runs.refusal(path) is not None
    assert (unsupported_feature(file.header, shape) is not None) == refused
    assert refused == (FOUND[arch]["result"] != RUNS)
    if refused:
        return  # no plan describes its cache
    assert tuple(arch_runs.layers_of(path)) == shape.n_head_kv
    heads = np.zeros(sum(shape.n_head_kv), np.uint8)
    compensation = arch_runs.compensates(path)
    profile = Profile(
        split_heads(heads, shape.n_head_kv),
        window_min=64,
        window_divisor=0,
        compensation=compensation,
    )
    sidecar = ModelFile(write_sidecar(file, tmp_path / "sidecar.gguf", profile))
    assert replace(sidecar.shape, parts=()) == replace(shape, parts=())
    assert sidecar.profile is not None
    with Model(path) as model:
        for razor in (False, True):
            for flash_attn, swa_full in ((True, False), (False, True)):
                plan = make_plan(
                    shape, profile if razor else None, 2048, "f16", "f16", flash_attn,
                    n_ubatch=128, swa_full=swa_full,
                )  # fmt: skip
                params = {"type_k": "f16", "type_v": "f16", "n_ctx": 2048, "n_ubatch": 128}
                local = Override(heads.tobytes(), window=64, compensation=compensation)
                override = local if razor else OFF
                with Context(
                    model, override, flash_attn=flash_attn, swa_full=swa_full, **params
                ) as ctx:
                    stats = ctx.stats()
                assert bool(stats.active) == plan.active == razor
                assert stats.kv_bytes == plan.kv_bytes
                assert stats.kv_bytes_sliding == plan.sliding_bytes
                assert stats.kv_bytes_recurrent == plan.recurrent_bytes


@pytest.fixture(scope="module")
def workers():
    found = Workers()
    yield found
    found.close()


@pytest.mark.slow
@pytest.mark.stock
@pytest.mark.parametrize("arch", TRIED)
def test_results(arch: str, workers: Workers) -> None:
    """What tests.tools.architectures found is found again."""
    try:
        assert examine(arch_models.path_of(arch), workers) == FOUND[arch]
    except RuntimeError:
        workers.close()
        raise


def test_the_workers_run_different_libraries(workers: Workers) -> None:
    assert workers("razor", runner.is_patched) and not workers("stock", runner.is_patched)
