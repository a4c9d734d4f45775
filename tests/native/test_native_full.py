"""llama.cpp's own full cache with our attention: exact, independent of batches, all operations."""

from __future__ import annotations

import mmap
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import reference, runner
from tests.support.native_cases import F32_TOLERANCE, KV, POOL, expected, tokens_of, weights
from tests.support.tiny_models import TinySpec, razor_kv, with_kv_heads

OWN = runner.Override(enabled=False, own_attention=True)
pytestmark = pytest.mark.skipif(runner.GPU_LAYERS > 0, reason="of caches in the host's memory")

SPECS = [
    with_kv_heads(TinySpec(arch, 3, 4, 4, head_dim, seed=i), grouping)
    for i, (arch, grouping, head_dim) in enumerate(
        [
            ("llama", "gqa", 32),
            ("llama", "mha", 64),
            ("qwen2", "mqa", 96),
            ("qwen3", "gqa", 128),
            ("gpt2", "mha", 32),
        ]
    )
] + [TinySpec("deci", 3, 4, (4, 0, 2), 32, seed=9)]


def full(path, tokens, splits=None, razor=OWN, **params):
    return runner.logits(
        path, tokens, razor, splits, **{"n_ctx": 1024, "n_batch": 1024, "flash_attn": True} | params
    )


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.arch}-{s.head_dim}")
def test_an_f32_cache_equals_the_reference(spec, tiny) -> None:
    """More cells than one chunk, in batches, in single tokens and by several threads."""
    tokens = tokens_of(spec, 700)
    want = reference.forward(spec, weights(spec), tokens, None)
    for splits, params in ((None, {}), ([640] + [1] * 60, {"n_ubatch": 128}), (9, {})):
        for n_threads in (1, 3):
            got = full(tiny(spec), tokens, splits, n_threads=n_threads, **params)
            assert np.abs(got - want).max() <= F32_TOLERANCE


@settings(derandomize=True, deadline=None, max_examples=25, suppress_health_check=HealthCheck)
@given(
    spec=st.sampled_from(SPECS),
    n=st.integers(1, 700),
    size=st.sampled_from([1, 3, 50, 300]),
    n_ubatch=st.sampled_from([1, 7, 100, 512]),
    kv_type=st.sampled_from(["f32", "f16", "bf16", "q8_0", "q4_0"]),
)
def test_the_attention_of_a_token_does_not_depend_on_its_batch(
    spec, n, size, n_ubatch, kv_type, tiny
) -> None:
    tokens = tokens_of(spec, n)
    types = {"type_k": kv_type, "type_v": kv_type}
    whole = full(tiny(spec), tokens, **types)
    found = full(tiny(spec), tokens, runner.random_splits(n, size, 0), n_ubatch=n_ubatch, **types)
    # the products of llama.cpp's other operations round by the number of rows
    np.testing.assert_allclose(
        found, whole, rtol=0, atol=F32_TOLERANCE if kv_type == "f32" else 2e-2
    )


@pytest.mark.parametrize("n_ubatch", [512, 32])
@pytest.mark.parametrize(
    ("type_k", "type_v"), [(k, v) for k, v, flash_attn in KV if flash_attn], ids=str
)
def test_the_error_is_within_stocks_own(type_k, type_v, n_ubatch, tiny, stock) -> None:
    params = {"type_k": type_k, "type_v": type_v, "n_ubatch": n_ubatch, "n_ctx": 512}
    ours, theirs = [], []
    for case in POOL:
        path, tokens = tiny(case.spec), tokens_of(case.spec, case.n_tokens)
        want = expected(case.spec, case.n_tokens, None)
        ours.append(((full(path, tokens, **params) - want) ** 2).mean())
        found = stock(runner.logits, path, tokens, flash_attn=True, **params)
        theirs.append(((found - want) ** 2).mean())
    assert np.mean(ours) ** 0.5 <= 1.05 * np.mean(theirs) ** 0.5


def test_removals_in_the_middle_and_shifts(tiny) -> None:
    """What llama.cpp does when a context is full: drop tokens, and move those behind to the front.

    The keys are turned by the shift, so the last token's logits are those of a cache into which the
    moved tokens were never written anew: our attention against llama.cpp's without flash attention.
    """
    spec = SPECS[0]
    tokens, more = tokens_of(spec, 300), [5, 6, 7]
    found = []
    for razor, params in ((OWN, {"flash_attn": True}), (runner.OFF, {"flash_attn": False})):
        with (
            runner.Model(tiny(spec)) as model,
            runner.Context(model, razor, n_ctx=512, **params) as ctx,
        ):
            assert ctx.stats().own_attention == (razor is OWN)
            ctx.decode(tokens)
            llama = runner.bindings()
            assert llama.llama_memory_can_shift(ctx.memory)
            assert ctx.seq_rm(40, 140)
            llama.llama_memory_seq_add(ctx.memory, 0, 140, -1, -100)
            ctx.n_past = 200
            found.append(ctx.decode(more))
            assert ctx.pos_max() == 202
    np.testing.assert_allclose(*found, rtol=0, atol=F32_TOLERANCE)


