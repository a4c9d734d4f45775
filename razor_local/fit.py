"""Estimate the memory of a model and its context, before anything is loaded.

The numbers come from llama.cpp itself. A model opened with no_alloc only has its headers read, and
a context made on it lays out its KV cache and compute buffers without allocating them. The numbers
are therefore exact for the devices and backends of this build.

Weights count in full, mapped from the file (mmap) or not. The operating system can drop pages of a
mapped file, but every token reads them all, and a model that does not stay in memory runs at the
speed of the disk. Weights count once: if a backend keeps its own copy (CPU_REPACK), the mapped
pages of the original are no longer needed.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from ctypes import c_void_p
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import available_memory, native
from .errors import (
    LibraryError,
    MemoryFullError,
    ProfileError,
    RazorError,
    UnsupportedError,
    option,
)
from .errors import options as written
from .model_file import open_model
from .model_shape import ModelShape
from .native.loaded import C, library
from .native.models import new_context
from .plan import KV_TYPES, N_CTX_PAD, Plan, make_plan
from .profile import Profile, split_heads

RAM = "RAM"  # name of the machine's own memory
MARGIN = 2**30  # bytes of each memory left free by auto, as llama.cpp's --fit-target
MIN_AUTO = 1024  # tokens; "auto" refuses smaller contexts
MAX_DRY_RUN = 2**22  # tokens: a dry run takes some 100 bytes for each
CARDS = tuple(n * 2**30 for n in (8, 12, 16, 24, 32, 48))  # memory of common graphics cards


@dataclass(frozen=True)
class Place:
    """What goes into one memory, in bytes. name: RAM, or a device such as "CUDA0"."""

    name: str
    weights: int
    kv: int
    compute: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.compute


@dataclass(frozen=True)
class Need:
    """What a context of n_ctx tokens takes with its model, in bytes.

    active: local heads hold less than every token; why_inactive says why a profile is not followed.
    kv: all that the context keeps, exactly; compute: buffers for prompts in steps of n_ubatch
    tokens. The process itself and its vocabulary (some ten MB) and a device's driver (some hundred)
    are not in it.
    """

    n_ctx: int
    active: bool
    why_inactive: str | None
    places: tuple[Place, ...]

    @property
    def weights(self) -> int:
        return sum(place.weights for place in self.places)

    @property
    def kv(self) -> int:
        return sum(place.kv for place in self.places)

    @property
    def compute(self) -> int:
        return sum(place.compute for place in self.places)

    @property
    def total(self) -> int:
        return sum(place.total for place in self.places)

    def room(self, limits: Mapping[str, int]) -> float:
        """Return the bytes left in the fullest memory, negative if the context does not fit.

        limits: bytes by name of the place; a place that is missing has no limit (inf).
        """
        rooms = [limits[place.name] - place.total for place in self.places if place.name in limits]
        return min(rooms, default=math.inf)

    def fullest(self, limits: Mapping[str, int]) -> Place:
        """Return the place with the fewest bytes left. limits: see room(); not empty."""
        places = [place for place in self.places if place.name in limits]
        return min(places, key=lambda place: limits[place.name] - place.total)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts (for JSON)."""
        return {
            "n_ctx": self.n_ctx,
            "active": self.active,
            "why_inactive": self.why_inactive,
            "weights_bytes": self.weights,
            "kv_bytes": self.kv,
            "compute_bytes": self.compute,
            "total_bytes": self.total,
            "places": [
                {
                    "name": place.name,
                    "weights_bytes": place.weights,
                    "kv_bytes": place.kv,
                    "compute_bytes": place.compute,
                    "total_bytes": place.total,
                }
                for place in self.places
            ],
        }


