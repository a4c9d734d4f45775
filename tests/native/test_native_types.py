"""KV types of local heads, which may differ from those of retrieval heads.

If the types in a layer differ, its local heads have separate tensors. The reference rounds rows and
compensation tokens to the types of their heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from razor_local.model_file import read_model_shape
from razor_local.plan import make_plan
from razor_local.profile import Profile
from tests.support import arch_models, reference, runner
from tests.support.device import examples
from tests.support.native_cases import Case, expected, tokens_of
from tests.support.reference import Types
from tests.support.runner import Context, Model, Override
from tests.support.tiny_models import TinySpec

ENV = "RAZOR_LOCAL_CPU_ATTENTION"
ON_CPU = pytest.mark.skipif(runner.GPU_LAYERS != 0, reason="on CPUs")
N_CTX = 1024
F32, F16, Q8, Q4 = (("f32",) * 2, ("f16",) * 2, ("q8_0",) * 2, ("q4_0",) * 2)
# heads of both kinds in the model's order, mixed, and of one kind alone; rotated, and not
CASES = [
    Case(TinySpec("llama", 3, 4, 4, 64, seed=800), ((1, 0, 0, 0), (1, 0, 0, 1), (0,) * 4), 64, 400),
    Case(TinySpec("qwen3", 3, 4, 2, 96, seed=801), ((0, 1), (1, 0), (1, 1)), 64, 400),
]
SCOPED = Case(
    TinySpec("llama", 2, 8, 4, 64, seed=802),
    ((0, 1, 0, 0), (0, 0, 0, 1)),
    0,
    500,
    scopes=((64, 0, 250, 64), (120, 64, 64, 0)),
)


def with_types(case: Case, full: Types, local: Types) -> reference.Razor:
    return replace(case.razor, types=(full, local))


def run(path: Any, case: Case, razor: reference.Razor, **params: Any) -> np.ndarray:
    assert razor.types is not None
    type_k, type_v = razor.types[0]
    params = {"n_ctx": N_CTX, "flash_attn": True, "type_k": type_k, "type_v": type_v} | params
    return runner.logits(
        path, tokens_of(case.spec, case.n_tokens), runner.override(razor), **params
    )


def rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(((a - b) ** 2).mean()))


def misread(full: Types, local: Types) -> list[tuple[Types, Types]]:
    """Return wrong types: those that heads would have if types were mixed up."""
    others = [(local, full), (full, full), (local, local), (full, local[::-1])]
    return [types for types in others if types != (full, local)]


def check(path: Any, case: Case, full: Types, local: Types, limit: float, **params: Any) -> None:
    """Check that the error is small next to the error against references with mixed-up types."""
    razor = with_types(case, full, local)
    got = run(path, case, razor, **params)
    error = rms(got, expected(case.spec, case.n_tokens, razor))
    wrong = min(
        rms(got, expected(case.spec, case.n_tokens, replace(razor, types=types)))
        for types in misread(full, local)
    )
    assert 0 < error <= limit * wrong, f"{error:.1e}, with mixed-up types {wrong:.1e}"


@ON_CPU
@pytest.mark.parametrize(
    ("full", "local"),
    [
        (F32, F16), (F16, Q8), (F16, Q4), (Q8, Q4), (Q8, F16), (F16, ("q5_1", "q4_1")),
        (F32, ("bf16", "f16")), (("q8_0", "f16"), ("q4_0", "f32")), (F16, ("f16", "q5_0")),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("case", [*CASES, SCOPED], ids=str)
def test_rows_have_the_types_of_their_heads(case: Case, full: Types, local: Types, tiny) -> None:
    """The attention on CPUs computes in F32, so the rounding of rows is almost the only error."""
    check(tiny(case.spec), case, full, local, 0.25, n_ubatch=100)


@pytest.mark.parametrize("case", [*CASES, SCOPED], ids=str)
@pytest.mark.parametrize(
    ("full", "local", "flash_attn"),
    [(Q8, Q4, True), (F16, Q4, True), (("q8_0", "f16"), ("q4_0", "f32"), False)],
    ids=str,
)
def test_upstreams_operations_read_them_too(
    full: Types, local: Types, flash_attn: bool, case: Case, tiny, monkeypatch
) -> None:
    """Upstream also rounds queries. Without flash attention, V of retrieval heads is transposed."""
    monkeypatch.setenv(ENV, "off")
    check(tiny(case.spec), case, full, local, 0.6, n_ubatch=100, flash_attn=flash_attn)


@st.composite
def random_cases(draw: Any) -> tuple[Case, Types, Types, dict[str, Any]]:
    n_kv, n_layer = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    scope = st.sampled_from([0, 0, 64, 200])
    row = st.lists(scope, min_size=n_kv, max_size=n_kv).map(tuple)
    scopes = tuple(draw(st.lists(row, min_size=n_layer, max_size=n_layer)))
    assume(any(sum(scopes, ())))
    case = Case(
        TinySpec("llama", n_layer, n_kv * draw(st.sampled_from([1, 3])), n_kv,
                 draw(st.sampled_from([32, 64, 96])), seed=803),
        tuple(tuple(int(x == 0) for x in row) for row in scopes),
        0,
        draw(st.integers(70, 500)),
        sink_tokens=draw(st.sampled_from([0, 4, 65])),
        compensation=draw(st.booleans()),
        scopes=scopes,
    )  # fmt: skip
    name = st.sampled_from(["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
    full, local = (draw(st.tuples(name, name)) for _ in range(2))
    splits = runner.random_splits(case.n_tokens, draw(st.sampled_from([3, 50, 200])), 0)
    return case, full, local, {"splits": splits, "n_ubatch": draw(st.sampled_from([16, 100, 512]))}


@ON_CPU
@settings(
    derandomize=True, deadline=None, max_examples=examples(40), suppress_health_check=HealthCheck
)
@given(random_cases())
def test_any_types_equal_the_reference(tiny, drawn) -> None:
    """The error is at most a small part of the change that the rounding of rows makes."""
    case, full, local, params = drawn
    razor = with_types(case, full, local)
    got = run(tiny(case.spec), case, razor, **params)
    want = expected(case.spec, case.n_tokens, razor)
    exact = expected(case.spec, case.n_tokens, case.razor)
    assert rms(got, want) <= 0.2 * rms(want, exact) + 2e-5


@pytest.mark.parametrize("flash_attn", [True, False], ids=["fa", "nofa"])
@pytest.mark.parametrize("case", [CASES[0], SCOPED], ids=str)
def test_the_same_types_change_nothing(case: Case, flash_attn: bool, tiny) -> None:
    """Bits, bytes and nodes are the same as without types of local heads."""
    path, plain = tiny(case.spec), runner.override(case.razor)
    params = {"type_k": "q8_0", "type_v": "f16", "flash_attn": flash_attn, "n_ctx": N_CTX}
    named = replace(plain, type_k_local="q8_0", type_v_local="f16")
    tokens = tokens_of(case.spec, 300)
    results = [runner.logits(path, tokens, override, **params) for override in (plain, named)]
    np.testing.assert_array_equal(*results)
    nodes = [runner.count_nodes(path, override, 300, **params) for override in (plain, named)]
    assert nodes[0] == nodes[1]
    with Model(path) as model:
        with Context(model, plain, **params) as one, Context(model, named, **params) as other:
            assert bytes(one.stats()) == bytes(other.stats())
            one.decode(tokens)
            assert other.load(one.save())  # the plan is the same


@ON_CPU
@pytest.mark.parametrize(
    ("mask", "own", "more"),
    [
        ((1, 0, 0, 0), True, 2),
        ((0, 1, 0, 0), True, 4),
        ((0,) * 4, True, 0),
        ((1, 0, 0, 0), False, 4),
    ],
    ids=["in order", "mixed", "local", "upstream"],
)
def test_nodes_of_a_split_layer(mask, own: bool, more: int, tiny, monkeypatch) -> None:
    """Each kind of heads has its stores, mixed heads are gathered, and attention is one node."""
    if not own:
        monkeypatch.setenv(ENV, "off")
    path = tiny(TinySpec("llama", 4, 8, 4, 64, seed=31))
    razor = runner.override(reference.make_razor((mask,) * 4, 64))
    params = {"type_k": "f16", "type_v": "f16", "flash_attn": True}
    full = runner.count_nodes(path, runner.OFF, 300, **params)
    split = replace(razor, type_k_local="bf16", type_v_local="bf16")
    assert runner.count_nodes(path, split, 300, **params) - full == 4 * more


@ON_CPU
@pytest.mark.parametrize(("n_windows", "own"), [(2, True), (3, False)])
def test_layers_with_many_windows_run_upstreams_attention(n_windows: int, own: bool, tiny) -> None:
    """ggml's custom operations have nine sources. The statistics show what runs."""
    row = (0, 64, 128, 64, 192 if n_windows == 3 else 128)
    case = Case(TinySpec("llama", 2, 5, 5, 32, seed=804), ((1, 0, 0, 0, 0),) * 2, 0, 420,
                scopes=(row,) * 2)  # fmt: skip
    razor = with_types(case, Q8, Q4)
    with Model(tiny(case.spec)) as model:
        with Context(
            model, runner.override(razor), n_ctx=N_CTX, type_k="q8_0", type_v="q8_0",
            flash_attn=True,
        ) as ctx:  # fmt: skip
            assert ctx.stats().n_windows == n_windows
            assert bool(ctx.stats().own_attention) == own
    check(tiny(case.spec), case, Q8, Q4, 0.25 if own else 0.6)


