"""Reports on a chat as lines of text: its model, its cache and its speed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..printable import printable

BAR_WIDTH = 50  # columns of the bar of /context

if TYPE_CHECKING:
    from ..chat import Chat, Turn
    from ..llama import Llama


def describe(llama: Llama) -> str:
    """Return one line: the model, its context, its heads and the size of the cache."""
    memory, plan = llama.memory(), llama.plan
    name = llama.metadata.get("general.name") or Path(llama.model_path).name
    name = printable(name[:300], one_line=True)
    if not memory.active or plan is None:
        return f"{name}, {memory.n_ctx} tokens; razor is off ({memory.why}); {_kv(memory)}"
    return (
        f"{name}, {memory.n_ctx} tokens; {plan.retrieval_kv_heads} of {plan.kv_heads} KV heads keep"
        f" every token, the others {plan.sink_tokens} and the last {plan.window}; {_kv(memory)}"
    )


def stats(llama: Llama, conversation: Chat) -> str:
    """Return the lines of /stats."""
    memory, plan = llama.memory(), llama.plan
    lines = [describe(llama)]
    if memory.active and plan is not None:
        seq = llama.stats()
        lines.append(
            f"cache: {seq.n_tokens} tokens, {seq.n_folded} of them folded in local heads"
            f" (frontier {seq.frontier}), types {plan.type_k}/{plan.type_v}"
        )
    if plan is not None:
        sizes = ", ".join(f"{t} {_mib(plan.kv_bytes_full_as(t))}" for t in _full_types(plan))
        lines.append(f"full cache of {memory.n_ctx} tokens: {sizes}")
    if conversation.last is not None:
        lines.append(numbers(llama, conversation, conversation.last))
    return "\n".join(lines)


def numbers(llama: Llama, conversation: Chat, turn: Turn) -> str:
    """Return the line of numbers under an answer."""
    memory = llama.memory()
    prompt = f"{turn.n_evaluated} new tokens, {turn.prompt_per_second:.1f} tok/s"
    return (
        f"prompt {prompt} | answer {turn.n_answer} tokens, {turn.answer_per_second:.1f} tok/s"
        f" | context {conversation.n_used}/{memory.n_ctx} | {_kv(memory)}"
    )


def context(chat: Chat, ascii_only: bool) -> str:
    """Return the lines of /context: the numbers, and a bar of what is used, kept and free."""
    n_ctx, used, kept = chat.model.n_ctx(), chat.n_used, chat.reserve
    n_used, n_kept = (min(-(-n * BAR_WIDTH // n_ctx), BAR_WIDTH) for n in (used, kept))
    n_kept = min(n_kept, BAR_WIDTH - n_used)
    marks = "#+." if ascii_only else "█▒░"
    widths = (n_used, n_kept, BAR_WIDTH - n_used - n_kept)
    bar = "".join(mark * width for mark, width in zip(marks, widths, strict=True))
    return (
        f"{used} of {n_ctx} tokens used by {len(chat.messages)} messages; {chat.n_left} left for"
        f" the next message, {kept} kept for its answer\n"
        f"[{bar}] {marks[0]} used, {marks[1]} kept, {marks[2]} free"
    )


def _full_types(plan: Any) -> list[str]:
    quantized = [t for t in ("q8_0", "q4_0") if plan.shape.head_dim_k % 32 == 0]
    return ["f16", *(quantized if plan.shape.head_dim_v % 32 == 0 else [])]


def _kv(memory: Any) -> str:
    if not memory.active:
        return f"KV {_mib(memory.kv_bytes)} (full cache)"
    full = _mib(memory.kv_bytes_full)
    return f"KV {_mib(memory.kv_bytes)} of {full} full ({memory.share:.0%})"


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"