def test_states_and_rollbacks(tiny) -> None:
    spec = SPECS[0]
    tokens = tokens_of(spec, 400)
    with runner.Model(tiny(spec)) as model:
        contexts = [
            runner.Context(model, OWN, n_ctx=512, flash_attn=True, type_k="f16", type_v="f16")
            for _ in range(2)
        ]
        one, other = contexts
        one.decode(tokens)
        assert other.load(one.save())
        other.n_past = 400
        assert one.seq_rm(390)
        again = one.decode(tokens[390:])[-1:]
        np.testing.assert_array_equal(one.decode([9]), other.decode([9]))
        assert np.isfinite(again).all()
        for ctx in contexts:
            ctx.close()


def huge_page_bytes() -> int:
    """Return the bytes of this process that are backed by huge pages."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(map(int, re.findall(r"AnonHugePages: +(\d+)", rollup)))


def measure_huge_pages(path, razor) -> tuple[int, int, int]:
    """Return the bytes in huge pages of a mapping of 16 MiB and of a cache, and of the cache."""
    size, before = 16 << 20, huge_page_bytes()
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.write(bytes(size))
        possible = huge_page_bytes() - before
    with runner.Model(path) as model:
        before = huge_page_bytes()
        with runner.Context(model, razor, n_ctx=32768, flash_attn=True) as ctx:
            return possible, huge_page_bytes() - before, ctx.stats().kv_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize(
    "razor", [OWN, runner.Override(retrieval=bytes([1, 0] * 3), window=64)], ids=["full", "razor"]
)
def test_caches_use_huge_pages(razor, tiny) -> None:
    # in a new process: a heap keeps huge pages that earlier caches have freed
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        possible, found, kv_bytes = pool.submit(measure_huge_pages, tiny(SPECS[0]), razor).result()
    if possible < 12 << 20:
        pytest.skip("no huge pages available")
    # up to 2 MiB at each end of a buffer stay in small pages
    assert found >= kv_bytes - (8 << 20) > 8 << 20


def test_where_it_does_not_run(tiny, monkeypatch) -> None:
    path = tiny(SPECS[0])

    def runs(razor=OWN, **params) -> bool:
        params = {"flash_attn": True} | params
        with runner.Model(path) as model, runner.Context(model, razor, **params) as ctx:
            stats = ctx.stats()
            assert not stats.active
            return bool(stats.own_attention)

    assert runs()
    assert not runs(runner.OFF) and not runs(None)
    assert not runs(flash_attn=False)
    assert not runs(n_seq_max=2)
    monkeypatch.setenv("RAZOR_LOCAL_CPU_ATTENTION", "off")
    assert not runs()
    monkeypatch.setenv("RAZOR_LOCAL_CPU_ATTENTION", "z80")
    with pytest.raises(runner.LoadError, match="RAZOR_LOCAL_CPU_ATTENTION is 'z80'"):
        runs()
    monkeypatch.delenv("RAZOR_LOCAL_CPU_ATTENTION")
    monkeypatch.setenv("RAZOR_LOCAL_DISABLE", "1")
    assert not runs()


def test_a_model_whose_plan_saves_nothing_runs_it(tiny) -> None:
    path = tiny(TinySpec("llama", 3, 4, 2, 32, seed=1), razor_kv(((1, 1), (1, 1), (1, 1))))
    with (
        runner.Model(path) as model,
        runner.Context(model, n_ctx=512, flash_attn=True) as ctx,
    ):
        assert (ctx.stats().active, ctx.stats().own_attention) == (0, 1)


def test_razor_false_is_stock_to_the_bit(tiny, stock) -> None:
    spec = SPECS[0]
    tokens = tokens_of(spec, 300)
    params = {"n_ctx": 512, "flash_attn": True, "type_k": "f16", "type_v": "f16"}
    np.testing.assert_array_equal(
        runner.logits(tiny(spec), tokens, runner.OFF, **params),
        stock(runner.logits, tiny(spec), tokens, **params),
    )
