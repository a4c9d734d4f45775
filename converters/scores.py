"""Head scores: how much each query head looks for repetitions, and the heads chosen by it.

Scores are measured by calibrate.py, kept in a model's metadata or in a file (JSON or npz), and
turned into retrieval heads by choose_heads(). docs/format.md describes the files.
"""

from __future__ import annotations

import ast
import io
import json
import math
import os
import tempfile
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ProfileError
from ..profile import (
    MAX_CALIBRATION_BYTES,
    MAX_CALIBRATION_KEYS,
    MAX_HEADS,
    MAX_LAYERS,
    ModelShape,
    Profile,
    describe_heads,
)

INDUCTION = 0.14  # shares of all KV heads; the paper's defaults
ECHO = 0.01
ECHO_PART = ECHO / (INDUCTION + ECHO)  # of a single budget

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
        if len(record) > MAX_CALIBRATION_KEYS:
            raise ProfileError(f"the calibration record has {len(record)} entries, too many")
        for key, value in record.items():
            text = isinstance(value, str) and len(value.encode()) <= MAX_CALIBRATION_BYTES
            number = type(value) is int and 0 <= value < 2**32
            if not isinstance(key, str) or len(key) > 200 or not (text or number):
                raise ProfileError(
                    f"calibration record {key[:80]!r} is neither a text nor a whole number"
                    " of 32 bits"
                )
        if not isinstance(record.get("model_fingerprint"), str):
            raise ProfileError("the calibration record does not say which model was measured")

    def check_model(self, shape: ModelShape) -> None:
        """Raises ProfileError unless the scores were measured on this very model file."""
        if (self.n_head, self.n_head_kv) != (shape.n_head, shape.n_head_kv):
            raise ProfileError(
                f"the scores are for {_describe(self.n_head, self.n_head_kv)}, the model has"
                f" {_describe(shape.n_head, shape.n_head_kv)}"
            )
        if self.calibration["model_fingerprint"] != shape.fingerprint:
            raise ProfileError(
                "the scores were measured on another model file (fingerprint"
                f" {self.calibration['model_fingerprint'][:12]}, this one is"
                f" {shape.fingerprint[:12]}); measure this one, another quantization may have"
                " other heads"
            )


def choose_heads(
    scores: Scores,
    *,
    induction: float = INDUCTION,
    echo: float = ECHO,
    retrieval: float | None = None,
) -> tuple[np.ndarray, ...]:
    """The retrieval heads by score: one uint8 array [n_head_kv] of 0/1 per layer.

    The score of a KV head is the largest of its group of query heads. The KV heads of all layers
    are ranked together, once by induction and once by echo score, equal ones in the order of the
    model. induction, echo: share of all KV heads taken from each ranking, rounded up, so that a
    small model keeps a head of both; what is in both counts once. Heads that pay the repetition
    little more attention than chance are not taken, even if fewer than the share remain: which of
    them comes first is due to the seed alone.

    retrieval: one budget instead, a share of all KV heads rounded up, which is met exactly: its
    15th part (to the nearest head) is taken from the echo ranking as above, the rest is filled up
    from the induction ranking. Raises ProfileError for a share that is not from 0 to 1.
    """
    for name, share in (("induction", induction), ("echo", echo), ("retrieval", retrieval)):
        if share is not None and not 0 <= share <= 1:
            raise ProfileError(f"{name} is {share:g}, expected a share of the KV heads from 0 to 1")
    total = sum(scores.n_head_kv)
    induction_scores = _group_max(scores, scores.induction)
    echo_scores = _group_max(scores, scores.echo)
    by_induction, by_echo = _ranking(induction_scores), _ranking(echo_scores)
    by_echo = by_echo[echo_scores[by_echo] > _chance(scores)]
    chosen = np.zeros(total, np.uint8)
    if retrieval is None:
        by_induction = by_induction[induction_scores[by_induction] > _chance(scores)]
        chosen[by_induction[: _count(induction, total)]] = 1
        chosen[by_echo[: _count(echo, total)]] = 1
    else:
        budget = _count(retrieval, total)
        chosen[by_echo[: math.floor(budget * ECHO_PART + 0.5)]] = 1
        rest = by_induction[chosen[by_induction] == 0]
        chosen[rest[: budget - int(chosen.sum())]] = 1
    return tuple(np.split(chosen, np.cumsum(scores.n_head_kv)[:-1]))


