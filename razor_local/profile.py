"""The razor profile of a model: its retrieval heads, and the parameters of its local heads.

It is read from the `razor.*` metadata of a GGUF, or from a sidecar (a GGUF without tensors). Every
key's type, element type, count and range is checked here, before any library sees the file.
docs/format.md describes each key.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ProfileError, option
from .gguf.header import BOOL, F32, STRING, U8, U32, Header, read_header
from .model_shape import MAX_HEADS, MAX_LAYERS, ModelShape, describe_heads

if TYPE_CHECKING:
    from .plan import Plan

VERSION = 1
VERSION_SCOPES = 2  # method "rope" with a scope for each head
METHODS = ("rope", "alibi")
ONE_WINDOW: dict[str, Any] = {"method": "rope", "scope": None}  # fields without scopes
DEFAULT_SINKS = 4
DEFAULT_WINDOW_MIN = 4000
DEFAULT_WINDOW_DIVISOR = 5
DEFAULT_COMPENSATION = True

MAX_SINKS = 4096
MAX_WINDOW = 2**30
MAX_CALIBRATION_KEYS = 64
MAX_CALIBRATION_BYTES = 4096

KEY_PREFIX = "razor."
KEY_VERSION = "razor.version"
KEY_METHOD = "razor.method"
KEY_SINK_TOKENS = "razor.sink_tokens"
KEY_WINDOW_MIN = "razor.window_min"
KEY_WINDOW_DIVISOR = "razor.window_divisor"
KEY_COMPENSATION = "razor.compensation"
KEY_RETRIEVAL = "razor.head.retrieval"
KEY_ECHO = "razor.head.echo_score"
KEY_INDUCTION = "razor.head.induction_score"
KEY_SCOPE = "razor.head.scope"
KEY_HEAD_PREFIX = "razor.head."
HEAD_KEYS = (KEY_RETRIEVAL, KEY_ECHO, KEY_INDUCTION, KEY_SCOPE)
KEY_CALIBRATION_PREFIX = "razor.calibration."
KEY_FINGERPRINT = "razor.model.fingerprint"  # in sidecars only


@dataclass(frozen=True, eq=False)
class Profile:
    """The heads of a model and the hyper-parameters that go with them. Checked on creation.

    Attributes:
        retrieval: one uint8 array [n_head_kv] of 0/1 per layer, 1 = retrieval head.
        scope: one uint32 array [n_head_kv] per layer: tokens that the head keeps, including the
            newest; 0 (the whole context) exactly for retrieval heads. With None, all local heads
            have the same window. The method "alibi" requires scopes.
        echo_score, induction_score: f32 [sum of n_head], layer-major, or None.
        sink_tokens, window_min: tokens.
        window_divisor: 0 if only window_min counts.

    Raises:
        ProfileError: a field is not valid.
    """

    retrieval: tuple[np.ndarray, ...]
    method: str = METHODS[0]
    sink_tokens: int = DEFAULT_SINKS
    window_min: int = DEFAULT_WINDOW_MIN
    window_divisor: int = DEFAULT_WINDOW_DIVISOR
    compensation: bool = DEFAULT_COMPENSATION
    echo_score: np.ndarray | None = None
    induction_score: np.ndarray | None = None
    calibration: dict[str, str | int] = field(default_factory=dict)
    scope: tuple[np.ndarray, ...] | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ProfileError(
                f"{KEY_METHOD} is {self.method[:40]!r}, expected '{METHODS[0]}' or '{METHODS[1]}'"
            )
        _check_range(KEY_SINK_TOKENS, self.sink_tokens, 0, MAX_SINKS)
        _check_range(KEY_WINDOW_MIN, self.window_min, 1, MAX_WINDOW)
        _check_range(KEY_WINDOW_DIVISOR, self.window_divisor, 0, MAX_WINDOW)
        layers = []
        for il, heads in enumerate(self.retrieval):
            raw = np.asarray(heads)
            if raw.ndim != 1 or not np.isin(raw, (0, 1)).all():
                raise ProfileError(f"{KEY_RETRIEVAL}: layer {il} holds other values than 0 and 1")
            heads = raw.astype(np.uint8)
            heads.setflags(write=False)
            layers.append(heads)
        object.__setattr__(self, "retrieval", tuple(layers))
        self._check_scope()
        for key, score in ((KEY_ECHO, self.echo_score), (KEY_INDUCTION, self.induction_score)):
            if score is not None and not np.isfinite(score).all():
                raise ProfileError(f"{key} holds values that are not finite numbers")
        for key, value in self.calibration.items():
            if not isinstance(value, str):
                _check_range(KEY_CALIBRATION_PREFIX + key, value, 0, 2**32 - 1)

    def _check_scope(self) -> None:
        if self.scope is None:
            if self.method == "alibi":
                raise ProfileError(f"{KEY_METHOD} is 'alibi' and {KEY_SCOPE} is missing")
            return
        layers = []
        if len(self.scope) != len(self.retrieval):
            raise ProfileError(
                f"{KEY_SCOPE} has {len(self.scope)} layers, {KEY_RETRIEVAL} {len(self.retrieval)}"
            )
        for il, (heads, retrieval) in enumerate(zip(self.scope, self.retrieval, strict=True)):
            raw = np.asarray(heads)
            if raw.shape != retrieval.shape or raw.dtype.kind not in "iu":
                raise ProfileError(
                    f"{KEY_SCOPE}: layer {il} has other values than a whole number for each of"
                    f" {len(retrieval)} KV heads"
                )
            bad = (raw < 0) | (raw > MAX_WINDOW)
            if bad.any():
                raise ProfileError(
                    f"{KEY_SCOPE}: layer {il} holds {raw[bad][0]}, expected 0 to {MAX_WINDOW}"
                )
            if ((raw == 0) != (retrieval == 1)).any():
                raise ProfileError(
                    f"{KEY_SCOPE}: layer {il} is 0 (the whole context) for other KV heads than the"
                    f" retrieval heads of {KEY_RETRIEVAL}"
                )
            heads = raw.astype(np.uint32)
            heads.setflags(write=False)
            layers.append(heads)
        object.__setattr__(self, "scope", tuple(layers))

    @property
    def version(self) -> int:
        """The razor.version of a file with this profile."""
        return VERSION_SCOPES if self.method == "rope" and self.scope is not None else VERSION

    def flat(self) -> np.ndarray:
        """Return all heads for the native library: uint8 [sum of n_head_kv], layer-major."""
        return np.concatenate([np.zeros(0, np.uint8), *self.retrieval])

    def with_options(
        self, window: int | None, sink_tokens: int | None, compensation: bool | None
    ) -> Profile:
        """Return a copy with the options that are not None.

        A window applies to every context size, and replaces the scopes of all local heads
        (ONE_WINDOW).
        """
        changes: dict[str, Any] = {}
        if window is not None:
            _check_range("window", window, 1, MAX_WINDOW)
            changes.update(ONE_WINDOW, window_min=window, window_divisor=0)
        if sink_tokens is not None:
            check_parameters(sink_tokens=sink_tokens)
            changes["sink_tokens"] = sink_tokens
        if compensation is not None:
            if not isinstance(compensation, (bool, np.bool_)):
                raise ProfileError(f"compensation is {compensation!r}, expected True or False")
            changes["compensation"] = bool(compensation)
        return replace(self, **changes) if changes else self

    def check_shape(self, shape: ModelShape) -> None:
        """Raise ProfileError unless the profile has exactly the model's layers and KV heads."""
        found = tuple(len(layer) for layer in self.retrieval)
        if found != shape.n_head_kv:
            raise ProfileError(
                f"the profile is for {describe_heads(found)},"
                f" the model has {describe_heads(shape.n_head_kv)}"
            )
        for key, score in ((KEY_ECHO, self.echo_score), (KEY_INDUCTION, self.induction_score)):
            if score is not None and score.shape != (sum(shape.n_head),):
                raise ProfileError(
                    f"{key} has shape {list(score.shape)}, the model has {sum(shape.n_head)}"
                    " query heads"
                )


