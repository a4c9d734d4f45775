"""razor-local fit: show which context fits which memory, without loading the model."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import RazorError, UnsupportedError
from ..plan import N_CTX_PAD
from ..printable import printable
from .params import (
    BATCH_SIZE,
    CACHE_TYPE_LOCAL_K,
    CACHE_TYPE_LOCAL_V,
    DEFAULT_MODEL,
    FLASH_ATTN,
    KV_TYPE,
    N_GPU_LAYERS,
    RPC,
    UBATCH_SIZE,
    ContextSize,
    Number,
    Size,
    model_argument,
    note_damaged_profile,
)
from .parser import Command
from .terminal import ProgressBar, echo, table_console

if TYPE_CHECKING:
    from rich.table import Table

    from ..fit import Candidate, ContextOptions, DryModel, Need
    from ..profile import Profile

PATH = click.Path(path_type=Path)
TYPES = ("f16", "q8_0", "q4_0")  # side by side

EPILOG = """
\b
Examples:
  razor-local fit model.gguf                       contexts for common cards and this machine
  razor-local fit model.gguf --vram 8GiB           the largest context for 8 GiB
  razor-local fit model.gguf -c 131072             the memory for a context
  razor-local fit model.gguf -c 131072 --vram 24G  whether it fits
  razor-local fit model.gguf -c auto --json        the largest context for this machine