@dataclass(frozen=True)
class ContextOptions:
    """Options of a context that decide about its memory; the defaults are those of Llama.

    Attributes:
        profile: None for llama.cpp's own full cache.
        n_batch, n_ubatch: batch sizes in tokens.
        logits_all: whether the bindings keep the logits of every token. They count as a compute
            buffer.
        type_k_local, type_v_local: KV types of local heads; None for type_k and type_v.
        n_slots: sequences of the context, each with n_ctx tokens of its own.
    """

    profile: Profile | None = None
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: bool = True
    n_batch: int = 512
    n_ubatch: int = 512
    offload_kqv: bool = True
    op_offload: bool | None = None
    swa_full: bool | None = None
    logits_all: bool = False
    type_k_local: str | None = None
    type_v_local: str | None = None
    n_slots: int = 1

    def __post_init__(self) -> None:
        for name in (self.type_k, self.type_v, self.type_k_local, self.type_v_local):
            if name is not None and name not in KV_TYPES:
                raise UnsupportedError(
                    f"{name!r} is not a KV cache type, expected one of {', '.join(KV_TYPES)}"
                )


class DryModel:
    """A model of which only the headers are read. A context manager.

    n_gpu_layers: -1 for all; without a device in the build it does nothing. split_mode, main_gpu,
    tensor_split: as in llama_cpp.Llama.
    file: the model file. shape: None for a model whose cache a plan does not describe.
    n_ctx_train: tokens, 0 if unknown.
    Raises GGUFError, RazorError where llama.cpp refuses the model, OSError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_gpu_layers: int = -1,
        split_mode: int = C.LLAMA_SPLIT_MODE_LAYER,
        main_gpu: int = 0,
        tensor_split: Sequence[float] | None = None,
    ) -> None:
        self._model: int | None = None
        self.file = open_model(path)
        self.path = self.file.path
        if split_mode == C.LLAMA_SPLIT_MODE_TENSOR:
            raise UnsupportedError("split mode 'tensor' cannot be planned; plan with 'layer'")
        _ = self.file.parts  # of a split model all files have to be there
        try:
            self.shape: ModelShape | None = self.file.shape
        except ProfileError:
            self.shape = None
        C.llama_backend_init()
        params = C.llama_model_default_params()
        params.no_alloc = True
        params.load_mode = C.LLAMA_LOAD_MODE_NONE  # nothing is mapped either
        params.n_gpu_layers = 2**31 - 1 if n_gpu_layers == -1 else n_gpu_layers
        params.split_mode, params.main_gpu = split_mode, main_gpu
        if tensor_split is not None:
            n_max = C.llama_max_devices()
            if len(tensor_split) > n_max:
                raise UnsupportedError(
                    f"tensor_split has {len(tensor_split)} parts, expected at most {n_max}"
                )
            self._tensor_split = (ctypes.c_float * n_max)(*tensor_split)
            params.tensor_split = self._tensor_split
        library.clear_errors()
        self._model = C.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            raise RazorError(f"{self.path} cannot be planned: {library.reason()}")
        self.n_ctx_train = max(C.llama_model_n_ctx_train(self._model), 0)
        self._needs: dict[ContextOptions, dict[int, Need]] = {}
        self._n_vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(self._model))
        self._n_mapped = 0  # bytes of weights that stay in the mapped file

    def close(self) -> None:
        if self._model:
            C.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> DryModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def need(self, n_ctx: int, options: ContextOptions | None = None) -> Need:
        """Return the memory of a context of n_ctx tokens (0: trained length; rounded up to 256).

        Raises UnsupportedError if razor or llama.cpp refuses the model or the options, RazorError.
        """
        options = options or ContextOptions()
        n_ctx = self.padded(n_ctx)
        if n_ctx * options.n_slots > MAX_DRY_RUN:
            raise UnsupportedError(
                f"{options.n_slots} slots of {n_ctx:,} tokens cannot be planned, expected up to"
                f" {MAX_DRY_RUN:,} tokens in all"
            )
        known = self._needs.setdefault(options, {})
        if n_ctx not in known:
            known[n_ctx] = self._dry_run(n_ctx, options)
        return known[n_ctx]

    def largest(
        self,
        limits: Mapping[str, int],
        options: ContextOptions | None = None,
        n_max: int = 0,
    ) -> Need | None:
        """Return the largest context that fits, a multiple of 256; None if not even 256 tokens fit.

        Raises what need() raises.

        Args:
            limits: see Need.room().
            n_max: maximum tokens (0: the trained length, or MAX_DRY_RUN if that is unknown).
        """
        options = options or ContextOptions()
        n_max = self.padded(min(n_max or self.n_ctx_train or MAX_DRY_RUN, MAX_DRY_RUN))
        self.need(N_CTX_PAD, options)  # what is refused here is refused at any size

        def room(n: int) -> float:
            try:
                return self.need(n, options).room(limits)
            except UnsupportedError:  # more than a device takes in one piece
                return -math.inf

        n = largest_fitting(room, n_max, self._needs[options])
        return self.need(n, options) if n else None

    def flash_attention(
        self, type_k: str = "f16", type_v: str = "f16", type_v_local: str | None = None
    ) -> bool:
        """Return whether llama.cpp's "auto" turns flash attention on.

        It does if V is quantized, which needs it, or the device of every layer can run it. Raises
        UnsupportedError.
        """
        if any(KV_TYPES[name].block > 1 for name in (type_v, type_v_local or type_v)):
            return True
        params = C.llama_context_default_params()
        params.n_ctx = N_CTX_PAD
        params.type_k, params.type_v = KV_TYPES[type_k].ggml_id, KV_TYPES[type_v].ggml_id
        params.flash_attn_type = C.LLAMA_FLASH_ATTN_TYPE_AUTO
        lines: list[bytes] = []
        before, data = C.llama_log_callback(), c_void_p()
        C.llama_log_get(ctypes.byref(before), ctypes.byref(data))

        def log(level: int, text: bytes, _: Any) -> None:
            lines.append(text)
            before(level, text, data)

        callback = C.llama_log_callback(log)
        C.llama_log_set(callback, None)  # no function reports it
        try:
            with self._context(params, native.make_params(None)):
                pass
        finally:
            C.llama_log_set(before, data)
        return any(b"Flash Attention enabled" in line for line in lines)

    def padded(self, n_ctx: int) -> int:
        """Return n_ctx rounded as need() does. Raises UnsupportedError."""
        n_ctx = n_ctx or self.n_ctx_train
        if not 0 < n_ctx <= MAX_DRY_RUN:
            raise UnsupportedError(
                f"a context of {n_ctx} tokens cannot be planned, expected 1 to {MAX_DRY_RUN:,}"
            )
        return -(-n_ctx // N_CTX_PAD) * N_CTX_PAD

    def devices(self) -> tuple[str, ...]:
        """Return the devices that hold a part of the model or its contexts."""
        places = self.need(N_CTX_PAD).places
        return tuple(place.name for place in places if place.name != RAM)

    def available(self, n_batch: int = 512) -> dict[str, int]:
        """Return the free bytes of RAM and of each device, as limits for largest().

        A device that does not report its memory is left out.

        Args:
            n_batch: batch size in tokens; the bindings reserve an array for its logits.
        """
        devices = self.devices()
        # These take address space but no memory: the part of the mapped file that is not used as
        # weights, the threads, and the array for logits.
        n_file = sum(part.file_size for part in self.file.parts)
        n_unused = max(n_file - self._n_mapped, 0) + 4 * n_batch * self._n_vocab
        n_unused += available_memory.space_of_program()
        free = {RAM: available_memory.available_ram(n_unused)}
        for name in devices:
            n_free, total = available_memory.device_memory(name)
            if total:
                free[name] = n_free
        return free

    def _dry_run(self, n_ctx: int, options: ContextOptions) -> Need:
        plan = self._plan(n_ctx, options)
        params = C.llama_context_default_params()
        params.n_ctx = n_ctx * options.n_slots
        params.n_seq_max = options.n_slots
        params.n_batch = min(options.n_batch, n_ctx)
        params.n_ubatch = min(options.n_ubatch, params.n_batch)
        params.type_k = KV_TYPES[options.type_k].ggml_id
        params.type_v = KV_TYPES[options.type_v].ggml_id
        params.flash_attn_type = int(options.flash_attn)
        params.offload_kqv = options.offload_kqv
        if options.op_offload is not None:
            params.op_offload = options.op_offload
        if options.swa_full is not None or (plan and plan.active):
            params.swa_full = bool(options.swa_full)  # as Llama does
        override = native.make_params(
            options.profile,
            type_k_local=options.type_k_local,
            type_v_local=options.type_v_local,
        )
        with self._context(params, override) as context:
            active = bool(library.stats(context).active)
            memory = library.memory(context)
            n_logits = 4 * n_ctx * self._n_vocab if options.logits_all else 0
            places = _places(memory, n_logits)
            self._n_mapped = sum(m.weights for m in memory if m.name == b"CPU")
        why = plan.why_inactive if plan else None
        if plan and plan.active and not active:
            why = f"{native.DISABLE_ENV} is set"  # the only other reason
        need = Need(n_ctx, active, why, places)
        planned = plan.kv_bytes * options.n_slots if active and plan else need.kv
        if planned != need.kv:
            raise LibraryError(
                f"the library would allocate {need.kv} bytes of KV cache, but the plan has"
                f" {planned}: the library does not match the Python code; reinstall razor-local"
            )
        return need

    def _context(self, params: Any, override: native.Params) -> AbstractContextManager[int]:
        def failed(why: str) -> RazorError:
            return UnsupportedError(f"{self.path} cannot be planned: {why}")

        assert self._model is not None
        return new_context(library, C, self._model, params, override, failed)

    def _plan(self, n_ctx: int, options: ContextOptions) -> Plan | None:
        if options.profile is None:
            return None  # llama.cpp has caches that a plan does not describe
        if self.shape is None:
            raise UnsupportedError(f"razor cannot run {self.path}")
        return make_plan(
            self.shape, options.profile, n_ctx, options.type_k, options.type_v, options.flash_attn,
            n_ubatch=min(options.n_ubatch, options.n_batch, n_ctx), swa_full=options.swa_full,
            type_k_local=options.type_k_local, type_v_local=options.type_v_local,
        )  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """One of several plans for a model. cache: "full" or "razor"; refused: why it cannot be run."""

    cache: str
    options: ContextOptions
    refused: str | None = None

    @property
    def name(self) -> str:
        """For example "razor q8_0", or "razor f16 (local q8_0)"."""
        options = self.options
        name = f"{self.cache} {_pair(options.type_k, options.type_v)}"
        if options.type_k_local is None and options.type_v_local is None:
            return name
        local = options.type_k_local or options.type_k, options.type_v_local or options.type_v
        return f"{name} (local {_pair(*local)})"


def _pair(type_k: str, type_v: str) -> str:
    return type_k if type_k == type_v else f"{type_k}/{type_v}"


def make_candidates(
    model: DryModel,
    profile: Profile | None,
    types: Iterable[tuple[str, str]],
    base: ContextOptions | None = None,
    n_ctx: int = N_CTX_PAD,
) -> list[Candidate]:
    """Make candidates of a full cache and of razor, with each pair of K and V types.

    Args:
        profile: the profile for razor; None leaves razor out.
        base: all other options.
        n_ctx: a context size that must be possible.

    Raises:
        UnsupportedError: n_ctx is out of range.
    """
    n_ctx = model.padded(n_ctx)
    found = []
    for cache, planned in (("full", None), ("razor", profile)):
        for type_k, type_v in types if cache == "full" or profile else ():
            options = replace(
                base or ContextOptions(), profile=planned, type_k=type_k, type_v=type_v
            )
            if cache == "full":
                options = replace(options, type_k_local=None, type_v_local=None)
            refused = None
            try:
                model.need(n_ctx, options)
            except (UnsupportedError, ProfileError) as error:
                refused = str(error)
            found.append(Candidate(cache, options, refused))
    return found


def largest_fitting(room: Callable[[int], float], n_max: int, tried: Iterable[int] = ()) -> int:
    """Return the largest multiple of 256 up to n_max with room for it, 0 if there is none.

    If room() falls with n, this is the largest such multiple. In any case room(result) >= 0, and
    room(result + 256) < 0 unless that is beyond n_max.

    Args:
        room: returns the bytes left with n tokens.
        n_max: a multiple of 256.
        tried: sizes for which room() costs nothing.
    """
    rooms: dict[int, float] = {}

    def at(unit: int) -> float:
        if unit not in rooms:
            rooms[unit] = room(unit * N_CTX_PAD)
        return rooms[unit]

    top = n_max // N_CTX_PAD
    for n in tuple(tried):
        if n <= n_max:
            at(n // N_CTX_PAD)
    low = max((unit for unit, left in rooms.items() if left >= 0), default=0)
    high = min((unit for unit, left in rooms.items() if left < 0 and unit > low), default=top + 1)
    if not low:
        if at(1) < 0:
            return 0
        low = 1
    while high > top and low < top:  # steps that grow: large contexts take time to plan
        unit = min(max(4 * low, 32), top)
        if at(unit) >= 0:
            low = unit
        else:
            high = unit
    steps = 0
    while high - low > 1 and low < top:
        # bytes are nearly linear in n: a straight line between the two ends, and a bisection now
        # and then for where they are not
        steps += 1
        linear = steps % 4 and at(high) > -math.inf
        part = at(low) / (at(low) - at(high)) if linear else 0.5
        unit = min(max(low + int((high - low) * part), low + 1), high - 1)
        if at(unit) >= 0:
            low = unit
        else:
            high = unit
    return low * N_CTX_PAD


@dataclass(frozen=True)
class AutoContext:
    """The context that "auto" chooses.

    Attributes:
        n_ctx: tokens of the context.
        n_max: tokens that it would have with enough memory.
        place: the memory with the least room to spare.
        free: free bytes in that memory.
    """

    n_ctx: int
    n_max: int
    place: str
    free: int


def auto_context(
    path: str | os.PathLike[str], options: ContextOptions, n_max: int = 0, **model_options: Any
) -> AutoContext:
    """Return the largest context, up to the trained length, for the memory that is free now.

    MARGIN stays free in RAM and in each device.

    Args:
        n_max: maximum tokens (0: trained length).
        model_options: arguments of DryModel.

    Raises:
        MemoryFullError: fewer than MIN_AUTO tokens fit.
        RazorError, OSError: what DryModel and DryModel.need raise.
    """
    with DryModel(path, **model_options) as model:
        n_max = model.padded(min(n_max or MAX_DRY_RUN, model.n_ctx_train or MAX_DRY_RUN))
        free = model.available(options.n_batch)
        limits = {name: n - MARGIN for name, n in free.items()}
        need = model.largest(limits, options, n_max)
        smallest = min(MIN_AUTO, n_max)
        if need is None or need.n_ctx < smallest:
            spare = f"or pass {written(n_ctx=smallest)} to use the 1 GiB that is kept free"
            raise MemoryFullError(f"{no_room(model, limits, options, smallest)}, {spare}")
        place = need.fullest(limits)
        return AutoContext(need.n_ctx, n_max, place.name, free[place.name])


def out_of_memory(
    what: str,
    path: str | os.PathLike[str],
    options: ContextOptions,
    n_ctx: int,
    **model_options: Any,
) -> MemoryFullError:
    """Return the error for a context that could not be allocated, with contexts that fit.

    Args:
        what: a clause that names the failure.
        n_ctx: tokens of that context.
        model_options: arguments of DryModel.
    """
    try:
        with DryModel(path, **model_options) as model:
            free = model.available(options.n_batch)
            for margin in (MARGIN, 0):
                limits = {name: max(n - margin, 0) for name, n in free.items()}
                fitting = _fitting(model, limits, options, n_ctx)
                if fitting:
                    first, *others = fitting
                    spare = "with 1 GiB to spare, " if margin else ""
                    other = "".join(f", or {other}" for other in others)
                    return MemoryFullError(f"{what}; {spare}{first} fits{other}")
            return MemoryFullError(no_room(model, limits, options))
    except (RazorError, OSError, MemoryError):  # planning needs memory, too
        smaller = written(type_k="q8_0", type_v="q8_0")
        return MemoryFullError(f"{what}; use a smaller {option('n_ctx')}, or {smaller}")


def _fitting(
    model: DryModel, limits: Mapping[str, int], options: ContextOptions, n_ctx: int
) -> list[str]:
    """Return the largest context that fits, and a larger one with smaller types, as arguments."""
    smaller = "q4_0" if "q8_0" in (options.type_k, options.type_v) else "q8_0"
    found: list[str] = []
    n_found = 0
    for type_k, type_v, n_max in (
        (
            options.type_k,
            options.type_v,
            n_ctx - N_CTX_PAD,
        ),  # n_ctx has failed, even if it seems to fit
        (smaller, smaller, n_ctx),
    ):
        if n_max < N_CTX_PAD:
            continue
        try:
            need = model.largest(limits, replace(options, type_k=type_k, type_v=type_v), n_max)
        except UnsupportedError:  # needs flash attention, or another head size
            continue
        if need is not None and need.n_ctx > n_found:
            types = {} if type_k == type_v == "f16" else {"type_k": type_k, "type_v": type_v}
            for name in ("type_k_local", "type_v_local"):
                if getattr(options, name) is not None:
                    types[name] = getattr(options, name)
            found.append(written(n_ctx=need.n_ctx, **types))
            n_found = need.n_ctx
    return found


def no_room(
    model: DryModel, limits: Mapping[str, int], options: ContextOptions, n_ctx: int = N_CTX_PAD
) -> str:
    """Return a sentence that explains why not even a context of n_ctx tokens fits."""
    need = model.need(n_ctx, options)
    full = need.fullest(limits)
    memory = "memory" if need.places == (full,) else full.name
    hint = "take a smaller quantization of the model"
    if full.name != RAM:
        hint += f" or fewer layers on the device ({option('n_gpu_layers')})"
    return (
        f"{model.path}: even a context of {need.n_ctx:,} tokens needs {full.total / 2**20:,.1f} MiB"
        f" of {memory} ({full.weights / 2**20:,.1f} MiB of weights), and"
        f" {max(limits[full.name], 0) / 2**20:,.1f} MiB are available; {hint}"
    )


def paper_profile(shape: ModelShape) -> Profile:
    """Make a profile with the paper's shares, to plan for a model that has none yet.

    It has 14 % of the KV heads by induction and 1 % by echo score, rounded up, and here spread
    evenly over the layers. This only estimates the memory: convert may choose more or fewer heads.
    The bytes depend on the number of heads, not on which ones they are.
    """
    from .scores import ECHO, INDUCTION

    total = sum(shape.n_head_kv)
    n = min(sum(math.ceil(share * total - 1e-9) for share in (INDUCTION, ECHO)), total)
    heads = np.zeros(total, np.uint8)
    heads[np.arange(n) * total // max(n, 1)] = 1
    return Profile(retrieval=split_heads(heads, shape.n_head_kv))


def _places(memory: Iterable[native.Memory], n_logits: int) -> tuple[Place, ...]:
    """Return the memory by place: RAM first, then the devices by name.

    n_logits: bytes of logits that the bindings keep in RAM.
    """
    found = {RAM: Place(RAM, 0, 0, n_logits)}
    for m in sorted(memory, key=lambda m: m.device):
        name = RAM if m.is_host else m.device.decode("utf-8", "replace")
        old = found.get(name, Place(name, 0, 0, 0))
        found[name] = Place(
            name, old.weights + m.weights, old.kv + m.cache, old.compute + m.compute
        )
    return tuple(found.values())
