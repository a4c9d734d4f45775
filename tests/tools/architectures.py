"""Tries every architecture of the pinned llama.cpp and writes docs/architectures.md.

python -m tests.tools.architectures          # tries all, takes minutes
python -m tests.tools.architectures --page   # only writes the page from docs/architectures.json
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from razor_local.common.markdown import markdown_table
from razor_local.model_file import ModelFile
from tests.support import arch_models, arch_runs, runner, stock
from tests.support.native_build import ROOT, cache_dir, pin

RESULTS = ROOT / "docs/architectures.json"
PAGE = ROOT / "docs/architectures.md"
LIMIT = 1e-4  # of the attention of each head against the reference, with an F32 cache

RUNS, REFUSED, UNTRIED, FAILS = "runs razor", "refused", "not tried", "fails"

HEAD = """\
# Architectures

This page lists every architecture of the pinned llama.cpp. `python -m tests.tools.architectures`
tries them and generates the page from its results (`docs/architectures.json`).

razor changes the KV cache of layers with full attention. Layers with a sliding window and recurrent
layers keep llama.cpp's own caches. *runs razor* means that a tiny random model of the architecture
passed these checks, with and without flash attention:

- Each full-attention layer gets one local head, whose window is longer than the text. The logits
  then have the same bits as those of a stock llama.cpp. (In ALiBi models, layers with several
  groups of heads run without flash attention. They are compared with a stock llama.cpp without
  flash attention.)
- With a window of 64 tokens and a text of 400 (250 if positions are learned), the attention of each
  head in each of these layers differs from the reference by at most 1e-4 (F32 cache).

*refused* means that a context with razor is refused with a sentence that names the reason. The
model runs with a full cache (`--no-razor`). *not tried* means that llama.cpp's own tests have no
model of the architecture: most of these are encoders, draft models and purely recurrent
models.

"""

METAL = """
## Metal

The Metal backend has not been run on a Mac yet. `tests/native/test_metal.py` checks every operation
that razor adds to the graph of a full cache against the rules in the pinned source
(`ggml-metal-device.m`, for GPUs from the M1 on). Metal accepts all of them, so none moves to the
CPU:

- in llama, qwen2vl, gemma2, gemma3, gemma4, gpt-oss, llama4, lfm2, granitehybrid, falcon-h1,
  qwen35, qwen35moe and bloom,
- with heads of 64, 80, 96, 128, 256 and 512,
- with KV types f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 and q4_0,
- with and without flash attention. Flash attention on Metal needs K and V of the same type.
"""


def architectures() -> list[str]:
    """All names in LLM_ARCH_NAMES of the pinned sdist."""
    version, _ = pin()
    with tarfile.open(cache_dir() / f"llama_cpp_python-{version}.tar.gz") as sdist:
        member = f"llama_cpp_python-{version}/vendor/llama.cpp/src/llama-arch.cpp"
        file = sdist.extractfile(member)
        assert file is not None
        text = file.read().decode()
    table = text[text.index("LLM_ARCH_NAMES") :]
    names = re.findall(r'\{ *LLM_ARCH_\w+, *"([^"]+)" *\}', table[: table.index("};")])
    return sorted(name for name in names if name not in ("(unknown)", "clip"))


def parts_of(path: Path) -> str:
    """The caches of a model in words."""
    shape = ModelFile(path).shape
    parts = ["full attention"] if any(shape.n_head_kv) else []
    if shape.sliding is not None:
        parts.append("sliding windows")
    if shape.recurrent_bytes:
        parts.append("recurrent states")
    if shape.shared:
        parts.append("shared caches")
    return ", ".join(parts)


class Workers:
    """Processes that run the library with razor's and with llama.cpp's attention, and the stock
    library. One that ended is started again."""

    def __init__(self) -> None:
        self.running: dict[str, runner.Worker] = {}

    def __call__(self, which: str, *args: Any) -> Any:
        if which not in self.running:
            folder = stock.stock_lib_dir() if which == "stock" else None
            attention = {"RAZOR_LOCAL_CPU_ATTENTION": "off"} if which == "upstream" else {}
            self.running[which] = runner.Worker(folder, attention)
        return self.running[which](*args)

    def close(self) -> None:
        for worker in self.running.values():
            worker.close()
        self.running.clear()


def examine(path: Path, workers: Workers) -> dict[str, Any]:
    """What one architecture does."""
    sentence = workers("razor", arch_runs.refusal, path)
    if sentence is not None:
        why = re.sub(r"^.*?: | not supported, switch razor off.*$", "", sentence)
        return {"result": REFUSED, "why": why}
    problems = []
    for flash_attn in (False, True):
        razor = workers("upstream", arch_runs.razor_logits, path, flash_attn, 500)
        # an ALiBi layer with several KV heads has two groups
        one_group = max(ModelFile(path).shape.n_head_kv) == 1
        flash = flash_attn and (one_group or arch_runs.compensates(path))
        same = np.array_equal(razor, workers("stock", arch_runs.full_logits, path, flash))
        error = workers("razor", arch_runs.attention_error, path, flash_attn)
        if not same or not error <= LIMIT:
            name = "with" if flash_attn else "without"
            problems.append(f"{name} flash attention: same bits {same}, error {error:.1e}")
    if problems:
        return {"result": FAILS, "why": "; ".join(problems)}
    return {"result": RUNS, "parts": parts_of(path)}


def page(results: dict[str, dict[str, Any]]) -> str:
    rows = []
    for arch, found in sorted(results.items()):
        detail = found.get("parts") or found.get("why") or ""
        rows.append([f"`{arch}`", found["result"], detail])
    counts = {what: sum(r["result"] == what for r in results.values()) for what in (RUNS, REFUSED)}
    summary = (
        f"{counts[RUNS]} of {len(results)} architectures run razor, {counts[REFUSED]} are refused"
        " by name.\n\n"
    )
    lines = markdown_table(["architecture", "result", "caches, or why it is refused"], rows)
    lines[1] = "|---|---|---|"
    return HEAD + summary + "\n".join(lines) + "\n" + METAL


def main() -> None:
    if "--page" not in sys.argv[1:]:
        found = arch_models.models()
        results: dict[str, dict[str, Any]] = {}
        workers = Workers()
        for arch in architectures():
            if arch not in found:
                results[arch] = {"result": UNTRIED}
                continue
            try:
                results[arch] = examine(found[arch], workers)
            except Exception as error:  # whatever it is, the next one is tried
                results[arch] = {"result": FAILS, "why": str(error)[:300]}
                workers.close()
            print(arch, results[arch], flush=True)
        workers.close()
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