def profile_from_scores(
    scores: Scores,
    *,
    induction: float = INDUCTION,
    echo: float = ECHO,
    retrieval: float | None = None,
    **options: Any,
) -> Profile:
    """Profile with the heads of choose_heads(), the scores and the record of their measurement.

    options: fields of Profile. Raises ProfileError.
    """
    heads = choose_heads(scores, induction=induction, echo=echo, retrieval=retrieval)
    if retrieval is None:
        budget = {"induction": f"{induction:g}", "echo": f"{echo:g}"}
    else:
        budget = {"retrieval": f"{retrieval:g}"}
    return Profile(
        retrieval=heads,
        echo_score=scores.echo,
        induction_score=scores.induction,
        calibration=scores.calibration | budget,
        **options,
    )


def with_retrieval(profile: Profile, shape: ModelShape, retrieval: float) -> Profile:
    """The profile of the model with another budget, by the scores it holds. Raises ProfileError."""
    scores = profile_scores(profile, shape)
    return replace(profile, retrieval=choose_heads(scores, retrieval=retrieval))


def profile_scores(profile: Profile, shape: ModelShape) -> Scores:
    """The scores that a profile of the model holds. Raises ProfileError if it has none."""
    if profile.scope is not None:
        raise ProfileError(
            "the razor profile holds ALiBi scopes, which decide what each head keeps; there is no"
            " budget to choose"
        )
    if profile.echo_score is None or profile.induction_score is None:
        raise ProfileError(
            "the razor profile holds no head scores, so that no other budget can be chosen; convert"
            " the model without --heads, which measures them"
        )
    record = {"model_fingerprint": shape.fingerprint} | profile.calibration
    return Scores(
        profile.echo_score, profile.induction_score, shape.n_head, shape.n_head_kv, record
    )


def save_scores(scores: Scores, path: str | os.PathLike[str]) -> Path:
    """Writes a file for load_scores(), npz if the name ends so, else JSON. Raises OSError.

    The name appears when the file is complete; a file of that name is replaced.
    """
    path = Path(path)
    head = {"format": FORMAT, "version": VERSION, "calibration": scores.calibration}
    arrays = {name: np.asarray(getattr(scores, name), kind) for name, kind in ARRAYS.items()}
    if path.suffix.lower() == ".npz":
        out = io.BytesIO()
        head_bytes = np.frombuffer(json.dumps(head).encode(), np.uint8)
        np.savez_compressed(out, head=head_bytes, **arrays)
        data = out.getvalue()
    else:
        # the shortest decimals that read back as the same f32
        lists = {
            name: [int(v) if a.dtype.kind == "i" else float(str(v)) for v in a]
            for name, a in arrays.items()
        }
        data = (json.dumps(head | lists, indent=1) + "\n").encode()
    fd, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".part", dir=path.parent)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    return path


def load_scores(path: str | os.PathLike[str]) -> Scores:
    """Scores of a file that save_scores() wrote. Raises ProfileError (one sentence) or OSError."""
    path = Path(path)
    if path.is_dir():
        raise ProfileError(f"{path} is a folder, expected a file of scores")
    with open(path, "rb") as file:
        raw = file.read(MAX_BYTES + 1)
    try:
        if len(raw) > MAX_BYTES:
            raise ProfileError(f"is larger than {MAX_BYTES >> 20} MiB, no file of scores is")
        fields = _read_npz(raw) if raw.startswith(b"PK") else _read_json(raw)
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
        arrays = {name: _numbers(fields, name, kind) for name, kind in ARRAYS.items()}
        return Scores(calibration=record, **arrays)
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from None


