"""The named policies of a KV cache that are compared on the same weights and questions.

    full            llama.cpp's own cache
    exact           a full cache with razor_local's attention, if supported; exact on CPUs
    razor           the profile of the model
    razor-no-comp   the same heads without compensation tokens
    local           every KV head local, with compensation
    streaming       every KV head local, without compensation: attention sinks and a window
    random-heads    as many retrieval heads as the profile has, drawn at random
    heads=FILE      the retrieval heads of another profile, sidecar, head list or file of scores

Each name may be followed by a KV type (razor-q8_0; the default is f16) or by one type for K and one
for V (full-q8_0/q4_0). The types of local heads may follow after a plus (razor-f16+q8_0). A budget
may follow razor and razor-no-comp (razor-q8_0@0.1): the share of retrieval heads, chosen again by
the scores in the profile. A window in tokens may follow every policy with local heads except
heads=FILE (razor-q8_0:1024, razor-q8_0@0.1:1024).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import ProfileError, RazorError, UnsupportedError
from ..model_setup import ModelSetup
from ..model_shape import ModelShape
from ..plan import KV_TYPES, Plan, make_plan, row_size, split_type
from ..profile import Profile, split_heads

KINDS = (
    "full", "exact", "razor", "razor-no-comp", "local", "streaming", "random-heads", "heads=FILE",
)  # fmt: skip
FULL = ("full", "exact")
DEFAULT = (
    "full-f16", "full-q8_0", "full-q4_0", "razor-f16", "razor-q8_0", "razor-q4_0", "local-f16",
    "streaming-f16", "razor-no-comp-f16", "random-heads-f16",
)  # fmt: skip
DEFAULT_FOR_BUDGETS = (
    "full-f16", "full-q8_0", "full-q4_0", "razor-f16", "razor-q8_0", "local-f16",
)  # fmt: skip


@dataclass(frozen=True)
class Policy:
    """A policy of a KV cache.

    Attributes:
        series: the name without the budget.
        profile: the profile, or None for llama.cpp's own cache.
        kv_type: the KV type, or two types for K and V as in "q8_0/q4_0".
        budget: the share of retrieval heads, or None for the profile's.
        local_type: the KV type or types of local heads, or None for kv_type.
    """

    name: str
    series: str
    profile: Profile | None
    kv_type: str
    budget: float | None = None
    local_type: str | None = None

    @property
    def is_full(self) -> bool:
        """Return True for the policies full and exact."""
        return self.series.partition("-")[0] in FULL

    @property
    def types(self) -> dict[str, Any]:
        """Return the KV types as arguments of make_plan(), Llama and Examiner.ask()."""
        type_k, type_v = split_type(self.kv_type)
        local = split_type(self.local_type) if self.local_type else (None, None)
        return {
            "type_k": type_k, "type_v": type_v, "type_k_local": local[0], "type_v_local": local[1],
        }  # fmt: skip

    def plan(self, shape: ModelShape, n_ctx: int) -> Plan:
        return make_plan(shape, self.profile, n_ctx, **self.types)

    def llama_args(self) -> dict[str, Any]:
        """Return the arguments of razor_local.Llama."""
        return {"razor": self.profile if self.profile is not None else False} | self.types


def make_policies(
    setup: ModelSetup,
    names: Sequence[str] | None = None,
    budgets: Sequence[float] = (),
    seed: int = 0,
) -> tuple[ModelShape, tuple[Policy, ...]]:
    """Make the policies of these names for a model.

    Args:
        setup: the model.
        names: the policies, by default DEFAULT without KV types that do not fit the head size.
        budgets: budgets for each razor policy, in addition to the profile's. Budgets that choose
            the same heads as another are left out.
        seed: seed of the random heads.

    Returns:
        The shape of the model, and the policies.

    Raises:
        RazorError: a name is not known.
        ProfileError: the model lacks the profile or the scores that a policy needs.
        UnsupportedError, OSError: the model cannot be used.
    """
    shape = setup.file.shape
    if names is None:
        chosen = DEFAULT_FOR_BUDGETS if budgets else DEFAULT
        names = [name for name in chosen if type_fits(shape, _split(name)[1][0])]
    wanted = [_split(name) for name in names]
    if budgets:
        if not any(kind.startswith("razor") for kind, *_ in wanted):
            raise RazorError(
                "there is no policy to give budgets to; add razor-f16 or razor-q8_0 to the policies"
            )
        wanted = [
            (kind, types, share, window)
            for kind, types, own, window in wanted
            for share in ((own, *budgets) if kind.startswith("razor") and own is None else (own,))
        ]
    base = None
    if any(kind not in FULL for kind, *_ in wanted):
        shape, base = setup.read()
    policies: dict[tuple[Any, ...], Policy] = {}
    for kind, (kv_type, local_type), budget, window in wanted:
        types = f"{kind}-{kv_type}" + (f"+{local_type}" if local_type else "")
        after = "" if window is None else f":{window}"
        series = types + after
        name = series if budget is None else f"{types}@{str(budget).removesuffix('.0')}{after}"
        profile = _profile(kind, budget, base, shape, setup, seed)
        if profile is not None:
            try:
                profile = profile.with_options(window, None, None)
            except ProfileError as error:
                raise ProfileError(f"the policy {name!r}: {error}") from None
        policy = Policy(name, series, profile, kv_type, budget, local_type)
        policy.plan(shape, shape.n_ctx_train or 4096)  # raises if the type does not fit the head
        heads = b"" if profile is None else _heads(profile)
        policies.setdefault((series, heads), policy)
    return shape, tuple(policies.values())


def _heads(profile: Profile) -> bytes:
    """Return what a profile says about each head."""
    arrays = (*profile.retrieval, *(profile.scope or ()))
    return b"".join(array.tobytes() for array in arrays)


def _split(name: str) -> tuple[str, tuple[str, str | None], float | None, int | None]:
    """Split a policy's name into kind, KV types (the second for local heads), budget and window."""
    rest, budget, window = name, None, None
    match = re.fullmatch(r"(?!heads=|full|exact)(.+):([0-9]+)", name)
    if match:
        rest, window = match[1], int(match[2])
    match = re.fullmatch(r"(razor.*)@([0-9.]+)", rest)
    if match:
        rest, budget = match[1], _share(match[2], name)
    kind, _, types = rest.rpartition("-")
    kv_type, plus, local_type = types.partition("+")
    if not _is_type(kv_type) or (plus and (not _is_type(local_type) or kind in FULL)):
        kind, kv_type, local_type = rest, "f16", ""
    kv_type, local_type = (_shortest(types) for types in (kv_type, local_type))
    file = kind.startswith("heads=") and len(kind) > len("heads=")
    seeded = re.fullmatch(r"random-heads=[0-9]{1,9}", kind)
    if not (kind in KINDS[:-1] or file or seeded):
        raise RazorError(
            f"{name!r} is not a policy, expected one of {', '.join(KINDS)}; a KV type can follow"
            " (razor-q8_0, full-q8_0/q4_0, razor-f16+q8_0), and a window if there are local heads"
            " (razor-q8_0:1024)"
        )
    return kind, (kv_type, local_type if local_type not in ("", kv_type) else None), budget, window


