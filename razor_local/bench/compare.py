"""Compare two runs of a benchmark."""

from __future__ import annotations

from typing import Any

from ..common.compact_json import compact_json
from ..common.markdown import markdown_table, one_line
from ..errors import RazorError
from .cells import kv, mib, number, times
from .figures import Report, types_of


def compare_rows(here: Report, there: Report) -> list[dict[str, Any]]:
    """Pair the rows that both runs have: the value in A and in B, and the change B / A."""
    others = {(*types_of(r), r["depth"]): r for r in there.rows}
    found = []
    for row in here.rows:
        other = others.get((*types_of(row), row["depth"]))
        if other is None:
            continue
        entry = {name: row[name] for name in ("type_k", "type_v", "depth")}
        for name in (
            "razor_tok_s",
            "full_tok_s",
            "decode_ratio_full",
            "razor_prefill_tok_s",
            "full_prefill_tok_s",
            "razor_first_token_s",
            "razor_kv_bytes",
            "razor_peak_rss",
        ):
            a, b = row[name], other[name]
            entry |= {f"{name}_a": a, f"{name}_b": b, f"{name}_change": b / a if a and b else None}
        found.append(entry)
    return found


def differences(here: Report, there: Report) -> list[str]:
    """Return a sentence for each difference between the setups of two runs."""
    found = []
    for path in (
        "model.name", "model.fingerprint", "model.retrieval_kv_heads", "model.window_min",
        "model.window_divisor", "machine.cpu", "machine.cores", "machine.gpus", "setup.n_threads",
        "setup.n_gpu_layers", "settings.n_ctx", "settings.type_k_local",
        "settings.type_v_local", "library.build", "code.commit",
    ):  # fmt: skip
        part, name = path.split(".")
        a, b = here.head[part].get(name), there.head[part].get(name)
        if a != b:
            found.append(f"{path}: {one_line(str(a))} in A, {one_line(str(b))} in B")
    return found


def format_comparison(here: Report, there: Report, kind: str) -> str:
    """Format compare_rows() as one of FORMATS. Raises RazorError if no row is in both runs."""
    rows = compare_rows(here, there)
    if not rows:
        raise RazorError("the two runs have no KV type and depth in common to compare")
    if kind == "json":
        return compact_json({"differences": differences(here, there), "rows": rows})
    columns = {
        "razor decode tok/s": "razor_tok_s",
        "full decode tok/s": "full_tok_s",
        "razor / full": "decode_ratio_full",
        "razor prefill tok/s": "razor_prefill_tok_s",
        "razor first token s": "razor_first_token_s",
    }
    titles = ["KV type", "tokens in cache"]
    for title in columns:
        titles += [f"{title}: A", "B", "B / A"]
    lines = markdown_table(
        [*titles, "razor KV MiB: A", "B"],
        [
            [
                kv(row),
                f"{row['depth']:,}",
                *(
                    cell
                    for name in columns.values()
                    for cell in (
                        number(row[f"{name}_a"]),
                        number(row[f"{name}_b"]),
                        times(row[f"{name}_change"]),
                    )
                ),
                mib(row["razor_kv_bytes_a"]),
                mib(row["razor_kv_bytes_b"]),
            ]
            for row in rows
        ],
    )
    notes = [f"- {line}" for line in differences(here, there)]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"
