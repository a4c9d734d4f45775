"""Compare a layer that ran with the reference, and decide whether it passes.

Errors are relative to the root mean square of a head's output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from ..converters.alibi import alibi_slopes
from ..plan import KV_TYPES, Plan
from . import reference
from .capture import Layer, rotation_sizes
from .result import Errors, GroupResult

KL_ROWS = 16  # logits converted to F64 at a time

# Bounds of the errors relative to the RMS of a head's output: of the RMS error of a head over all
# checked queries, and of any single element. docs/verification.md has the measurements. With
# quantized keys CPUs round q to 8 bits, which can decide near ties between the keys of a sharp head
# in single rows.
QUANTIZED = (1e-2, 5e-1)
BOUNDS = {"f32": (1e-5, 5e-4), "f16": (3e-3, 5e-2), "bf16": (5e-3, 1e-1)} | {
    kv_type: QUANTIZED for kv_type, info in KV_TYPES.items() if info.block > 1
}
WORSE_THAN_FULL = 2.0  # allowed multiple of the full cache's error where that exceeds the bound


def compare_layer(
    il: int,
    razor: Layer,
    full: Layer,
    windows: Sequence[int],
    plan: Plan,
    full_local: Layer | None = None,
) -> list[GroupResult]:
    """Compare each head group of a layer with the reference.

    Args:
        il: index of the layer.
        razor, full: the layer as it ran with razor and with a full cache.
        windows: the window of each KV head, 0 for retrieval heads.
        plan: the plan of the razor context.
        full_local: the layer as it ran with a full cache of the types of local heads, if these
            differ from the types of retrieval heads.
    """
    everything = (0,) * len(windows)
    group = razor.q.shape[1] // len(windows)
    full_plan = with_full_types(plan)
    sides = [(razor, windows, plan), (full, everything, full_plan)]
    if full_local is not None:
        sides.append((full_local, everything, with_full_types(plan, local=True)))
    diffs = []
    for layer, its_windows, its_plan in sides:
        expected = expected_output(il, layer, its_windows, its_plan)
        diffs.append(layer.out.astype(np.float64) - expected)
    results = []
    names = {0: "retrieval"} | {
        g.window: "local" if len(plan.groups) == 1 else f"local ({g.window})" for g in plan.groups
    }
    for window, name in names.items():
        kv_heads = np.flatnonzero(np.asarray(windows) == window)
        if len(kv_heads) == 0:
            continue
        types = (plan.type_k_local, plan.type_v_local) if window else (plan.type_k, plan.type_v)
        bounds = [_bound(kv_type, plan.flash_attn) for kv_type in types]
        bound_rms, bound_largest = (max(pair) for pair in zip(*bounds, strict=True))
        heads = (kv_heads[:, None] * group + np.arange(group)).reshape(-1)
        errors = _errors(diffs[0], razor.out, heads)
        if window and full_local is not None:
            yardstick = _errors(diffs[2], full_local.out, heads)
        else:
            yardstick = _errors(diffs[1], full.out, heads)
        results.append(
            GroupResult(
                il=il,
                group=name,
                kv_heads=len(kv_heads),
                errors=errors,
                full=yardstick,
                limit_rms=max(bound_rms, WORSE_THAN_FULL * yardstick.worst_rms),
                limit_largest=max(bound_largest, WORSE_THAN_FULL * yardstick.largest),
            )
        )
    return results


def with_full_types(plan: Plan, local: bool = False) -> Plan:
    """Return a copy of a plan in which all heads have the types of retrieval or of local heads."""
    k, v = (plan.type_k_local, plan.type_v_local) if local else (plan.type_k, plan.type_v)
    return replace(plan, type_k=k, type_v=v, type_k_local=k, type_v_local=v)


def expected_output(il: int, layer: Layer, windows: Sequence[int], plan: Plan) -> np.ndarray:
    """Return the output of the reference for a layer: f32 [n_rows, n_head, d_v].

    plan: the plan with the types of the cache. windows: the window of each KV head, 0 for retrieval
    heads.
    """
    size_k, _ = rotation_sizes(plan)
    max_bias = plan.shape.max_alibi_bias
    return reference.attention(
        layer.q if size_k is None else reference.rotate(layer.q, size_k),
        layer.positions,
        _unpack(layer.k, (plan.type_k, plan.type_k_local), plan.heads(il)),
        _unpack(layer.v, (plan.type_v, plan.type_v_local), plan.heads(il)),
        np.asarray(windows) == 0,
        window=np.asarray(windows),
        block=plan.block,
        sink_tokens=plan.sink_tokens,
        compensation=plan.compensation,
        scale=layer.scale,
        slopes=alibi_slopes(layer.q.shape[1], max_bias) if max_bias else None,
        cap=layer.cap,
        sinks=layer.sinks,
        round_k=partial(reference.round_rows, kv_type=plan.type_k_local),
        round_v=partial(reference.round_rows, kv_type=plan.type_v_local),
    )


def _unpack(
    parts: Sequence[np.ndarray], types: Sequence[str], heads: Sequence[Sequence[int]]
) -> np.ndarray:
    """Unpack and join the rows of retrieval and of local heads: f32 [n, n_head_kv, d]."""
    some = [
        (its_heads, reference.unpack_rows(part, name))
        for part, name, its_heads in zip(parts, types, heads, strict=True)
        if its_heads
    ]
    n, _, d = some[0][1].shape
    result = np.empty((n, sum(map(len, heads)), d), np.float32)
    for its_heads, rows in some:
        result[:, its_heads] = rows
    return result


def kl_divergence(full: np.ndarray, razor: np.ndarray) -> np.ndarray:
    """Compute KL(softmax(full) || softmax(razor)) of logits [n, n_vocab], f64 [n], in nats."""
    result = np.empty(len(full))
    for i in range(0, len(full), KL_ROWS):
        p, q = (_log_softmax(x[i : i + KL_ROWS].astype(np.float64)) for x in (full, razor))
        result[i : i + KL_ROWS] = (np.exp(p) * (p - q)).sum(axis=1)
    return result


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    logarithms: np.ndarray = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    return logarithms


def _errors(diff: np.ndarray, out: np.ndarray, heads: np.ndarray) -> Errors:
    """Compute the errors of some query heads. diff: f64, out: f32, both [n_rows, n_head, d]."""
    squares = (diff[:, heads] ** 2).mean(axis=(0, 2))
    size = (out[:, heads].astype(np.float64) ** 2).mean(axis=(0, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        # A head whose output is zero has no error if zero is right.
        each = np.where((squares == 0) & (size == 0), 0.0, np.sqrt(squares / size))
        largest = np.abs(diff[:, heads]).max(axis=(0, 2))
        largest = np.where((largest == 0) & (size == 0), 0.0, largest / np.sqrt(size))
        whole = math.sqrt(squares.sum() / size.sum()) if size.sum() else float(each.max())
    worst = int(np.argmax(np.where(np.isnan(each), np.inf, each)))
    return Errors(float(largest.max()), whole, float(each[worst]), int(heads[worst]))


def _bound(kv_type: str, flash_attn: bool) -> tuple[float, float]:
    # llama.cpp casts the rows of an F32 cache to F16 for flash attention
    return BOUNDS["f16" if kv_type == "f32" and flash_attn else kv_type]
