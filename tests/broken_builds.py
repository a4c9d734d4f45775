"""Shows that the native tests can fail: builds the library broken in one place at a time.

    python tests/broken_builds.py            # every break; prints which tests notice it
    python tests/broken_builds.py fold mask  # the breaks whose name contains one of these

Exits with 1 if a break goes unnoticed. Takes a full build the first time, then half a minute of
compilation and some minutes of tests per break; the working tree is left alone.
"""

# ruff: noqa: E501 - a table of texts of the sources

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from stock import ROOT, _cache_dir, _run, _tool

CACHE, PLAN, RAZOR = "llama-kv-cache-razor.cpp", "llama-razor-plan.h", "llama-razor.cpp"


@dataclass(frozen=True)
class Break:
    """One text of one file of native/src replaced by another; tests: what is run (pytest -k)."""

    name: str
    file: str
    old: str
    new: str
    tests: str


REFERENCE = "reference and (matrix or f32_cache or single_token or threads or own)"
STATE = "stateful"

BREAKS = [
    Break("mask-without-log-n", CACHE, "const double n_folded = step.frontier - plan.sink_tokens;", "const double n_folded = 1;", REFERENCE),
    Break("mask-without-second-cell", CACHE, "rest > 0.0 ?", "false ?", REFERENCE),
    Break("mask-without-sinks", CACHE, "p < std::min(plan.sink_tokens, step.pos0)", "p < 0", REFERENCE),
    Break("fold-dropped", CACHE, "build_fold(g, layer->v, layer->v_sum);", "", REFERENCE),
    Break("fold-off-by-one", CACHE, "rows[i] = plan.cell(step.fold_from + i);", "rows[i] = plan.cell(step.fold_from + i + 1);", REFERENCE),
    Break("fold-starts-from-old-sum", CACHE, "step.fold_from == plan.sink_tokens ? kv::SLOT_ZERO : 1 - step.slot", "1 - step.slot", STATE),
    Break("frontier-late", PLAN, "start - window > sink_tokens ? start - window", "start - window > sink_tokens ? start - window - 1", REFERENCE),
    Break("ring-too-short", PLAN, "(pos - sink_tokens) % ring()", "(pos - sink_tokens) % (window + block - 8)", "native and not memory"),
    Break("heads-not-gathered", CACHE, "res.identity    = retrieval_first || res.local_first;", "", "reference or invariance"),
    Break("heads-out-not-gathered", CACHE, "data_out[h*n_gqa + j]    = i_kv*n_gqa + j;", "data_out[h*n_gqa + j]    = h*n_gqa + j;", "reference or invariance"),
    Break("ubatch-crosses-blocks", CACHE, "std::min(n_ubatch, plan.block - pos % plan.block)", "n_ubatch", "reference or invariance"),
    Break("graph-reused-for-other-fold", CACHE, "step.n_kv == n_kv && step.n_fold == n_fold;\n}\n\nvoid", "step.n_kv == n_kv;\n}\n\nvoid", "reference or invariance or stateful"),
    Break("rollback-without-unfold", CACHE, "        unfold(st, frontier);\n    }\n\n    return", "    }\n\n    return", STATE),
    Break("rollback-over-lost-rows", CACHE, "return st.n_high <= to + plan.ring();", "return true;", STATE),
    Break("rollback-of-the-middle", CACHE, "if ((uint32_t) p0 > n || (uint32_t) p1 < n) {", "if ((uint32_t) p0 > n) {", STATE),
    Break("rollback-always-refused", CACHE, "    if (plan.n_comp > 0 && st.frontier_prev != (int64_t) to) {\n        return false;\n    }", "    return false;", STATE),
    Break("high-water-forgotten", CACHE, "st.n_high = std::max(st.n_high, n_end);", "st.n_high = n_end;", STATE),
    Break("clear-keeps-folds", CACHE, "        st = stream_state();\n        st.frontier = plan.sink_tokens;\n    }\n\n    last_step", "    }\n\n    last_step", STATE),
    Break("abort-keeps-fold", CACHE, "        unfold(st, last_step.fold_from);\n    }\n\n    llama_kv_cache::seq_rm", "    }\n\n    llama_kv_cache::seq_rm", STATE),
    Break("abort-with-lost-rows", CACHE, "if (st.n_high > last_step.fold_from + plan.ring()) {", "if (false) {", STATE),
    Break("state-without-sums", CACHE, "            io.read_tensor(layer.k_sum, 0, SLOT_ZERO*layer.k_sum->nb[1]);\n            io.read_tensor(layer.v_sum, 0, SLOT_ZERO*layer.v_sum->nb[1]);", "", STATE),
    Break("state-of-other-heads", CACHE, "        for (const uint32_t h : plan.retrieval[il]) {\n            add(h);\n        }", "", STATE),
    Break("state-of-other-window", CACHE, "    add(plan.window);\n    add(plan.block);", "", STATE),
    Break("state-of-stock", CACHE, "if (magic != RAZOR_STATE_MAGIC) {", "if (false) {", STATE),
    Break("state-unchecked", CACHE, "if (!sane) {", "if (false) {", STATE),
    Break("shift-accepted", CACHE, "    return false;\n}\n\nvoid llama_kv_cache_razor::clear", "    return true;\n}\n\nvoid llama_kv_cache_razor::clear", "native"),
    Break("more-bytes", CACHE, "ggml_new_tensor_3d(ctx, type_v, n_embd_v, plan.cells, n_strm)", "ggml_new_tensor_3d(ctx, type_v, n_embd_v, plan.cells + 256, n_strm)", "memory"),
    Break("bytes-not-counted", RAZOR, "res.bytes_sums  = layer->k_sum ? ggml_nbytes(layer->k_sum) + ggml_nbytes(layer->v_sum) : 0;", "", "memory"),
    Break("window-ignored", RAZOR, "uint64_t window = profile.window;", "uint64_t window = 0;", "memory or reference"),
    Break("razor-without-metadata", RAZOR, "    if (!any) {\n        return nullptr;\n    }", "    if (!any) {\n        auto res = std::make_shared<llama_razor_profile>();\n        res->window_min = 32;\n        res->window_divisor = 0;\n        res->retrieval.resize(razor_n_kv_heads(hparams));\n        return res;\n    }", "stock"),
    Break("switch-ignored", RAZOR, 'return env && strcmp(env, "") != 0 && strcmp(env, "0") != 0;', "(void) env; return false;", "stock"),
    Break("types-unchecked", RAZOR, "    if (found != expected) {", "    if (false) {", "refusals"),
    Break("values-unchecked", RAZOR, "        if (mask[i] > 1) {", "        if (false) {", "refusals"),
    Break("ranges-unchecked", RAZOR, "    if (val < min || val > max) {", "    if (false) {", "refusals"),
    Break("version-unchecked", RAZOR, "    if (version != RAZOR_VERSION) {", "    if (false) {", "refusals"),
    Break("mask-shape-unchecked", RAZOR, "if (mask->size() != razor_n_kv_heads(hparams)) {", "if (mask->size() < razor_n_kv_heads(hparams)) {", "refusals"),
    Break("unsupported-accepted", RAZOR, "    if (!unsupported.empty()) {", "    if (false) {", "refusals"),
    Break("non-causal-accepted", CACHE, "    if (!cparams.causal_attn) {", "    if (false) {", "refusals"),
    Break("gaps-accepted", CACHE, "if (ubatch.pos[i] != (llama_pos) (pos + i)) {", "if (false) {", "native"),
]  # fmt: skip


