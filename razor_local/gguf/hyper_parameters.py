"""Valid ranges of the numbers in a model's metadata that llama.cpp computes with.

llama.cpp divides by some of them and asserts on others in its compute threads, where a failure ends
the process. A bad number is refused here, before the file is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import UnsupportedError

MAX_EXPERTS = 512  # LLAMA_MAX_EXPERTS
MAX_N_CTX = 2**31 - 1  # the bindings take it for an int
MAX_VOCAB = 2_000_000  # llama.cpp allocates this many tokens for a model without a vocabulary
ROPE_SCALING_TYPES = ("none", "linear", "yarn", "longrope")

# the expected values in words, and a check
_Check = tuple[str, Callable[[float], bool]]
_POSITIVE: _Check = ("above 0", lambda value: value > 0)
_NOT_NEGATIVE: _Check = ("0 or more", lambda value: value >= 0)
_DIVISOR: _Check = ("1 or more", lambda value: value >= 1)
_RANGES: dict[str, _Check] = {  # by key without the architecture
    "context_length": (f"0 to {MAX_N_CTX}", lambda value: 0 <= value <= MAX_N_CTX),
    "vocab_size": (f"0 to {MAX_VOCAB}", lambda value: 0 <= value <= MAX_VOCAB),
    "rope.freq_base": _POSITIVE,
    "rope.freq_base_swa": _POSITIVE,
    "attention.compress_rope_freq_base": _POSITIVE,
    "rope.scaling.factor": _NOT_NEGATIVE,  # 0: no scaling, as for the next two
    "rope.scale_linear": _NOT_NEGATIVE,
    "rope.scaling.attn_factor": _NOT_NEGATIVE,
    "rope.scaling.alpha": _NOT_NEGATIVE,
    "attention.scale": _NOT_NEGATIVE,  # 0: the usual one
    "attention.group_norm_groups": _DIVISOR,
    "attention.output_group_count": _DIVISOR,
    "attention.indexer.kpool": _DIVISOR,
    "conv_group_size": _DIVISOR,
    "experts_per_group": _DIVISOR,
    "ple.head_vocab_sizes": _DIVISOR,
    "ssm.time_step_rank": _DIVISOR,
    "wkv.head_size": _DIVISOR,
}
_EPSILON: _Check = ("0 to 1", lambda value: 0 <= value <= 1)

# for these architectures only: others do not divide by the key and allow 0
_RANGES_OF_ARCHS: dict[str, tuple[tuple[str, ...], _Check]] = {
    "ssm.group_count": (
        ("mamba2", "nemotron_h", "nemotron_h_moe", "granitehybrid", "falcon-h1", "qwen3next",
         "qwen35", "qwen35moe", "qwen4exp"),
        _DIVISOR,
    ),
    "interleave_moe_layer_step": (("ernie4_5-moe",), _DIVISOR),
    "attention.head_count": (
        ("olmo2", "phimoe", "gemma2", "gemma3", "deepseek2-ocr"),
        _DIVISOR,
    ),
}  # fmt: skip

# architectures whose positions always have sections; others have them if the first two are above 0
_MROPE_ARCHS = (
    "qwen2vl",
    "paddleocr",
    "qwen3vl",
    "qwen3vlmoe",
    "qwen35",
    "qwen35moe",
    "qwen4exp",
    "qwen3tts",
)


def find_fault(arch: str, values: Mapping[str, Any]) -> str | None:
    """Return what is wrong with hyper-parameters, as "KEY is X, expected Y"; None if nothing.

    Args:
        arch: the architecture, the prefix of the keys
        values: by key, without the architecture: a number, a text, or a list of numbers
    """
    for key, value in values.items():
        for number in value if isinstance(value, list) else [value]:
            expected = _expected(arch, key, number)
            if expected is not None:
                found = f"{number:g}" if isinstance(number, float) else repr(number)
                return f"{arch}.{key} is {found}, expected {expected}"
    fault = _experts(arch, values) or _rotation(arch, values)
    return fault and f"{arch}.{fault}"


def check_overrides(overrides: Mapping[str, Any] | None) -> None:
    """Raise UnsupportedError for a bad value in Llama's kv_overrides, which replace metadata."""
    for key, value in (overrides or {}).items():
        arch, _, name = key.partition(".")
        expected = _expected(arch, name, value)
        if expected is not None:
            raise UnsupportedError(f"kv_overrides: {key} is {value!r}, expected {expected}")