@pytest.mark.parametrize("arch", ["gpt-oss", "gemma2"])
def test_sinks_and_caps_of_split_layers(arch: str) -> None:
    """Logits with F16 rows differ from those of an F32 cache only by rounding, with any depth.

    Layers with a sliding window keep the types of the context.
    """
    path = arch_models.path_of(arch)
    tokens = runner.random_tokens(800, 100, 3)
    params = {"n_ctx": N_CTX, "swa_full": False, "type_k": "f32", "type_v": "f32"}
    with Model(path) as model:
        heads = [n for n in model.layers() if n]
        mask = b"".join(bytes([1] * (n - 1) + [0]) for n in heads)
        got = []
        for name in (None, "f16"):
            razor = Override(mask, window=512, type_k_local=name, type_v_local=name)
            with Context(model, razor, flash_attn=True, **params) as ctx:
                got.append(np.concatenate([ctx.decode(tokens[:700]), ctx.decode(tokens[700:], 1)]))
                stats = ctx.stats()
            if name is not None:
                assert (stats.type_k, stats.type_k_local) == (0, 1)
    assert 0 < rms(*got) <= 2e-3
    first = [logits[:30] for logits in got]  # here the sinks weigh most
    assert rms(*first) <= 2e-3


# bytes

BYTES = TinySpec("llama", 3, 6, 6, 32, n_embd=32, n_ff=32, n_vocab=32, seed=805)
NAMES = ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]


