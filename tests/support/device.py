"""Tolerances of the native tests for the device they run on (see tests/tools/other_backend.py).

The CPU sums F32 values in F32, so the tests can require 1e-5 there. Devices take shortcuts, such as
F16 products in matrix multiplications, and different kernels for one token and for many. Their
tolerance is therefore the error of a stock build on the same device, measured on first use.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np

from tests.support import reference, runner
from tests.support.stock import stock_lib_dir
from tests.support.tiny_models import TinySpec, make_model, make_weights

_MODELS = [
    TinySpec("llama", 3, 4, 2, 64, seed=500),
    TinySpec("qwen3", 3, 4, 4, 128, seed=501),
    TinySpec("gpt2", 3, 4, 4, 64, seed=502),
]


def tolerance(
    on_cpu: float, type_k: str = "f32", type_v: str = "f32", flash_attn: bool = False
) -> float:
    """Return the largest accepted |difference| of logits.

    It is on_cpu if no layer is offloaded, and otherwise twice the error of stock on the device or
    on its host. Twice, because a test may compare two runs that both have this error.
    """
    if runner.GPU_LAYERS == 0:
        return on_cpu
    return max(on_cpu, 2 * stock_error(type_k, type_v, flash_attn))


def examples(n: int) -> int:
    """Return the number of examples of a property test that takes n on the CPU.

    Devices get fewer: they are slow with tiny models, and the CPU run covers the host's code.
    """
    return n if runner.GPU_LAYERS == 0 else max(1, n // 5)


@functools.cache
def stock_error(type_k: str, type_v: str, flash_attn: bool) -> float:
    """Return max |logit - float64 reference| of a stock build.

    It runs ubatches of 1, 32 and 512 tokens (1 only for the first tokens, because devices are slow
    at it), with all layers and the cache on the device, and with none.
    """
    error = 0.0
    with tempfile.TemporaryDirectory() as folder, runner.Worker(stock_lib_dir()) as stock:
        for spec in _MODELS:
            path = make_model(Path(folder) / f"{spec.arch}.gguf", spec)
            tokens = runner.random_tokens(300, spec.n_vocab, spec.seed)
            want = reference.forward(spec, make_weights(spec), tokens)
            for n_ubatch, n in ((1, 64), (32, 300), (512, 300)):
                for where in ({}, {"gpu_layers": 0, "op_offload": False}):
                    params = {"type_k": type_k, "type_v": type_v, "flash_attn": flash_attn} | where
                    got = stock(runner.logits, path, tokens[:n], n_ubatch=n_ubatch, **params)
                    error = max(error, float(np.abs(got - want[:n]).max()))
    return error