def check_parameters(
    sink_tokens: int | None = None,
    window_min: int | None = None,
    window_divisor: int | None = None,
) -> None:
    """Check options of a profile, which the message names. Raises ProfileError."""
    for name, value, low, high in (
        ("sink_tokens", sink_tokens, 0, MAX_SINKS),
        ("window_min", window_min, 1, MAX_WINDOW),
        ("window_divisor", window_divisor, 0, MAX_WINDOW),
    ):
        if value is not None:
            _check_range(option(name), value, low, high)


def facts_line(profile: Profile) -> str | None:
    """Return the outcome of the planted facts, None if `convert` planted none.

    For example "planted facts: 16 of 20 found, 17 with the full cache (context 1,280, window 341,
    49% of the full cache's bytes)".
    """
    record = profile.calibration
    n, found, full = (record.get(k) for k in ("facts", "facts_found", "facts_found_full"))
    if not (isinstance(n, int) and isinstance(found, int) and isinstance(full, int)):
        return None
    if not max(found, full, 1) <= n:
        return None
    line = f"planted facts: {found} of {n} found, "
    line += "as with the full cache" if found == full else f"{full} with the full cache"
    n_tokens, window = record.get("facts_tokens"), record.get("facts_window")
    size, size_full = (str(record.get(f"facts_kv_bytes{k}")) for k in ("", "_full"))
    known = isinstance(n_tokens, int) and isinstance(window, int) and 0 < window < n_tokens
    if known and all(re.fullmatch("[1-9][0-9]{0,17}", bytes_) for bytes_ in (size, size_full)):
        known = int(size) <= int(size_full)
        line += known * (
            f" (context {n_tokens:,}, window {window:,},"
            f" {int(size) / int(size_full):.0%} of the full cache's bytes)"
        )
    return line


