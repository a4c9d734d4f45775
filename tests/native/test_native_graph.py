"""How many nodes the attention of a layer adds to the graph: each is a kernel launch on a GPU and a
barrier on a CPU. docs/architecture.md has the table."""

from __future__ import annotations

import pytest

from razor_local.native.structs import Tensor
from razor_local.native.tensors import I32
from tests.support import reference, runner
from tests.support.tiny_models import TinySpec

ENVS = ("RAZOR_LOCAL_CPU_ATTENTION", "RAZOR_LOCAL_DEVICE_ATTENTION")
N_LAYER = 4
ON_DEVICE = (
    runner.GPU_LAYERS != 0
)  # there an input of which layers take parts is copied, once a graph
KINDS = {
    "retrieval-first": ((1, 0, 0, 0), 2),
    "local-first": ((0, 0, 1, 1), 2),
    "mixed": ((0, 1, 0, 0), 4),
    "mixed-groups": ((1, 0, 0, 1), 4),
    "local": ((0, 0, 0, 0), 0),
}


def test_rows_are_of_a_type_that_backends_copy(tiny, monkeypatch) -> None:
    """Layers on devices take parts of a copy, and ggml-vulkan ends the process at one of I64."""
    for env in ENVS:
        monkeypatch.setenv(env, "off")
    types = []

    @runner.bindings().ggml_backend_sched_eval_callback
    def look(pointer: int, ask: bool, data: object) -> bool:
        rows = Tensor.from_address(pointer).src[1]
        if ask and rows and Tensor.from_address(rows).name.startswith(b"razor_inp_rows"):
            types.append(Tensor.from_address(rows).type)
        return False

    path = tiny(TinySpec("llama", N_LAYER, 8, 4, 64, seed=31))
    plan = reference.make_razor((KINDS["mixed"][0],) * N_LAYER, 64)
    with runner.Model(path) as model:
        with runner.Context(model, runner.override(plan), cb_eval=look, flash_attn=True) as ctx:
            ctx.decode(runner.random_tokens(8, 64, 3))
    assert types == [I32] * (2 * N_LAYER)  # of K and of V


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_nodes_added_per_layer(kv: str, kind: str, tiny, monkeypatch) -> None:
    """By upstream's operations."""
    for env in ENVS:
        monkeypatch.setenv(env, "off")
    row, more = KINDS[kind]
    path = tiny(TinySpec("llama", N_LAYER, 8, 4, 64, seed=31))
    plan = reference.make_razor((row,) * N_LAYER, 64)
    params = {"type_k": kv, "type_v": kv, "flash_attn": True}
    full = runner.count_nodes(path, runner.OFF, 300, **params)
    razor = runner.count_nodes(path, runner.override(plan), 300, **params)
    copies = (1 + kind.startswith("mixed")) * ON_DEVICE
    assert razor - full == more * N_LAYER + copies


@pytest.mark.skipif(runner.GPU_LAYERS != 0, reason="on CPUs")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_past", "more"), [(300, 0), (700, 1)])
def test_nodes_added_per_layer_on_cpus(n_past: int, more: int, kind: str, tiny) -> None:
    """One attention for both groups in the model's order; a second adds up the parts of threads
    where more than 512 cells are in use."""
    path = tiny(TinySpec("llama", N_LAYER, 8, 4, 64, seed=31))
    plan = reference.make_razor((KINDS[kind][0],) * N_LAYER, 64)
    params = {"type_k": "f16", "type_v": "f16", "flash_attn": True, "n_ctx": 1024}
    full = runner.count_nodes(path, runner.OFF, n_past, **params)
    razor = runner.count_nodes(path, runner.override(plan), n_past, **params)
    if kind == "local":
        more = 0  # a window of 64
    assert (razor - full) / N_LAYER == more


@pytest.fixture
def knows_ours(tiny) -> None:
    """Skips where the device does not know our operations (native/src/ggml-razor.h)."""
    if not ON_DEVICE:
        pytest.skip("no layer is offloaded")
    path = tiny(TinySpec("llama", N_LAYER, 8, 4, 64, seed=31))
    plan = reference.make_razor(((0,) * 4,) * N_LAYER, 64)
    with runner.Model(path) as model, runner.Context(model, runner.override(plan)) as ctx:
        name = ctx.buffers()[0].name.decode()
    if not name.startswith("CUDA"):
        pytest.skip(f"{name} does not know our operations")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_nodes_added_per_layer_on_devices(kv: str, kind: str, tiny, knows_ours) -> None:
    """K and V are stored at once, and both groups of heads are one attention."""
    path = tiny(TinySpec("llama", N_LAYER, 8, 4, 64, seed=31))
    plan = reference.make_razor((KINDS[kind][0],) * N_LAYER, 64)
    params = {"type_k": kv, "type_v": kv, "flash_attn": True}
    full = runner.count_nodes(path, runner.OFF, 300, **params)
    step, fold = (runner.count_nodes(path, runner.override(plan), n, **params) for n in (300, 320))
    assert step - full == -N_LAYER + 1
    assert fold - step == N_LAYER


def test_layers_of_retrieval_heads_add_none(tiny, monkeypatch) -> None:
    monkeypatch.setenv(ENVS[1], "off")
    path = tiny(TinySpec("llama", N_LAYER, 8, 4, 64, seed=31))
    plan = reference.make_razor(((1,) * 4,) * (N_LAYER - 1) + ((0,) * 4,), 64)
    params = {"type_k": "f16", "type_v": "f16", "flash_attn": True}
    full = runner.count_nodes(path, runner.OFF, 300, **params)
    assert runner.count_nodes(path, runner.override(plan), 300, **params) == full + ON_DEVICE


def test_nodes_of_a_fold(tiny, monkeypatch) -> None:
    """The step that folds: per tensor of a layer, rows read, transposed, summed, added to the sums
    and stored, their mean made, spread and stored: nine nodes."""
    monkeypatch.setenv(ENVS[1], "off")
    path = tiny(TinySpec("llama", N_LAYER, 8, 4, 64, seed=31))
    plan = reference.make_razor(((0, 1, 0, 0),) * N_LAYER, 64)
    params = {"type_k": "f16", "type_v": "f16", "flash_attn": True}
    override = runner.override(plan)
    step, fold = (runner.count_nodes(path, override, n, **params) for n in (300, 320))
    assert fold - step == 9 * 2 * N_LAYER + ON_DEVICE
