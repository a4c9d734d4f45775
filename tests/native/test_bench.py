"""The benchmark as a whole: what it plans to measure, that its figures add up, that it can be
resumed, and what it refuses. How fast anything is, is not tested.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pynvml
import pytest
from click.testing import CliRunner
from gguf import GGUFValueType

from razor_local.bench import run as bench_module
from razor_local.bench.batches import Batch, Settings, Side, make_batches
from razor_local.bench.energy import EnergyMeter
from razor_local.bench.figures import Report
from razor_local.bench.measure import Measure
from razor_local.bench.report import format_report
from razor_local.bench.run import open_journal, run_bench, weights_bytes
from razor_local.bench.worker import Context, Session, SessionContext
from razor_local.cli import main
from razor_local.common.machine import describe_code, describe_gpus, describe_machine, free_memory
from razor_local.errors import RazorError
from razor_local.model_file import ModelFile
from razor_local.model_setup import ModelSetup
from razor_local.model_shape import ModelShape
from razor_local.plan import make_plan
from razor_local.profile import Profile
from tests.support.bench import KV, QUICK, SPEC
from tests.support.journals import damaged
from tests.support.tiny_models import TinySpec

SHAPE = ModelShape("llama", 16, (32,) * 16, (8,) * 16, 64, 64, 131072)
pytestmark = pytest.mark.usefixtures("same_commit")

PROFILE = Profile(tuple(np.eye(8, dtype=np.uint8)[il % 8] for il in range(16)))


def run(*args: str):
    return CliRunner().invoke(main, ["bench", *map(str, args)])


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    """One run of everything on a tiny model, resumed from nothing."""
    folder = tmp_path_factory.mktemp("bench")
    args = [tiny(SPEC, KV), "-d", "0,500", "-d", "1k", "-c", "2048", "--types", "f16,q8_0", *QUICK]
    args += ["--real-prefill", "-o", folder / "run.json", "--resume", folder / "run.jsonl"]
    done = run(*args, "--plot", folder / "run.svg")
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    return SimpleNamespace(
        args=args, folder=folder, report=json.loads((folder / "run.json").read_text())
    )


def test_figures_add_up(measured) -> None:
    rows = measured.report["rows"]
    assert [(r["type_k"], r["depth"]) for r in rows] == [
        (t, d) for t in ("f16", "q8_0") for d in (0, 500, 1024)
    ]
    for r in rows:
        full = 3 * 2 * 2 * 64 * 2 * 2048
        assert r["n_ctx"] == 2048 and r["pairs"] == 3
        assert r["razor_tok_s"] == pytest.approx(1e3 / r["razor_ms"])
        assert 0 < r["decode_ratio_full_q1"] <= r["decode_ratio_full"] <= r["decode_ratio_full_q3"]
        assert (r["full_f16_ms"] is None) == (r["type_k"] == "f16")
        assert r["full_kv_bytes"] == (full if r["type_k"] == "f16" else full * 34 // 64)
        assert r["full_f16_kv_bytes"] == (None if r["type_k"] == "f16" else full)
        assert r["razor_kv_bytes"] < r["full_kv_bytes"]
        assert r["razor_over_read"] > 0 and r["razor_prefill_tok_s"] > 0
        assert r["razor_first_token_s"] > 0 and r["full_first_token_s"] > 0
        # the real prefill has 1024 tokens
        far = r["depth"] == 1024 and r["type_k"] == "q8_0"
        assert r["first_token"] == ("integrated" if far else "measured")
    if os.path.exists("/proc/self/clear_refs"):
        assert all(r["razor_peak_rss"] > r["razor_kv_bytes"] for r in rows)


def test_folds_are_crossed_and_counted(measured) -> None:
    assert [f["type_k"] for f in measured.report["folds"]] == ["f16", "q8_0"]
    for f in measured.report["folds"]:
        assert f["folds"] >= 1 and f["tokens"] >= 15
        assert f["longest_ms"] >= f["longest_fold_ms"] >= f["median_ms"] * 0.1
        assert f["longest_ratio"] == pytest.approx(f["longest_ms"] / f["median_ms"])


def test_real_prefill_is_compared(measured) -> None:
    checks = measured.report["checks"]
    assert [c["side"] for c in checks] == ["razor", "full"]
    for c in checks:
        assert 100 + 64 < c["tokens"] < 2048  # the window is full: there was something to fold
        assert c["real_s"] > 0 and c["integrated_over_real"] > 0 and c["random_over_real"] > 0


def test_head_says_what_ran_where(measured) -> None:
    head = measured.report["head"]
    assert head["model"]["retrieval_kv_heads"] == 3 and head["model"]["kv_heads"] == 6
    assert not head["model"]["random_weights"]
    assert head["machine"]["cpu"] and head["machine"]["cores"] >= 1
    assert head["library"]["build"]["version"] and head["library"]["backends"]
    assert head["setup"]["n_threads"] == 2
    assert str(measured.folder) not in json.dumps(head)  # no paths of the machine


def test_run_is_resumed_without_measuring_again(measured, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(bench_module, "Worker", refuse)
    done = run(*measured.args, "-o", measured.folder / "again.json")
    assert done.exit_code == 0, done.output
    assert json.loads((measured.folder / "again.json").read_text()) == measured.report


def test_journals_are_resumed_unless_their_fields_are_wrong(measured, tmp_path) -> None:
    lines = (measured.folder / "run.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path / "run.jsonl"

    def reopen(lines: list[str]) -> Report:
        path.write_text("".join(lines))
        head = json.loads(lines[0])
        head.pop("kind", None)
        with bench_module.open_journal(path, head) as journal:
            return Report(journal.head, journal.records)

    for n in range(1, len(lines) + 1):
        assert len(reopen(lines[:n]).records) == n - 1
    n_refused = 0
    for changed in damaged(lines):
        try:
            found = reopen(changed)
        except RazorError as error:
            n_refused += 1
            assert str(error).isprintable()
        else:
            format_report(found, "md")
    assert n_refused > 100


def test_only_what_is_missing_is_measured(measured, tmp_path) -> None:
    lines = (measured.folder / "run.jsonl").read_text().splitlines()
    # a process that was killed while it wrote the last line
    torn = tmp_path / "run.jsonl"
    torn.write_text("".join(f"{line}\n" for line in lines[:-3]) + lines[-3][:40])
    args = [torn if a == measured.folder / "run.jsonl" else a for a in measured.args]
    done = run(*args[: args.index("-o")], "--resume", torn, "--json")
    assert done.exit_code == 0, done.output
    again = torn.read_text().splitlines()
    assert again[: len(lines) - 3] == lines[:-3]
    names = [[json.loads(x).get(k) for k in ("kind", "type_k", "depth")] for x in again]
    assert names == [[json.loads(x).get(k) for k in ("kind", "type_k", "depth")] for x in lines]
    assert len(json.loads(done.stdout)["rows"]) == 6


def test_kinds_can_be_measured_one_after_the_other(tiny, tmp_path) -> None:
    journal = tmp_path / "run.jsonl"
    args = [tiny(SPEC, KV), "-d", "0,1k", "-c", "2048", "--types", "q8_0,f16", *QUICK]
    args += ["--real-prefill", "--resume", journal, "--json"]

    def kinds() -> list[str]:
        return [json.loads(line)["kind"] for line in journal.read_text().splitlines()]

    done = run(*args, "--only", "memory,real_prefill")
    assert done.exit_code == 0, done.output
    assert kinds() == ["head", *["memory"] * 5, "real_prefill"]
    assert json.loads(done.stdout)["checks"][0]["integrated_s"] is None
    memory = [json.loads(line) for line in journal.read_text().splitlines()[1:6]]
    bytes_of = {(m["type_k"], m["side"]): m["kv_bytes"] for m in memory}
    assert bytes_of["q8_0", "full_f16"] == bytes_of["f16", "full"]  # alike: measured once
    before = kinds()
    done = run(*args)
    assert done.exit_code == 0, done.output
    assert kinds()[:7] == before and kinds().count("memory") == 5
    assert json.loads(done.stdout)["checks"][0]["integrated_s"] > 0
    assert run(*args, "--only", "memories").exit_code == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("-r", "4"), "different settings"),
        (("--window-min", "90"), "different (model|setup)"),
    ],
)
def test_journal_of_another_run_is_refused(measured, change, message) -> None:
    before = (measured.folder / "run.jsonl").read_bytes()
    done = run(*measured.args, *change)
    assert done.exit_code == 1 and re.search(message, done.output)
    assert (measured.folder / "run.jsonl").read_bytes() == before


@pytest.mark.parametrize("text", ["", "hello\n", "{}\n", '{"kind": "head"}\n', "[1]\n", "\xff\n"])
def test_other_files_are_no_journals(measured, tmp_path, text) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(text.encode("latin-1"))
    head = measured.report["head"]
    with pytest.raises(RazorError, match="is not a journal of a benchmark|is from another run"):
        open_journal(path, head)
    assert path.read_bytes() == text.encode("latin-1")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_interrupted_run_keeps_its_journal_and_leaves_no_process(tiny, tmp_path) -> None:
    journal = tmp_path / "run.jsonl"
    args = ["bench", str(tiny(SPEC, KV)), "-d", "0", "-c", "2048", "-r", "100000"]
    args += ["--seconds", "600", "--resume", str(journal), "-o", str(tmp_path / "run.md")]
    code = "from razor_local.cli import main; main()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell in the background lets its children ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    end = time.monotonic() + 60
    while not journal.exists() or journal.read_text().count("\n") < 3:
        assert time.monotonic() < end and child.poll() is None
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, err = child.communicate(timeout=60)
    assert child.returncode != 0
    assert "run the same command again to continue from" in err and "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["run.jsonl"]
    kinds = [json.loads(line)["kind"] for line in journal.read_text().splitlines()]
    assert kinds[0] == "head" and set(kinds[1:]) == {"memory"}


def test_full_caches_of_another_build(tiny, stock_folder) -> None:
    args = [tiny(SPEC, KV), "-d", "300", "-c", "1024", "--types", "q8_0", *QUICK]
    done = run(*args, "--stock-lib", stock_folder, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    (row,) = report["rows"]
    assert row["full_ms"] > 0 and row["full_f16_ms"] > 0
    assert row["full_kv_bytes"] > row["razor_kv_bytes"] > 0  # a stock build's log tells it
    assert report["head"]["setup"]["full_cache"] == "another build"
    assert run(*args, "--stock-lib", stock_folder).exit_code == 0


class _FakeContext:
    """Takes 10 ms for the weights of a batch, and for each token 1 ms per 100 before it."""

    def __init__(self, side: Side) -> None:
        self.side, self.depth, self.batches = side, 0, []
        self.in_turn: list[int] = []
        self.step_seconds = 0.01

    def fill(self, depth: int) -> None:
        self.depth = depth

    rewind = fill

    def step(self) -> float:
        self.in_turn.append(1)
        return 0.01 + self.depth / 1e5

    def steps(self, n: int) -> list[float]:
        """The first is slow."""
        self.in_turn.append(n)
        return [self.step_seconds * 9, *(self.step_seconds + i / 1e4 for i in range(n - 1))]

    def append(self, n_tokens: int) -> float:
        self.batches.append((self.depth, n_tokens))
        self.depth += n_tokens
        return 0.01 + n_tokens * (self.depth - n_tokens / 2) / 1e5


def _fake_measure(settings: Settings, type_kv: str) -> tuple[Measure, list[_FakeContext]]:
    sides = [Side(name, name == "razor", type_kv, type_kv, 131_072) for name in ("razor", "full")]
    clock = SimpleNamespace(show=lambda what: None)
    plans = {side.name: side.plan(SHAPE, PROFILE) for side in sides}
    measure = Measure(Batch(tuple(sides), ()), plans, 0, None, settings, None, clock)
    return measure, [_FakeContext(side) for side in sides]


@pytest.mark.parametrize(
    ("type_kv", "depth", "n_tokens", "rounds"),
    [
        ("f16", 0, 512, 5),
        ("f16", 2000, 256, 2),
        ("f16", 100_000, 256, 2),  # never fewer: tiles are cut in smaller ones
        ("q8_0", 0, 512, 5),
        ("q8_0", 5000, 64, 2),
        ("q8_0", 40_000, 16, 2),
        ("q8_0", 100_000, 4, 2),
        ("q8_0", 130_900, 4, 2),
    ],
)
def test_batches_of_prefill_get_smaller_where_they_are_slow(
    type_kv, depth, n_tokens, rounds
) -> None:
    measure, contexts = _fake_measure(Settings(), type_kv)
    found = measure.prefill(contexts, depth)
    assert found["tokens"] == n_tokens
    assert [len(ms) for ms in found["ms"].values()] == [rounds, rounds]
    for context in contexts:
        assert all(at == depth and at + n <= 131_072 for at, n in context.batches)
        assert context.batches[-1] == (depth, n_tokens)


@pytest.mark.parametrize(
    ("depth", "seconds", "pairs", "steps"),
    [
        (0, 1.01, 10, 4),  # 1 s of 2 sides with 5 steps of 10 ms
        (3900, 15.0, 30, 4),
        (3900, 1.0, 5, 4),  # never fewer
        (4100, 15.0, 100, 1),  # 51 ms
        (100_000, 15.0, 7, 1),
    ],
)
def test_short_steps_are_made_in_a_row_and_the_first_does_not_count(
    depth, seconds, pairs, steps
) -> None:
    measure, contexts = _fake_measure(Settings(), "f16")
    for context in contexts:
        context.fill(depth)
    found = measure._steps(contexts, "decoding", seconds)
    assert found["steps"] == steps
    took = 10.15 if steps > 1 else 10 + depth / 100  # the median of 10, 10.1, 10.2, 10.3
    for context in contexts:
        assert found["ms"][context.side.name] == [pytest.approx(took)] * pairs
        warm = 1 if depth == 100_000 else 3
        assert context.in_turn == [1] * warm + [steps + 1 if steps > 1 else 1] * pairs


@pytest.mark.parametrize("slow", [0, 1])
def test_turns_are_alike_where_one_side_is_slow(slow) -> None:
    measure, contexts = _fake_measure(Settings(), "f16")
    contexts[slow].fill(10_000)
    assert measure._steps(contexts, "", 5.0)["steps"] == 1
    assert contexts[0].in_turn == contexts[1].in_turn == [1] * (3 + 41)


@pytest.mark.parametrize("depth", [0, 512, 1024, 1536])
def test_batches_of_prefill_are_whole_blocks_that_fold(tiny, monkeypatch, depth) -> None:
    """After decoding at the same depth, which leaves a token more."""
    session = Session(ModelSetup(str(tiny(SPEC, KV)), n_threads=2))
    worker = SimpleNamespace(ask=session.answer)
    sides = [Side(name, name == "razor", "f16", "f16", 2048) for name in ("razor", "full")]
    contexts = [Context(worker, side, session.open(asdict(side))) for side in sides]
    plans = {side.name: side.plan(session.shape, session.profile) for side in sides}
    clock = SimpleNamespace(show=lambda what: None)
    settings = Settings(seconds=100.0, max_pairs=5)  # whole batches however slow the machine is
    measure = Measure(Batch(tuple(sides), ()), plans, 0, None, settings, None, clock)
    seen = []
    append = SessionContext.append

    def watch(self: SessionContext, n_tokens: int) -> float:
        at = self.api.llama_memory_seq_pos_max(self.memory, 0) + 1
        before = self.native.seq(self.ctx, 0).frontier if self.plan.active else 0
        took = append(self, n_tokens)
        after = self.native.seq(self.ctx, 0).frontier if self.plan.active else 0
        seen.append((self.plan.active, at, n_tokens, after - before))
        return took

    measure._fill(contexts, depth)
    assert contexts[0].depth == contexts[1].depth == (depth + 1 if depth else 0)
    monkeypatch.setattr(SessionContext, "append", watch)
    found = measure.prefill(contexts, depth)
    for context in contexts:
        context.close()
    assert found["tokens"] == 512 and len(found["ms"]["razor"]) == 5
    block = plans["razor"].block
    assert block == 64
    # as many as a prompt folds there: at 0 the window of 100 fills first
    folds = 512 if depth else 448 - 100 - 4
    seen = [each for each in seen if each[2] == 512]
    assert seen.count((False, depth, 512, 0)) == seen.count((True, depth, 512, folds)) == 5
    assert len(seen) == 10


# -- the plan of a run


@pytest.mark.parametrize("n_ctx", [0, 768, 2048, 2304, 8192, 32256])
@pytest.mark.parametrize("window", [64, 300, 1500])
def test_prefill_is_measured_where_blocks_begin(n_ctx, window) -> None:
    profile = replace(PROFILE, window_min=window, window_divisor=0)
    depths = [0, 300, 700, 1000, 1900, 2047, 2300, 7424, 8000, 31_999, 32_255]
    depths = [depth for depth in depths if depth < (n_ctx or 10**6)]
    settings = Settings(tuple(depths), n_ctx=n_ctx, types=(("f16", "f16"),), real_prefill=0)
    if n_ctx and make_plan(SHAPE, profile, n_ctx).why_inactive:
        pytest.skip("razor does nothing in so small a context")
    for batch in make_batches(settings, SHAPE, profile):
        plan = batch.sides[0].plan(SHAPE, profile)
        points = [step.depth for step in batch.steps if step.kind == "prefill"]
        assert points and all(at % 512 == 0 and at + 256 <= plan.n_ctx for at in points)
        assert 512 % plan.block == 0
        deepest = max(step.depth for step in batch.steps if step.kind == "decode")
        assert max(points) > deepest - 512 - 64 or deepest <= 512


def test_contexts_are_as_large_as_their_depths_need() -> None:
    settings = Settings(depths=(131072, 0, 512, 8192, 32768))
    batches = make_batches(settings, SHAPE, PROFILE)
    sizes = [(b.sides[0].n_ctx, b.sides[0].type_k) for b in batches]
    assert sizes == [(n_ctx, t) for n_ctx in (8704, 33280, 131584) for t in ("f16", "q8_0", "q4_0")]
    small = [(s.kind, s.depth) for s in batches[0].steps]
    assert [d for kind, d in small if kind == "decode"] == [0, 512, 8192]
    assert ("prompt", 512) in small and ("prompt", 8192) not in small
    # prefill: at 0, where the window is full, at the depth
    assert [d for kind, d in small if kind == "prefill"] == [0, 4608, 8192]
    large = [(s.kind, s.depth) for s in batches[6].steps]
    assert [d for kind, d in large if kind == "prefill"] == [27136, 131072]
    assert [s.name for s in batches[0].sides] == ["razor", "full"]
    assert [s.name for s in batches[1].sides] == ["razor", "full", "full_f16"]
    keys = [tuple(b.key(s).values()) for b in batches for s in b.steps]
    assert len(keys) == len(set(keys))


def test_real_prefill_is_made_in_every_context_that_holds_it() -> None:
    def real(n_tokens: int | None, **changes) -> list[tuple[int, str, int]]:
        settings = Settings(depths=(0, 8192, 32768, 131072), real_prefill=n_tokens, **changes)
        found = []
        for batch in make_batches(settings, SHAPE, PROFILE):
            side = batch.sides[0]
            steps = [(s.kind, s.depth) for s in batch.steps]
            for _, depth in (step for step in steps if step[0] == "real_prefill"):
                found.append((side.n_ctx, side.type_k, depth))
                assert ("prefill", depth // 512 * 512) in steps  # the integral reaches there
        return found

    assert real(None) == []
    assert real(0) == [(8704, "f16", 5120)]
    assert real(131072) == [(131584, "f16", 131072)]
    assert real(32768) == [(n_ctx, "f16", 32768) for n_ctx in (33280, 131584)]
    assert real(8192, types=(("q8_0", "q8_0"), ("f16", "f16"))) == [
        (n_ctx, "q8_0", 8192) for n_ctx in (8704, 33280, 131584)
    ]
    with pytest.raises(RazorError, match="does not fit into the largest context of 131584 tok"):
        real(131584)


def test_one_context_for_all_depths() -> None:
    settings = Settings(depths=(0, 8192), n_ctx=32000, types=(("f16", "q8_0"),))
    (batch,) = make_batches(settings, SHAPE, PROFILE, energy=True)
    assert batch.sides[0].n_ctx == 32000 and batch.sides[2].type_v == "f16"
    assert [s.kind for s in batch.steps].count("energy") == 1


def test_weights_that_a_token_reads(tiny) -> None:
    tied, untied = (tiny(TinySpec("llama", 3, 4, 2, 64, tied=t)) for t in (True, False))
    d, ff, n_q, n_kv, layers = 64, 96, 256, 128, 3
    blocks = layers * (2 * d * n_q + 2 * d * n_kv + 3 * d * ff + 2 * d) + d
    # the table of token embeddings is the output head, or one row of it is read
    assert (
        weights_bytes(ModelFile(tied)) == weights_bytes(ModelFile(untied)) == (blocks + 128 * d) * 4
    )
    # experts of which a number for each layer is used: all of them are counted
    some = {
        "llama.expert_count": (8, GGUFValueType.UINT32),
        "llama.expert_used_count": ([2, 2, 2], GGUFValueType.ARRAY),
    }
    experts = ModelFile(tiny(TinySpec("llama", 3, 4, 2, 64), some))
    assert weights_bytes(experts) == weights_bytes(ModelFile(untied))


# -- refused


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("MODEL", "-d", "900", "-c", "512"), "depth 900 does not fit into a context of 512"),
        (("MODEL", "-d", "10", "-c", "256"), "razor does nothing at 256 tokens"),
        (("STOCK", "-d", "10"), "has no razor profile"),
        (("none.gguf",), "none.gguf: No such file"),
        (("MODEL", "-d", "8x"), "'8x' is not a number of tokens"),
        (("MODEL", "-d", "-1"), "'-1' is not a number of tokens"),
        (("MODEL", "--types", "f16,q9"), "'q9' is not one of"),
        (("MODEL", "--types", "f16", "-ctk", "q8_0"), "--types and -ctk, -ctv exclude"),
        (("MODEL", "--shape", "30m"), "expected one of MODEL, --shape"),
        (("--shape", "llama-9"), "'llama-9' is not a known shape; expected 30m, llama-3.2-1b"),
        (("MODEL", "--seed", "3"), "belong to --shape"),
        (("MODEL", "-o", "no/where/x.json"), "the folder no/where does not exist"),
        (("MODEL", "--plot", "x.bmp"), "x.bmp is not the name of a picture"),
        (("MODEL", "--real-prefill", "5k", "-c", "2k", "-d", "0"), "real prefill of 5120 tokens"),
        (("MODEL", "--window-min", "0"), "--window-min is 0, expected 1 to"),
        (("MODEL", "--retrieval", "0.5"), "has no head scores"),
        (("--report", "MODEL"), "is not a report of a benchmark"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(
    tiny, tmp_path, monkeypatch, args, message
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": str(tiny(SPEC, KV)), "STOCK": str(tiny(SPEC))}
    done = run(*(names.get(a, a) for a in args))
    assert done.exit_code != 0 and done.stdout == ""
    assert message in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
@pytest.mark.parametrize("option", ["-o", "--resume", "--plot"])
def test_pipes_and_devices_are_neither_read_nor_replaced(tiny, tmp_path, option) -> None:
    path = tmp_path / "pipe.png"
    os.mkfifo(path)
    done = run(tiny(SPEC, KV), "-d", "0", "-c", "2048", option, path)
    assert done.exit_code == 1 and done.stdout == ""
    assert done.stderr == f"Error: {path} is not a regular file; choose another name\n"
    assert path.is_fifo() and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
@pytest.mark.parametrize("gibibytes", [1, 1.5])
def test_memory_that_is_not_to_be_had_is_one_sentence(tiny, tmp_path, gibibytes) -> None:
    """Where the system lets less be taken than it has: a context or a cache cannot be made."""
    n = int(gibibytes * 2**30)
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({n}, {n}));"
        "from razor_local.cli import main; main()"
    )
    args = ["-d", "500k", "-c", "512k", "--types", "f32", "-t", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, "bench", tiny(SPEC, KV), *args],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "memory" in done.stderr and done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_too_little_memory_is_told_before_anything_is_loaded(tiny, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(bench_module, "free_memory", lambda: 500 << 20)
    monkeypatch.setattr(bench_module, "Worker", None)
    journal = tmp_path / "run.jsonl"
    with pytest.raises(RazorError, match="full caches of 1,024 tokens need about 0.5 GiB of mem"):
        run_bench(ModelSetup(str(tiny(SPEC, KV))), Settings((0,), n_ctx=1024), resume=journal)
    assert not journal.exists()


# -- the machine


def test_code_is_told_from_changed_code() -> None:
    code = describe_code()
    root = Path(bench_module.__file__).parents[2]
    if not (root / ".git").exists():
        assert code["commit"] is None
        return
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert head.stdout.startswith(code["commit"].removesuffix("-dirty")[:12])


def test_machine_is_described() -> None:
    machine = describe_machine()
    assert machine["cpu"] and 1 <= machine["cores"] <= (os.cpu_count() or 1)
    assert 0 < free_memory() < machine["memory_total"]


def test_energy_of_cpu_packages_is_read_over_their_wrap_around(tmp_path, monkeypatch) -> None:
    for name, label in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "name").write_text(label + "\n")
        (folder / "max_energy_range_uj").write_text("9999999\n")
        (folder / "energy_uj").write_text("9000000\n")
    (tmp_path / "intel-rapl:1").mkdir()  # without files: as good as forbidden
    fake_nvml(monkeypatch, None)
    meter = EnergyMeter(tmp_path)
    assert meter.sources == ["package-0"]
    meter.start()
    (tmp_path / "intel-rapl:0/energy_uj").write_text("500000\n")
    joules, seconds = meter.stop()
    assert joules == pytest.approx(1.5) and seconds > 0


def test_energy_of_gpus_is_read(tmp_path, monkeypatch) -> None:
    millijoules = [7_000, 100]
    fake_nvml(monkeypatch, millijoules)
    meter = EnergyMeter(tmp_path)
    assert meter.sources == ["GPU 0", "GPU 1"]
    meter.start()
    millijoules[:] = [9_500, 600]
    assert meter.stop()[0] == pytest.approx(3.0)
    millijoules[1] = None  # as of a GPU that has no counter
    assert EnergyMeter(tmp_path).sources == ["GPU 0"]
    with pytest.raises(OSError, match="GPU 1 does not report its energy .Not Supported"):
        meter.stop()
    fake_nvml(monkeypatch, None)
    assert EnergyMeter(tmp_path).sources == []


def test_gpus_are_described(monkeypatch) -> None:
    fake_nvml(monkeypatch, [1, 2])
    gpu = {"name": "NVIDIA", "memory_total": 80 << 30, "driver": "550.54.15", "cuda": "12.4"}
    assert describe_gpus() == [gpu, gpu]
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", unsupported)
    monkeypatch.setattr(pynvml, "nvmlSystemGetCudaDriverVersion_v2", unsupported)
    assert describe_gpus()[0] == gpu | {"name": None, "cuda": None}
    fake_nvml(monkeypatch, None)
    assert describe_gpus() == []


def unsupported(*_: object) -> None:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def fake_nvml(monkeypatch, millijoules: list[int | None] | None) -> None:
    """As many GPUs as there are numbers, which are their energy; None: no driver."""

    def init() -> None:
        if millijoules is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    def energy(gpu: int) -> int:
        return unsupported() if millijoules[gpu] is None else millijoules[gpu]

    for name, function in {
        "nvmlInit": init,
        "nvmlDeviceGetCount": lambda: len(millijoules),
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda gpu: "NVIDIA",
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(total=80 << 30),
        "nvmlDeviceGetTotalEnergyConsumption": energy,
        "nvmlSystemGetDriverVersion": lambda: "550.54.15",
        "nvmlSystemGetCudaDriverVersion_v2": lambda: 12040,
    }.items():
        monkeypatch.setattr(pynvml, name, function)