def _read_json(raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        raise ProfileError("is neither JSON nor npz, expected a file of head scores") from None
    return fields if isinstance(fields, dict) else {}


def _read_npz(raw: bytes) -> dict[str, Any]:
    """The arrays of an npz file: np.load would allocate whatever size a damaged header names."""
    arrays: dict[str, Any] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name not in ("head", *ARRAYS):
                    continue
                if info.file_size > MAX_BYTES:
                    raise ProfileError(f"{name} is larger than {MAX_BYTES >> 20} MiB")
                arrays[name] = _read_npy(name, archive.read(info))
    except ProfileError:
        raise
    except Exception as error:  # zipfile meets damage with a dozen types of exceptions
        raise ProfileError(f"is a damaged npz file ({str(error)[:100]})") from None
    head = arrays.pop("head", np.zeros(0, np.uint8))
    return _read_json(head.astype(np.uint8).tobytes() or b"{}") | arrays


def _read_npy(name: str, raw: bytes) -> np.ndarray:
    """A one-dimensional array of numbers in .npy format 1.0."""
    size = int.from_bytes(raw[8:10], "little")
    body = raw[10 + size :]
    try:
        if raw[:8] != b"\x93NUMPY\x01\x00" or size > 4096:
            raise ValueError
        header = ast.literal_eval(raw[10 : 10 + size].decode("latin1").strip())
        kind, shape = np.dtype(header["descr"]), header["shape"]
        if kind.kind not in "iuf" or len(shape) != 1 or shape[0] * kind.itemsize != len(body):
            raise ValueError
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
        raise ProfileError(f"{name} is not a one-dimensional array of numbers") from None
    return np.frombuffer(body, kind)


def _numbers(fields: dict[str, Any], name: str, kind: type) -> np.ndarray:
    values = fields.get(name)
    if isinstance(values, list):
        wanted = (int,) if kind is np.int64 else (int, float)
        if not all(type(v) in wanted and abs(v) < 2**31 for v in values):
            values = None  # nan too: it is not < 2**31
        else:
            values = np.array(values, kind)
    if not isinstance(values, np.ndarray) or (kind is np.int64 and values.dtype.kind == "f"):
        what = "whole numbers" if kind is np.int64 else "finite numbers"
        raise ProfileError(f"has no list '{name}' of {what}")
    return values.astype(kind)


def _group_max(scores: Scores, per_query_head: np.ndarray) -> np.ndarray:
    """Scores of the KV heads, layer-major: the largest in the group of query heads of each."""
    layers = np.split(per_query_head, np.cumsum(scores.n_head)[:-1])
    groups = [
        layer.reshape(n_kv, -1).max(axis=1)
        for layer, n_kv in zip(layers, scores.n_head_kv, strict=True)
        if n_kv
    ]
    return np.concatenate([np.zeros(0, np.float32), *groups])


def _ranking(values: np.ndarray) -> np.ndarray:
    """Indices of the largest values first, equal ones in their order."""
    return np.argsort(-values, kind="stable")


def _chance(scores: Scores) -> float:
    """The score up to which a head tells nothing, 0 if it is not known how it was measured.

    Attention spread evenly over all earlier tokens has a score of 0.7/tokens to 1/tokens: of the
    rK to (r + 1)K tokens before a query in repetition r, r are copies.
    """
    tokens = scores.calibration.get("tokens")
    return 3 / tokens if isinstance(tokens, int) and tokens > 0 else 0.0


def _count(share: float, total: int) -> int:
    return math.ceil(share * total - 1e-9)  # 0.14 * 50 is a little more than 7


def _describe(n_head: tuple[int, ...], n_head_kv: tuple[int, ...]) -> str:
    return f"{describe_heads(n_head, 'query')} and {describe_heads(n_head_kv)}"
