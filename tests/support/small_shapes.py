"""Small shapes of every architecture of bench/shapes.py."""

from __future__ import annotations

from typing import Any

from razor_local.bench.shapes import DeltaNet, Experts, Shape, Sliding

SMALL: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen35": {"rope_dim": 16, "delta_net": DeltaNet(4, 2, 4, 32)},
    "qwen35moe": {
        "rope_dim": 16, "delta_net": DeltaNet(4, 2, 4, 32), "experts": Experts(4, 2, 32, 32),
    },
    "gemma3": {"tied": True, "sliding": Sliding(64, 6)},
    "gemma4": {"tied": True, "keys_are_values": True, "sliding": Sliding(64, 6, 4, 32)},
    "gpt-oss": {"qk_norm": False, "sliding": Sliding(64, 2), "experts": Experts(4, 2, 32)},
}  # fmt: skip


def small_shape(arch: str) -> Shape:
    options = {"qk_norm": True} | SMALL[arch]
    n_layer = 2 if arch == "qwen3" else 12
    return Shape(arch, n_layer, 64, 4, 2, 64, 96, 200, 4096, 1e6, **options)
