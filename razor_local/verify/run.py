"""Is what runs RazorAttention, and is it right? Every layer's attention against the reference.

The model runs as it always does, with the native cache, on any backend and any KV type. The eval
callback hands over what goes into each layer's attention (queries, keys and values, after RoPE) and
what comes out of it; reference.py computes the same from the paper, with the heads as
Python reads them from the file. The library is not asked what it does, that is measured: also
which KV heads' keys it stores for the whole context, by comparing what is written into each cache
with the keys of all heads.

A second context with a full cache reads the same tokens. Its own error against the reference is
the yardstick of what the arithmetic of this backend can do, and the KL divergence of the logits
says what RazorAttention costs on this text.

docs/verification.md: what is checked, with which bounds, and what is not.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from ctypes import c_float
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import native
from ..common.machine import n_cores
from ..common.progress import Progress, Stop
from ..errors import ProfileError, RazorError, UnsupportedError
from ..gguf.header import read_header
from ..native.callbacks import Control
from ..native.models import load_model, new_context, vocabulary
from ..native.structs import CustomParams, Tensor
from ..native.tensors import F32, bind, check_layout, read
from ..plan import KV_TYPES, Plan, make_plan, padded_n_ctx
from ..profile import (
    ModelShape,
    Profile,
    no_profile,
    profile_from_header,
    read_sidecar,
    shape_from_header,
)
from . import reference

DEFAULT_N_CTX = 8192
DEFAULT_ROWS = 1024
SINGLE = 64  # tokens at the end that are decoded one by one
MORE_FOLDS = 3  # after the first, where the number of tokens is free
KEYS_COMPARED = 8  # tokens of each ubatch whose keys tell which heads are stored
KL_ROWS = 16  # logits converted to F64 at a time

# Errors relative to the root mean square of a head's output: of a head over all checked queries,
# and of any single number. What was measured stands in docs/verification.md.
# CPUs round q to 8 bits for products with quantized keys: near ties between keys of a sharp head
# fall the other way in single rows
QUANTIZED = (1e-2, 5e-1)
BOUNDS = {"f32": (1e-5, 5e-4), "f16": (3e-3, 5e-2), "bf16": (5e-3, 1e-1)} | {
    kv_type: QUANTIZED for kv_type, info in KV_TYPES.items() if info.block > 1
}
WORSE_THAN_FULL = 2.0  # times the full cache's own error is allowed where that is above the bound


@dataclass(frozen=True)
class Errors:
    """Of some heads of one layer, relative to the root mean square of each head's own output.

    largest: of any number; rms: over all heads; worst_rms: of the head worst_head (a query head).
    """

    largest: float
    rms: float
    worst_rms: float
    worst_head: int


@dataclass(frozen=True)
class GroupResult:
    """The retrieval or local KV heads of one layer; full: the same heads in the full cache.

    limit_rms, limit_largest: what passes, for errors.worst_rms and errors.largest.
    """

    il: int
    group: str  # "retrieval" or "local"
    kv_heads: int
    errors: Errors
    full: Errors
    limit_rms: float
    limit_largest: float

    @property
    def passed(self) -> bool:
        # a NaN does not pass
        return self.errors.worst_rms <= self.limit_rms and self.errors.largest <= self.limit_largest


@dataclass(frozen=True)
class Divergence:
    """KL(full cache || razor) of the next token's probabilities, in nats, over the checked rows.

    mean, largest: all rows; end: mean over the last eighth of the text; same_top: share of the rows
    where both find the same token most likely. (No bound: this is what the method costs.)
    """

    mean: float
    largest: float
    end: float
    same_top: float


@dataclass(frozen=True)
class Verification:
    """The result of verify().

    buffers: where the cache lies, for example CUDA0. n_tokens: run; n_text: of the text, what was
    left out included; n_rows: queries checked in each layer; n_folded: tokens in the compensation
    token at the end. misplaced: a sentence for each layer that keeps the whole context for other KV
    heads than the profile says.
    """

    model: str
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
        """One sentence."""
        failed = [group for group in self.groups if not group.passed]
        what = f"{self.n_tokens:,} tokens, {self.plan.type_k}/{self.plan.type_v} KV"
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
        """Everything as plain numbers, strings, lists and dicts (for JSON)."""
        plan = self.plan.to_dict()
        del plan["layers"]
        return {
            "model": self.model,
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


@dataclass(frozen=True)
class Layer:
    """What one layer's attention was given and gave.

    q: f32 [n_rows, n_head, d_k] after RoPE, at positions int [n_rows]; out: f32 [n_rows, n_head,
    d_v], rotated if V is (reference.rotation_sizes). k, v: all tokens, packed in the KV types of
    the plan after rotation (reference.pack_rows). scale: factor of q.k.
    """

    q: np.ndarray
    positions: np.ndarray
    k: np.ndarray
    v: np.ndarray
    out: np.ndarray
    scale: float


def verify(
    model_path: str | os.PathLike[str],
    *,
    n_ctx: int = 0,
    n_tokens: int = 0,
    text: str | None = None,
    seed: int = 0,
    rows: int = DEFAULT_ROWS,
    sidecar: str | os.PathLike[str] | None = None,
    type_k: str = "f16",
    type_v: str = "f16",
    flash_attn: bool = True,
    n_batch: int = 512,
    n_ubatch: int = 512,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> Verification:
    """Runs a model and compares each layer's attention with the reference; see above.

    n_ctx: context in tokens, 0: 8,192 or the trained length if that is less. n_tokens: tokens to
    run, 0: enough for a few folds, or all of text. text: what to run, else random ordinary tokens
    (seed). The last 64 tokens are decoded one by one. rows: queries compared in each layer, spread
    over the text with all of the last 64; 0: all. n_gpu_layers: -1, all.

    Raises UnsupportedError (a model whose attention cannot be seen), ProfileError (no profile, a
    plan that is not active, nothing would be folded), Stopped, GGUFError, RazorError, OSError.
    """
    model_path = Path(model_path)
    header = read_header(model_path)
    shape = shape_from_header(header)
    profile = (
        profile_from_header(header, shape) if sidecar is None else read_sidecar(sidecar, shape)
    )
    plan = _plan(model_path, shape, profile, n_ctx, type_k, type_v, flash_attn)
    assert profile is not None
    if n_ubatch > n_batch or n_batch < 1 or n_ubatch < 1:
        raise RazorError(
            f"the batch is {n_batch} and the ubatch {n_ubatch} tokens, expected 1 to the batch for"
            " the ubatch"
        )
    lib = native.load()
    from llama_cpp import llama_cpp as C

    C.llama_backend_init()
    bind(lib.lib)
    control = Control(C, progress, stop)
    with ExitStack() as stack:
        model = stack.enter_context(load_model(lib, C, model_path, n_gpu_layers, control))
        tokens, n_text = _tokens(C, model, plan, n_tokens, text, seed)
        positions = sample_positions(len(tokens), rows, seed)
        sides = []
        # without a sidecar the library reads the profile from the file, as Python did above
        own = None if sidecar is None else native.make_params(profile)
        for params in (own, native.make_params(None)):
            capture = _Capture(lib.lib, shape, plan, positions, control)
            ctx = stack.enter_context(
                _context(
                    lib, C, model, plan, params, capture, n_batch, n_ubatch, n_threads or n_cores()
                )
            )
            sides.append((ctx, capture))
        active = [bool(lib.stats(ctx).active) for ctx, _ in sides]
        if active != [True, False]:
            raise RazorError(
                f"the library runs {'razor' if active[1] else 'a full cache'} where"
                f" {'a full cache' if active[1] else 'razor'} was asked for; unset"
                f" {native.DISABLE_ENV}, or reinstall razor-local"
            )
        buffers = {buffer.name.decode() for buffer in lib.buffers(sides[0][0])}
        kl = _run(C, lib, model, sides, tokens, positions, n_batch, plan.block, control)

        misplaced = sides[0][1].misplaced(profile)
        groups: list[GroupResult] = []
        layers = [il for il, n in enumerate(shape.n_head_kv) if n]
        for i, il in enumerate(layers):
            control.progress(i, len(layers), "checking")
            control.check()
            razor_layer, full_layer = (capture.layer(il) for _, capture in sides)
            groups += compare_layer(il, razor_layer, full_layer, profile.retrieval[il], plan)
    last = reference.frontier(
        np.array([len(tokens) - 1]), plan.sink_tokens, plan.window, plan.block
    )
    return Verification(
        model=str(model_path),
        plan=plan,
        buffers=tuple(sorted(buffers)),
        n_tokens=len(tokens),
        n_text=n_text,
        n_rows=len(positions),
        n_folded=int(last[0]) - plan.sink_tokens,
        groups=tuple(groups),
        misplaced=misplaced,
        kl=kl,
    )


def compare_layer(
    il: int, razor: Layer, full: Layer, retrieval: np.ndarray, plan: Plan
) -> list[GroupResult]:
    """The head groups of a layer that ran with razor, and with a full cache, against the reference.

    retrieval: 0/1 [n_head_kv], from the profile.
    """
    everything = np.ones_like(retrieval)
    group = razor.q.shape[1] // len(retrieval)
    diffs = []
    for layer, heads in ((razor, retrieval), (full, everything)):
        diffs.append(layer.out.astype(np.float64) - expected_output(layer, heads, plan))
    bounds = [_bound(kv_type, plan.flash_attn) for kv_type in (plan.type_k, plan.type_v)]
    bound_rms, bound_largest = (max(pair) for pair in zip(*bounds, strict=True))
    results = []
    for name, kind in (("retrieval", 1), ("local", 0)):
        kv_heads = np.flatnonzero(np.asarray(retrieval) == kind)
        if len(kv_heads) == 0:
            continue
        heads = (kv_heads[:, None] * group + np.arange(group)).reshape(-1)
        errors, yardstick = (
            _errors(diff, layer.out, heads)
            for diff, layer in zip(diffs, (razor, full), strict=True)
        )
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


def expected_output(layer: Layer, retrieval: np.ndarray, plan: Plan) -> np.ndarray:
    """What the reference computes for a layer: f32 [n_rows, n_head, d_v]."""
    size_k, _ = _rotations(plan)
    return reference.attention(
        layer.q if size_k is None else reference.rotate(layer.q, size_k),
        layer.positions,
        reference.unpack_rows(layer.k, plan.type_k),
        reference.unpack_rows(layer.v, plan.type_v),
        retrieval,
        window=plan.window,
        block=plan.block,
        sink_tokens=plan.sink_tokens,
        compensation=plan.compensation,
        scale=layer.scale,
        round_k=partial(reference.round_rows, kv_type=plan.type_k),
        round_v=partial(reference.round_rows, kv_type=plan.type_v),
    )


def sample_positions(n: int, rows: int, seed: int) -> np.ndarray:
    """Positions to check among n: all if rows is 0 or enough, else rows of them, ascending.

    The last SINGLE are always among them, and one from each of as many equal parts of the rest.
    """
    if rows == 0 or n <= rows:
        return np.arange(n)
    singles = min(SINGLE, rows)
    edges = np.linspace(0, n - singles, rows - singles + 1).astype(np.int64)
    rng = np.random.default_rng(seed)
    spread = [int(rng.integers(a, b)) for a, b in zip(edges, edges[1:], strict=False)]
    return np.array([*spread, *range(n - singles, n)], np.int64)


def first_fold(plan: Plan) -> int:
    """The position at which the first tokens are folded."""
    return ((plan.sink_tokens + plan.window) // plan.block + 1) * plan.block


def kl_divergence(full: np.ndarray, razor: np.ndarray) -> np.ndarray:
    """KL(softmax(full) || softmax(razor)) of logits [n, n_vocab], f64 [n], in nats."""
    result = np.empty(len(full))
    for i in range(0, len(full), KL_ROWS):
        p, q = (_log_softmax(x[i : i + KL_ROWS].astype(np.float64)) for x in (full, razor))
        result[i : i + KL_ROWS] = (np.exp(p) * (p - q)).sum(axis=1)
    return result


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def _plan(
    path: Path,
    shape: ModelShape,
    profile: Profile | None,
    n_ctx: int,
    type_k: str,
    type_v: str,
    flash_attn: bool,
) -> Plan:
    """An active plan. Raises ProfileError."""
    if profile is None:
        raise no_profile(path)
    n_ctx = n_ctx or min(DEFAULT_N_CTX, shape.n_ctx_train or DEFAULT_N_CTX)
    plan = make_plan(shape, profile, padded_n_ctx(shape, n_ctx), type_k, type_v, flash_attn)
    if not plan.active:
        raise ProfileError(
            f"razor would not be active in a context of {plan.n_ctx} tokens ({plan.why_inactive}),"
            " so there is nothing to verify; use another -c"
        )
    return plan


def _tokens(
    C: Any, model: int, plan: Plan, n_tokens: int, text: str | None, seed: int
) -> tuple[np.ndarray, int]:
    """The tokens to run, int32, and how many the text has.

    Raises ProfileError where nothing would be folded.
    """
    least = first_fold(plan) + 1
    if text is not None:
        tokens = _tokenize(C, model, text)
        n_text = len(tokens)
        wanted = n_tokens or min(n_text, plan.n_ctx)
        if n_text < wanted:
            raise RazorError(f"the text has {n_text:,} tokens, {wanted:,} were asked for")
        tokens = tokens[:wanted]
    else:
        from ..converters.calibrate import draw_tokens

        # the last tokens, decoded one by one, go over the edge of a block
        wanted = n_tokens or min(
            plan.n_ctx, first_fold(plan) + MORE_FOLDS * plan.block + SINGLE // 2
        )
        bos, usable = vocabulary(C, model)
        n = min(wanted, plan.n_ctx + 1) - len(bos)
        tokens = np.concatenate([bos, draw_tokens(usable, n, seed)]) if n > 0 else bos[:wanted]
        n_text = wanted
    if wanted > plan.n_ctx:
        raise RazorError(
            f"{wanted:,} tokens do not fit into a context of {plan.n_ctx:,}; use a larger -c"
        )
    if len(tokens) < least:
        raise ProfileError(
            f"the first fold (window {plan.window:,}, block {plan.block}) comes with token"
            f" {least:,} and {len(tokens):,} are to be run, so it would not be verified;"
            " use a larger -n, or a longer text"
        )
    return tokens, n_text


def _tokenize(C: Any, model: int, text: str) -> np.ndarray:
    vocab = C.llama_model_get_vocab(model)
    if C.llama_vocab_type(vocab) == C.LLAMA_VOCAB_TYPE_NONE:
        raise UnsupportedError("the model has no tokenizer; leave the text out for random tokens")
    data = text.encode()
    size = len(data) + 8
    ids = (ctypes.c_int32 * size)()
    n = C.llama_tokenize(vocab, data, len(data), ids, size, True, False)
    if n < 0:
        raise RazorError("the text could not be tokenized")
    return np.array(ids[:n], np.int32)


_CACHE = re.compile(r"cache_(razor_)?([kv])_l(\d+)\b")  # tensors of llama_kv_cache and of ours
_OUTPUT = re.compile(r"kqv_out-(\d+)$")
_SAME_DATA = ("VIEW", "RESHAPE", "CONT", "PERMUTE", "TRANSPOSE", "PAD")


class _Capture:
    """Collects what goes in and out of the attention of each layer, from the eval callback.

    Tensors are not told by their names, which differ from model to model, but by what is done with
    them: what is stored in a cache tensor is k or v, and what flash attention (or the product with
    K) reads first is q. Following these back through views, the rotation and the gathering of heads
    leads to what the model computed, before razor touched it. Its data are copied when they are
    computed, because ggml uses memory again: all tensors of the right shape are, until the output
    of the layer tells which ones count.
    """

    def __init__(
        self,
        lib: ctypes.CDLL,
        shape: ModelShape,
        plan: Plan,
        positions: np.ndarray,
        control: Control,
    ) -> None:
        self.lib, self.shape, self.plan, self.control = lib, shape, plan, control
        self.positions = positions
        self.eval_callback = control.watch(self._is_wanted, self._take)
        self.sizes = {
            (d, n)
            for il in range(shape.n_layer)
            for d, n in (
                (shape.head_dim_k, shape.n_head[il]),
                (shape.head_dim_k, shape.n_head_kv[il]),
                (shape.head_dim_v, shape.n_head_kv[il]),
            )
        }
        self.copies: dict[int, np.ndarray] = {}  # by address of the tensor
        self.found: dict[str, int] = {}  # q, k, v of the layer under way: address
        self.scale = 0.0
        self.il = -1
        self.layers: dict[int, dict[str, list[np.ndarray]]] = {}
        self.scales: dict[int, float] = {}
        self.n_seen: dict[int, int] = {}
        # (layer, whether for the whole context) -> bool [heads stored, KV heads]: same keys
        self.stored: dict[tuple[int, bool], np.ndarray] = {}
        self.checked = False

    def layer(self, il: int) -> Layer:
        """What was collected of a layer, which is given away. Raises UnsupportedError."""
        parts = self.layers.pop(il, None)
        n_rows = sum(map(len, parts["q"])) if parts else 0
        if parts is None or n_rows != len(self.positions):
            raise UnsupportedError(
                f"layer {il} of this model ({self.shape.arch}) shows its attention for {n_rows} of"
                f" {len(self.positions)} rows"
            )
        q, k, v, out = (np.concatenate(parts[name]) for name in ("q", "k", "v", "out"))
        return Layer(q, self.positions, k, v, out, self.scales[il])

    def misplaced(self, profile: Profile) -> tuple[str, ...]:
        """A sentence for each layer whose keys are not stored as the profile says."""
        sentences = []
        for il in self.n_seen:
            heads = {
                True: np.flatnonzero(profile.retrieval[il]),
                False: np.flatnonzero(profile.retrieval[il] == 0),
            }
            found = {}
            for whole, expected in heads.items():
                same = self.stored.get((il, whole), np.zeros((0, len(profile.retrieval[il])), bool))
                right = len(same) == len(expected) and same[range(len(same)), expected].all()
                found[whole] = expected.tolist() if right else [_which(row) for row in same]
            if found != {whole: expected.tolist() for whole, expected in heads.items()}:
                sentences.append(
                    f"layer {il} keeps the whole context for the KV heads {_names(found[True])} and"
                    f" a window for {_names(found[False])}, the profile says"
                    f" {_names(heads[True].tolist())} and {_names(heads[False].tolist())}"
                )
        return tuple(sentences)

    def _take(self, pointer: int) -> None:
        tensor, output = Tensor.from_address(pointer), _OUTPUT.match(self._name(pointer))
        if output:
            self._finish(int(output[1]), pointer)
        elif self._op(pointer) == "SET_ROWS":
            self._note_stored(tensor.src[0], tensor.src[1], tensor.view_src)
        elif self._op(pointer) == "CUSTOM":
            self._note_stored(tensor.src[0], tensor.src[4], tensor.src[2])
        else:
            self.copies[pointer] = read(self.lib, pointer)[0]

    def _is_wanted(self, pointer: int) -> bool:
        if not self.checked:
            check_layout(self.lib, pointer)
            self.checked = True
        is_input = self._is_input(pointer, Tensor.from_address(pointer))
        return is_input or _OUTPUT.match(self._name(pointer)) is not None

    def _is_input(self, pointer: int, tensor: Tensor) -> bool:
        """Whether a tensor may be what a layer's attention reads."""
        op = self._op(pointer)
        name = tensor.name.decode("utf-8", "replace")
        if op == "SET_ROWS":
            cache = _CACHE.match(self._name(tensor.view_src))
            if cache:
                ours, what, il = cache.groups()
                self.il = int(il)
                d = self.shape.head_dim_k if what == "k" else self.shape.head_dim_v
                self._find(what, tensor.src[0], d, self.shape.n_head_kv[self.il])
                return bool(ours) and what == "k"
        elif op == "FLASH_ATTN_EXT":
            self._find("q", tensor.src[0], self.shape.head_dim_k, self.shape.n_head[self.il])
            self._parameters(tensor, softcap=2)
        elif op == "CUSTOM":
            return self._custom(tensor)
        elif op == "MUL_MAT" and name.startswith("kq-"):
            self._find("q", tensor.src[1], self.shape.head_dim_k, self.shape.n_head[self.il])
        elif op == "SOFT_MAX" and name.startswith("kq_soft_max-"):
            self._parameters(tensor)
        elif name.startswith("kq_tanh-"):
            self._refuse("soft-capped attention logits")
        elif op not in ("GET_ROWS", "FLASH_ATTN_EXT", "CUSTOM", "REPEAT") and tensor.type == F32:
            d, n, _, rest = tensor.ne
            seen = op in _SAME_DATA and tensor.src[0] in self.copies
            return (d, n) in self.sizes and rest == 1 and not seen
        return False

    def _custom(self, tensor: Tensor) -> bool:
        """Ours: attention, the storing of K and V, or a fold (native/src/ggml-razor.h)."""
        if _CACHE.match(self._name(tensor.src[0])):
            return False  # a fold
        if _CACHE.match(self._name(tensor.src[1])):  # attention; one without k only adds up
            self._find("q", tensor.src[0], self.shape.head_dim_k, self.shape.n_head[self.il])
            self.scale = c_float.from_address(CustomParams.from_buffer(tensor.op_params).data).value
        elif cache := _CACHE.match(self._name(tensor.src[2])):
            self.il = int(cache[3])
            n_heads = self.shape.n_head_kv[self.il]
            self._find("k", tensor.src[0], self.shape.head_dim_k, n_heads)
            self._find("v", tensor.src[1], self.shape.head_dim_v, n_heads)
            return True
        return False

    def _find(self, what: str, pointer: int | None, d: int, n_heads: int) -> None:
        """Follows data back to the tensor of shape [d, n_heads, n_tokens] the model computed."""
        found = None
        while pointer:
            tensor = Tensor.from_address(pointer)
            if tuple(tensor.ne[:2]) == (d, n_heads) and tensor.ne[3] == 1:
                if pointer in self.copies:
                    found = pointer
            op = self._op(pointer)
            if op in _SAME_DATA:
                pointer = tensor.src[0]
            elif op == "GET_ROWS" and "razor_inp_heads" in self._name(tensor.src[1]):
                pointer = tensor.src[0]
            elif op == "MUL_MAT" and re.search("attn_inp_[kv]_rot", self._name(tensor.src[0])):
                pointer = tensor.src[1]
            else:
                break
        if found is not None:  # else the mean of a fold is being stored
            self.found[what] = found

    def _note_stored(self, stored: int, places: int, cache: int) -> None:
        """Which KV heads' keys were just written into a cache tensor: the tensors of what, of the
        rows it went to, and of the cache."""
        k = self.copies.get(self.found.get("k", 0))
        if k is None:
            return  # the mean of a fold
        n_tokens, n_heads, d = k.shape
        rows = read(self.lib, stored).reshape(n_tokens, n_heads, d)[:KEYS_COMPARED]
        k = k[:KEYS_COMPARED]
        size_k, _ = _rotations(self.plan)
        if size_k is not None:
            k = reference.rotate(k, size_k)
        off = np.abs(rows[:, :, None] - k[:, None]).max(axis=(0, 3))
        same = off <= 1e-3 * np.abs(k).max()  # [heads in the order of the rows, KV heads]
        for whole, order in self._places(places, cache, n_heads).items():
            place = (self.il, whole)
            before = self.stored.get(place)
            fits = before is not None and before.shape == same[order].shape
            self.stored[place] = same[order] & before if fits else same[order]

    def _places(self, places: int, cache: int, n_heads: int) -> dict[bool, np.ndarray]:
        """Whether for the whole context -> the heads of a token's rows in the order of the cache,
        by the rows of the cache they are written to."""
        rows = read(self.lib, places).reshape(-1)[:n_heads]
        cells, n_ctx = self.plan.cells, self.plan.n_ctx
        n_rows = Tensor.from_address(cache).ne[1]  # n_ctx or cells of each head
        first_local = (n_rows - n_heads * cells) // (n_ctx - cells) * n_ctx
        order = np.argsort(rows)
        return {
            True: order[rows[order] < first_local],
            False: order[rows[order] >= first_local],
        }

    def _parameters(self, tensor: Tensor, softcap: int | None = None) -> None:
        values = ctypes.cast(tensor.op_params, ctypes.POINTER(c_float))
        self.scale = values[0]
        if values[1] != 0.0:
            self._refuse("ALiBi")
        if softcap is not None and values[softcap] != 0.0:
            self._refuse("soft-capped attention logits")

    def _refuse(self, feature: str) -> None:
        raise UnsupportedError(f"the reference does not know {feature}, which this model has")

    def _finish(self, il: int, pointer: int) -> None:
        """Keeps what a layer was given and gave in this ubatch."""
        if il != self.il or set(self.found) != {"q", "k", "v"}:
            raise UnsupportedError(
                f"layer {il} of this model ({self.shape.arch}) does not show what its attention"
                f" reads (found {', '.join(sorted(self.found)) or 'nothing'})"
            )
        q, k, v = (self.copies[self.found[name]] for name in "qkv")
        out = read(self.lib, pointer).reshape(len(q), self.shape.n_head[il], self.shape.head_dim_v)
        start = self.n_seen.get(il, 0)
        self.n_seen[il] = start + len(q)
        low, high = np.searchsorted(self.positions, (start, start + len(q)))
        chosen = self.positions[low:high] - start
        size_k, size_v = _rotations(self.plan)
        parts = self.layers.setdefault(il, {name: [] for name in ("q", "k", "v", "out")})
        parts["q"].append(q[chosen])
        parts["k"].append(_pack(k, self.plan.type_k, size_k))
        parts["v"].append(_pack(v, self.plan.type_v, size_v))
        parts["out"].append(out[chosen])
        self.scales[il] = self.scale
        self.copies.clear()
        self.found.clear()

    def _op(self, pointer: int) -> str:
        return self.lib.ggml_op_desc(pointer).decode()

    def _name(self, pointer: int | None) -> str:
        return Tensor.from_address(pointer).name.decode("utf-8", "replace") if pointer else ""