def kv_options(type_k: str, type_v: str, type_k_local: str, type_v_local: str) -> str:
    """Return the command-line options that select these KV types, "" for f16."""
    named = (
        ("-ctk", type_k, "f16"),
        ("-ctv", type_v, "f16"),
        ("-ctlk", type_k_local, type_k),
        ("-ctlv", type_v_local, type_v),
    )
    return " ".join(f"{option} {name}" for option, name, default in named if name != default)


def tune_note(profile: Profile, plan: Plan) -> str | None:
    """Return a note if the profile was tuned with other KV types or another context size."""
    options = kv_options(plan.type_k, plan.type_v, plan.type_k_local, plan.type_v_local)
    tuned, n_ctx = profile.calibration.get("tune_options"), profile.calibration.get("tune_context")
    if tune_line(profile) is None or not plan.active or (options, plan.n_ctx) == (tuned, n_ctx):
        return None
    return f"note: the profile was tuned with -c {n_ctx}" + (f" {tuned}" if tuned else "")


def tune_line(profile: Profile) -> str | None:
    """Return the measurements of `tune`, None if the profile has no valid ones.

    For example "KL divergence 0.0084 nats from the full f16 cache (0.0513 in the worst tenth of 512
    tokens), 41.2 of 180.0 MiB at 8,192 tokens with -ctk q8_0 -ctv q8_0".
    """
    record = profile.calibration
    kl, worst = (str(record.get(f"tune_{name}")) for name in ("kl", "kl_worst"))
    size, full = (str(record.get(f"tune_kv_bytes{name}")) for name in ("", "_full"))
    n_tokens, n_ctx = record.get("tune_tokens"), record.get("tune_context")
    options = str(record.get("tune_options", ""))
    valid = (
        all(re.fullmatch(r"[0-9]{1,6}\.[0-9]{1,9}", value) for value in (kl, worst))
        and all(re.fullmatch("[1-9][0-9]{0,17}", value) for value in (size, full))
        and isinstance(n_tokens, int)
        and isinstance(n_ctx, int)
        and re.fullmatch("(-ctl?[kv] [a-z0-9_]{1,8} ?){0,4}", options)
    )
    if not valid:
        return None
    return (
        f"KL divergence {float(kl):.4f} nats from the full f16 cache ({float(worst):.4f} in the"
        f" worst tenth of {n_tokens:,} tokens), {int(size) / 2**20:,.1f} of"
        f" {int(full) / 2**20:,.1f} MiB at {n_ctx:,} tokens"
        + (f" with {options}" if options else " in f16")
    )


def scopes_text(profile: Profile) -> str:
    """Return the scopes of the local heads as text: "scopes of 64 to 1,024 tokens"."""
    assert profile.scope is not None
    scopes = [scope for layer in profile.scope for scope in layer.tolist() if scope]
    low, high = min(scopes, default=0), max(scopes, default=0)
    if low < high:
        return f"scopes of {low:,} to {high:,} tokens"
    return f"scopes of {high:,} token" + "s" * (high != 1)


def read_sidecar(path: str | os.PathLike[str], shape: ModelShape) -> Profile:
    """Return the profile in a sidecar of the model with this shape.

    Raises ProfileError if the file is not a sidecar, or belongs to another model.
    """
    return sidecar_from_header(read_header(path), shape)


def sidecar_from_header(header: Header, shape: ModelShape) -> Profile:
    """Return the profile in a sidecar whose header was already read."""
    path = header.path
    fingerprint = header.string(KEY_FINGERPRINT)
    if fingerprint is None:
        raise ProfileError(
            f"{path} is not a sidecar (it has no {KEY_FINGERPRINT}); make one with"
            " 'razor-local convert MODEL.gguf --heads FILE.tsv --sidecar -o OUT.gguf'"
        )
    if fingerprint != shape.fingerprint:
        other = header.string("general.name") or "without a name"
        raise ProfileError(
            f"{path} is the sidecar of another model file ({other[:80]!r}, fingerprint"
            f" {fingerprint[:12]!r}), this model is {shape.name[:80]!r}"
            f" ({shape.fingerprint[:12]}); make a sidecar of this file"
        )
    profile = profile_from_header(header, shape)
    if profile is None:
        raise ProfileError(f"{path} has no {KEY_RETRIEVAL}; make the sidecar again")
    return profile


