"""Report the model, the memory and the speed of a chat as lines of text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..printable import printable
from .params import count_text, size_text

BAR_WIDTH = 50  # columns of the bar of /context
MIN_TOKENS = 64  # the rate of a shorter prompt says little about the speed

if TYPE_CHECKING:
    from ..chat import Chat, Turn
    from ..fit import AutoContext
    from ..llama import Llama
    from ..memory import Memory


def describe(llama: Llama, chosen: AutoContext | None = None) -> str:
    """Return the lines above a chat: model and device, memory, and why razor is off.

    Args:
        chosen: the choice of the context, if it depended on the free memory.
    """
    memory = llama.memory()
    name = llama.metadata.get("general.name") or Path(llama.model_path).name
    parts = (
        f"weights {size_text(memory.weights_bytes)}",
        _kv(memory),
        f"compute {size_text(memory.compute_bytes)}",
        f"context {memory.n_ctx:,} tokens{_why_smaller(chosen)}",
    )
    lines = [
        f"{printable(name[:300], one_line=True)} · {_weights_type(llama)} · {_device(llama)}",
        " · ".join(parts),
    ]
    if llama.plan is not None and llama.plan.has_local_types:
        lines.append(f"KV cache types: {llama.plan.types_text}")
    if not memory.active:
        lines.append(f"{memory.why}, so the full cache runs")
    return "\n".join(lines)


def stats(llama: Llama, conversation: Chat) -> str:
    """Return the lines of /stats."""
    memory, plan, last = llama.memory(), llama.plan, conversation.last
    types = "" if plan is None else f", {plan.types_text}"
    rows = [
        ("device", _device(llama)),
        ("weights", f"{size_text(memory.weights_bytes)}, {_weights_type(llama)}"),
        ("KV cache", _kv(memory).removeprefix("KV cache ") + types),
        ("heads", _heads(llama)),
        ("prompts", _prompts(memory)),
        ("rewind", _rewind(llama)),
        ("compute", f"{size_text(memory.compute_bytes)} of buffers"),
        ("context", f"{conversation.n_used:,} of {memory.n_ctx:,} tokens used"),
    ]
    if last is not None:
        rows += [
            ("prompt", f"{last.n_evaluated:,} new tokens{_prompt_rate(last)}"),
            ("answer", f"{last.n_answer:,} tokens, {last.answer_per_second:.1f} per second"),
        ]
    return "\n".join(f"{name:<9} {value}" for name, value in rows)


def _heads(llama: Llama) -> str:
    memory, plan = llama.memory(), llama.plan
    if not memory.active or plan is None:
        return f"all keep every token: {memory.why}"
    between = "the average of those between" if plan.compensation else "drop those between"
    if not plan.sink_tokens:
        between = between.replace("between", "before")
    first = f"the first {plan.sink_tokens:,} and " if plan.sink_tokens else ""
    return (
        f"{plan.retrieval_kv_heads} of {plan.kv_heads} keep every token; the others keep {first}the"
        f" last {plan.windows_text}, and {between} ({llama.stats().n_folded:,} so far)"
    )


def _prompts(memory: Memory) -> str:
    if not memory.active:
        return "read with full attention"  # and nothing is compressed
    if memory.prefill_why is not None:
        return f"read with the compressed cache: {memory.prefill_why}"
    size = f" (buffers of up to {size_text(memory.prefill_bytes)})" if memory.prefill_bytes else ""
    return f"read with full attention, then compressed{size}"


def _rewind(llama: Llama) -> str:
    memory = llama.memory()
    checkpoints = count_text(memory.checkpoints or 0, "checkpoint")
    checkpoints += f" ({size_text(memory.checkpoint_bytes)})"
    if not memory.active:
        goal = "any token" if memory.checkpoints is None else checkpoints
        return f"the full cache can go back to {goal}"
    back = f"the cache can go back by {llama.stats().n_rollback:,} tokens"
    if memory.checkpoints:
        back += f" and to {checkpoints}"
    if memory.rewind_why is not None:
        return f"{back}; no log: {memory.rewind_why}"
    where = "of memory" if memory.rewind == "ram" else "on disk"
    return f"{back}, with a log of {size_text(memory.rewind_bytes)} {where}"


def numbers(llama: Llama, conversation: Chat, turn: Turn) -> str:
    """Return the line of numbers under an answer."""
    memory = llama.memory()
    return (
        f"prompt {turn.n_evaluated} new tokens{_prompt_rate(turn, 'tok/s')}"
        f" | answer {turn.n_answer} tokens, {turn.answer_per_second:.1f} tok/s"
        f" | context {conversation.n_used}/{memory.n_ctx} | {_kv(memory)}"
    )


def context(chat: Chat, ascii_only: bool) -> str:
    """Return the lines of /context: the numbers, and a bar of what is used, kept and free."""
    n_ctx, used = chat.model.n_ctx(), chat.n_used
    kept = min(chat.reserve, max(n_ctx - used, 0))
    free = n_ctx - used - kept
    n_used, n_kept = (min(-(-n * BAR_WIDTH // n_ctx), BAR_WIDTH) for n in (used, kept))
    n_kept = min(n_kept, BAR_WIDTH - n_used)
    marks = "#+." if ascii_only else "█▒░"
    widths = (n_used, n_kept, BAR_WIDTH - n_used - n_kept)
    bar = "".join(mark * width for mark, width in zip(marks, widths, strict=True))
    dropped = f" ({chat.n_dropped} were dropped)" if chat.n_dropped else ""
    larger = ""
    if chat.n_left > free:
        larger = f"\na longer message, up to {chat.n_left} tokens, drops the oldest messages"
    return (
        f"{used} of {n_ctx} tokens used by {count_text(len(chat.messages), 'message')}{dropped};"
        f" {free} left for the next message, {kept} kept for its answer{larger}\n"
        f"[{bar}] {marks[0]} used, {marks[1]} kept, {marks[2]} free"
    )


def _prompt_rate(turn: Turn, unit: str = "per second") -> str:
    if turn.n_evaluated < MIN_TOKENS:
        return ""
    return f", {turn.prompt_per_second:.1f} {unit}"


def _kv(memory: Memory) -> str:
    size = size_text(memory.kv_bytes)
    if not memory.active:
        return f"KV cache {size} (full)"
    full = size_text(memory.kv_bytes_full)
    return f"KV cache {size} instead of {full} (−{1 - memory.share:.0%})".replace("%", " %")


def _why_smaller(chosen: AutoContext | None) -> str:
    if chosen is None or chosen.n_ctx == chosen.n_max:
        return ""
    from ..fit import RAM

    where = "free memory" if chosen.place == RAM else f"free memory of {chosen.place}"
    free = size_text(chosen.free)
    return f" (the largest that fits into {free} of {where} with 1 GiB to spare)"


def _weights_type(llama: Llama) -> str:
    """Return the quantization as files name it, such as "Q4_K_M"."""
    from ..native.loaded import C

    name = (C.llama_ftype_name(C.llama_model_ftype(llama.model)) or b"").decode()
    name = re.sub(r" - (Small|Medium|Large)\b", lambda size: f"_{size[1][0]}", name)
    return re.sub(r"\(guessed\)|^all | - .*", "", name).strip()


def _device(llama: Llama) -> str:
    from ..available_memory import device_description
    from ..native.loaded import C

    n_threads = llama.n_threads
    cpu = f"CPU, {n_threads} thread{'s' if n_threads != 1 else ''}"
    names = [device_description(name) for name in llama.memory().devices]
    if not names:
        return cpu
    n_layers = C.llama_model_n_layer(llama.model) + 1  # and the output
    n_offloaded = llama.model_params.n_gpu_layers
    if n_offloaded >= n_layers:
        return " and ".join(names)
    return f"{' and '.join(names)} ({n_offloaded} of {n_layers} layers) and {cpu}"
