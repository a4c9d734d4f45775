"""upstream_tests.py notices what it has to: two runs that differ, in any way, are not the same.

The tests of upstream themselves take minutes and need both trees: `uv run python
-m tests.tools.upstream_tests`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tests.tools import upstream_tests
from tests.tools.upstream_tests import (
    FAILED,
    OPS,
    PASSED,
    SKIPPED,
    RazorTest,
    Result,
    Tree,
    UpstreamTest,
    cases_of_archs,
    cases_of_junit,
    cases_of_models,
    cases_of_ops,
    differences,
    judge,
    run_test,
)

GOOD = Result(0, {"a": PASSED, "b": SKIPPED})


@pytest.mark.parametrize(
    ("patched", "says"),
    [
        (Result(0, {"a": FAILED, "b": SKIPPED}), "a: passed on stock, failed on patched"),
        (Result(0, {"a": PASSED, "b": PASSED}), "b: skipped on stock, passed on patched"),
        (Result(0, {"a": PASSED}), "b: skipped on stock, not run on patched"),
        (Result(0, GOOD.cases | {"c": PASSED}), "c: not run on stock, passed on patched"),
        (Result(1, GOOD.cases), "exit 0 on stock, 1 on patched"),
        (Result(-11, GOOD.cases), "exit 0 on stock, -11 on patched"),
        (
            Result(None, GOOD.cases),
            "time limit reached: 1 passed, 1 skipped, exit 0 on stock,"
            " 1 passed, 1 skipped, time limit on patched",
        ),
    ],
)
def test_a_difference_is_named(patched: Result, says: str) -> None:
    assert differences(GOOD, GOOD) == []
    assert differences(GOOD, patched) == [says]


@pytest.mark.parametrize("nothing", [Result(0, {}), Result(1, {"a": FAILED, "b": SKIPPED})])
def test_two_runs_that_passed_nothing_are_no_comparison(nothing: Result) -> None:
    assert differences(nothing, nothing) == ["no case passed on stock: nothing was compared"]


results = st.builds(
    Result,
    st.sampled_from([0, 1, -6, None]),
    st.dictionaries(st.sampled_from("abc"), st.sampled_from([PASSED, FAILED, SKIPPED])),
)


@given(results, results)
def test_same_verdict_means_same_verdicts(stock: Result, patched: Result) -> None:
    same = stock == patched and stock.exit_code is not None and PASSED in stock.cases.values()
    assert (differences(stock, patched) == []) == same


# each parser on lines as the tests print them


def test_lines_of_archs() -> None:
    output = """
|   Model arch.|     Device|Config|   NMSE vs. CPU|Roundtrip|
|--------------|-----------|------|---------------|---------|
|         llama|AMD EPYC 1|  Dense|OK (0.00e+00)|                  OK|
|         llama|      Meta|  Dense|SKIP           |                SKIP|
|      gpt-neox|AMD EPYC 1|    MoE|an error before the verdict
FAIL (2.00e-01)|                  FAIL|
Summary: 2 test(s) executed, 1 failed
"""
    assert cases_of_archs(output, 1) == {
        "llama Dense on CPU: logits": PASSED,
        "llama Dense on CPU: saved and loaded": PASSED,
        "llama Dense on Meta: logits": SKIPPED,
        "llama Dense on Meta: saved and loaded": SKIPPED,
        "gpt-neox MoE on CPU: logits": FAILED,
        "gpt-neox MoE on CPU: saved and loaded": FAILED,
    }


def test_lines_of_models() -> None:
    output = """
Model             baseline  seq_rm
llama-dense.gguf  PASS      FAIL
mamba-dense.gguf  SKIP      PASS
main: summary: 0 passed, 2 failed (of 2)
"""
    assert cases_of_models(output, 1) == {
        "llama-dense.gguf baseline": PASSED,
        "llama-dense.gguf seq_rm": FAILED,
        "mamba-dense.gguf baseline": SKIPPED,
        "mamba-dense.gguf seq_rm": PASSED,
    }


def test_lines_of_ops() -> None:
    output = """
Backend 1/1: CPU
  GET_ROWS(type=f32,n=256): OK
  GET_ROWS(type=f32,n=256): [GET_ROWS] NMSE = 0.5 > 0.0000001 FAIL
  GET_ROWS(type=q1_0,n=1): not supported [CPU]
  2/3 tests passed
  Backend CPU: FAIL
