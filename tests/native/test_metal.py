"""Metal accepts the operations that razor adds to a graph, by the rules in the pinned source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from razor_local.bench.shape_file import write_shape_model
from razor_local.bench.shapes import Shape
from tests.support import arch_models, metal, runner
from tests.support.metal import Node

ARCHS = ("llama", "qwen2vl", "gemma2", "gemma3", "gemma4", "gpt-oss", "llama4", "lfm2",
         "granitehybrid", "falcon-h1", "qwen35", "qwen35moe", "bloom")  # fmt: skip
HEAD_DIMS = (64, 80, 96, 128, 256, 512)
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
# SHA-256 of supports_op() in the release that metal.accepts() was written from
RULES = "285292d4914986b05147aff147c14f893ef09112a8835d89ddface9739f19b8d"


@pytest.fixture(scope="module")
def upstream() -> Iterator[runner.Worker]:
    """A process with llama.cpp's attention, which devices without razor's kernels run."""
    with runner.Worker(None, {"RAZOR_LOCAL_CPU_ATTENTION": "off"}) as worker:
        yield worker


@pytest.mark.stock
def test_rules_are_those_of_the_pinned_release() -> None:
    """If this fails, compare metal.accepts() with the new source."""
    assert hashlib.sha256(metal.supports_op().encode()).hexdigest() == RULES


@pytest.mark.stock
@pytest.mark.parametrize("arch", ARCHS)
def test_every_family(arch: str, upstream) -> None:
    path = arch_models.path_of(arch)
    for kv_type, flash_attn in (("f16", True), ("f16", False), ("q8_0", True)):
        found = upstream(metal.refused, path, kv_type, flash_attn, arch != "bloom")
        assert found == []


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_size(head_dim: int, tmp_path: Path, upstream) -> None:
    shape = Shape("qwen3", 2, 64, 4, 2, head_dim, 96, 200, 4096, 1e6, qk_norm=True)
    path = write_shape_model(tmp_path / "m.gguf", shape, quant="f16")
    for flash_attn in (True, False):
        assert upstream(metal.refused, path, "f16", flash_attn) == []


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("flash_attn", [True, False])
def test_every_type(kv_type: str, flash_attn: bool, tmp_path: Path, upstream) -> None:
    shape = Shape("qwen3", 2, 64, 4, 2, 64, 96, 200, 4096, 1e6, qk_norm=True)
    path = write_shape_model(tmp_path / "m.gguf", shape, quant="f16")
    assert upstream(metal.refused, path, kv_type, flash_attn) == []


def test_what_metal_refuses() -> None:
    """Show that the checks above can fail."""

    def node(op: str, kind: str, *sources: str, dim: int = 64) -> Node:
        dims = ((dim, 1, 1, 1),) * len(sources)
        return Node(op, kind, sources, dims, (True,) * len(sources))

    assert metal.accepts(node("FLASH_ATTN_EXT", "f32", "f32", "q8_0", "q8_0"))
    assert not metal.accepts(node("FLASH_ATTN_EXT", "f32", "f32", "q8_0", "q4_0"))
    assert not metal.accepts(node("FLASH_ATTN_EXT", "f32", "f32", "f16", "f16", dim=160))
    assert metal.accepts(node("CPY", "i32", "i32"))
    assert not metal.accepts(node("CPY", "i64", "i64"))
    assert not metal.accepts(node("ADD", "f32", "f32", "f16"))
    assert not metal.accepts(node("CUSTOM", "f32", "f32"))
