"""Check the arguments of Llama(), and choose the cache of its context."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from . import hooks, native
from .available_memory import available_ram
from .errors import (
    GGUFError,
    MemoryFullError,
    ProfileError,
    RazorError,
    Stopped,
    UnsupportedError,
    option,
    options,
)
from .gguf.hyper_parameters import check_overrides
from .model_file import ModelFile
from .model_shape import ModelShape
from .native.loaded import C, llama_cpp
from .plan import KV_TYPES, NO_LOCAL_TYPES, Plan, make_plan, padded_n_ctx
from .profile import KEY_PREFIX, Profile

if TYPE_CHECKING:
    from .fit import ContextOptions

_TYPE_NAMES = {kv_type.ggml_id: name for name, kv_type in KV_TYPES.items()}
_MAX_THREADS = 512  # GGML_MAX_N_THREADS; ggml ends the process above it
_BASE_OPTIONS = frozenset(inspect.signature(llama_cpp.Llama.__init__).parameters) - {"kwargs"}


@dataclass(frozen=True)
class CacheChoice:
    """The cache that a context will have.

    Attributes:
        profile: the profile with the options applied; None for a model without one, and with
            razor=False.
        plan: the plan; None for a model whose cache no plan describes.
        why: the reason if razor is not active.
        own_attention: whether razor_local's attention also runs with llama.cpp's own cache, if
            possible.
        n_ctx: tokens; 0 is the trained length.
    """

    profile: Profile | None
    plan: Plan | None
    why: str | None
    own_attention: bool
    n_ctx: int


def refuse_arguments(model_path: str, n_ctx: int | str, kwargs: dict[str, Any]) -> None:
    """Refuse arguments that the base class would ignore, or that would crash the library."""
    try:
        model_path.encode()
    except UnicodeEncodeError:
        raise UnsupportedError(
            f"the name {model_path!r} is not UTF-8, which llama.cpp's bindings expect; rename the"
            " file or its folder"
        ) from None
    for name in kwargs:
        if name not in _BASE_OPTIONS:
            raise TypeError(f"Llama() has no argument {name!r}")
    numbers = {"n_ctx": 0 if isinstance(n_ctx, str) else n_ctx} | kwargs
    for name, low, high, instead in (
        ("n_ctx", 0, 2**31 - 1, " or 'auto'"),
        ("n_batch", 1, 2**31 - 1, ""),
        ("n_ubatch", 1, 2**31 - 1, ""),
        ("n_threads", 0, _MAX_THREADS, " or None"),
        ("n_threads_batch", 0, _MAX_THREADS, " or None"),
    ):
        value: Any = numbers.get(name)
        if value is None and (name not in numbers or instead == " or None"):
            continue
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or not low <= value <= high:
            raise UnsupportedError(
                f"{option(name)} is {value!r}, expected a whole number from {low} to"
                f" {high}{instead}"
            )
    check_overrides(kwargs.get("kv_overrides"))
    lora = kwargs.get("lora_path")
    if lora is not None and not os.path.isfile(lora):
        raise UnsupportedError(f"lora_path is {lora!r}, which is not a file; name a LoRA adapter")


def refuse_prefill(prefill: Any) -> None:
    """Raise UnsupportedError for a value that Llama(prefill=) does not accept."""
    if prefill not in ("auto", "full", "razor"):
        raise UnsupportedError(
            f"{option('prefill')} is {prefill!r}, expected 'auto', 'full' or 'razor'"
        )


def _refuse_razor(razor: Any) -> None:
    is_path = isinstance(razor, (str, os.PathLike)) and bool(os.fspath(razor))
    # a misspelt "auto" would be a file that does not exist
    misspelt = isinstance(razor, str) and razor != "auto" and razor.lower() == "auto"
    if misspelt and not os.path.lexists(razor):
        is_path = False
    if not (is_path or isinstance(razor, (bool, Profile))):
        raise UnsupportedError(
            f"razor is {razor!r}, expected True, False, 'auto', a Profile or the path of a sidecar"
        )


def type_name(kv_type: int | str | None) -> str:
    """Return the name of a KV cache type. Raises UnsupportedError if there is none."""
    if kv_type is None:
        return "f16"
    name = _TYPE_NAMES.get(kv_type) if isinstance(kv_type, int) else kv_type
    if name not in KV_TYPES:
        raise UnsupportedError(
            f"{kv_type!r} is not a KV cache type, expected one of {', '.join(KV_TYPES)}"
        )
    return name


def choose_cache(
    file: ModelFile,
    razor: bool | str | os.PathLike[str] | Profile,
    budget: float | None,
    window: int | None,
    sink_tokens: int | None,
    compensation: bool | None,
    n_ctx: int | str,
    type_k: str,
    type_v: str,
    flash_attn: bool,
    others: dict[str, Any],
    progress: Callable[[float], object] | None = None,
    type_k_local: str | None = None,
    type_v_local: str | None = None,
) -> CacheChoice:
    """Choose the cache for arguments of Llama().

    Args:
        others: the remaining arguments that were given.

    Raises:
        GGUFError, ProfileError: the file is damaged, or has no profile to change.
        UnsupportedError: razor cannot run the model, or has none of the options.
        MemoryFullError: the cache is larger than the memory.
        RazorError: measuring the heads was stopped.
    """
    _refuse_razor(razor)
    reason = None
    local_types: dict[str, Any] = {"type_k_local": type_k_local, "type_v_local": type_v_local}
    if isinstance(razor, str) and razor == "auto":
        context = {"n_ctx": n_ctx, "type_k": type_k, "type_v": type_v, "flash_attn": flash_attn}
        context = context | local_types
        razor, reason = _auto_profile(file, context, others, progress)
    shape, profile, why = choose_profile(file, razor, budget, window, sink_tokens, compensation)
    why = reason or why
    if (type_k_local or type_v_local) and profile is None:
        if razor is False or reason is None and not native.is_disabled():
            raise UnsupportedError(
                f"{option('type_k_local')} and {option('type_v_local')} have no effect without"
                f" razor ({why}); leave them out"
            )
        why = f"{why} ({NO_LOCAL_TYPES})"
    own_attention = razor is not False and not native.is_disabled()
    given = {"type_k": type_k, "type_v": type_v, "flash_attn": flash_attn, **local_types, **others}
    if isinstance(n_ctx, str):
        n_ctx = _auto_n_ctx(file, n_ctx, profile, given)
    if shape is None:
        return CacheChoice(profile, None, why, own_attention, n_ctx)
    n_ctx = padded_n_ctx(shape, n_ctx)
    n_ubatch = min(others.get("n_ubatch", 512), others.get("n_batch", 512), n_ctx)
    plan = make_plan(
        shape, profile, n_ctx, type_k, type_v, flash_attn,
        n_ubatch=n_ubatch, swa_full=others.get("swa_full"), **local_types,
    )  # fmt: skip
    if profile is None:
        plan = replace(plan, why_inactive=why)
    if plan.active:
        _refuse_options(others)
    _refuse_too_large(file, plan, profile, given)
    return CacheChoice(profile, plan, plan.why_inactive, own_attention, n_ctx)


def choose_profile(
    file: ModelFile,
    razor: bool | str | os.PathLike[str] | Profile,
    budget: float | None,
    window: int | None = None,
    sink_tokens: int | None = None,
    compensation: bool | None = None,
) -> tuple[ModelShape | None, Profile | None, str]:
    """Return the shape, the profile, and the reason if there is no profile.

    The shape is None if no plan describes the model. Arguments and exceptions are those of
    choose_cache().
    """
    overridden = not (budget is window is sink_tokens is compensation is None)
    disabled = native.is_disabled()
    if razor is False or disabled:
        why = options(razor=False) if razor is False else f"{native.DISABLE_ENV} is set"
        if overridden and not disabled:
            raise ProfileError(
                "budget, window, sink_tokens and compensation change a razor profile, which"
                f" {options(razor=False)} switches off; leave one or the other out"
            )
        try:
            return file.shape, None, why
        except (GGUFError, ProfileError):
            return None, None, why  # llama.cpp may know better

    no_profile = "the model file has no razor profile"
    if razor is True:
        try:
            shape = file.shape
        except ProfileError:
            if any(key.startswith(KEY_PREFIX) for key in file.header.entries):
                raise
            shape = None
        if overridden and (shape is None or file.profile is None):
            raise ProfileError(
                f"{file} has no razor profile that {option('budget')}, window, sink_tokens or"
                " compensation could change; make one with 'razor-local convert MODEL.gguf -o"
                f" OUT.gguf', or pass {option('razor=SIDECAR')}"
            )
        if shape is None:
            return None, None, no_profile
    profile = file.choose_profile(None if razor is True else razor, budget)
    if profile is not None:
        profile = profile.with_options(window, sink_tokens, compensation)
    return file.shape, profile, no_profile


def _auto_profile(
    file: ModelFile,
    context: dict[str, Any],
    others: dict[str, Any],
    progress: Callable[[float], object] | None,
) -> tuple[Profile | bool, str | None]:
    """Return the profile for razor="auto", or True and the reason if there is none."""
    try:
        _ = file.shape
    except ProfileError:
        return True, None  # as without "auto"
    if native.is_disabled():
        return True, None

    def report(done: float, total: float, label: str) -> None:
        if progress is not None and progress(done / total if total else 0.0) is False:
            raise Stopped

    if context["n_ctx"] == "auto":
        context |= {"n_ctx": 0}
    try:
        auto = hooks.auto_profile(
            file,
            n_threads=others.get("n_threads"),
            n_gpu_layers=others.get("n_gpu_layers", 0),  # the default of the base class
            progress=report,
            **context,
        )
    except Stopped:
        raise RazorError(
            f"measuring the heads of {file} was stopped: progress() returned False"
        ) from None
    return (True, auto.why) if auto.found is None else (auto.found.profile, None)


def _auto_n_ctx(file: ModelFile, n_ctx: str, profile: Profile | None, given: dict[str, Any]) -> int:
    from .fit import auto_context

    if n_ctx != "auto":
        raise UnsupportedError(
            f"{option('n_ctx')} is {n_ctx!r}, expected a number of tokens or 'auto'"
        )
    if given.get("embedding"):
        raise UnsupportedError(
            f"{options(n_ctx='auto')} plans for text; pass a number with embedding=True"
        )
    context, model = _planned(profile, given)
    return auto_context(file, context, **model).n_ctx


def out_of_memory(
    what: str, file: ModelFile, n_ctx: int, profile: Profile | None, given: dict[str, Any]
) -> MemoryFullError:
    """Return the error for a context of n_ctx tokens that does not fit into the memory.

    Args:
        what: a clause that names what does not fit.
        given: arguments of Llama(), including type_k, type_v and flash_attn.
    """
    from . import fit

    context, model = _planned(profile, given)
    return fit.out_of_memory(what, file, context, n_ctx, **model)


def _planned(
    profile: Profile | None, given: dict[str, Any]
) -> tuple[ContextOptions, dict[str, Any]]:
    """Return the arguments of Llama() that determine its memory, for fit.py."""
    from .fit import ContextOptions

    names = {f.name for f in fields(ContextOptions)} - {"profile"}
    context = {name: given[name] for name in names if name in given}
    names = {"n_gpu_layers", "split_mode", "main_gpu", "tensor_split"}
    model = {name: given[name] for name in names if name in given}
    return ContextOptions(profile=profile, **context), model


def _refuse_options(kwargs: dict[str, Any]) -> None:
    if kwargs.get("embedding"):
        raise UnsupportedError(
            "embedding=True puts the sequences of a batch into one cache, which razor does not"
            f" support; pass {options(razor=False)}"
        )


def _refuse_too_large(
    file: ModelFile, plan: Plan, profile: Profile | None, given: dict[str, Any]
) -> None:
    # allocating it would succeed and filling it end the process, where memory is overcommitted
    if C.llama_supports_gpu_offload():
        return
    free = available_ram() + psutil.swap_memory().free
    if plan.kv_bytes > free:
        what = (
            f"the KV cache of {plan.n_ctx:,} tokens takes {plan.kv_bytes / 2**30:.1f} GiB and"
            f" {free / 2**30:.1f} GiB of memory are free"
        )
        raise out_of_memory(what, file, plan.n_ctx, profile, given)