"""


@dataclass(frozen=True)
class Memory:
    """Something to fit into. limits: bytes by name of the place, see fit.Need.room."""

    name: str
    limits: dict[str, int]


@click.command(cls=Command, epilog=EPILOG)
@model_argument(DEFAULT_MODEL)
@click.option(
    "-c",
    "--ctx-size",
    type=ContextSize(),
    metavar="N",
    help="Estimate the memory of this context (tokens; 0: trained length, auto: largest that fits"
    " this machine).",
)
@click.option(
    "--vram",
    type=Size(),
    metavar="SIZE",
    help="Memory available on each graphics card, such as 8GiB.",
)
@click.option("--ram", type=Size(), metavar="SIZE", help="Main memory available, such as 16GiB.")
@N_GPU_LAYERS
@RPC
@BATCH_SIZE
@UBATCH_SIZE
@click.option(
    "-ctk",
    "--cache-type-k",
    type=KV_TYPE,
    help="Type of the K cache.  [default: f16, q8_0 and q4_0]",
)
@click.option(
    "-ctv", "--cache-type-v", type=KV_TYPE, help="Type of the V cache.  [default: same as -ctk]"
)
@CACHE_TYPE_LOCAL_K
@CACHE_TYPE_LOCAL_V
@FLASH_ATTN
@click.option("--sidecar", type=PATH, help="Sidecar with the profile of the model.")
@click.option(
    "--budget",
    "--retrieval",
    "budget",
    type=Number(0, 1),
    metavar="SHARE",
    help="Share of retrieval heads, chosen by the scores in the profile.",
)
@click.option("--beyond", is_flag=True, help="Also search contexts longer than the trained length.")
@click.option(
    "--plot", type=PATH, metavar="PICTURE", help="Draw memory by context (.png, .svg, .pdf)."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def fit(model: Path, **given: Any) -> None:
    """Estimate the memory of a context of MODEL, or the context that fits a memory.

    Each is shown with a full cache and with razor. Only headers are read. Weights, KV cache and
    compute buffers are counted as this build of llama.cpp would allocate them. Without a profile,
    the paper's share of retrieval heads is assumed.

    The table leaves 1 GiB of each card and of this machine free; --vram and --ram are used in full.
    """

    from ..fit import MAX_DRY_RUN, ContextOptions, DryModel, make_candidates, no_room

    with ProgressBar() as bar, DryModel(model, n_gpu_layers=given["n_gpu_layers"]) as dry:
        n_ctx = given["ctx_size"] if isinstance(given["ctx_size"], int) else None
        memories = _memories(dry, given)
        profile, source = _profile(dry, given["sidecar"], given["budget"])
        flash_attn = given["flash_attn"] == "on"
        if given["flash_attn"] == "auto":
            flash_attn = dry.flash_attention(*_types(given)[0], given["cache_type_local_v"])
        base = ContextOptions(
            flash_attn=flash_attn,
            n_batch=given["batch_size"],
            n_ubatch=given["ubatch_size"],
            type_k_local=given["cache_type_local_k"],
            type_v_local=given["cache_type_local_v"],
        )
        smallest = N_CTX_PAD if n_ctx is None else n_ctx
        candidates = make_candidates(dry, profile, _types(given), base, smallest)
        runs = [c for c in candidates if c.refused is None]
        if source == "paper" and not any(c.cache == "razor" for c in runs):
            profile = source = None
        if not runs:
            raise RazorError(candidates[0].refused)
        n_max = MAX_DRY_RUN if given["beyond"] else 0
        found: dict[str, list[Need | None]] = {}
        for done, c in enumerate(runs):
            bar(done, len(runs), "planning")
            found[c.name] = (
                [dry.need(n_ctx, c.options)]
                if n_ctx is not None
                else [dry.largest(memory.limits, c.options, n_max) for memory in memories]
            )
        if len(memories) == 1 and not any(needs[0] for needs in found.values()):
            raise RazorError(no_room(dry, memories[0].limits, runs[-1].options))
        if given["plot"] is not None:
            _plot(dry, runs, given["plot"], given["beyond"])
        report = _report(dry, profile, source, base, memories, candidates, found)
    if given["as_json"]:
        return echo(json.dumps(report, indent=2))
    _print_head(report)
    if len(memories) > 1:
        _print_cards(report)
    else:
        _print_needs(report)
    if n_ctx is None:
        _print_trained(report)


def _memories(dry: DryModel, given: dict[str, Any]) -> list[Memory]:
    """Return the memories to fill. A given context is compared with at most one of them."""
    from ..fit import CARDS, MARGIN, RAM

    devices, vram, ram = dry.devices(), given["vram"], given["ram"]
    if vram is not None and ram is not None and not devices:
        raise click.UsageError(
            "this build has no GPU backend, so there is only one memory; pass --vram or --ram, not"
            " both"
        )
    if vram is not None or ram is not None:
        limits = {} if vram is None else dict.fromkeys(devices or (RAM,), vram)
        limits |= {} if ram is None else {RAM: ram}
        return [Memory("given", limits)]
    here = Memory("this machine", {name: max(n - MARGIN, 0) for name, n in dry.available().items()})
    if given["ctx_size"] == "auto":
        return [here]
    if given["ctx_size"] is not None:
        return []
    cards = [Memory(f"{n >> 30} GiB", dict.fromkeys(devices or (RAM,), n - MARGIN)) for n in CARDS]
    return [*cards, here]


def _types(given: dict[str, Any]) -> list[tuple[str, str]]:
    k, v = given["cache_type_k"], given["cache_type_v"]
    return [(k or v, v or k)] if k or v else [(t, t) for t in TYPES]


def _profile(
    dry: DryModel, sidecar: Path | None, budget: float | None
) -> tuple[Profile | None, str | None]:
    """Return the profile for razor and its source."""
    from ..errors import ProfileError
    from ..fit import paper_profile

    if dry.shape is None:
        if sidecar is not None or budget is not None:
            raise ProfileError(f"razor cannot run {dry.path}")
        return None, None
    found = dry.file.find_profile(sidecar, budget)
    if sidecar is None:
        note_damaged_profile(dry.file, found)
    if found is None:
        if budget is not None:
            raise dry.file.no_profile()
        if dry.shape.max_alibi_bias:  # the scopes depend on the weights
            return None, None
        return paper_profile(dry.shape), "paper"
    return found.profile, found.source


def _report(
    dry: DryModel,
    profile: Profile | None,
    source: str | None,
    base: ContextOptions,
    memories: list[Memory],
    candidates: list[Candidate],
    found: dict[str, list[Need | None]],
) -> dict[str, Any]:
    """Return the report for --json; "needs" of a plan are in the order of "memories"."""
    from ..available_memory import available_ram, device_memory

    def described(need: Need | None, memory: Memory | None) -> dict[str, Any] | None:
        if need is None:
            return None
        return need.to_dict() | {"fits": memory and need.room(memory.limits) >= 0}

    heads = [] if profile is None else profile.flat().tolist()
    devices = {name: device_memory(name) for name in dry.devices()}
    columns: list[Memory | None] = [*memories] or [None]
    return {
        "model": {
            "path": str(dry.path),
            "name": dry.shape.name if dry.shape else "",
            "n_ctx_train": dry.n_ctx_train,
            "weights_bytes": dry.need(N_CTX_PAD).weights,
        },
        "profile": source
        and {"source": source, "retrieval_kv_heads": sum(heads), "kv_heads": len(heads)},
        "flash_attn": base.flash_attn,
        "n_ubatch": base.n_ubatch,
        "ram_available_bytes": available_ram(),
        "devices": [
            {"name": name, "free_bytes": free, "total_bytes": total}
            for name, (free, total) in devices.items()
        ],
        "memories": [{"name": m.name, "limits": m.limits} for m in memories],
        "plans": [
            {
                "name": c.name,
                "cache": c.cache,
                "type_k": c.options.type_k,
                "type_v": c.options.type_v,
                "type_k_local": c.options.type_k_local or c.options.type_k,
                "type_v_local": c.options.type_v_local or c.options.type_v,
                "refused": c.refused,
                "needs": [
                    described(need, memory)
                    for need, memory in zip(found[c.name], columns, strict=True)
                ]
                if c.name in found
                else [],
            }
            for c in candidates
        ],
    }


def _print_head(report: dict[str, Any]) -> None:
    console, model, profile = table_console(), report["model"], report["profile"]
    name = printable(model["name"][:300], one_line=True)
    trained = model["n_ctx_train"]
    console.print(
        f"model    {name or 'without a name'}: {_mib(model['weights_bytes'])} MiB of weights,"
        f" trained for {trained:,} tokens"
    )
    if profile is None:
        console.print(
            "profile  none, so only full caches are planned; 'razor-local convert' makes one if"
            " razor can run the model"
        )
    else:
        n, total = profile["retrieval_kv_heads"], profile["kv_heads"]
        where = {
            "paper": "none: planned with the paper's shares,",
            "file": "in the file:",
            "sidecar": "in the sidecar:",
            "cache": "in the profile cache:",
            "list": "in the list that razor-local ships for the model:",
        }[profile["source"]]
        console.print(
            f"profile  {where} {n} of {total} KV heads as retrieval heads ({n / max(total, 1):.1%})"
        )
    devices = ", ".join(device["name"] for device in report["devices"])
    console.print(
        f"memory   {f'RAM and {devices}' if devices else 'RAM only (no GPU in this build)'};"
        f" ubatches of {report['n_ubatch']} tokens, flash attention"
        f" {'on' if report['flash_attn'] else 'off'}"
    )
    refused: dict[str, list[str]] = {}
    for plan in report["plans"]:
        if plan["refused"]:
            refused.setdefault(plan["refused"], []).append(plan["name"])
    for reason, names in refused.items():
        console.print(f"not {', '.join(names)}: {reason}")
    console.print()


def _print_cards(report: dict[str, Any]) -> None:
    """Print the largest contexts: a line per memory, a column per plan."""
    plans = [plan for plan in report["plans"] if not plan["refused"]]
    table = _table("memory", *(plan["name"] for plan in plans))
    for i, memory in enumerate(report["memories"]):
        needs = [plan["needs"][i] for plan in plans]
        table.add_row(memory["name"], *(f"{need['n_ctx']:,}" if need else "-" for need in needs))
    console = table_console()
    console.print("largest context in tokens, leaving 1 GiB of each memory free:\n")
    console.width = max(console.width, 256)  # types of local heads make long names
    console.print(table)
    limits = report["memories"][-1]["limits"].items()
    here = ", ".join(f"{n / 2**30:.1f} GiB of {name}" for name, n in limits)
    console.print(f"\nthis machine: {here} available")


def _print_needs(report: dict[str, Any]) -> None:
    """Print one memory or one context: a line per plan."""
    plans = [plan for plan in report["plans"] if not plan["refused"]]
    places = ["RAM", *(device["name"] for device in report["devices"])]
    columns = ["context", "weights", "KV", "compute", "total"]
    columns += places if len(places) > 1 else []
    fits = bool(report["memories"])
    table = _table("plan", *columns, *(["fits"] if fits else []))
    for plan in plans:
        (need,) = plan["needs"]
        if need is None:
            table.add_row(plan["name"], "-", *("" for _ in columns[1:]), "no")
            continue
        sizes = [need[f"{part}_bytes"] for part in ("weights", "kv", "compute", "total")]
        totals = {place["name"]: place["total_bytes"] for place in need["places"]}
        sizes += [totals.get(name, 0) for name in places] if len(places) > 1 else []
        answer = ["yes" if need["fits"] else "no"] if fits else []
        table.add_row(plan["name"], f"{need['n_ctx']:,}", *map(_mib, sizes), *answer)
    table_console().print("tokens and MiB:\n")
    table_console().print(table)
    for plan in plans:
        need = plan["needs"][0]
        if plan["cache"] == "razor" and need and not need["active"]:
            table_console().print(f"{plan['name']} runs the full cache: {need['why_inactive']}")
    for memory in report["memories"]:
        limits = ", ".join(f"{_mib(n)} MiB of {name}" for name, n in memory["limits"].items())
        table_console().print(f"\navailable: {limits}")


def _print_trained(report: dict[str, Any]) -> None:
    trained = report["model"]["n_ctx_train"]
    needs = [need for plan in report["plans"] for need in plan["needs"] if need]
    if trained and any(need["n_ctx"] - 256 < trained <= need["n_ctx"] for need in needs):
        table_console().print(
            f"{trained:,} tokens is the trained length; --beyond searches further"
        )


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    return table


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.1f}"


def _plot(dry: DryModel, runs: list[Candidate], path: Path, beyond: bool) -> None:
    """Draw the memory of each plan by context, and the cards."""
    from ..common.figure import make_figure, save_figure
    from ..fit import CARDS, MAX_DRY_RUN

    figure = make_figure(path, (8, 5), "look at the numbers with --json")
    top = dry.n_ctx_train or 131072
    top = dry.padded(min(8 * top if beyond else top, MAX_DRY_RUN))
    sizes = sorted({dry.padded(max(round(top * i / 16), 1)) for i in range(17)})
    axes = figure.add_subplot()

    def total(n: int, c: Candidate) -> float:
        try:
            return dry.need(n, c.options).total / 2**30
        except UnsupportedError:  # more than a device takes in one piece
            return math.nan

    highest = 0.0
    for c in runs:
        totals = [total(n, c) for n in sizes]
        highest = max([highest, *(t for t in totals if t > highest)])
        style = "--" if c.cache == "full" else "-"
        color = f"C{[x.options.type_k for x in runs].index(c.options.type_k)}"
        axes.plot(sizes, totals, style, color=color, label=c.name)
    for card in CARDS:
        if card / 2**30 < 1.1 * highest:
            axes.axhline(card / 2**30, color="0.7", linewidth=0.8)
            axes.annotate(f"{card >> 30} GiB", (sizes[-1], card / 2**30), fontsize=7, ha="right")
    name = dry.shape.name if dry.shape else dry.path.name
    axes.set(
        title=printable(name[:100], one_line=True),
        xlabel="context in tokens",
        ylabel="GiB of weights, KV cache and compute buffers",
        ylim=(0, None),
    )
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend()
    figure.tight_layout()
    save_figure(figure, path)