@settings(
    derandomize=True, deadline=None, max_examples=examples(60), suppress_health_check=HealthCheck
)
@given(
    st.lists(st.lists(st.sampled_from([0, 0, 64, 300]), min_size=6, max_size=6), min_size=3,
             max_size=3),
    st.lists(st.sampled_from(NAMES), min_size=4, max_size=4),
    st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_bytes_of_any_types(tiny, scopes, types: list[str], comp: bool, flash_attn: bool) -> None:
    """The backend buffers match razor_local.plan in total and per layer."""
    type_k, type_v, type_k_local, type_v_local = types
    if not flash_attn:
        type_v, type_v_local = ("f16" if "q" in name else name for name in (type_v, type_v_local))
    mask = [[int(x == 0) for x in row] for row in scopes]
    profile = Profile(
        tuple(np.array(row, np.uint8) for row in mask),
        scope=tuple(np.array(row, np.uint32) for row in scopes),
        compensation=comp,
    )
    path = tiny(BYTES)
    local = {"type_k_local": type_k_local, "type_v_local": type_v_local}
    plan = make_plan(read_model_shape(path), profile, N_CTX, type_k, type_v, flash_attn, **local)
    override = Override(
        bytes(sum(mask, [])), compensation=comp, scope=tuple(sum(scopes, [])), **local
    )
    params = {"type_k": type_k, "type_v": type_v, "flash_attn": flash_attn, "n_ubatch": 16}
    with Model(path) as model, Context(model, override, n_ctx=N_CTX, **params) as ctx:
        stats, buffers = ctx.stats(), ctx.buffers()
        layers = [ctx.layer(il) for il in range(3)] if stats.active else []
    assert (bool(stats.active), stats.kv_bytes) == (plan.active, plan.kv_bytes)
    if not stats.active:
        return
    assert stats.kv_bytes == sum(b.bytes for b in buffers)
    assert stats.kv_bytes == stats.kv_bytes_retrieval + stats.kv_bytes_local
    row = sum(runner_row(name) for name in (type_k, type_v))
    assert stats.kv_bytes_retrieval == sum(map(sum, mask)) * N_CTX * row
    assert [stats.type_k, stats.type_v, stats.type_k_local, stats.type_v_local] == [
        runner.KV_TYPES[name] for name in (type_k, type_v, type_k_local, type_v_local)
    ]
    for got, want in zip(layers, plan.layers, strict=True):
        sizes = (got.bytes_k, got.bytes_v, got.bytes_sums)
        assert sizes == (want.bytes_k, want.bytes_v, want.bytes_sums)


def runner_row(name: str) -> int:
    """Return the bytes of a row of 32 elements."""
    return {"f32": 128, "f16": 64, "bf16": 64, "q8_0": 34, "q5_1": 24, "q5_0": 22, "q4_1": 20,
            "q4_0": 18}[name]  # fmt: skip


# states, rollback, abort

STATE = Case(TinySpec("llama", 2, 4, 4, 64, seed=806), ((1, 0, 0, 1), (0, 0, 1, 0)), 24, 300)
STATE_PARAMS = {"n_ctx": N_CTX, "type_k": "f16", "type_v": "f16", "flash_attn": True}


@pytest.mark.parametrize("n", [20, 200], ids=["before-folds", "after-folds"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "seq"])
def test_a_state_continues_and_other_types_are_refused(whole: bool, n: int, tiny) -> None:
    """A refused state changes nothing."""
    tokens = tokens_of(STATE.spec, n + 60)
    overrides = [
        replace(runner.override(STATE.razor), type_k_local=k, type_v_local=v)
        for k, v in (("q8_0", "q4_0"), ("q8_0", "q8_0"), ("q4_0", "q4_0"), (None, None))
    ]
    with Model(tiny(STATE.spec)) as model:
        states, wants = [], []
        for override in overrides:
            with Context(model, override, **STATE_PARAMS) as ctx:
                ctx.decode(tokens[:n])
                states.append(ctx.save(whole))
                wants.append(ctx.decode(tokens[n:]))
        for i, override in enumerate(overrides):
            with Context(model, override, **STATE_PARAMS) as ctx:
                assert ctx.load(states[i], whole)
                for other in states[:i] + states[i + 1 :]:
                    assert not ctx.load(other, whole)
                    error = runner.last_error()
                    assert "saved under another plan" in error and "KV types" in error
                assert ctx.pos_max() == n - 1
                np.testing.assert_array_equal(ctx.decode(tokens[n:]), wants[i])


@pytest.mark.parametrize("back", [1, 40, 64])
def test_a_rollback_leaves_nothing(back: int, tiny) -> None:
    """Roll back over a fold. Tokens are decoded one by one, so the bits can be compared."""
    tokens, others = tokens_of(STATE.spec, 240), runner.random_tokens(back, 100, 9)
    override = replace(runner.override(STATE.razor), type_k_local="q8_0", type_v_local="q4_0")
    with Model(tiny(STATE.spec)) as model, Context(model, override, **STATE_PARAMS) as ctx:
        want = ctx.decode(tokens, 1)
        ctx.clear()
        ctx.decode(tokens[: 200 - back], 1)
        ctx.decode(others, 1)
        assert ctx.seq().frontier > 4
        assert ctx.seq_rm(200 - back)
        np.testing.assert_array_equal(ctx.decode(tokens[200 - back :], 1), want[200 - back :])


# refusals


@pytest.mark.parametrize(
    ("types", "params", "says"),
    [
        (("f16", "q8_0"), {"flash_attn": False},
         "a quantized V cache of local heads (q8_0) needs flash attention"),
        (("f16", "q4_0"), {"flash_attn_type": -1},
         "a quantized V cache of local heads (q4_0) needs flash attention"),
    ],
    ids=["off", "auto"],
)  # fmt: skip
def test_flash_attention_is_needed(types: Types, params: dict, says: str, tiny) -> None:
    override = Override(bytes(8), window=64, type_k_local=types[0], type_v_local=types[1])
    with Model(tiny(TinySpec("llama", 2, 4, 4, 32, seed=807))) as model:
        with pytest.raises(runner.LoadError) as error:
            Context(model, override, **params)
        assert says in str(error.value) and "\n" not in str(error.value)
        with Context(model, replace(override, type_v_local="f16"), flash_attn=False):
            pass


def test_head_sizes_must_fit(tiny) -> None:
    with Model(tiny(TinySpec("llama", 2, 4, 4, 80, seed=808))) as model:
        with pytest.raises(runner.LoadError) as error:
            Context(model, Override(bytes(8), window=64, type_k_local="q8_0"), flash_attn=True)
    assert "need head sizes that are multiples of 32 and 1, layer 0 has 80 and 80" in str(
        error.value
    )


@pytest.mark.parametrize("number", [-2, 10, 24, 1000])
def test_other_numbers_are_refused(number: int) -> None:
    params = runner.raw_params(Override(bytes(8), window=64))
    for name in ("type_k_local", "type_v_local"):
        changed = runner.raw_params(Override(bytes(8), window=64))
        setattr(changed, name, number)
        assert not runner.razor_api().llama_razor_set_override(changed)
        assert runner.last_error() == (
            f"{name} is {number}, expected the number of a KV cache type or -1"
        )
    assert runner.razor_api().llama_razor_set_override(params)
    runner.set_override(None)