def _expected(arch: str, key: str, value: Any) -> str | None:
    """Return the expected range of one value, None if the value is valid."""
    if key == "rope.scaling.type":
        known = value in ROPE_SCALING_TYPES
        return None if known else f"one of {', '.join(ROPE_SCALING_TYPES)}"
    if not isinstance(value, (int, float)):
        return None
    if not math.isfinite(value):
        return "a finite number"
    checks = [_RANGES.get(key)]
    archs, check = _RANGES_OF_ARCHS.get(key, ((), None))
    if arch in archs:
        checks.append(check)
    if key.rpartition(".")[2].endswith("epsilon"):
        checks.append(_EPSILON)
    for check in checks:
        if check is not None and not check[1](value):
            return check[0]
    return None


def _whole(values: Mapping[str, Any], key: str, default: int = 0) -> int:
    """Return an integer value, or the largest of a list, or default if there is neither."""
    value = values.get(key, default)
    if isinstance(value, list):
        value = max(value, default=default)
    return value if isinstance(value, int) else default


def _experts(arch: str, values: Mapping[str, Any]) -> str | None:
    n, used = _whole(values, "expert_count"), _whole(values, "expert_used_count")
    groups, groups_used = (_whole(values, f"expert_group_{key}") for key in ("count", "used_count"))
    if arch in ("hunyuan_vl", "hunyuan-dense") and n <= 1:
        return None  # models without experts, whatever the keys say
    if not 0 <= n <= MAX_EXPERTS:
        return f"expert_count is {n}, expected 0 to {MAX_EXPERTS}"
    low = min(n, 1)
    if not low <= used <= n:
        return f"expert_used_count is {used}, expected {low} to {n} (expert_count is {n})"
    if groups and not 0 < groups < n:
        return f"expert_group_count is {groups}, expected less than expert_count ({n})"
    if groups > 1 and n % groups:
        return f"expert_group_count is {groups}, expected a divisor of expert_count ({n})"
    if groups > 1 and not 0 < groups_used < groups:
        return f"expert_group_used_count is {groups_used}, expected 1 to {groups - 1}"
    return None


def _rotation(arch: str, values: Mapping[str, Any]) -> str | None:
    n_head = values.get("attention.head_count", 0)
    n_head = n_head[0] if isinstance(n_head, list) and n_head else n_head
    if not isinstance(n_head, int) or n_head < 1:
        return None
    size = _whole(values, "attention.key_length", _whole(values, "embedding_length") // n_head)
    for key, n in (
        ("rope.dimension_count", size),
        ("rope.dimension_count_swa", _whole(values, "attention.key_length_swa", size)),
    ):
        n_rot = _whole(values, key)
        if n_rot % 2 or not 0 <= n_rot <= n:
            return f"{key} is {n_rot}, expected an even number up to the head size {n}"

    key = "rope.dimension_sections"
    sections = values.get(key)
    if not isinstance(sections, list):
        return None
    if arch not in _MROPE_ARCHS and not all(n > 0 for n in sections[:2]):
        return None  # llama.cpp ignores the sections
    if min(sections) < 0 or not any(sections[:3]) or sum(sections) > size:
        return (
            f"{key} is {sections}, expected numbers of 0 or more, not all of the first 3 being 0,"
            f" and together at most the head size {size}"
        )
    return None
