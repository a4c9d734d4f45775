"""razor-local eval as a whole: small runs on the built-in model, resuming, reports, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from razor_local import RazorError, Stopped
from razor_local.cli import main
from razor_local.cli.params import DEFAULT_MODEL
from razor_local.common import files as safe_write
from razor_local.evals import run as run_module
from razor_local.evals.haystack import MadeText
from razor_local.evals.needle import NeedleSettings, make_samples, score
from razor_local.evals.perplexity import Window, read_text, run_facts, run_perplexity
from razor_local.evals.policies import exact_full, make_policies
from razor_local.evals.questions import Prompts
from razor_local.evals.report import Report, format_report
from razor_local.evals.run import (
    describe_run,
    open_journal,
    open_llama,
    run_questions,
)
from razor_local.model_file import read_model_shape, read_profile
from razor_local.model_setup import ModelSetup
from razor_local.plan import make_plan
from razor_local.verify.compare import kl_divergence
from tests.support.embedded_model import model_with_scores, no_numbers
from tests.support.journals import damaged

NEEDLE = ["needle", "-c", "1k", "--depths", "20,60", "--kinds", "single", "--samples", "2", "-t", 1]
WINDOW = ["--window-min", "128", "--window-divisor", "0"]  # the facts are all behind it


def run(*args: object):
    return CliRunner().invoke(main, ["eval", *map(str, args)])


def report(*args: object):
    done = run(*args, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(autouse=True)
def _commit(monkeypatch) -> None:
    """Someone may commit while the tests run, and a journal of another commit is refused."""
    code = {"version": "1", "commit": "abc"}
    monkeypatch.setattr(run_module, "describe_code", lambda: code)


# -- needle


@pytest.fixture(scope="module")
def needles(tmp_path_factory):
    """One run of a few policies, its report and its journal."""
    folder = tmp_path_factory.mktemp("needle")
    args = [*NEEDLE, *WINDOW, "--policies", "full,razor,razor-q8_0,streaming,local"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "describe_code", lambda: {"version": "1", "commit": "abc"})
        done = run(
            *args, "-o", folder / "run.json", "--resume", folder / "run.jsonl",
            "--plot", folder / "heat.png", "--plot-curve", folder / "curve.svg",
        )  # fmt: skip
    assert done.exit_code == 0 and done.stdout == "", done.output
    return args, folder, json.loads((folder / "run.json").read_text())


def test_razor_finds_what_the_full_cache_finds_and_streaming_does_not(needles) -> None:
    _, _, found = needles
    rows = {row["policy"]: row for row in found["rows"]}
    assert [row["n"] for row in rows.values()] == [4] * 5
    assert rows["full-f16"]["score"] == rows["razor-f16"]["score"] == 1
    assert rows["razor-q8_0"]["score"] == 1
    assert rows["streaming-f16"]["score"] == rows["local-f16"]["score"] == 0
    assert rows["razor-f16"]["difference"] == 0 and rows["full-f16"]["difference"] is None
    assert rows["streaming-f16"]["difference"] == -1
    assert rows["streaming-f16"]["difference_high"] < -0.3
    assert found["missing"] == 0


def test_the_exact_full_cache_reads_the_prompts_of_the_others(tmp_path, monkeypatch) -> None:
    """One run compares several windows, and gives the same answers as separate runs."""
    loaded, load = [], open_llama
    monkeypatch.setattr(
        run_module,
        "open_llama",
        lambda setup, policy, *a: loaded.append(policy.name) or load(setup, policy, *a),
    )
    together = report(*NEEDLE, "--policies", "exact,razor:128,razor:64")
    assert loaded == ["exact-f16", "razor-f16:128", "razor-f16:64"]
    alone = report(*NEEDLE, *WINDOW, "--policies", "razor")
    answers = {(a["policy"], *a["answers"]) for a in together["answers"]}
    assert {("razor-f16:128", *a["answers"]) for a in alone["answers"]} < answers
    rows = {row["policy"]: row for row in together["rows"]}
    assert rows["razor-f16:128"]["kv_bytes"] == alone["rows"][0]["kv_bytes"]
    assert rows["razor-f16:64"]["kv_bytes"] < rows["razor-f16:128"]["kv_bytes"]
    assert together["head"]["policies"][0]["retrieval_kv_heads"] is None


def reopened(path, lines) -> Report:
    """What a run would report of a journal that it resumes."""
    path.write_text("".join(lines))
    head = json.loads(lines[0])
    head.pop("kind", None)
    with open_journal(path, head) as journal:
        return Report(journal.head, journal.records)


def test_every_beginning_of_a_journal_is_resumed(needles, tmp_path) -> None:
    _, folder, _ = needles
    lines = (folder / "run.jsonl").read_text().splitlines(keepends=True)
    for n in range(1, len(lines) + 1):
        assert len(reopened(tmp_path / "run.jsonl", lines[:n]).records) == n - 1


def test_journals_with_wrong_fields_are_refused_or_shown(needles, tmp_path) -> None:
    _, folder, _ = needles
    lines = (folder / "run.jsonl").read_text().splitlines(keepends=True)
    n_refused = 0
    for changed in damaged(lines):
        try:
            found = reopened(tmp_path / "run.jsonl", changed)
        except RazorError as error:
            n_refused += 1
            assert str(error).isprintable()
        else:
            for kind in ("md", "json"):
                format_report(found, kind)
    assert n_refused > 100


def test_bytes_stand_beside_the_scores(needles) -> None:
    _, _, found = needles
    shape, profile = read_model_shape(DEFAULT_MODEL), read_profile(DEFAULT_MODEL)
    for row in found["rows"]:
        kv_type = row["policy"].rpartition("-")[2]
        if row["policy"].startswith("razor"):
            plan = make_plan(shape, profile, 1024, kv_type, kv_type, window=128)
            assert row["kv_bytes"] == plan.kv_bytes and row["active"]
            assert row["share"] == plan.kv_bytes / plan.kv_bytes_full_f16
    assert found["rows"][0]["share"] == 1 and not found["rows"][0]["active"]
    assert found["head"]["policies"][1]["window_min"] == 128


def test_answers_are_kept_with_what_was_expected(needles) -> None:
    _, _, found = needles
    assert len(found["answers"]) == 4 * 5
    for answer in found["answers"]:
        (expected,), (said,) = answer["expected"][0], answer["answers"]
        assert answer["score"] == (expected in said)
    cells = [c for c in found["cells"] if c["policy"] == "razor-f16"]
    assert [(c["depth"], c["n"], c["score"]) for c in cells] == [(20, 2, 1), (60, 2, 1)]


def test_pictures_are_drawn(needles) -> None:
    _, folder, _ = needles
    assert (folder / "heat.png").read_bytes().startswith(b"\x89PNG")
    curve = (folder / "curve.svg").read_text()
    assert "<svg" in curve and "streaming-f16" in curve


def test_an_interrupted_run_goes_on_and_reports_the_same(needles, tmp_path) -> None:
    args, folder, found = needles
    lines = (folder / "run.jsonl").read_text().splitlines(keepends=True)
    journal = tmp_path / "run.jsonl"
    for n in (1, 9, len(lines)):
        journal.write_text("".join(lines[:n]) + lines[-1][:20] * (n < len(lines)))
        assert report(*args, "--resume", journal) == found
        assert len(journal.read_text().splitlines()) == len(lines)
    other = run(*args, "--resume", journal, "--seed", 1)
    assert other.exit_code == 1 and "is from another run" in other.output


def test_stop_keeps_whole_answers(tmp_path) -> None:
    setup = ModelSetup(str(DEFAULT_MODEL), n_threads=1)
    shape, policies = make_policies(setup, ["full", "razor"])
    settings = NeedleSettings((1024,), kinds=("single",), samples=1)
    samples = make_samples(settings, MadeText(), Prompts(setup.model))
    head = describe_run(
        "needle", setup, shape, policies, seed=0, n_samples=5, lengths=[1024], tasks=["single"]
    )
    for n in (0, 3, 100):  # the second run goes on with the first one's answers
        with open_journal(tmp_path / "run.jsonl", head) as journal:
            with pytest.raises(Stopped) if n < 100 else nullcontext():
                run_questions(
                    setup, shape, policies, samples, score, journal, head,
                    stop=lambda j=journal, n=n: sum("score" in r for r in j.records) >= n,
                )  # fmt: skip
            answers = [r for r in journal.records if r["kind"] == "answer"]
            assert len(answers) == min(n, 10) and all(r["score"] == 1 for r in answers)
    assert os.listdir(tmp_path) == ["run.jsonl"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_keeps_whole_answers(tmp_path) -> None:
    journal = tmp_path / "run.jsonl"
    args = ["eval", *map(str, NEEDLE), "--samples", "50", "--resume", str(journal)]
    child = subprocess.Popen(
        [sys.executable, "-c", "from razor_local.cli import main; main()", *args],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # a shell in the background lets its children ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    end = time.monotonic() + 120
    while not journal.exists() or '"kind": "answer"' not in journal.read_text():
        assert time.monotonic() < end and child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode != 0 and out == ""
    assert "run the same command again to continue from" in err and "Traceback" not in err
    kinds = [json.loads(line)["kind"] for line in journal.read_text().splitlines()]
    assert kinds[:2] == ["head", "cache"] and "answer" in kinds
    assert os.listdir(tmp_path) == ["run.jsonl"]


def test_markdown_has_policies_side_by_side() -> None:
    done = run(
        *NEEDLE, *WINDOW, "--samples", 1, "--policies", "full,razor", "--kinds", "single,reworded"
    )
    assert done.exit_code == 0, done.output
    tables = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert tables[0] == ("| policy | KV bytes | share of full f16 | single | reworded | all |")
    full = make_plan(read_model_shape(DEFAULT_MODEL), None, 1024).kv_bytes
    assert tables[2].startswith(f"| full-f16 | {full:,} | 1.000 | 100.0 (34.2 to 100.0) |")
    assert tables[4] == "| difference from full-f16 | single | reworded | all |"
    assert "## 1,024 tokens\n\n2 samples per task, 4 in total\n" in done.stdout
    assert "Measured" in done.stdout


def test_a_full_cache_is_not_called_razor() -> None:
    done = run(
        *NEEDLE, "--samples", 1, "--depths", 50, "--policies", "full,razor", "--window-min", 1000
    )
    assert done.exit_code == 0, done.output
    full = make_plan(read_model_shape(DEFAULT_MODEL), None, 1024).kv_bytes
    assert f"| razor-f16\\* | {full:,} | 1.000 |" in done.stdout
    assert "razor would save nothing in this context" in done.stdout


def test_several_questions_follow_each_other_in_one_conversation() -> None:
    found = report("needle", "-c", "1k", "--depths", 50, "--kinds", "questions,values", "--samples",
                   1, "--policies", "full", "-t", 1, "-n", 40)  # fmt: skip
    questions, values = (
        next(a for a in found["answers"] if a["task"] == task) for task in ("questions", "values")
    )
    assert len(questions["answers"]) == 3 and len(questions["expected"]) == 3
    assert len(values["answers"]) == 1 and len(values["expected"][0]) == 3
    assert [row["task"] for row in found["rows"]] == ["questions", "values", "all"]


def test_haystack_of_a_folder(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("It was a fine day. We went out. " * 400)
    found = report(
        *NEEDLE, "--samples", 1, "--depths", 50, "--policies", "full", "--haystack", tmp_path
    )
    assert found["head"]["settings"]["haystack"] == tmp_path.name
    assert found["rows"][0]["score"] in (0, 1)


# -- ruler


def test_ruler_runs_and_scores_each_task(tmp_path) -> None:
    found = report("ruler", "-c", "1k", "--tasks", "niah_multikey_1,vt,fwe", "--samples", 1,
                   "--policies", "full,streaming", "-t", 1, "-n", 40, "--plot",
                   tmp_path / "r.png")  # fmt: skip
    rows = [(r["task"], r["policy"]) for r in found["rows"]]
    assert rows == [
        (task, policy)
        for task in ("niah_multikey_1", "vt", "fwe", "all")
        for policy in ("full-f16", "streaming-f16")
    ]
    for answer in found["answers"]:
        (expected,), (said,) = answer["expected"], answer["answers"]
        assert answer["score"] == np.mean([e.lower() in said.lower() for e in expected])
    assert (tmp_path / "r.png").exists()


# -- budgets


def test_budgets_become_a_curve(tmp_path) -> None:

    model = model_with_scores(tmp_path)
    found = report(
        "needle", model, *NEEDLE[1:], *WINDOW, "--samples", 1, "--depths", 50,
        "--budget", "0.01,0.9", "--policies", "full,razor",
        "--plot-curve", tmp_path / "curve.svg",
    )  # fmt: skip
    names = [row["policy"] for row in found["rows"]]
    assert names == ["full-f16", "razor-f16", "razor-f16@0.01", "razor-f16@0.9"]
    sizes = [row["kv_bytes"] for row in found["rows"]]
    assert sizes[2] < sizes[1] < sizes[3] < sizes[0]
    assert "razor-f16" in (tmp_path / "curve.svg").read_text()


# -- perplexity


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    from random import Random

    from razor_local.evals.haystack import MadeText

    path = tmp_path_factory.mktemp("text") / "made.txt"
    pieces = MadeText().pieces(Random(3))
    path.write_text("".join(next(pieces) for _ in range(60)))
    return path


def test_perplexity_and_divergence_are_those_of_the_logits(book) -> None:
    args = ["perplexity", "--text", book, "-c", 512, "--windows", 1, "-t", 1, "--sinks", 2,
            "--window-min", 64, "--window-divisor", 0]  # fmt: skip
    found = report(*args, "--policies", "full,razor,streaming,full-q4_0,exact,razor:96")
    rows = {row["policy"]: row for row in found["rows"]}
    exact, wider = rows["exact-f16"], rows["razor-f16:96"]
    assert (exact["kl"], exact["ratio"], exact["same_top"]) == (0, 1, 1)  # it is the reference
    assert exact["kv_bytes"] == rows["full-f16"]["kv_bytes"]
    assert 0 < wider["kl"] < rows["razor-f16"]["kl"] < rows["streaming-f16"]["kl"]
    setup = ModelSetup(
        str(DEFAULT_MODEL), sink_tokens=2, window_min=64, window_divisor=0, n_threads=1
    )
    tokens = read_text(setup, book).window(run_window(book))
    logits = {}
    shape, policies = make_policies(setup, ["full", "razor"])
    for policy in (exact_full(shape, "f16"), *policies):
        llama = open_llama(setup, policy, 512, logits_all=True)
        llama.eval(tokens.tolist())
        logits[policy.name] = llama.scores[: len(tokens) - 1].copy()
        llama.close()
    targets = tokens[1:]
    nll = {}
    for name, values in logits.items():
        x = values.astype(np.float64)
        x -= np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) + x.max(
            1, keepdims=True
        )
        nll[name] = -x[np.arange(len(targets)), targets]
    for name in ("full-f16", "razor-f16"):
        assert rows[name]["perplexity"] == pytest.approx(np.exp(nll[name].mean()), rel=1e-4)
        assert rows[name]["n"] == len(targets) == 511
        kl = kl_divergence(logits["exact-f16"], logits[name])
        assert rows[name]["kl"] == pytest.approx(kl.mean(), rel=1e-2, abs=1e-6)
        same = logits["exact-f16"].argmax(1) == logits[name].argmax(1)
        assert rows[name]["same_top"] == pytest.approx(same.mean(), abs=5e-3)
        excess = np.exp((nll[name] - nll["exact-f16"]).mean())
        assert rows[name]["ratio"] == pytest.approx(excess, rel=1e-4)
    for row in found["rows"]:
        for name in ("perplexity", "ratio", "kl", "same_top"):
            assert (
                row[f"{name}_low"] <= row[name] + 1e-12 and row[name] <= row[f"{name}_high"] + 1e-12
            )
    # llama.cpp's attention is nearly exact, and what is dropped is missed
    assert 0 < rows["full-f16"]["kl"] < 1e-4 and rows["full-f16"]["ratio"] == pytest.approx(
        1, abs=1e-3
    )
    assert rows["streaming-f16"]["kl"] > rows["razor-f16"]["kl"] > 1e-6
    assert rows["full-q4_0"]["kl"] > 1e-4
    positions = {(r["policy"], r["from_position"]): r["kl"] for r in found["by_position"]}
    assert positions["streaming-f16", 256] > positions["streaming-f16", 0]


@pytest.mark.parametrize("prefill", ["auto", "razor"])
def test_only_what_follows_a_prompt_counts(book, prefill) -> None:
    """--prefill sets how the prompt is read; the rest is read with the compressed cache."""
    window = ["--window-min", 64, "--window-divisor", 0, "-t", 1, "--policies", "full,razor"]
    args = ["perplexity", "--text", book, "-c", 512, "--windows", 1, *window]
    found = report(*args, "--prompt", 300, "--prefill", prefill)
    assert found["head"]["settings"]["prompt"] == 300
    setup = ModelSetup(
        str(DEFAULT_MODEL), window_min=64, window_divisor=0, n_threads=1, prefill=prefill
    )
    tokens = read_text(setup, book).window(run_window(book)).tolist()
    logits = {}
    for policy in make_policies(setup, ["full", "razor"])[1]:
        llama = open_llama(setup, policy, 512)
        llama.prefill(tokens[:299])
        logits[policy.name] = np.concatenate([x.copy() for x in llama.eval_logits(tokens[299:511])])
        assert llama.memory().prefill == ("razor" if prefill == policy.series[:5] else "full")
        llama.close()
    kl = kl_divergence(logits["full-f16"], logits["razor-f16"])
    row = {row["policy"]: row for row in found["rows"]}["razor-f16"]
    assert row["n"] == len(kl) == 212 and row["kl"] == pytest.approx(kl.mean(), rel=1e-2)
    whole = {r["policy"]: r for r in report(*args)["by_position"] if r["from_position"] == 256}
    compressed = whole["razor-f16"]["kl"]  # of tokens 256 to 511, read with the compressed cache
    assert (row["kl"] == pytest.approx(compressed, rel=0.4)) or prefill == "auto"
    text = run(*args, "--prompt", 300, "--prefill", prefill).stdout
    line = "- the first 300 tokens of each window are a prompt, and those after it count; "
    how = {
        "auto": "all policies read it with full attention",
        "razor": "read with the compressed cache: razor-f16",
    }
    assert f"{line}{how[prefill]}\n" in text


def test_a_folder_of_texts(book, tmp_path) -> None:
    """No window spans two files, and the files take turns."""
    folder = tmp_path / "books"
    folder.mkdir()
    words = book.read_text()
    for name, text in (("a.txt", words), ("b.txt", words[2000:])):
        (folder / name).write_text(text)
    args = ["-c", 256, "--policies", "full-q4_0", "-t", 1]
    both = report("perplexity", "--text", folder, "--windows", 2, *args)
    alone = [
        report("perplexity", "--text", folder / n, "--windows", 1, *args)
        for n in ("a.txt", "b.txt")
    ]
    (row,), rows = both["rows"], [found["rows"][0] for found in alone]
    assert row["n"] == sum(r["n"] for r in rows)
    assert row["kl"] == pytest.approx(np.mean([r["kl"] for r in rows]), rel=1e-6)
    assert both["head"]["settings"]["text"] == "books"
    # its files are not overwritten, and a journal is not resumed if they are divided otherwise
    result = run("perplexity", "--text", folder, *args, "-o", folder / "b.txt")
    assert result.exit_code == 1 and "b.txt is read by this command" in result.stderr
    assert (folder / "b.txt").read_text() == words[2000:]
    journal = tmp_path / "run.jsonl"
    report("perplexity", "--text", folder, "--windows", 2, *args, "--resume", journal)
    paragraphs = [*words.split("\n\n"), *words[2000:].split("\n\n")]
    half = len(paragraphs) // 3
    (folder / "a.txt").write_text("\n\n".join(paragraphs[:half]))
    (folder / "b.txt").write_text("\n\n".join(paragraphs[half:]))
    result = run("perplexity", "--text", folder, "--windows", 2, *args, "--resume", journal)
    assert result.exit_code == 1 and "is from another run" in result.stderr
    for file in folder.iterdir():
        file.rename(folder / f".{file.name}")
    result = run("perplexity", "--text", folder, *args)
    assert result.exit_code == 1 and "has no .txt files, expected a text file or a" in result.stderr


def test_full_caches_are_marked_and_nothing_to_draw_is_no_warning(book, tmp_path, recwarn) -> None:
    picture = tmp_path / "p.png"
    args = ["--text", book, "-c", 512, "--windows", 1, "-t", 1, "--policies", "exact,razor:4096"]
    plots = ["--plot", picture, "--plot-curve", tmp_path / "c.png"]
    result = run("perplexity", *args, *plots)
    assert result.exit_code == 0 and picture.exists() and not len(recwarn)
    assert "\n| exact-f16 |" in result.stdout and "\n| razor-f16:4096\\* |" in result.stdout
    assert (
        "\n\\* razor would save nothing in this context, so a full cache runs.\n" in result.stdout
    )


def run_window(book):
    return Window(0, 512, 1)


def test_perplexity_is_resumed_and_drawn(book, tmp_path) -> None:
    args = ["perplexity", "--text", book, "-c", 256, "--stride", 128, "--windows", 3, "-t", 1,
            "--policies", "full,full-q8_0"]  # fmt: skip
    journal = tmp_path / "run.jsonl"
    found = report(*args, "--resume", journal)
    assert found["rows"][0]["n"] == 255 + 2 * 128
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2 + 3 * 2
    for n in range(1, len(lines) + 1):
        assert len(reopened(tmp_path / "again.jsonl", lines[:n]).records) == n - 1
    for i, changed in enumerate(damaged(lines)):
        with suppress(RazorError):
            reopened(tmp_path / f"{i}.jsonl", changed)
    journal.write_text("".join(lines[:5]))
    again = report(
        *args, "--resume", journal, "--plot", tmp_path / "p.png", "--plot-curve", tmp_path / "c.png"
    )
    assert again == found
    assert (tmp_path / "p.png").exists() and (tmp_path / "c.png").exists()
    text = run(*args, "--resume", journal).stdout
    quantized = make_plan(read_model_shape(DEFAULT_MODEL), None, 256, "q8_0", "q8_0").kv_bytes
    assert f"| full-q8_0 | {quantized:,} | 0.531 |" in text and "by position" in text


def test_perplexity_shows_planted_facts_beside_the_divergence(book, tmp_path, monkeypatch) -> None:
    journal = tmp_path / "run.jsonl"
    args = ["perplexity", "--text", book, "-c", 1024, "--windows", 1, "--resume", journal]
    args += ["--policies", "full,razor,local", "--window-min", 256, "--window-divisor", 0]
    rows = {row["policy"]: row for row in report(*args)["rows"]}
    found = {name: row["facts_found"] for name, row in rows.items()}
    assert {row["facts_asked"] for row in rows.values()} == {20}
    assert found["full-f16"] >= 15 and abs(found["razor-f16"] - found["full-f16"]) <= 1
    assert found["local-f16"] < found["full-f16"] / 2, "the window holds no fact"
    lines = journal.read_text().splitlines(keepends=True)
    assert sum('"kind": "facts"' in line for line in lines) == 3
    journal.write_text("".join(lines[:-1]))  # the last policy is asked again, the others are not
    from razor_local.evals.facts import Examiner

    asked, ask = [], Examiner.ask

    def noted(self, *args, what: str, **types):
        asked.append(what)
        return ask(self, *args, what=what, **types)

    monkeypatch.setattr(Examiner, "ask", noted)
    text = run(*args).stdout
    assert asked == ["planting facts: local-f16"]
    assert f"| {found['local-f16']} of 20 |" in text
    assert "perplexity and KL divergence on plain text do not show whether facts are lost" in text


def test_stop_keeps_whole_windows(book, tmp_path) -> None:
    setup = ModelSetup(str(DEFAULT_MODEL), n_threads=1)
    shape, policies = make_policies(setup, ["full"])
    text, windows = read_text(setup, book), [Window(0, 256, 1), Window(256, 512, 1)]
    head = describe_run("perplexity", setup, shape, policies)
    with open_journal(tmp_path / "run.jsonl", head) as journal:
        arguments = setup, shape, policies, text, windows, 256, journal, head
        with pytest.raises(Stopped):
            run_perplexity(*arguments, stop=lambda: any("nll" in r for r in journal.records))
        assert [r["kind"] for r in journal.records] == ["cache", "window"]
        run_perplexity(*arguments)
        assert [r["kind"] for r in journal.records] == ["cache", "window", "window"]
        with pytest.raises(Stopped):
            run_facts(setup, shape, policies, 1024, journal, stop=lambda: True)
        assert len(journal.records) == 3


def test_a_context_too_short_for_facts_is_noted(book) -> None:
    result = run("perplexity", "--text", book, "-c", 256, "--windows", 1, "--policies", "full")
    assert result.exit_code == 0
    assert result.stderr == (
        "Note: no facts were planted: a text of 128 tokens is too short to plant facts in,"
        " expected 640 or more.\n"
    )


# -- refusals


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["needle", "/nowhere.gguf"], "/nowhere.gguf: No such file"),
        (["needle", "--policies", "magic"], "'magic' is not a policy"),
        (["needle", "--kinds", "double"], "'double' is not a kind of needle"),
        (["needle", "--depths", "200"], "200.0 is not in the range 0<=x<=100"),
        (["needle", "-c", "many"], "'many' is not a number of tokens"),
        (["needle", "-c", "100"], "use larger lengths"),
        (["needle", "--haystack", "/nowhere"], "is not a folder"),
        (["needle", "--plot", "a.bmp"], "is not the name of a picture"),
        (["needle", "-o", "/nowhere/run.json"], "the folder /nowhere does not exist"),
        (["needle", "--budget", "2"], "not in the range"),
        (["needle", "--facts", "1"], "facts in a text is 1"),
        (["ruler", "--tasks", "qa_1"], "'qa_1' is not a task of RULER"),
        (["perplexity"], "Missing option '--text'"),
        (["perplexity", "--text", "/nowhere.txt"], "/nowhere.txt: No such file"),
        (["perplexity", "--text", str(DEFAULT_MODEL)], "is not a text in UTF-8"),
        (["perplexity", "--text", __file__, "--stride", "100"], "the stride is 100 tokens"),
        (
            ["perplexity", "--text", __file__, "--prefill", "full"],
            "--prefill needs --prompt TOKENS",
        ),
        (
            ["perplexity", "--text", __file__, "-c", "512", "--prompt", "512"],
            "the prompt of a window has 512 tokens, expected 2 to 511",
        ),
    ],
)
def test_mistakes_are_one_sentence(args, text, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*args)
    assert done.exit_code != 0 and text in done.output, done.output
    assert "Traceback" not in done.output and done.stdout == ""
    assert len(done.stderr.strip().splitlines()[-1]) < 400
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="names are Unicode there")
@pytest.mark.parametrize("output", [True, False])
def test_a_file_whose_name_is_not_utf8_is_reported(tmp_path, output) -> None:
    text = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt"))
    text.write_text("It was a fine day and they went out for a walk. " * 200)
    args = ["perplexity", "--text", text, "-c", 256, "--windows", 1, "--policies", "full"]
    done = run(*args, *(["-o", tmp_path / "run.md"] if output else []))
    assert done.exit_code == 0, done.output
    report = (tmp_path / "run.md").read_text("utf-8") if output else done.stdout
    assert "- ?.txt: 1 windows" in report


def test_a_report_that_cannot_be_written_goes_to_stdout(tmp_path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safe_write, "publish", full)
    done = run(*NEEDLE, "--policies", "full", "-o", tmp_path / "run.md")
    assert done.exit_code == 1 and list(tmp_path.iterdir()) == []
    assert done.stdout.startswith("# razor-local eval needle")
    assert done.stderr.splitlines()[-1] == f"Error: {tmp_path}/run.md: No space left on device"


def test_logits_that_are_no_numbers_are_an_error(tmp_path, book) -> None:
    model = no_numbers(tmp_path / "model.gguf")
    args = ["perplexity", model, "--text", book, "-c", 512, "--windows", 1, "--policies", "razor"]
    done = run(*args, "--json")
    assert done.exit_code == 1 and done.stdout == ""
    assert "exact-f16 computes logits that are not numbers within tokens 0 to 256" in done.stderr


def test_a_journal_of_another_kind_is_refused(tmp_path) -> None:
    journal = tmp_path / "run.jsonl"
    journal.write_text('{"kind": "head", "version": 1}\n')
    done = run(*NEEDLE, "--policies", "full", "--resume", journal)
    assert done.exit_code == 1 and "is from another run (different eval" in done.output
    journal.write_text("notes\n")
    done = run(*NEEDLE, "--policies", "full", "--resume", journal)
    assert done.exit_code == 1 and "is not a journal of an evaluation" in done.output
    assert journal.read_text() == "notes\n"


def test_a_byte_order_mark_is_no_text(tmp_path) -> None:
    texts = [tmp_path / "plain.txt", tmp_path / "marked.txt"]
    for path, encoding in zip(texts, ("utf-8", "utf-8-sig"), strict=True):
        path.write_text("Call me Ishmael.", encoding=encoding)
    setup = ModelSetup(str(DEFAULT_MODEL))
    plain, marked = (read_text(setup, path).tokens.tolist() for path in texts)
    assert plain == marked
