"""Plan a benchmark: batches of contexts side by side, and the measurements in each of them.

A context is as large as its depth needs, because razor's window is a share of the context: a small
depth in a large context would have another plan. Settings.n_ctx sets one size for all depths.

Batches of prefill begin where those of a prompt do, at multiples of the largest batch. Every fold
block divides that size, and a batch that crossed the end of a block would be split.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import RazorError
from ..gguf.hyper_parameters import MAX_N_CTX
from ..plan import N_CTX_PAD, make_plan

if TYPE_CHECKING:  # it imports numpy, and --help names KINDS
    from ..model_shape import ModelShape
    from ..plan import Plan
    from ..profile import Profile

MIN_DEPTH = 8192  # the smallest context is made for this depth: razor starts at about 4k tokens
ROOM = 512  # tokens of a context beyond its depth, for a batch of prefill
CHUNKS = (512, 256, 128, 64)  # tokens of a batch of prefill
ALIGNED = CHUNKS[0]  # depths of prefill are multiples of this, as it is of every fold block
SHORT_PROMPT = 512  # tokens of the longest prompt that is always prefilled for real
# Kinds of steps in the order in which a batch runs them. The real prefill comes last because it
# replaces the random rows.
KINDS = ("memory", "decode", "energy", "prefill", "prompt", "fold", "real_prefill")


@dataclass(frozen=True)
class Side:
    """One of the contexts that are compared."""

    name: str  # razor, full, full_f16
    razor: bool
    type_k: str
    type_v: str
    n_ctx: int
    type_k_local: str | None = None  # of local heads
    type_v_local: str | None = None

    def plan(self, shape: ModelShape, profile: Profile) -> Plan:
        """Return the plan of the context.

        With a retrieval share of 1 the razor side is a full cache with razor's attention kernel.
        Layers with a sliding window keep that window on both sides, as in llama.cpp's programs.

        Raises:
            RazorError: a razor context would run a full cache though it has local heads.
        """
        run = profile if self.razor else None
        plan = make_plan(
            shape, run, self.n_ctx, self.type_k, self.type_v, swa_full=False,
            type_k_local=self.type_k_local, type_v_local=self.type_v_local,
        )  # fmt: skip
        if self.razor and not plan.active and not profile.flat().all():
            raise RazorError(
                f"razor does nothing at {plan.n_ctx} tokens ({plan.why_inactive});"
                " raise -c or set a smaller window with --window-min"
            )
        return plan


@dataclass(frozen=True)
class Settings:
    """The measurements of a run.

    Attributes:
        depths: tokens in the cache.
        types: (K, V) of razor and of the full cache it is compared with. Unless both are f16, a
            full f16 cache runs too.
        n_ctx: tokens of every context; 0 makes each as large as its depth needs.
        max_pairs: maximum number of turns per decode measurement.
        seconds: time that one measurement may take before it makes fewer turns.
        real_prefill: tokens that are prefilled for real to check the random caches, with the first
            types, in every context that holds them. 0 takes as many as fold, in the smallest
            context; None makes no check.
        type_k_local, type_v_local: types of razor's local heads; None: those in types.
    """

    depths: tuple[int, ...] = (0, 8192, 32768)
    types: tuple[tuple[str, str], ...] = (("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q4_0"))
    n_ctx: int = 0
    max_pairs: int = 100
    seconds: float = 15.0
    real_prefill: int | None = None
    type_k_local: str | None = None
    type_v_local: str | None = None


@dataclass(frozen=True)
class Step:
    """One measurement.

    Attributes:
        kind: one of KINDS.
        depth: its depth, or the number of its tokens.
        side: the name of the side for which it is made, "" for all sides.
    """

    kind: str
    depth: int
    side: str = ""

    @property
    def cost(self) -> float:
        """Estimate the seconds with a 1B model on two cores, for the progress."""
        d = self.depth
        return {
            "memory": 2 + d / 16000,
            "decode": min(20, 4 + d / 512) + d / 3000,
            "prompt": 1 + d / 12,
            "prefill": 17 + d / 2000,
            "fold": 12.0,
            "energy": 6.0,
            "real_prefill": 20 + d / 15,
        }[self.kind]


@dataclass(frozen=True)
class Batch:
    """Contexts that are open together and the measurements on them. sides[0] is razor's."""

    sides: tuple[Side, ...]
    steps: tuple[Step, ...]

    def key(self, step: Step) -> dict[str, Any]:
        """Return the fields that identify a record."""
        razor = self.sides[0]
        return {
            "kind": step.kind,
            "type_k": razor.type_k,
            "type_v": razor.type_v,
            "n_ctx": razor.n_ctx,
            "depth": step.depth,
            "side": step.side,
        }


