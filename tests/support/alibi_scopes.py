"""ALiBi models, and the scopes that converters/alibi.py computes for them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from razor_local.converters import alibi
from razor_local.converters.alibi import alibi_slopes, head_scope

from razor_local.model_file import read_model_shape
from razor_local.profile import Profile
from tests.support.alibi_models import AlibiSpec

EPSILON = 0.001
SPECS = {
    "bloom": AlibiSpec("bloom"),
    "mpt": AlibiSpec("mpt", bias=0, max_bias=4.0),
    "mpt with biases": AlibiSpec("mpt", n_head=3, n_head_kv=3, head_dim=32, max_bias=4.0),
    "jais": AlibiSpec("jais", gain=2.0),
    "refact": AlibiSpec("refact", n_head_kv=2, gain=0.4, fused=False),
    "refact fused": AlibiSpec("refact", n_head=6, n_head_kv=3, gain=0.4),
    "baichuan": AlibiSpec("baichuan", n_layer=40, head_dim=8, fused=False),
}


def query_head_scopes(spec: AlibiSpec, profile: Profile) -> np.ndarray:
    """Return the scope of the KV head that each query head reads: [n_layer, n_head]."""
    scopes = np.stack(profile.scope).astype(int)
    return np.repeat(scopes, spec.n_head // spec.n_head_kv, axis=1)


def own_scopes(path: Path, spec: AlibiSpec, il: int, epsilon: float = EPSILON) -> list[int]:
    """Return the scope of each query head of a layer by itself."""
    found = alibi._Attention(read_model_shape(path))
    ranges = [r for ih in range(spec.n_head_kv) for r in found.logit_ranges(il, ih)]
    slopes = alibi_slopes(spec.n_head, spec.max_bias)
    return [head_scope(r, s, epsilon) for r, s in zip(ranges, slopes, strict=True)]


def passed_distance(scope: int, slope: float) -> int:
    """Return a distance at which inputs made for it must still get more than epsilon.

    It is 3 % below the scope, and lower by the attention to the tokens between, which the bound
    leaves out of the denominator. The logit of each of them is at most that of the query itself
    minus the slope.
    """
    return math.floor(0.97 * (scope - 1) + math.log(-math.expm1(-slope)) / slope)