def main(patterns: list[str]) -> int:
    chosen = [b for b in BREAKS if not patterns or any(p in b.name for p in patterns)]
    tree = _cache_dir() / "broken-build"
    unnoticed = []
    for broken in chosen:
        copy_sources(tree)
        path = tree / "native/src" / broken.file
        text = path.read_text()
        if text.count(broken.old) != 1:
            raise SystemExit(
                f"{broken.name}: its text is {text.count(broken.old)} times in {path.name}"
            )
        write_if_changed(path, text.replace(broken.old, broken.new))
        failed = failing_tests(build(tree), broken.tests)
        if not failed:
            unnoticed.append(broken.name)
        print(f"{broken.name}: {', '.join(failed) or 'NOT NOTICED'}", flush=True)
    print(f"{len(chosen) - len(unnoticed)} of {len(chosen)} breaks noticed", flush=True)
    return 1 if unnoticed else 0


def copy_sources(tree: Path) -> None:
    for file in [ROOT / "CMakeLists.txt", *(ROOT / "native").rglob("*")]:
        if file.is_file():
            target = tree / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_if_changed(target, file.read_text())


def write_if_changed(path: Path, text: str) -> None:
    """Unchanged files keep their time, so that they are not compiled again."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def build(tree: Path) -> Path:
    cmake, ninja = _tool("cmake"), _tool("ninja")
    if cmake is None or ninja is None:
        raise SystemExit(
            "cmake and ninja are needed: run with 'uv run python tests/broken_builds.py'"
        )
    folder = tree / "build"
    if not (folder / "build.ninja").is_file():
        _run([cmake, "-S", tree, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
              f"-DPython_EXECUTABLE={sys.executable}"])  # fmt: skip
    _run([cmake, "--build", folder])
    installed = tree / "installed"
    shutil.rmtree(installed, ignore_errors=True)
    _run([cmake, "--install", folder, "--prefix", installed, "--component", "razor"])
    return installed / "razor_local/lib"


def failing_tests(lib: Path, tests: str) -> list[str]:
    """Names of the test functions that fail with the library, without parameters."""
    env = os.environ | {"RAZOR_LOCAL_LIB": str(lib), "LLAMA_CPP_LIB_PATH": str(lib)}
    files = sorted(str(path) for path in (ROOT / "tests").glob("test_native_*.py"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=12", "-k", tests, *files],
        capture_output=True, text=True, env=env, cwd=ROOT,
    )  # fmt: skip
    found = re.findall(r"^(?:FAILED|ERROR) \S+?::(\w+)", done.stdout, re.MULTILINE)
    if done.returncode < 0 or "Fatal Python error" in done.stderr:
        found.append(f"the process ends with {done.returncode} (an assertion of the library)")
    elif done.returncode > 1:
        raise SystemExit(f"pytest failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
