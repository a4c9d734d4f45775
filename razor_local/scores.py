"""Head scores: how strongly each query head attends to repetitions, and the choice of heads.

calibrate.py measures the scores. They are kept in a model's metadata or in a JSON file, and
choose_heads() turns them into retrieval heads. docs/format.md describes the files.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .common.files import new_file
from .common.inputs import open_input
from .errors import ProfileError, option
from .model_shape import MAX_HEADS, MAX_LAYERS, ModelShape, describe_heads
from .plan import Plan, make_plan
from .profile import (
    MAX_CALIBRATION_BYTES,
    MAX_CALIBRATION_KEYS,
    MAX_WINDOW,
    Profile,
    split_heads,
)

MIN_TOKENS = 16  # of a measurement: with fewer every token is near every other

INDUCTION = 0.14  # shares of all KV heads; the paper's defaults
ECHO = 0.01
FLOOR, CERTAIN = 0.02, 0.1  # scores: below the first no head stands out, from the second on all do
SPREAD = 10  # deviations from the median that a head needs to stand out
MAX_SHARE = 0.25  # maximum share of KV heads chosen by score: more would save little memory
MIN_HEADS = 4  # that limit is never below four heads

FORMAT = "razor scores"
VERSION = 1
MAX_BYTES = 8 << 20  # a hundred times what the largest model has
MAX_SCORE = 1 + 1e-3  # attention of one head sums to 1, up to rounding
ARRAYS = {"n_head": np.int64, "n_head_kv": np.int64, "echo": np.float32, "induction": np.float32}


@dataclass(frozen=True, eq=False)
class Scores:
    """Echo and induction score of every query head of a model. Checked on creation.

    echo, induction: f32 [sum of n_head], layer-major, 0 to 1. n_head, n_head_kv: query and KV heads
    per layer. calibration: a record of the measurement; model_fingerprint in it is required.
    Raises ProfileError.
    """

    echo: np.ndarray
    induction: np.ndarray
    n_head: tuple[int, ...]
    n_head_kv: tuple[int, ...]
    calibration: dict[str, str | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n_head, n_head_kv = tuple(map(int, self.n_head)), tuple(map(int, self.n_head_kv))
        if not 0 < len(n_head) <= MAX_LAYERS or len(n_head) != len(n_head_kv):
            raise ProfileError(
                f"scores for {len(n_head)} layers of query heads and {len(n_head_kv)} of KV heads,"
                f" expected as many of both, at most {MAX_LAYERS}"
            )
        for il, (q, kv) in enumerate(zip(n_head, n_head_kv, strict=True)):
            if not 0 <= kv <= MAX_HEADS or not 0 <= q <= MAX_HEADS or (kv and (not q or q % kv)):
                raise ProfileError(
                    f"layer {il} has scores of {q} query heads for {kv} KV heads, expected a"
                    " multiple"
                )
        object.__setattr__(self, "n_head", n_head)
        object.__setattr__(self, "n_head_kv", n_head_kv)
        for name in ("echo", "induction"):
            values = np.array(getattr(self, name), np.float32)
            if values.shape != (sum(n_head),):
                raise ProfileError(
                    f"{name} has shape {list(values.shape)}, expected {sum(n_head)} scores, one per"
                    " query head"
                )
            bad = ~((values >= 0) & (values <= MAX_SCORE))  # NaN is neither
            if bad.any():
                i = int(bad.argmax())
                raise ProfileError(f"{name} score {i} is {values[i]:g}, expected 0 to 1")
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        record = self.calibration
        if len(record) > MAX_CALIBRATION_KEYS // 2:  # a profile adds how the heads were chosen
            raise ProfileError(
                f"the calibration record has {len(record)} entries, expected at most"
                f" {MAX_CALIBRATION_KEYS // 2}"
            )
        for key, value in record.items():
            text = isinstance(value, str) and _fits(value, MAX_CALIBRATION_BYTES)
            number = type(value) is int and 0 <= value < 2**32
            named = isinstance(key, str) and _fits(key, 200) and key.isprintable()
            if not named or not (text or number):
                raise ProfileError(
                    f"calibration record {str(key)[:80]!r} is neither a text nor a whole number"
                    " of 32 bits"
                )
        if not isinstance(record.get("model_fingerprint"), str):
            raise ProfileError("the calibration record does not say which model was measured")

    def check_model(self, shape: ModelShape) -> None:
        """Raise ProfileError unless the scores were measured on this model file."""
        if (self.n_head, self.n_head_kv) != (shape.n_head, shape.n_head_kv):
            raise ProfileError(
                f"the scores are for {_describe(self.n_head, self.n_head_kv)}, the model has"
                f" {_describe(shape.n_head, shape.n_head_kv)}"
            )
        if self.calibration["model_fingerprint"] != shape.fingerprint:
            raise ProfileError(
                "the scores were measured on another model file (fingerprint"
                f" {str(self.calibration['model_fingerprint'])[:12]}, this one is"
                f" {shape.fingerprint[:12]}); measure this one, another quantization may have"
                " other heads"
            )


@dataclass(frozen=True)
class Cut:
    """The score that separates the KV heads that stand out from the others.

    Attributes:
        value: KV heads above it stand out.
        above, below: the scores next to the cut, 0 where there is none; `inspect --heads` shows
            their ratio.
        n_above: number of KV heads above the cut.
    """

    value: float
    above: float
    below: float
    n_above: int

    @property
    def ratio(self) -> float:
        """above / below, infinite where nothing is below, 0 where no head stands out."""
        if not self.n_above:
            return 0.0
        return self.above / self.below if self.below > 0 else math.inf


def find_cut(values: np.ndarray, chance: float = 0.0) -> Cut:
    """Find the score above which a KV head stands out from the others.

    A head at CERTAIN (a tenth of its attention goes to the repetition) or above always stands out,
    unless that is chance. One below FLOOR, within SPREAD deviations of the median (the median
    absolute deviation, scaled to a standard deviation) or at chance never does. Between these two
    bounds the cut is where neighboring scores have the largest ratio: their geometric mean, limited
    to the bounds.

    Args:
        values: f32 [KV heads], one score of each.
        chance: scores up to this are indistinguishable from chance.
    """
    ordered = np.sort(np.asarray(values, np.float64))[::-1]
    median = float(np.median(ordered)) if len(ordered) else 0.0
    spread = 1.4826 * float(np.median(np.abs(ordered - median))) if len(ordered) else 0.0
    low = max(chance, min(max(FLOOR, median + SPREAD * spread), CERTAIN))
    high = max(CERTAIN, low)
    n_above, best = int((ordered > low).sum()), 0.0
    padded = np.append(ordered, 0.0)
    # candidates: the gaps between neighbors that reach into [low, high]
    for n in range(max(int((ordered >= high).sum()), 1), n_above + 1):
        ratio = padded[n - 1] / max(padded[n], low / 100)
        if ratio > best:
            best, n_above = ratio, n
    if not n_above:
        return Cut(low, 0.0, float(padded[0]), 0)
    above, below = float(padded[n_above - 1]), float(padded[n_above])
    return Cut(min(max(math.sqrt(above * below), low), max(high, below)), above, below, n_above)


def find_cuts(scores: Scores) -> dict[str, Cut]:
    """Return the cuts of "induction" and "echo" over the KV heads of all layers."""
    return {name: find_cut(values, _chance(scores)) for name, values in _kv_scores(scores).items()}


def choose_heads(
    scores: Scores,
    *,
    induction: float | None = None,
    echo: float | None = None,
    budget: float | None = None,
) -> tuple[np.ndarray, ...]:
    """Choose retrieval heads by their scores: one uint8 array [n_head_kv] of 0/1 per layer.

    The score of a KV head is the largest of its group of query heads. Without a share, every KV
    head that stands out by either score is chosen (find_cut), at most MAX_SHARE of all of them (or
    MIN_HEADS) and those with the highest strength first. The strength of a head is the larger of
    its two scores, each divided by its cut.

    Args:
        induction, echo: the paper's quotas instead: the share of all KV heads taken from each
            ranking, rounded up, so that a small model keeps a head of both (the other one has the
            paper's default). Heads at chance are not taken, even if fewer than the share remain.
        budget: one share of all KV heads instead, rounded up and met exactly: the heads with the
            highest strength, whether they stand out or not.

    Raises:
        ProfileError: a share is not between 0 and 1.
    """
    for name, share in (("induction", induction), ("echo", echo), ("budget", budget)):
        if share is not None and not 0 <= share <= 1:
            raise ProfileError(f"{name} is {share:g}, expected a share of the KV heads from 0 to 1")
    if budget is not None and (induction is not None or echo is not None):
        raise ProfileError("a budget and shares by score exclude each other; leave one out")
    total = sum(scores.n_head_kv)
    chosen = np.zeros(total, np.uint8)
    if induction is not None or echo is not None:
        quotas = {
            "induction": INDUCTION if induction is None else induction,
            "echo": ECHO if echo is None else echo,
        }
        for name, values in _kv_scores(scores).items():
            ranking = _ranking(values)
            ranking = ranking[values[ranking] > _chance(scores)]
            chosen[ranking[: _count(quotas[name], total)]] = 1
    else:
        strength = head_strength(scores)
        if budget is None:
            n = min(int((strength > 1).sum()), max(math.floor(MAX_SHARE * total), MIN_HEADS))
        else:
            n = _count(budget, total)
        chosen[_ranking(strength)[:n]] = 1
    return split_heads(chosen, scores.n_head_kv)


def head_strength(scores: Scores) -> np.ndarray:
    """Return how much each KV head stands out (above 1 if it does), f64 [sum of n_head_kv]."""
    cuts, values = find_cuts(scores), _kv_scores(scores)
    return np.maximum(*(values[name].astype(np.float64) / cuts[name].value for name in values))


def profile_from_scores(
    scores: Scores,
    *,
    induction: float | None = None,
    echo: float | None = None,
    budget: float | None = None,
    **options: Any,
) -> Profile:
    """Make a profile with the heads of choose_heads(), their scores and the calibration record.

    Args:
        options: fields of Profile.

    Raises:
        ProfileError: as choose_heads() and Profile do.
    """
    heads = choose_heads(scores, induction=induction, echo=echo, budget=budget)
    record: dict[str, str | int]
    if budget is not None:
        record = {"select": "budget", "budget": f"{budget:g}"}
    elif induction is not None or echo is not None:
        record = {
            "select": "paper",
            "induction": f"{INDUCTION if induction is None else induction:g}",
            "echo": f"{ECHO if echo is None else echo:g}",
        }
    else:
        record = {"select": "score"}
    return Profile(
        retrieval=heads,
        echo_score=scores.echo,
        induction_score=scores.induction,
        calibration=_measured(scores.calibration) | record,
        **options,
    )


def check_scopes_by_score(shape: ModelShape, n_ctx: int, **options: Any) -> None:
    """Refuse a context that with_scopes_by_score() would refuse for any choice of heads.

    Args:
        options: sink_tokens, window_min and window_divisor of the profile.

    Raises ProfileError, UnsupportedError.
    """
    local = tuple(np.zeros(n, np.uint8) for n in shape.n_head_kv)
    _shared_plan(Profile(local, **options), shape, n_ctx)


def _shared_plan(profile: Profile, shape: ModelShape, n_ctx: int) -> Plan:
    plan = make_plan(shape, profile, n_ctx)
    if not plan.active:
        raise ProfileError(
            f"{plan.why_inactive}, so there are no windows to share;"
            f" use a larger {option('n_ctx')}, or fewer retrieval heads"
        )
    return plan


def with_scopes_by_score(profile: Profile, shape: ModelShape, n_ctx: int) -> Profile:
    """Return the profile with a scope for each local head that grows with its strength.

    A scope is half the window of the profile in a context of n_ctx tokens, plus a part that is
    proportional to the strength (head_strength). The factor is the largest one with which a cache
    of n_ctx tokens takes no more bytes than with a single window.

    Raises:
        ProfileError: the profile has no scores, or saves nothing in that context.
    """
    plan = _shared_plan(profile, shape, n_ctx)
    local = profile.flat() == 0
    strength = head_strength(profile_scores(profile, shape))
    mean = float(strength[local].mean())
    share = strength / mean if mean > 0 else np.ones_like(strength)
    record = profile.calibration | {"scopes": "score", "scopes_tokens": plan.n_ctx}

    def scoped(extra: float) -> Profile:
        scope = np.ceil(plan.window / 2 + extra * share).clip(1, MAX_WINDOW) * local
        layers = split_heads(scope.astype(np.uint32), shape.n_head_kv)
        return replace(profile, scope=layers, calibration=record)

    low, high = 0, plan.n_ctx  # tokens of a head of mean strength
    while low < high:
        middle = (low + high + 1) // 2
        if make_plan(shape, scoped(middle), n_ctx).kv_bytes <= plan.kv_bytes:
            low = middle
        else:
            high = middle - 1
    return scoped(low)


def with_budget(profile: Profile, shape: ModelShape, budget: float) -> Profile:
    """Return the profile with another budget, met exactly.

    Heads that `tune` chose, or that `convert` chose by score or added to find planted facts, come
    first. All others follow by strength. Raises ProfileError if the profile has no scores.
    """
    scores = profile_scores(profile, shape)
    retrieval = choose_heads(scores, budget=budget)
    if profile.calibration.get("select") in ("score", "tune"):
        chosen, strength = profile.flat(), head_strength(scores)
        order = np.lexsort((-strength, 1 - chosen.astype(np.int64)))
        flat = np.zeros_like(chosen)
        flat[order[: _count(budget, len(flat))]] = 1
        retrieval = split_heads(flat, shape.n_head_kv)
    record = _measured(profile.calibration) | {"select": "budget", "budget": f"{budget:g}"}
    return replace(profile, retrieval=retrieval, calibration=record)


def _measured(record: dict[str, str | int]) -> dict[str, str | int]:
    """Return the record without the keys that describe a choice of heads and its measurements."""
    chosen = ("select", "induction", "echo", "budget", "retrieval")
    return {
        k: v for k, v in record.items() if k not in chosen and not k.startswith(("facts", "tune_"))
    }


def profile_scores(profile: Profile, shape: ModelShape) -> Scores:
    """Return the scores of a profile of the model. Raises ProfileError if it has none."""
    if profile.scope is not None:
        raise ProfileError(
            "the razor profile holds a scope for each head, which decides what it keeps; there is"
            " no budget to choose"
        )
    if profile.echo_score is None or profile.induction_score is None:
        raise ProfileError(
            "the razor profile has no head scores, so the budget cannot be changed; measure them"
            " with 'razor-local convert MODEL -o OUT.gguf'"
        )
    record = {"model_fingerprint": shape.fingerprint} | profile.calibration
    return Scores(
        profile.echo_score, profile.induction_score, shape.n_head, shape.n_head_kv, record
    )


def save_scores(scores: Scores, path: str | os.PathLike[str], replace: bool = True) -> Path:
    """Write a file for load_scores().

    The file appears under its name when it is complete. An existing file is replaced, or refused if
    replace is False. Raises RazorError, OSError.
    """
    path = Path(path)
    head = {"format": FORMAT, "version": VERSION, "calibration": scores.calibration}
    arrays = {name: np.asarray(getattr(scores, name), kind) for name, kind in ARRAYS.items()}
    # the shortest decimals that read back as the same f32
    lists = {
        name: [int(v) if a.dtype.kind == "i" else float(str(v)) for v in a]
        for name, a in arrays.items()
    }
    data = (json.dumps(head | lists, indent=1) + "\n").encode()
    with new_file(path, len(data), replace) as file:
        file.write(data)
    return path


def load_scores(path: str | os.PathLike[str]) -> Scores:
    """Load the scores that save_scores() wrote. Raises ProfileError, OSError."""
    path = Path(path)
    with open_input(path, "a file of scores", ProfileError) as file:
        raw = file.read(MAX_BYTES + 1)
    try:
        if len(raw) > MAX_BYTES:
            raise ProfileError(
                f"is larger than {MAX_BYTES >> 20} MiB; expected a file of 'razor-local convert"
                " --save-scores'"
            )
        fields = _read_json(raw)
        if fields.get("format") != FORMAT:
            raise ProfileError(
                "is not a file of head scores; make one with 'razor-local convert --save-scores'"
            )
        if fields.get("version") != VERSION:
            raise ProfileError(
                f"is of version {str(fields.get('version'))[:20]}, this razor-local reads version"
                f" {VERSION}; update razor-local or measure again"
            )
        record = fields.get("calibration")
        if not isinstance(record, dict):
            raise ProfileError("has no calibration record")
        arrays: dict[str, Any] = {
            name: _numbers(fields, name, kind) for name, kind in ARRAYS.items()
        }
        return Scores(calibration=record, **arrays)
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from None


def _read_json(raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        raise ProfileError("is not JSON, expected a file of head scores") from None
    return fields if isinstance(fields, dict) else {}


def _numbers(fields: dict[str, Any], name: str, kind: type) -> np.ndarray:
    values = fields.get(name)
    wanted = (int,) if kind is np.int64 else (int, float)
    # nan is not below 2**31
    if not isinstance(values, list) or not all(
        type(v) in wanted and abs(v) < 2**31 for v in values
    ):
        what = "whole numbers" if kind is np.int64 else "finite numbers"
        raise ProfileError(f"has no list '{name}' of {what}")
    return np.array(values, kind)


def group_max(
    per_query_head: np.ndarray, n_head: Sequence[int], n_head_kv: Sequence[int]
) -> np.ndarray:
    """Return the score of each KV head, the largest of its group of query heads; layer-major."""
    layers = np.split(per_query_head, np.cumsum(n_head)[:-1])
    groups = [
        layer.reshape(n_kv, -1).max(axis=1)
        for layer, n_kv in zip(layers, n_head_kv, strict=True)
        if n_kv
    ]
    return np.concatenate([np.zeros(0, np.float32), *groups])


def _kv_scores(scores: Scores) -> dict[str, np.ndarray]:
    return {
        name: group_max(getattr(scores, name), scores.n_head, scores.n_head_kv)
        for name in ("induction", "echo")
    }


def _ranking(values: np.ndarray) -> np.ndarray:
    """Return the indices of the values in descending order; equal values keep their order."""
    return np.argsort(-values, kind="stable")


def _chance(scores: Scores) -> float:
    """Return the score that is no better than chance, 0 if the measurement is unknown.

    Attention spread evenly over all earlier tokens has a score of 0.7/tokens to 1/tokens: of the
    rK to (r + 1)K tokens before a query in repetition r, r are copies.
    """
    tokens = scores.calibration.get("tokens")
    return 3 / tokens if isinstance(tokens, int) and tokens >= MIN_TOKENS else 0.0


def _count(share: float, total: int) -> int:
    return math.ceil(share * total - 1e-9)  # 0.14 * 50 is a little more than 7


def _fits(text: str, n_bytes: int) -> bool:
    """Return True if the text encodes to at most n_bytes of UTF-8."""
    try:
        return len(text.encode()) <= n_bytes
    except UnicodeEncodeError:
        return False


def _describe(n_head: tuple[int, ...], n_head_kv: tuple[int, ...]) -> str:
    return f"{describe_heads(n_head, 'query')} and {describe_heads(n_head_kv)}"
