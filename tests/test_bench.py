"""The decode benchmark: its random cache is a real one in all that costs time, and its figures add
up. How fast anything is, is not tested.
"""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from tiny_models import TinySpec, razor_kv

from razor_local.bench import _Bindings, bench_decode
from razor_local.cli import main
from razor_local.errors import RazorError

SPEC = TinySpec("llama", 3, 4, 2, 64, n_ctx_train=4096)
MASK = ((0, 0), (1, 0), (1, 1))
KV = razor_kv(MASK, window_min=100, window_divisor=0)


def task(path, **options) -> dict:
    defaults = {
        "model": str(path),
        "n_ctx": 1024,
        "n_threads": 1,
        "n_gpu_layers": 0,
        "sidecar": None,
        "name": "razor",
        "razor": True,
        "type_k": "f16",
        "type_v": "f16",
        "lib": None,
    }
    return defaults | options


@pytest.mark.parametrize("type_kv", ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_random_cache_has_the_state_of_a_prefill(tiny, type_kv: str) -> None:
    side = _Bindings(task(tiny(SPEC, KV), type_k=type_kv, type_v=type_kv))
    for depth in (1, 4, 5, 64, 300, 1000):
        side.api.llama_memory_clear(side.memory, True)
        for token in range(depth):
            side.decode(token % SPEC.n_vocab)
        size = side.api.llama_state_seq_get_size(side.ctx, 0)
        want = side.native.seq(side.ctx, 0)
        side.fill(depth)
        got = side.native.seq(side.ctx, 0)
        assert (got.n_tokens, got.frontier) == (want.n_tokens, want.frontier)
        assert side.api.llama_state_seq_get_size(side.ctx, 0) == size
        assert side.step() > 0
        assert side.step() > 0  # the first was taken out again


def test_full_cache_is_filled_too(tiny) -> None:
    side = _Bindings(task(tiny(SPEC, KV), razor=False, name="full"))
    assert not side.native.stats(side.ctx).active
    side.fill(700)
    assert side.api.llama_memory_seq_pos_max(side.memory, 0) == 699
    assert side.step() > 0


def test_command_prints_figures_that_add_up(tiny) -> None:
    path = str(tiny(SPEC, KV))
    args = ["bench", path, "-d", "0", "-d", "500", "-c", "2048", "-r", "3", "--json"]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)
    assert [(r["depth"], r["pairs"]) for r in results] == [(0, 3), (500, 3)]
    for r in results:
        assert r["razor_ms"] > 0 and r["full_ms"] > 0
        assert r["ratio_low"] <= r["ratio"] <= r["ratio_high"]
        assert r["razor_kv_bytes"] < r["full_kv_bytes"] == 3 * 2 * 2 * 64 * 2 * 2048
    done = CliRunner().invoke(main, args[:-1])
    assert done.exit_code == 0 and "faster by" in done.stdout


def test_what_cannot_be_timed_is_refused_in_one_sentence(tiny, tmp_path) -> None:
    path = tiny(SPEC, KV)
    with pytest.raises(RazorError, match="depth 900 does not fit into a context of 512 tokens"):
        bench_decode(path, [900], n_ctx=512)
    with pytest.raises(RazorError, match="has no razor profile"):
        bench_decode(tiny(SPEC), [10], n_ctx=512)
    with pytest.raises(RazorError, match="razor does nothing at 256 tokens"):
        bench_decode(path, [10], n_ctx=256)
    with pytest.raises(RazorError, match="No such file|does not exist"):
        bench_decode(tmp_path / "none.gguf", [10], n_ctx=512)
