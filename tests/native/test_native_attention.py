"""Attention on CPUs (native/src/cpu/): every compiled kernel against float64.

The other native tests run what the CPU at hand has best; here are the others, and what is cut into
tasks for threads.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import reference, runner
from tests.support.native_cases import POOL, Case, expected, mask_of, tokens_of
from tests.support.tiny_models import TinySpec, make_model, make_weights, model_kv, write_gguf

if runner.GPU_LAYERS != 0:
    pytest.skip("attention on CPUs", allow_module_level=True)

ENV = "RAZOR_LOCAL_CPU_ATTENTION"
DEVICE_ENV = "RAZOR_LOCAL_DEVICE_ATTENTION"
F32_TOLERANCE = 3e-5
# of F16 and quantized rows the reference knows nothing: half of upstream's own error at least
KV = ["f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"]


def kernels() -> list[str]:
    """Those that this CPU has; the library names them when it is asked for another."""
    why = why_refused(TinySpec("llama", 1, 2, 2, 32), "none of them")
    found = re.search(r"expected one of: ([\w, ]+);", why)
    return found[1].split(", ") if found else ["off"]  # and test_an_unknown_kernel_is_refused fails


def why_refused(spec: TinySpec, value: str, env: str = ENV) -> str:
    """What is said of a value of a variable, nothing if it is taken."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = make_model(Path(folder) / "model.gguf", spec)
        patch.setitem(os.environ, env, value)
        plan = reference.make_razor(((0,) * spec.n_head_kv,) * spec.n_layer, 64)
        try:
            with runner.Model(path) as model:
                with runner.Context(model, runner.override(plan), flash_attn=True):
                    return ""
        except Exception as error:
            return str(error)


KERNELS = kernels()


def logits(path: str, case: Case, tokens: list[int], **params: object) -> np.ndarray:
    params = {"n_ctx": 1024, "flash_attn": True} | params
    return runner.logits(path, tokens, runner.override(case.razor), **params)


def test_an_unknown_kernel_is_refused() -> None:
    why = why_refused(TinySpec("llama", 1, 2, 2, 32), "sse9")
    assert f"{ENV} is 'sse9', expected one of: off" in why
    assert "correct or unset it" in why


def test_an_unknown_choice_for_devices_is_refused() -> None:
    spec = TinySpec("llama", 1, 2, 2, 32)
    for value in ("on", "ampere", "token", "off", ""):
        assert why_refused(spec, value, DEVICE_ENV) == ""
    why = why_refused(spec, "no", DEVICE_ENV)
    assert f"{DEVICE_ENV} is 'no', expected one of: on, ampere, token, off" in why
    assert "correct or unset it" in why


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kv", KV)
def test_error_of_each_kernel(kv: str, kernel: str, tiny, monkeypatch) -> None:
    """Rows are read as gguf's own dequantization reads them: with an F32 cache the result is that
    of float64, with others it is as near to it as upstream's attention, or nearer."""
    errors = {}
    for name in {kernel, "off"}:
        monkeypatch.setenv(ENV, name)
        squares = []
        for case in POOL:
            tokens, want = tokens_of(case.spec, 300), expected(case.spec, 300, case.razor)
            got = logits(tiny(case.spec), case, tokens, type_k=kv, type_v=kv, n_ubatch=32)
            squares.append(((got - want) ** 2).mean())
        errors[name] = float(np.sqrt(np.mean(squares)))
    print(f"rms error: {errors}")
    assert 0 < errors[kernel] <= 1.05 * errors["off"]


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "off"])
def test_each_kernel_equals_the_reference(kernel: str, tiny, monkeypatch) -> None:
    monkeypatch.setenv(ENV, kernel)
    for case in POOL:
        tokens, want = tokens_of(case.spec, 300), expected(case.spec, 300, case.razor)
        for splits in (300, 1):
            got = logits(tiny(case.spec), case, tokens, splits=splits)
            assert np.abs(got - want).max() <= F32_TOLERANCE


@settings(derandomize=True, deadline=None, max_examples=15, suppress_health_check=HealthCheck)
@given(
    n_kv=st.sampled_from([1, 2, 4]),
    n_gqa=st.sampled_from([1, 3, 4, 7]),
    head_dim=st.sampled_from([16, 48, 64, 112]),
    kind=st.sampled_from(["none", "scattered", "edges", "prefix"]),
    window=st.sampled_from([64, 300, 600]),
    n_last=st.integers(1, 70),
    n_threads=st.sampled_from([1, 2, 3, 8]),
    kernel=st.sampled_from(KERNELS),
)
def test_any_shape_and_any_cut_into_tasks(
    tiny, n_kv, n_gqa, head_dim, kind, window, n_last, n_threads, kernel
) -> None:
    """1,100 tokens, then some more in one batch: few are cut by cells, many by tokens."""
    if kernel == "off":
        kernel = KERNELS[-1]
    spec = TinySpec("llama", 2, n_kv * n_gqa, n_kv, head_dim, n_ctx_train=2048, seed=77)
    case = Case(spec, mask_of(kind, n_kv, 2), window, 1100 + n_last)
    tokens = runner.random_tokens(case.n_tokens, spec.n_vocab, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENV, kernel)
        got = logits(
            tiny(spec), case, tokens, n_ctx=2048, splits=[512, 512, 76, n_last], n_threads=n_threads
        )
    want = reference.forward(spec, make_weights(spec), tokens, case.razor)
    assert np.abs(got[1050:] - want[1050:]).max() <= F32_TOLERANCE


@pytest.mark.parametrize("n_ubatch", [1, 64])
def test_rows_that_nobody_sees_may_hold_anything(n_ubatch: int, tmp_path) -> None:
    """Not a number in rows that were taken back does not reach what comes after."""
    spec = TinySpec("llama", 3, 4, 2, 64, seed=200)
    weights = make_weights(spec)
    weights["token_embd.weight"][7] = np.nan
    tensors = [(name, data, None) for name, data in weights.items()]
    path = write_gguf(tmp_path / "model.gguf", spec.arch, model_kv(spec), tensors)
    tokens = [token for token in runner.random_tokens(420, spec.n_vocab, 1) if token != 7]
    override = runner.override(reference.make_razor(((0, 0), (1, 0), (0, 1)), 64))
    with (
        runner.Model(path) as model,
        runner.Context(model, override, n_ctx=1024, n_ubatch=n_ubatch, flash_attn=True) as ctx,
    ):
        ctx.decode(tokens[:350])
        assert np.isnan(ctx.decode([7] * 30)).all()
        assert ctx.seq_rm(350)
        got = ctx.decode(tokens[350:380])
        ctx.clear()
        want = ctx.decode(tokens[:380])[350:]
    assert np.isfinite(want).all()
    assert np.abs(got - want).max() <= F32_TOLERANCE
