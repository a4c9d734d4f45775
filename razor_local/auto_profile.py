"""Find the profile of a model, and measure one if there is none.

Measuring takes from seconds to hours, so the model is timed first. The profile cache stores the
result, even if that is a note that no head stands out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import native, profile_cache
from .available_memory import available_ram
from .common.machine import n_cores
from .common.progress import Progress, Stop
from .converters.calibrate import DEFAULT_MAX_MEMORY, calibrate, measure_pace
from .converters.write import write_sidecar
from .errors import NoProfileError, RazorError
from .evals.haystack import Haystack
from .evals.proof import TOKENS_READ, prove
from .fit import paper_profile
from .model_file import FoundProfile, ModelFile, open_model
from .model_shape import unsupported_feature
from .plan import Plan, make_plan
from .profile import Profile
from .profile_cache import Note
from .scores import profile_from_scores

MAX_SECONDS = 120  # "auto" measures a model only if that takes less
LOADS = 3  # how often the model is loaded: for the scores, the facts and their prompts
NO_PROFILE = "the model has no razor profile"
ALIBI = f"{NO_PROFILE} ('razor-local convert' computes the scopes of its ALiBi heads)"


@dataclass(frozen=True)
class AutoProfile:
    """The profile of a model, or the reason why it has none.

    Attributes:
        found: the profile; None if the full cache runs.
        why: the reason for no profile, in a few words; "" with a profile.
        tried: whether the heads were measured, now or earlier, without producing a profile.
        seconds: how long measuring would take if it was skipped because of that; otherwise None.
        saving: the plan with the paper's shares in that case; otherwise None.
    """

    found: FoundProfile | None
    why: str = ""
    tried: bool = False
    seconds: float | None = None
    saving: Plan | None = None


def auto_profile(
    model: str | os.PathLike[str],
    *,
    when: str = "auto",
    n_ctx: int = 0,
    type_k: str = "f16",
    type_v: str = "f16",
    flash_attn: bool = True,
    n_threads: int | None = None,
    n_gpu_layers: int = -1,
    max_seconds: float = MAX_SECONDS,
    progress: Progress | None = None,
    stop: Stop | None = None,
    type_k_local: str | None = None,
    type_v_local: str | None = None,
) -> AutoProfile:
    """Return the profile that ModelFile.find_profile() finds, or measure one.

    Nothing is measured if razor could not run the model, or would save nothing in this context.
    Measuring uses at most half of the free memory in addition to the model. If measuring fails, or
    razor misses facts with the measured heads, the full cache runs.

    Args:
        when: "auto" measures if that takes less than max_seconds. "now" measures however long it
            takes, even if the package has a list for the model or no head stood out before.
            "never" does not measure.
        n_ctx, type_k, type_v, flash_attn, type_k_local, type_v_local: settings of the context that
            will run; n_ctx 0 means the trained length.
        n_threads, n_gpu_layers: settings for measuring.

    Raises:
        GGUFError, ProfileError: the model, its profile or its sidecar is damaged.
        Stopped: measuring was stopped; nothing was saved.
        OSError.
    """
    file = open_model(model)
    found = file.find_profile()
    if when == "never" or (found is not None and not (found.source == "list" and when == "now")):
        return AutoProfile(found, "" if found else NO_PROFILE)
    shape = file.shape
    try:
        feature = unsupported_feature(file.header, shape)
        if feature is not None:
            return AutoProfile(found, f"razor does not run models with {feature}")
        if native.is_disabled():
            return AutoProfile(found, f"{native.DISABLE_ENV} is set")
        if shape.max_alibi_bias:  # nothing is measured
            return AutoProfile(found, ALIBI)
        plan = make_plan(
            shape, paper_profile(shape), n_ctx, type_k, type_v, flash_attn,
            type_k_local=type_k_local, type_v_local=type_v_local,
        )  # fmt: skip
    except RazorError as error:
        return AutoProfile(found, str(error))
    if not plan.active:
        return AutoProfile(found, plan.why_inactive or NO_PROFILE)
    options: dict[str, Any] = {"n_threads": n_threads, "n_gpu_layers": n_gpu_layers}
    max_memory = min(DEFAULT_MAX_MEMORY, available_ram() // 2)
    setting = f"{n_threads or n_cores()} threads, {n_gpu_layers} layers on the GPU"
    note = profile_cache.read_note(shape)
    try:
        if when == "auto":
            if note.why:
                return AutoProfile(None, note.why, tried=True)
            seconds = note.seconds if note.setting == setting else 0.0
            if not seconds:
                seconds = estimate_seconds(
                    file, enough=max_seconds, max_memory=max_memory, progress=progress, stop=stop,
                    **options,
                )  # fmt: skip
            if seconds > max_seconds:
                _keep(file, Note(seconds=seconds, setting=setting))
                why = f"{NO_PROFILE}, and measuring one takes about {seconds:.0f} seconds"
                return AutoProfile(None, why, seconds=seconds, saving=plan)
        profile = measure_profile(
            file, max_memory=max_memory, progress=progress, stop=stop, **options
        )
    except RazorError as error:
        if isinstance(error, NoProfileError):
            _keep(file, Note(why=str(error)))
        return AutoProfile(found, str(error), tried=True)
    try:
        where = str(save_profile(file, profile))
    except (RazorError, OSError):
        where = ""  # it is used now, and measured again next time
    return AutoProfile(FoundProfile(profile, "measured", where))


def estimate_seconds(
    model: str | os.PathLike[str],
    *,
    proof: bool = True,
    progress: Progress | None = None,
    stop: Stop | None = None,
    **options: Any,
) -> float:
    """Time the model on a few hundred tokens, and estimate how long measure_profile() takes.

    Args:
        proof: whether to include the test with planted facts.
        options: further arguments of measure_pace().

    Raises what calibrate() raises.
    """
    pace = measure_pace(model, progress=progress, stop=stop, **options)
    seconds = LOADS * pace.loading + pace.calibration
    return seconds + proof * TOKENS_READ * pace.token


def measure_profile(
    model: str | os.PathLike[str],
    *,
    max_memory: int = DEFAULT_MAX_MEMORY,
    progress: Progress | None = None,
    stop: Stop | None = None,
    **options: Any,
) -> Profile:
    """Measure the heads, choose those that stand out, and test them on planted facts.

    Args:
        max_memory: maximum memory of calibrate(), in bytes.
        options: n_threads and n_gpu_layers.

    Raises what calibrate() and prove_profile() raise, and NoProfileError if razor misses facts.
    """
    scores = calibrate(model, max_memory=max_memory, progress=progress, stop=stop, **options)
    return prove_profile(
        model,
        profile_from_scores(scores),
        must_hold=True,
        progress=progress,
        stop=stop,
        **options,
    )


def prove_profile(
    model: str | os.PathLike[str],
    profile: Profile,
    *,
    skip: bool = False,
    must_hold: bool = False,
    haystack: Haystack | None = None,
    note: Callable[[str], object] | None = None,
    progress: Progress | None = None,
    stop: Stop | None = None,
    **options: Any,
) -> Profile:
    """Test a profile on planted facts and record the outcome.

    If heads that were chosen by score lose facts, the choice is changed.

    Args:
        skip: plant no facts, and only check that there are heads.
        must_hold: raise NoProfileError if razor misses facts that the full cache finds.
        haystack: the text to plant the facts in; None means generated sentences.
        note: called with a sentence if facts are lost or could not be planted.
        options: n_threads and n_gpu_layers.

    Raises:
        NoProfileError: neither the scores nor the facts select a head, or must_hold is violated.
        Stopped: stop() returned True.
        GGUFError, OSError: the model cannot be read.
    """
    report = note or (lambda sentence: None)
    by_score = profile.calibration.get("select") == "score"
    by_list = profile.echo_score is None
    proof, why = None, ""
    if not skip:
        try:
            proof = prove(
                model, profile, may_change=by_score, haystack=haystack, progress=progress,
                stop=stop, **options,
            )  # fmt: skip
        except RazorError as error:  # keep the heads, although they are untested
            why = str(error)
    none = not (profile.flat() if proof is None else np.concatenate(proof.retrieval)).any()
    holds = proof is not None and proof.holds
    if by_score and (none or not (holds or profile.flat().any())):
        tried = "was skipped (--no-proof)" if skip else f"was not possible ({why})"
        if proof is not None:
            tried = (
                f"did not pass (the full cache finds {proof.full.n_found} of"
                f" {len(proof.full.found)}, razor {proof.razor.n_found})"
            )
        raise NoProfileError(
            f"no head stands out by its scores, and the test with planted facts {tried}"
        )
    if proof is None:
        if why:
            report(f"the heads were not tested on planted facts: {why}.")
        return profile
    if not proof.conclusive:
        report(
            f"the full cache itself finds only {proof.full.n_found} of {len(proof.full.found)}"
            " planted facts, so this test is inconclusive; measure your task, for example with"
            " 'razor-local eval'."
        )
    elif not proof.holds:
        found = f"{proof.razor.n_found} of {len(proof.full.found)} found; the full cache finds"
        found += f" {proof.full.n_found}"
        if must_hold:
            raise NoProfileError(
                f"razor misses facts with the measured heads ({found}); 'razor-local convert'"
                " writes a profile anyway"
            )
        more = "" if by_list else ", use a larger budget (chat --budget 0.25),"
        report(
            f"razor misses facts with these heads ({found}). Measure your task{more} or run the"
            " full cache."
        )
    return replace(
        profile, retrieval=proof.retrieval, calibration=profile.calibration | proof.record()
    )


def save_profile(file: ModelFile, profile: Profile) -> Path:
    """Save a profile in the profile cache and return its path.

    Raises ConvertError, RazorError, OSError.
    """
    profile_cache.make_folder()
    path = profile_cache.path_of(file.shape)
    write_sidecar(file, path, profile, force=True, private=True)
    path.with_suffix(".json").unlink(missing_ok=True)
    return path


def _keep(file: ModelFile, note: Note) -> None:
    """Save a note on a model. If that fails, the model is timed or measured again next time."""
    with suppress(RazorError, OSError):
        profile_cache.write_note(file.shape, note)
