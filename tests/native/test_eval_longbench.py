"""LongBench files: metrics against values worked out by hand, prompts, what is refused."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from razor_local.cli import main
from razor_local.cli.params import DEFAULT_MODEL
from razor_local.errors import RazorError, UnsupportedError
from razor_local.evals import longbench
from razor_local.evals.longbench import DATA_SETS, LongBench
from razor_local.evals.questions import Prompts, message

CODES = "The secret code of Marlow is 48213. " + "It was a fine day and they went out. " * 20


@pytest.fixture(scope="module")
def prompts():
    return Prompts(DEFAULT_MODEL)


def write(folder, name, *items) -> None:
    whole = [
        {"context": CODES, "input": "", "answers": ["48213"], "all_classes": None} | item
        for item in items
    ]
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in whole)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def run(*args: object):
    return CliRunner().invoke(main, ["eval", "longbench", "--data", *map(str, args)])


@pytest.mark.parametrize(
    ("metric", "answer", "right", "score"),
    [
        ("f1", "The Eiffel tower!", "eiffel Tower", 1),
        ("f1", "in Paris, France", "Paris", 0.5),  # precision 1/3, recall 1
        ("f1", "London", "Paris", 0),
        ("f1", "", "Paris", 0),
        ("f1_zh", "北京。", "北京", 1),
        ("f1_zh", "上海", "北京", 0),
        ("rouge", "the cat sat", "the cat sat on the mat", 2 * 1 * 0.5 / 1.5),
        ("rouge", "", "words", 0),
        ("rouge_zh", "北京 大学", "北京 大学", 1),
        ("classes", "It is a City.", "City", 1),
        ("classes", "City or Country", "City", 0.5),
        ("classes", "Other city", "Other city", 1),  # "city" alone is a part of it
        ("classes", "Country", "City", 0),
        ("count", "There are 12 of 13.", "12", 0.5),
        ("count", "twelve", "12", 0),
        ("retrieval", "Paragraph 3", "Paragraph 3", 1),
        ("retrieval", "Paragraph 30", "Paragraph 3", 0),
        ("retrieval", "段落3", "段落3", 1),
        ("code", "// first\n    return x\nmore", "    return x", 1),
        ("code", "```python\nab", "ac", 0.5),
        ("code", "", "x", 0),
    ],
)
def test_metrics(metric, answer, right, score) -> None:
    classes = ["City", "Country", "Other city", "city"]
    found = longbench.METRICS[metric](answer, right, classes)
    assert found == pytest.approx(score)


def test_every_data_set_makes_a_prompt(prompts, tmp_path) -> None:
    for name in DATA_SETS:
        write(tmp_path, name, {"input": "INPUT"})
    write(tmp_path, "hotpotqa_e", {"input": "INPUT"})
    (tmp_path / "notes.jsonl").write_text("no data set\n")
    bench = LongBench(tmp_path, prompts, 2048)
    assert sorted(bench.names) == sorted([*DATA_SETS, "hotpotqa_e"])
    assert len(bench.samples) == len(DATA_SETS) + 1 and not bench.left_out
    for sample in bench.samples:
        (question,) = sample.questions
        whole = message(sample.text, question.text)
        assert whole.count(CODES) == 1 and "{" not in whole
        without = {"gov_report", "multi_news", "vcsum", "passage_count", "lcc"}
        assert ("INPUT" in whole) == (sample.task not in without)
        n = prompts.n_raw(whole) if sample.raw else prompts.n_prompt(whole)
        assert n == sample.n_prompt <= 2048 - sample.max_tokens


def test_the_best_of_all_answers_counts_and_of_some_sets_the_first_line(prompts, tmp_path) -> None:
    write(tmp_path, "hotpotqa", {"answers": ["Rome", "Paris"]})
    write(tmp_path, "triviaqa", {"answers": ["Paris"]})
    write(tmp_path, "trec", {"answers": ["City"], "all_classes": ["City", "River"]})
    bench = LongBench(tmp_path, prompts, 2048)
    samples = {sample.task: sample for sample in bench.samples}
    assert bench.score(samples["hotpotqa"], ["Paris"]) == 1
    assert bench.score(samples["triviaqa"], ["\nParis\nQuestion: more"]) == 1
    assert bench.score(samples["trec"], ["City\nRiver"]) == 1
    assert bench.score(samples["trec"], ["City, River"]) == 0.5


def test_what_does_not_fit_is_left_out_or_cut_in_the_middle(prompts, tmp_path) -> None:
    text = "BEGIN " + CODES * 20 + " END"
    write(tmp_path, "hotpotqa", {"context": text}, {})
    bench = LongBench(tmp_path, prompts, 1024)
    assert [s.index for s in bench.samples] == [1] and bench.left_out == {"hotpotqa": 1}
    bench = LongBench(tmp_path, prompts, 1024, cut=True)
    first, second = bench.samples
    assert bench.n_cut == {"hotpotqa": 1} and not bench.left_out
    assert first.text.startswith("BEGIN The secret") and first.text.endswith("out.  END")
    assert 1024 - 32 - 64 <= first.n_prompt <= 1024 - 32
    write(tmp_path, "hotpotqa", {"context": text})
    with pytest.raises(RazorError, match="no sample in .* fits a context of 1,024 tokens"):
        LongBench(tmp_path, prompts, 1024)


def test_samples_are_drawn_by_the_seed(prompts, tmp_path) -> None:
    write(tmp_path, "hotpotqa", *({"input": str(i)} for i in range(30)))
    drawn = {
        seed: [s.index for s in LongBench(tmp_path, prompts, 2048, n_samples=5, seed=seed).samples]
        for seed in (0, 1)
    }
    assert len(drawn[0]) == 5 and drawn[0] == sorted(drawn[0]) and drawn[0] != drawn[1]


@pytest.mark.parametrize("field", ["context", "input", "answers", "_id"])
def test_lone_surrogates_are_one_sentence(prompts, tmp_path, field) -> None:
    item = {"context": "a", "input": "b", "answers": ["c"]}
    item[field] = ["\ud800"] if field == "answers" else "\ud800"
    (tmp_path / "qasper.jsonl").write_text(json.dumps(item) + "\n")
    with pytest.raises(
        RazorError, match="qasper.jsonl, line 1: expected valid Unicode, found a lo"
    ):
        LongBench(tmp_path, prompts, 1024)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"context": "a"}',
        '{"context": 1, "input": "", "answers": ["a"]}',
        '{"context": "a", "input": "", "answers": []}',
        '{"context": "a", "input": "", "answers": "a"}',
        "\xff",
        '{"context": "a", "input": "", "answers": ["a"], "all_classes": [1]}',
    ],
)
def test_damaged_lines_are_told(prompts, tmp_path, line) -> None:
    good = json.dumps({"context": "a", "input": "b", "answers": ["c"]})
    (tmp_path / "qasper.jsonl").write_bytes(f"{good}\n\n{line}\n".encode("latin-1"))
    with pytest.raises(RazorError, match="qasper.jsonl, line 3: expected an object"):
        LongBench(tmp_path, prompts, 2048)


def test_a_missing_library_is_one_sentence(tmp_path, monkeypatch) -> None:
    write(tmp_path, "lcc", {})
    monkeypatch.setattr(longbench, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"lcc needs rapidfuzz.*pip install razor-local\[ev"):
        longbench.check_libraries("lcc")
    longbench.check_libraries("hotpotqa")  # needs none
    done = run(tmp_path)
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["/nowhere"], "/nowhere is not a folder"),
        (["."], "has no file of LongBench"),
        ([".", "--datasets", "nothing"], "'nothing' is not a data set of LongBench"),
        ([".", "--datasets", "trec"], "has no trec.jsonl"),
    ],
)
def test_folders_without_files_are_told(args, text, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*args)
    assert done.exit_code == 1 and text in done.stderr and done.stdout == ""


def test_a_run_from_the_command_line(tmp_path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write(
        data,
        "hotpotqa",
        {"input": "What is the secret code of Marlow?"},
        {"context": CODES * 20, "input": "What is the secret code of Marlow?"},
    )
    write(data, "lcc", {"context": "x = 1\nx = 1\n", "answers": ["x = 1"]})
    done = run(data, "-c", "1k", "--policies", "full,streaming", "-t", 1, "--window-min", 64,
               "--window-divisor", 0, "--json", "--plot", tmp_path / "p.png")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "Note: 1 questions of hotpotqa do not fit and are left out" in done.stderr
    found = json.loads(done.stdout)
    assert [(r["task"], r["policy"], r["n"]) for r in found["rows"]] == [
        (task, policy, n)
        for task, n in (("hotpotqa", 1), ("lcc", 1), ("all", 2))
        for policy in ("full-f16", "streaming-f16")
    ]
    for answer in found["answers"]:
        metric = longbench.METRICS[DATA_SETS[answer["task"]].metric]
        expected = answer["expected"][0][0]
        assert answer["score"] == metric(answer["answers"][0], expected, [])
    assert len(found["head"]["settings"]["notes"]) == 1