"""
    assert cases_of_ops(output, 1) == {
        "GET_ROWS(type=f32,n=256)": PASSED,
        "GET_ROWS(type=f32,n=256) #2": FAILED,
        "GET_ROWS(type=q1_0,n=1)": SKIPPED,
    }


def test_cases_of_pytest(tmp_path: Path) -> None:
    file = tmp_path / "junit.xml"
    file.write_text("""<testsuites><testsuite>
        <testcase classname="t" name="a"/><testcase classname="t" name="b"><failure/></testcase>
        <testcase classname="t" name="c"><error/></testcase>
        <testcase classname="t" name="d"><skipped/></testcase></testsuite></testsuites>""")
    want = {"t::a": PASSED, "t::b": FAILED, "t::c": FAILED, "t::d": SKIPPED}
    assert cases_of_junit(file) == want


def test_operations_of_our_graphs_are_tested() -> None:
    source = (upstream_tests.ROOT / "native/src/llama-graph-razor.cpp").read_text()
    called = {re.sub(r"_\dd$", "", n) for n in re.findall(r"ggml_(\w+)\(ctx0", source)}
    called = {{"cast": "cpy", "soft_max_ext": "soft_max"}.get(n, n) for n in called}
    called -= {"reshape", "view", "transpose", "permute"}  # nothing is computed
    assert {"get_rows", "set_rows"} <= called <= {op.lower() for op in OPS}


# the script itself, on trees whose tests are shell scripts

SCRIPT = """#!/bin/sh
echo "a text of $0 with $*"
{}
"""


def fake_tree(folder: Path, name: str, line: str) -> Tree:
    folder = folder / name
    (folder / "llama.cpp/src").mkdir(parents=True, exist_ok=True)
    (folder / "llama.cpp/src/llama.cpp").write_text(name)
    for target in {t.target for t in upstream_tests.TESTS}:
        (folder / target).write_text(SCRIPT.format(line if target.endswith("safety") else ""))
        (folder / target).chmod(0o755)
    return Tree(name, folder / "llama.cpp", folder)


@pytest.mark.parametrize(
    ("line", "exit_code", "says"),
    [
        ("", 1, "the output lacks 'KV heads keep all 1024 tokens'"),
        ("echo 3 of 16 KV heads keep all 1024 tokens", 0, "exit 0"),
        ("exit 7", 1, "exit 0 on stock, 7 on patched"),
        ("kill -SEGV $$", 1, "exit 0 on stock, -11 on patched"),
    ],
)
def test_exit_code_of_the_script(tmp_path, monkeypatch, line, exit_code, says) -> None:
    trees = {"stock": "", "patched": line}
    monkeypatch.setattr(upstream_tests, "ATTEMPTS", 2)
    monkeypatch.setattr(
        upstream_tests, "build_tree", lambda name, *_: fake_tree(tmp_path, name, trees[name])
    )
    args = ["--folder", str(tmp_path), "thread-safety"]
    run = CliRunner().invoke(upstream_tests.main, args)
    assert run.exit_code == exit_code
    assert says in run.stdout and "Files of llama.cpp that differ: src/llama.cpp" in run.stdout
    run = CliRunner().invoke(upstream_tests.main, [*args, "--json"])
    assert run.exit_code == exit_code
    found = json.loads(run.stdout)
    problems = [p for r in found["tests"] for p in r["differences"]]
    problems += [p for r in found["with_razor"] for p in r["wrong"]]
    assert bool(problems) == bool(exit_code)
    assert found["tests"][0]["stock"]["cases"] == {"run": PASSED}


def test_time_limit(tmp_path: Path) -> None:
    tree = fake_tree(tmp_path, "stock", "exec sleep 60")
    result = run_test(
        UpstreamTest("test-thread-safety", "{model}", limit=0.2), tree, {"model": tmp_path}
    )
    assert result.exit_code is None and f"with {tmp_path}" in result.output


def test_lost_lines_are_waited_for(tmp_path: Path) -> None:
    """The script prints its text when it runs for the third time."""
    count = tmp_path / "count"
    tree = fake_tree(tmp_path, "stock", f"echo x >> {count}; tail -n +3 {count}")
    test = UpstreamTest("test-thread-safety", "", says="x\n")
    assert run_test(test, tree, {}).output.endswith("x\n")
    assert count.read_text() == "x\n" * 3


def test_refusal_must_be_the_right_one() -> None:
    refused = RazorTest(UpstreamTest("t", "", says="several sequences"), False, "refused")
    assert judge(refused, Result(1, {}, "refused: several sequences")) == []
    assert judge(refused, Result(0, {}, "several sequences")) == [
        "exit 0, expected a refusal",
    ]
    assert judge(refused, Result(1, {}, "")) == ["the output lacks 'several sequences'"]
    assert judge(refused, Result(None, {}, "several sequences")) != []


def test_unknown_name(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        upstream_tests, "build_tree", lambda name, *_: fake_tree(tmp_path, name, "")
    )
    run = CliRunner().invoke(upstream_tests.main, ["--folder", str(tmp_path), "no-such"])
    assert run.exit_code == 1 and "no test is named like no-such" in run.stderr
