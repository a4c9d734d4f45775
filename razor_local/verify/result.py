"""The result of verify()."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..plan import Plan


@dataclass(frozen=True)
class Errors:
    """Relative errors of a group of heads in one layer, normalized by each head's output RMS.

    Attributes:
        largest: largest error of any element.
        rms: RMS error over all heads.
        worst_rms: RMS error of the worst head.
        worst_head: index of that query head.
    """

    largest: float
    rms: float
    worst_rms: float
    worst_head: int


@dataclass(frozen=True)
class GroupResult:
    """The errors of the retrieval or local KV heads of one layer.

    Attributes:
        full: errors of the same heads in the full cache.
        limit_rms, limit_largest: the bounds of errors.worst_rms and errors.largest.
    """

    il: int
    group: str  # "retrieval" or "local", "local (512)" if the plan has several windows
    kv_heads: int
    errors: Errors
    full: Errors
    limit_rms: float
    limit_largest: float

    @property
    def passed(self) -> bool:
        # False for NaN
        return self.errors.worst_rms <= self.limit_rms and self.errors.largest <= self.limit_largest


@dataclass(frozen=True)
class Divergence:
    """KL(full cache || razor) of the next token's probabilities, in nats, over the checked rows.

    It has no bound, because it is the cost of the method.

    Attributes:
        mean, largest: over all rows.
        end: mean over the last eighth of the text.
        same_top: share of the rows where both predict the same token.
    """

    mean: float
    largest: float
    end: float
    same_top: float


@dataclass(frozen=True)
class Verification:
    """The result of verify().

    Attributes:
        profile: where the profile comes from, in a few words.
        buffers: the buffers that hold the cache, for example CUDA0.
        n_tokens: tokens that ran.
        n_text: tokens of the text, including those that were left out.
        n_rows: queries that were checked in each layer.
        n_folded: tokens in the compensation tokens of the smallest window at the end.
        misplaced: a sentence for each layer that keeps the whole context, or a window, for other KV
            heads than those of the profile.
    """

    model: str
    profile: str
    plan: Plan
    buffers: tuple[str, ...]
    n_tokens: int
    n_text: int
    n_rows: int
    n_folded: int
    groups: tuple[GroupResult, ...]
    misplaced: tuple[str, ...]
    kl: Divergence

    @property
    def passed(self) -> bool:
        return not self.misplaced and all(group.passed for group in self.groups)

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        failed = [group for group in self.groups if not group.passed]
        plan = self.plan
        what = f"{self.n_tokens:,} tokens, {plan.type_k}/{plan.type_v} KV"
        if plan.has_local_types:
            what += f", {plan.type_k_local}/{plan.type_v_local} of local heads"
        if self.misplaced:
            more = f" (and {len(self.misplaced) - 1} more layers)" if self.misplaced[1:] else ""
            return f"FAIL: {self.misplaced[0]}{more}"
        if not failed:
            return f"pass: all {len(self.groups)} groups of heads agree with the reference ({what})"
        worst = max(failed, key=lambda group: max(_excess(group)))
        of_rms, of_largest = _excess(worst)
        how = (
            f"query head {worst.errors.worst_head}, rms error {worst.errors.worst_rms:.1e} of the"
            f" output where {worst.limit_rms:.1e} is allowed"
            if of_rms >= of_largest
            else f"largest error {worst.errors.largest:.1e} of the output where"
            f" {worst.limit_largest:.1e} is allowed"
        )
        return (
            f"FAIL: {len(failed)} of {len(self.groups)} groups of heads differ from the reference"
            f" ({what}); worst: layer {worst.il}, {worst.group} heads, {how}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, strings, lists and dicts, for JSON."""
        plan = self.plan.to_dict()
        del plan["layers"]
        return {
            "model": self.model,
            "profile": self.profile,
            "passed": self.passed,
            "verdict": self.verdict,
            "buffers": list(self.buffers),
            "n_tokens": self.n_tokens,
            "n_text": self.n_text,
            "n_rows": self.n_rows,
            "n_folded": self.n_folded,
            "plan": plan,
            "kl": asdict(self.kl),
            "misplaced": list(self.misplaced),
            "groups": [asdict(group) | {"passed": group.passed} for group in self.groups],
        }


def _excess(group: GroupResult) -> tuple[float, float]:
    """Return worst_rms and largest as multiples of their bounds."""
    ratios = (
        group.errors.worst_rms / group.limit_rms,
        group.errors.largest / group.limit_largest,
    )
    rms, largest = (math.inf if math.isnan(ratio) else ratio for ratio in ratios)
    return rms, largest
