"""Caches on a device: all layers, half of them, none. Run by tests/tools/other_backend.py.

The other native tests say whether the logits are right there (they run on the device too); these
say that it was really the device that computed, and that razor does not make the scheduler copy
more than it does for stock.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.support import reference, runner
from tests.support.device import tolerance
from tests.support.tiny_models import TinySpec, make_weights

if runner.GPU_LAYERS == 0:
    pytest.skip("no layer is offloaded: tests.tools.other_backend does it", allow_module_level=True)

SPEC = TinySpec("llama", 4, 4, 4, 64, seed=600)
MASK = ((0, 1, 0, 1), (0, 0, 0, 0), (0, 0, 1, 0), (1, 1, 1, 1))
PLAN = reference.make_razor(MASK, 64)
TOKENS = runner.random_tokens(400, SPEC.n_vocab, 1)
# llama.cpp counts the output layer too, and offloads from the end
LAYERS = {"all": SPEC.n_layer + 1, "half": SPEC.n_layer // 2 + 1, "none": 0}
KV = [("f32", "f32", False), ("f16", "f16", False), ("f16", "f16", True)]
KV += [
    ("q8_0", "f16", False),
    ("q4_0", "f16", False),
    ("q8_0", "q8_0", True),
    ("q4_0", "q4_0", True),
]


def is_host(buffer: runner.BufferStats) -> bool:
    return buffer.name.decode().startswith("CPU")


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("offload_kqv", [True, False], ids=["offload", "no-offload"])
def test_where_the_caches_lie(layers: str, offload_kqv: bool, tiny) -> None:
    """Each layer's cache lies where the layer is, all on the host without KV offload."""
    with runner.Model(tiny(SPEC), LAYERS[layers]) as model:
        with runner.Context(model, runner.override(PLAN), offload_kqv=offload_kqv) as ctx:
            assert ctx.stats().active
            buffers = ctx.buffers()
            total = [ctx.layer(il) for il in range(SPEC.n_layer)]
    n_device = LAYERS[layers] - 1 if offload_kqv and LAYERS[layers] else 0
    first = SPEC.n_layer - n_device
    assert {is_host(b) for b in buffers} == {il < first for il in range(SPEC.n_layer)}
    for host in (True, False):
        on_it = total[:first] if host else total[first:]
        want = sum(x.bytes_k + x.bytes_v + x.bytes_sums for x in on_it)
        got = sum(b.bytes for b in buffers if is_host(b) == host)
        assert want <= got <= want + 4096 * len(buffers)  # devices align


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("offload_kqv", [True, False], ids=["offload", "no-offload"])
@pytest.mark.parametrize("flash_attn", [True, False], ids=["fa", "nofa"])
@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_graph_splits(
    kv: str, flash_attn: bool, offload_kqv: bool, layers: str, tiny, stock
) -> None:
    """The scheduler splits the graph of local heads no more often than stock's: all operations
    run where their cache is. Without flash attention and with the cache on the host, a layer with
    two attentions may be split once more. With quantized keys and no flash attention some devices
    leave stock's products to the CPU, and take ours, whose heads' rows lie together."""
    params = {"type_k": kv, "type_v": kv if flash_attn else "f16", "flash_attn": flash_attn}
    params |= {"offload_kqv": offload_kqv, "n_ubatch": 128}
    want = stock(runner.graph_splits, tiny(SPEC), None, LAYERS[layers], **params)
    got = runner.graph_splits(tiny(SPEC), runner.override(PLAN), LAYERS[layers], **params)
    print(f"splits: razor {got}, stock {want}")
    two_attentions = sum(0 < sum(row) < len(row) for row in MASK)
    assert 1 <= got <= want + (0 if flash_attn or offload_kqv else two_attentions)


@pytest.mark.parametrize(
    ("layers", "offload_kqv", "n_ubatch"),
    [("all", True, n) for n in (1, 64, 512)]
    + [("half", True, 64), ("all", False, 64), ("half", False, 64)]
    # the device computes large products of layers on the host
    + [("none", True, 512)],
)
@pytest.mark.parametrize(("type_k", "type_v", "flash_attn"), KV)
def test_logits(
    type_k: str, type_v: str, flash_attn: bool, layers: str, offload_kqv: bool, n_ubatch: int, tiny
) -> None:
    params = {"type_k": type_k, "type_v": type_v, "flash_attn": flash_attn}
    got = runner.logits(
        tiny(SPEC),
        TOKENS,
        runner.override(PLAN),
        gpu_layers=LAYERS[layers],
        offload_kqv=offload_kqv,
        n_ubatch=n_ubatch,
        **params,
    )
    want = reference.forward(SPEC, make_weights(SPEC), TOKENS, PLAN)
    full = reference.forward(SPEC, make_weights(SPEC), TOKENS)
    error = np.abs(got - want).max()
    print(f"max error {error:.2e}, a full cache is off by {np.abs(full - want).max():.2e}")
    assert error <= tolerance(3e-5, **params)
    assert error < 0.6 * np.abs(got - full).max()


@pytest.mark.parametrize(("type_k", "type_v", "flash_attn"), KV)
def test_state_goes_between_device_and_host(
    type_k: str, type_v: str, flash_attn: bool, tiny
) -> None:
    """Saved on the device, loaded on the host, and the other way."""
    params = {"type_k": type_k, "type_v": type_v, "flash_attn": flash_attn}
    override = runner.override(PLAN)
    with runner.Model(tiny(SPEC)) as device, runner.Model(tiny(SPEC), 0) as host:
        for first, second in ((device, host), (host, device)):
            with runner.Context(first, override, **params) as ctx:
                ctx.decode(TOKENS[:300])
                state = ctx.save()
                want = ctx.decode(TOKENS[300:])
            with runner.Context(second, override, **params) as ctx:
                assert ctx.load(state)
                assert ctx.save() == state, "every byte of the caches"
                got = ctx.decode(TOKENS[300:])
            np.testing.assert_allclose(got, want, rtol=0, atol=tolerance(3e-5, **params))