def make_batches(
    settings: Settings, shape: ModelShape, profile: Profile, energy: bool = False
) -> list[Batch]:
    """Plan all measurements, small contexts first. Raises RazorError if one is impossible."""
    # 1. Group the depths by the size of their context.
    if not settings.depths or not settings.types:
        raise RazorError("there is nothing to measure: name a depth and a KV type")
    groups: dict[int, list[int]] = {}
    for depth in sorted(set(settings.depths)):
        groups.setdefault(_context_size(settings, shape, depth), []).append(depth)
    # 2. Make a batch for each size and pair of KV types.
    batches = []
    for n_ctx, depths in sorted(groups.items()):
        for i, types in enumerate(settings.types):
            sides = _sides(types, n_ctx, settings.type_k_local, settings.type_v_local)
            plan = sides[0].plan(shape, profile)
            for side in sides[1:]:
                side.plan(shape, profile)  # raises if a type does not fit the head size
            steps = [Step("memory", depths[-1], side.name) for side in sides]
            # At depth 0 a large context costs as much as a small one: measure it once.
            points = {0} if n_ctx == min(groups) else set()
            points |= {_point(depth, n_ctx) for depth in depths if depth > SHORT_PROMPT}
            fills = _round_up(plan.sink_tokens + plan.window + plan.block, ALIGNED)
            if fills < max(points, default=0):
                points.add(fills)
            steps += [Step("decode", depth) for depth in depths]
            steps += [Step("prompt", depth) for depth in depths if 0 < depth <= SHORT_PROMPT]
            real = _real_tokens(settings, groups, n_ctx, fills) if i == 0 else 0
            if real:
                points |= {_point(real, n_ctx)}
                points |= {fills} if fills < max(points) else set()
            steps += [Step("prefill", point) for point in sorted(points)]
            steps += [Step("fold", depths[-1])]
            if energy:
                steps += [Step("energy", depths[-1])]
            if real:
                steps += [Step("real_prefill", real)]
            batches.append(Batch(sides, tuple(steps)))
    return batches


def _context_size(settings: Settings, shape: ModelShape, depth: int) -> int:
    if settings.n_ctx:
        n_ctx = _round_up(settings.n_ctx, N_CTX_PAD)
        if depth + 1 > n_ctx:
            raise RazorError(
                f"depth {depth} does not fit into a context of {n_ctx} tokens; raise -c"
            )
        return n_ctx
    least = min(MIN_DEPTH, shape.n_ctx_train or MIN_DEPTH)
    n_ctx = _round_up(max(depth, least) + ROOM, N_CTX_PAD)
    if n_ctx > MAX_N_CTX:
        raise RazorError(f"depth {depth} is more than a context can hold ({MAX_N_CTX} tokens)")
    return n_ctx


def _sides(
    types: tuple[str, str], n_ctx: int, type_k_local: str | None, type_v_local: str | None
) -> tuple[Side, ...]:
    sides = [
        Side("razor", True, *types, n_ctx, type_k_local, type_v_local),
        Side("full", False, *types, n_ctx),
    ]
    if types != ("f16", "f16"):
        sides.append(Side("full_f16", False, "f16", "f16", n_ctx))
    return tuple(sides)


def _point(depth: int, n_ctx: int) -> int:
    """Return the last aligned depth, up to this one, where the smallest batch still fits."""
    return min(depth, n_ctx - CHUNKS[-1]) // ALIGNED * ALIGNED


def _real_tokens(settings: Settings, sizes: Collection[int], n_ctx: int, fills: int) -> int:
    """Return the tokens of the real prefill in a context of n_ctx, 0 if it has none.

    Args:
        settings: see Settings.real_prefill.
        sizes: the sizes of all contexts.
        n_ctx: the size of this context.
        fills: tokens after which the cache folds.
    """
    wanted, largest = settings.real_prefill, max(sizes)
    if wanted is None or (wanted == 0 and n_ctx > min(sizes)):
        return 0
    real = wanted or min(fills + ALIGNED, n_ctx - CHUNKS[-1])
    if real > largest - CHUNKS[-1]:
        raise RazorError(
            f"a real prefill of {real} tokens does not fit into the largest context of {largest}"
            " tokens; choose fewer"
        )
    return real if real <= n_ctx - CHUNKS[-1] else 0


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