def profile_from_header(header: Header, shape: ModelShape) -> Profile | None:
    """Return the profile in a header, None without razor keys. Raises ProfileError, GGUFError."""
    entries = {k: e for k, e in header.entries.items() if k.startswith(KEY_PREFIX)}
    if not entries:
        return None

    def bad(text: str) -> ProfileError:
        return ProfileError(f"{header.path}: {text}")

    def required(key: str, kind: int) -> Any:  # str for STRING, int for the others
        value = header.string(key, 64) if kind == STRING else header.number(key, (kind,))
        if value is None:
            raise bad(f"has razor metadata without {key}; convert the model again")
        return value

    version = required(KEY_VERSION, U32)
    if version not in (VERSION, VERSION_SCOPES):
        raise bad(
            f"has razor metadata of version {version}, this razor-local reads versions {VERSION}"
            f" and {VERSION_SCOPES}; update razor-local or convert the model again"
        )
    method = required(KEY_METHOD, STRING)
    for key in entries:
        if key.startswith(KEY_HEAD_PREFIX) and key not in HEAD_KEYS:
            raise bad(f"has the unknown key '{key[:80]}'; update razor-local")
    compensation = required(KEY_COMPENSATION, BOOL)
    if compensation not in (0, 1):
        raise bad(f"{KEY_COMPENSATION} holds the byte {compensation}, expected 0 or 1")
    fingerprint = header.string(KEY_FINGERPRINT, 256)
    if fingerprint is not None and not re.fullmatch("[0-9a-f]{64}", fingerprint):
        raise bad(f"{KEY_FINGERPRINT} is {fingerprint[:80]!r}, expected 64 hexadecimal digits")

    def per_head(key: str, element: int, heads: tuple[int, ...], kind: str) -> np.ndarray | None:
        values = header.array(key, element, MAX_LAYERS * MAX_HEADS)
        if values is not None and len(values) != sum(heads):
            raise bad(
                f"{key} has {len(values)} elements, the model has {sum(heads)} {kind} heads"
                f" ({describe_heads(heads, kind)})"
            )
        return values

    flat = per_head(KEY_RETRIEVAL, U8, shape.n_head_kv, "KV")
    if flat is None:
        raise bad(f"has razor metadata without {KEY_RETRIEVAL}; convert the model again")
    scope = per_head(KEY_SCOPE, U32, shape.n_head_kv, "KV")
    if version == VERSION_SCOPES and scope is None:
        raise bad(f"has razor metadata without {KEY_SCOPE}; convert the model again")
    if version == VERSION and method != "alibi":
        scope = None  # checked, not used
    try:
        return Profile(
            retrieval=split_heads(flat, shape.n_head_kv),
            method=method,
            sink_tokens=required(KEY_SINK_TOKENS, U32),
            window_min=required(KEY_WINDOW_MIN, U32),
            window_divisor=required(KEY_WINDOW_DIVISOR, U32),
            compensation=bool(compensation),
            echo_score=per_head(KEY_ECHO, F32, shape.n_head, "query"),
            induction_score=per_head(KEY_INDUCTION, F32, shape.n_head, "query"),
            calibration=_calibration(header),
            scope=None if scope is None else split_heads(scope, shape.n_head_kv),
        )
    except ProfileError as error:
        raise error if str(error).startswith(f"{header.path}:") else bad(str(error)) from None


def split_heads(flat: np.ndarray, n_head_kv: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Split layer-major [sum of n_head_kv] into one array [n_head_kv] per layer."""
    return tuple(np.split(flat, np.cumsum(n_head_kv)[:-1]))


def _calibration(header: Header) -> dict[str, str | int]:
    keys = [k for k in header.entries if k.startswith(KEY_CALIBRATION_PREFIX)]
    if len(keys) > MAX_CALIBRATION_KEYS:
        raise ProfileError(
            f"has {len(keys)} keys {KEY_CALIBRATION_PREFIX}*, expected at most"
            f" {MAX_CALIBRATION_KEYS}"
        )
    record: dict[str, str | int] = {}
    for key in keys:
        entry = header.entries[key]
        value: int | float | str | None
        if entry.kind == STRING:
            value = header.string(key, MAX_CALIBRATION_BYTES)
        elif entry.kind == U32:
            value = entry.value
        else:
            raise ProfileError(f"key '{key[:80]}' should be string or u32, found {entry.type_name}")
        assert isinstance(value, (str, int))
        record[key.removeprefix(KEY_CALIBRATION_PREFIX)] = value
    return record


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ProfileError(f"{name} is {value!r}, expected a whole number")
    if not low <= value <= high:
        raise ProfileError(f"{name} is {value}, expected {low} to {high}")