def _is_type(text: str) -> bool:
    return text.count("/") <= 1 and all(name in KV_TYPES for name in text.split("/"))


def _shortest(types: str) -> str:
    """Return "q8_0" for "q8_0/q8_0"."""
    type_k, type_v = split_type(types)
    return type_k if type_k == type_v else types


def _share(text: str, name: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise RazorError(f"the budget of {name!r} is not a share from 0 to 1")
    return share


def _profile(
    kind: str,
    budget: float | None,
    base: Profile | None,
    shape: ModelShape,
    setup: ModelSetup,
    seed: int,
) -> Profile | None:
    if kind == "full":
        return None
    if kind == "exact":
        return exact_full(shape, "f16").profile
    assert base is not None
    if budget is not None:
        from ..scores import with_budget

        base = with_budget(base, shape, budget)
    if kind == "razor":
        return base
    if kind == "razor-no-comp":
        return replace(base, compensation=False)
    if base.method == "alibi":
        raise RazorError(
            f"the policy {kind!r} chooses other heads than the profile, but the scopes of ALiBi"
            " heads follow from the weights; leave this policy out"
        )
    base = replace(
        base, scope=None
    )  # other heads have no scopes, so all local heads get one window
    flat = base.flat()
    if kind.startswith("heads="):
        from ..converters.head_map import read_other_heads

        file = kind.removeprefix("heads=")
        return replace(base, retrieval=read_other_heads(file, shape, int(flat.sum())))
    chosen, compensation = np.zeros_like(flat), kind == "local"
    if kind.startswith("random-heads"):
        compensation = base.compensation
        rng = np.random.default_rng(int(kind.partition("=")[2] or seed))
        chosen[rng.choice(len(flat), int(flat.sum()), replace=False)] = 1
    return replace(base, retrieval=split_heads(chosen, shape.n_head_kv), compensation=compensation)


def exact_full(shape: ModelShape, kv_type: str) -> Policy:
    """Return a full cache with razor_local's attention, if supported; it is exact on CPUs."""
    every_head = tuple(np.ones(n, np.uint8) for n in shape.n_head_kv)
    return Policy(
        name := f"exact-{kv_type}", name, Profile(every_head, compensation=False), kv_type
    )


def may_share(policy: Policy) -> bool:
    """Return True if a policy can take keys and values from a full cache of its KV type."""
    return policy.profile is not None and policy.local_type in (None, policy.kv_type)


def type_fits(shape: ModelShape, kv_type: str) -> bool:
    """Return True if the K and V rows of the model's heads can be stored in this KV type."""
    type_k, type_v = split_type(kv_type)
    try:
        return bool(row_size(type_k, shape.head_dim_k) and row_size(type_v, shape.head_dim_v))
    except UnsupportedError:
        return False