def _which(same: np.ndarray) -> int | None:
    """The only head with the same keys, None if there is no such or more than one."""
    return int(np.argmax(same)) if same.sum() == 1 else None


def _names(heads: Sequence[int | None]) -> str:
    return ", ".join("?" if head is None else str(head) for head in heads) or "none"


def _pack(rows: np.ndarray, kv_type: str, rotation: int | None) -> np.ndarray:
    if rotation is not None:
        rows = reference.rotate(rows, rotation)
    return reference.pack_rows(rows, kv_type)


def _rotations(plan: Plan) -> tuple[int | None, int | None]:
    shape = plan.shape
    return reference.rotation_sizes(plan.type_k, plan.type_v, shape.head_dim_k, shape.head_dim_v)


def _context(
    lib: native.Native,
    C: Any,
    model: int,
    plan: Plan,
    override: native.Params | None,
    capture: _Capture,
    n_batch: int,
    n_ubatch: int,
    n_threads: int,
) -> AbstractContextManager[int]:
    """A context (a pointer) whose attention is captured. override None: as the file says."""
    params = C.llama_context_default_params()
    params.n_ctx = plan.n_ctx
    params.n_batch, params.n_ubatch = min(n_batch, plan.n_ctx), min(n_ubatch, plan.n_ctx)
    params.n_threads = params.n_threads_batch = n_threads
    params.type_k = KV_TYPES[plan.type_k].ggml_id
    params.type_v = KV_TYPES[plan.type_v].ggml_id
    params.flash_attn_type = (
        C.LLAMA_FLASH_ATTN_TYPE_ENABLED if plan.flash_attn else C.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    params.cb_eval = capture.eval_callback
    params.abort_callback = capture.control.abort_callback
    params.no_perf = True

    def failed(why: str) -> RazorError:
        return UnsupportedError(f"no context of {plan.n_ctx} tokens could be created: {why}")

    return new_context(lib, C, model, params, override, failed)


def _run(
    C: Any,
    lib: native.Native,
    model: int,
    sides: list[tuple[int, _Capture]],
    tokens: np.ndarray,
    positions: np.ndarray,
    n_batch: int,
    block: int,
    control: Control,
) -> Divergence:
    """Decodes tokens in both contexts in step and compares the logits at positions."""
    n, n_vocab = len(tokens), C.llama_vocab_n_tokens(C.llama_model_get_vocab(model))
    n_prompt = max(n - SINGLE, 0)
    wanted = np.zeros(n, bool)
    wanted[positions] = True

    def logits(ctx: int, edges: list[int]) -> np.ndarray:
        """Decodes a batch between each two edges: f32 [wanted rows, n_vocab]."""
        parts = [np.empty((0, n_vocab), np.float32)]
        for a, b in zip(edges, edges[1:], strict=False):
            _decode(C, lib, ctx, tokens[a:b], a, wanted[a:b], control)
            rows = int(wanted[a:b].sum())
            if rows:
                flat = C.llama_get_logits(ctx)
                parts.append(np.ctypeslib.as_array(flat, (rows, n_vocab)).copy())
        return np.concatenate(parts)

    (razor_ctx, _), (full_ctx, _) = sides
    kl, same = [], []
    starts = [*range(0, n_prompt, n_batch), *range(n_prompt, n)]
    for start, end in zip(starts, [*starts[1:], n], strict=True):
        control.progress(start, n, "running")
        razor = logits(razor_ctx, [start, end])
        # razor's ubatches end where blocks do: the full cache gets the same, because the size of
        # an ubatch can decide which kernel computes it
        first = (start // block + 1) * block
        full = logits(full_ctx, [start, *range(first, end, block), end])
        kl.append(kl_divergence(full, razor))
        same.append(full.argmax(axis=1) == razor.argmax(axis=1))
    values, tops = np.concatenate(kl), np.concatenate(same)
    return Divergence(
        mean=float(values.mean()),
        largest=float(values.max()),
        end=float(values[positions >= n - max(n // 8, 1)].mean()),
        same_top=float(tops.mean()),
    )


def _decode(
    C: Any,
    lib: native.Native,
    ctx: int,
    tokens: np.ndarray,
    start: int,
    wanted: np.ndarray,
    control: Control,
) -> None:
    n = len(tokens)
    batch = C.llama_batch_init(n, 0, 1)
    try:
        batch.n_tokens = n
        for i in range(n):
            batch.token[i], batch.pos[i] = int(tokens[i]), start + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = bool(wanted[i])
        lib.clear_errors()
        code = C.llama_decode(ctx, batch)
        C.llama_synchronize(ctx)
    finally:
        C.llama_batch_free(batch)
    control.check()
    if code != 0:
        raise RazorError(
            f"computing tokens {start} to {start + n} failed ({lib.reason()}, llama_decode {code})"
        )


def _errors(diff: np.ndarray, out: np.ndarray, heads: np.ndarray) -> Errors:
    """diff f64, out f32 [n_rows, n_head, d]; of the query heads in heads."""
    squares = (diff[:, heads] ** 2).mean(axis=(0, 2))
    size = (out[:, heads].astype(np.float64) ** 2).mean(axis=(0, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        # a head that gives nothing has no error if nothing is right
        each = np.where((squares == 0) & (size == 0), 0.0, np.sqrt(squares / size))
        largest = np.abs(diff[:, heads]).max(axis=(0, 2))
        largest = np.where((largest == 0) & (size == 0), 0.0, largest / np.sqrt(size))
        whole = math.sqrt(squares.sum() / size.sum()) if size.sum() else float(each.max())
    worst = int(np.argmax(np.where(np.isnan(each), np.inf, each)))
    return Errors(float(largest.max()), whole, float(each[worst]), int(heads[worst]))


def _bound(kv_type: str, flash_attn: bool) -> tuple[float, float]:
    # llama.cpp casts the rows of an F32 cache to F16 for flash attention
    return BOUNDS["f16" if kv_type == "f32" and flash_attn else kv_type]


def _excess(group: GroupResult) -> tuple[float, float]:
    """The errors as parts of what is allowed: rms of the worst head, largest of any number."""
    ratios = (
        group.errors.worst_rms / group.limit_rms,
        group.errors.largest / group.limit_largest,
    )
    rms, largest = (math.inf if math.isnan(ratio) else ratio for ratio in ratios)
    return rms, largest
