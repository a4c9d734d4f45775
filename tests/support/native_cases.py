"""Models, masks and KV types of several native tests, with the logits of the reference."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from tests.support import reference, runner
from tests.support.device import tolerance
from tests.support.tiny_models import TinySpec, make_weights

F32_TOLERANCE = tolerance(3e-5)  # 1e-4 is promised


@dataclass(frozen=True)
class Case:
    spec: TinySpec
    mask: tuple[tuple[int, ...], ...]
    window: int
    n_tokens: int
    sink_tokens: int = 4
    compensation: bool = True
    scopes: tuple[tuple[int, ...], ...] | None = None  # instead of mask and window
    n_ctx: int = 1024  # context size for the scopes

    @property
    def razor(self) -> reference.Razor:
        if self.scopes is not None:
            return reference.make_scoped(
                self.scopes, self.n_ctx, self.sink_tokens, self.compensation
            )
        return reference.make_razor(self.mask, self.window, self.sink_tokens, self.compensation)

    def __str__(self) -> str:
        s = self.spec
        mask = ".".join("".join(map(str, row)) for row in self.mask)
        n_kv = "+".join(str(n) for n in dict.fromkeys(s.kv_heads))
        window = f"w{self.window}"
        if self.scopes is not None:
            mask, window = ".".join("+".join(map(str, row)) for row in self.scopes), "scopes"
        return (
            f"{s.arch}-{s.n_head}q{n_kv}kv-d{s.head_dim}-{mask}-{window}"
            f"-s{self.sink_tokens}-n{self.n_tokens}{'' if self.compensation else '-nocomp'}"
        )


def mask_of(kind: str, n_kv: int, n_layer: int) -> tuple[tuple[int, ...], ...]:
    """Return a mask by name. With one KV head per layer it selects layers instead of heads."""
    patterns = {
        "none": [0],
        "prefix": [1, 1, 0, 0],
        "suffix": [0, 0, 1, 1],
        "scattered": [1, 0, 1, 0],
        "middle": [0, 1, 1, 0],
        "edges": [1, 0, 0, 1],
    }
    if kind == "mixed":  # layers with none, some and all retrieval heads
        rows = [[0] * n_kv, [(h + 1) % 2 for h in range(n_kv)], [1] * n_kv, [0] * n_kv]
    else:
        p = patterns[kind]
        if n_kv == 1:
            rows = [[p[il % len(p)]] for il in range(n_layer)]
        elif n_kv == 2:
            rows = [[p[0], p[-1]], [p[0], 0], [0, p[-1]]]
        else:
            rows = [[p[(h * len(p)) // n_kv] for h in range(n_kv)]] * n_layer
    return tuple(tuple(row) for row in rows[:n_layer])


@functools.cache
def weights(spec: TinySpec) -> dict[str, np.ndarray]:
    return make_weights(spec)


@functools.lru_cache(maxsize=64)
def expected(spec: TinySpec, n_tokens: int, razor: reference.Razor | None) -> np.ndarray:
    return reference.forward(spec, weights(spec), tokens_of(spec, n_tokens), razor)


def tokens_of(spec: TinySpec, n_tokens: int) -> list[int]:
    return runner.random_tokens(n_tokens, spec.n_vocab, spec.seed)


# llama.cpp's flash attention rounds F32 rows to F16, razor's kernel on CPUs does not
FLASH_F32 = [False, True] if runner.GPU_LAYERS == 0 else [False]


POOL = [
    Case(TinySpec("llama", 3, 4, 2, 64, seed=200), ((0, 0), (1, 0), (0, 1)), 64, 512),
    Case(TinySpec("qwen2", 3, 4, 4, 32, seed=201), ((0, 1, 0, 1), (0,) * 4, (1, 0, 0, 0)), 64, 512),
    Case(TinySpec("qwen3", 3, 4, 2, 128, seed=202), ((0, 1), (0, 0), (1, 1)), 64, 512),
    Case(TinySpec("qwen3", 2, 4, 1, 96, seed=203), ((0,), (0,)), 64, 512),
    Case(TinySpec("gpt2", 3, 4, 4, 64, seed=204), ((0,) * 4, (0, 0, 1, 0), (0, 1, 1, 0)), 64, 512),
    Case(TinySpec("llama", 2, 8, 8, 32, seed=205), ((0,) * 8, (0, 0, 1, 0) * 2), 64, 512),
]


# llama.cpp supports a quantized V only with flash attention
KV = [
    ("f32", "f32", True),
    ("f16", "f16", False),
    ("f16", "f16", True),
    ("bf16", "bf16", False),
    ("bf16", "bf16", True),
    ("q8_0", "f16", False),
    ("q8_0", "q8_0", True),
    ("q5_1", "q5_1", True),
    ("q5_0", "q5_0", True),
    ("q4_1", "q4_1", True),
    ("q4_0", "f16", False),
    ("q4_0", "q4_0", True),
    ("q8_0", "q4_0", True),
    ("f16", "q8_0", True),
]
