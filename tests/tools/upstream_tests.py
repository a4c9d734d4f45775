"""Run the tests of llama.cpp, its server and llama-cpp-python on the stock and the patched tree.

Both trees are built from the pinned sdist, which takes minutes the first time. Each test runs on
both, and each of its cases must have the same result. Then some tests run with razor switched on.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
from rich.console import Console

from tests.support import native_build
from tests.support.native_build import ROOT
from tests.tools import upstream_models

progress = Console(stderr=True)

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
ATTEMPTS = 8  # on a busy machine half of the runs lose lines of output
Cases = dict[str, str]  # name of a case: PASSED, FAILED or SKIPPED


# -- what a run says --


@dataclass(frozen=True)
class Result:
    """One run of a test. exit_code is negative after a signal and None at the time limit."""

    exit_code: int | None
    cases: Cases
    output: str = ""

    def __str__(self) -> str:
        counts = Counter(self.cases.values())
        parts = [f"{counts[v]:,} {v}" for v in (PASSED, FAILED, SKIPPED) if counts[v]]
        end = "time limit" if self.exit_code is None else f"exit {self.exit_code}"
        return ", ".join([*parts, end])

    def as_json(self) -> dict:
        return asdict(self) | {"output": self.output[-3000:]}


def differences(stock: Result, patched: Result) -> list[str]:
    """Return a sentence for each difference between two runs.

    Runs without a passed case and runs that did not end count as differences, because they show
    nothing about the patches.
    """
    found = []
    if stock.exit_code is None or patched.exit_code is None:
        found.append(f"time limit reached: {stock} on stock, {patched} on patched")
    elif stock.exit_code != patched.exit_code:
        found.append(f"exit {stock.exit_code} on stock, {patched.exit_code} on patched")
    for name in sorted(stock.cases.keys() | patched.cases.keys()):
        old, new = (r.cases.get(name, "not run") for r in (stock, patched))
        if old != new:
            found.append(f"{name}: {old} on stock, {new} on patched")
    if PASSED not in stock.cases.values():
        found.append("no case passed on stock: nothing was compared")
    return found


def cases_of_run(output: str, exit_code: int | None) -> Cases:
    """Return the only case of a test, from its exit code."""
    return {"run": PASSED if exit_code == 0 else FAILED}


def cases_of_archs(output: str, exit_code: int | None) -> Cases:
    """Parse test-llama-archs: a line per architecture, device and kind, with two verdicts."""
    words = {"OK": PASSED, "FAIL": FAILED, "SKIP": SKIPPED}
    verdict = r"\|[^|]*?(OK|FAIL|SKIP)[^|]*"  # errors may be printed before it
    line = r"\|\s*([\w.-]+)\|\s*([^|\n]+)\|\s*(Dense|MoE)" + verdict * 2
    cases = {}
    for arch, device, kind, logits, roundtrip in re.findall(line, output):
        device = "Meta" if device.strip() == "Meta" else "CPU"
        cases[f"{arch} {kind} on {device}: logits"] = words[logits]
        cases[f"{arch} {kind} on {device}: saved and loaded"] = words[roundtrip]
    return cases


def cases_of_models(output: str, exit_code: int | None) -> Cases:
    """Parse the table of a test that runs over a folder of models: a line per model."""
    words = {"PASS": PASSED, "FAIL": FAILED, "SKIP": SKIPPED}
    lines = output.splitlines()
    heads = [re.split(r"  +", line.strip()) for line in lines if re.match(r"Model +\w", line)]
    cases = {}
    for line in lines:
        model, *verdicts = line.split() or [""]
        if heads and model.endswith(".gguf") and all(v in words for v in verdicts):
            for name, verdict in zip(heads[0][1:], verdicts, strict=False):
                cases[f"{model} {name}"] = words[verdict]
    return cases


def cases_of_ops(output: str, exit_code: int | None) -> Cases:
    """Parse test-backend-ops: a line per operation and its parameters, some more than once."""
    cases: Cases = {}
    for case, end in re.findall(r"^  ([A-Z0-9_]+\(.*\)): (.*)$", output, re.MULTILINE):
        verdict = PASSED if end.endswith("OK") else FAILED
        if end.startswith(("not supported", "skipping")):
            verdict = SKIPPED
        name, n = case, 2
        while name in cases:
            name, n = f"{case} #{n}", n + 1
        cases[name] = verdict
    return cases


def cases_of_junit(file: Path) -> Cases:
    """Parse the file of pytest's --junitxml."""
    cases = {}
    for case in ET.parse(file).iter("testcase"):
        kinds = {child.tag for child in case}
        verdict = FAILED if kinds & {"failure", "error"} else PASSED
        verdict = SKIPPED if "skipped" in kinds else verdict
        cases[f"{case.get('classname')}::{case.get('name')}"] = verdict
    return cases


# -- what is run --

# operations that native/src puts into graphs, and those of upstream's attention on both groups
OPS = {
    "GET_ROWS": "",
    "SET_ROWS": "",
    "SUM_ROWS": "",
    "ADD": "",
    "MUL": "",
    "REPEAT": "",
    "CONCAT": "",
    "CONT": "",
    "CPY": "",
    "SOFT_MAX": "",
    "MUL_MAT": "",
    # 297 of 5,308: grouped queries, heads of 64 or 128
    "FLASH_ATTN_EXT": r"hsk=(64|128),hsv=(64|128),nh=4,nr23=\[4,1\],.*max_bias=0\.0+,",
}


@dataclass(frozen=True)
class UpstreamTest:
    """A test executable of llama.cpp.

    Attributes:
        args: its arguments, where {archs}, {model} and {razor} are replaced by paths.
        says: a text that the output must contain.
    """

    target: str
    args: str
    cases: Callable[[str, int | None], Cases] = cases_of_run
    note: str = ""
    says: str = ""
    limit: int = 600  # seconds
    env: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.target} {self.note}".strip()


TESTS = [
    UpstreamTest("test-llama-archs", "-s 1", cases_of_archs, says="Summary:"),
    UpstreamTest("test-save-load-state", "--models {archs} -t 1", cases_of_models, "(all archs)"),
    UpstreamTest("test-save-load-state", "-m {model}", note="(built-in model)"),
    UpstreamTest(
        "test-recurrent-state-rollback", "--models {archs} -t 1", cases_of_models, "(all archs)"
    ),
    UpstreamTest("test-state-restore-fragmented", "-m {model}"),
    UpstreamTest("test-thread-safety", "-m {model} -p Once -n 128 -c 256 -ub 32 -np 4 -t 1"),
    *(
        UpstreamTest(
            "test-backend-ops",
            f"-b CPU -o {op}" + (f" -p {params}" if params else ""),
            cases_of_ops,
            op,
        )
        for op, params in OPS.items()
    ),
]


@dataclass(frozen=True)
class RazorTest:
    """A test on a model with razor metadata, and whether it must pass on the patched tree."""

    test: UpstreamTest
    passes: bool
    reason: str


RAZOR_TESTS = [
    RazorTest(
        UpstreamTest(
            "test-thread-safety",
            "-m {razor} -p Once -n 1000 -c 1024 -ub 32 -np 4 -t 1 -lv 4",
            says="KV heads keep all 1024 tokens",
        ),
        True,
        "contexts of one sequence: passes",
    ),
    RazorTest(
        UpstreamTest(
            "test-state-restore-fragmented",
            "-m {razor}",
            says="set kv_unified to false or switch razor off",
        ),
        False,
        "three sequences in a unified cache: refused by name",
    ),
    # test-save-load-state also needs two sequences, and crashes without a context
    RazorTest(
        UpstreamTest(
            "test-save-load-state",
            "-m {razor}",
            note="(RAZOR_LOCAL_DISABLE=1)",
            env={"RAZOR_LOCAL_DISABLE": "1"},
        ),
        True,
        "razor switched off: passes",
    ),
]

PYTHON_TESTS = "llama-cpp-python's tests"
SERVER_TESTS = "llama-server's tests"


# -- trees --


@dataclass(frozen=True)
class Tree:
    """A built tree. bin contains executables and libraries."""

    name: str
    source: Path
    bin: Path


def build_tree(name: str, folder: Path, targets: Sequence[str]) -> Tree:
    """Build the stock or the patched tree in `folder`, with these test executables."""
    from tests.support.runner import Worker, ping

    build = folder / name / "build"
    stock = name == "stock"
    more = os.environ.get("CMAKE_ARGS", "").split()
    definitions = [f"-DRAZOR_STOCK={'ON' if stock else 'OFF'}", "-DRAZOR_TESTS=ON", *more]
    definitions.append("-DRAZOR_TOOLS=ON")  # llama-server
    native_build.build(build, *definitions)
    native_build.run(
        [native_build.tool("cmake"), "--build", build, "--config", "Release", "--parallel",
         "--target", *targets]
    )  # fmt: skip
    with Worker(build / "bin") as worker:
        if worker(ping) == stock:
            raise RuntimeError(f"{build / 'bin'} does not hold a {name} library")
    return Tree(name, build / "llama.cpp", build / "bin")


def changed_files(stock: Tree, patched: Tree) -> list[str]:
    """Return the source files of llama.cpp that differ between the trees."""

    def walk(compared: filecmp.dircmp, prefix: str) -> Iterator[str]:
        for name in compared.left_only + compared.right_only + compared.diff_files:
            yield prefix + name
        for name, below in compared.subdirs.items():
            yield from walk(below, f"{prefix}{name}/")

    ignore = [".razor-unpacked.json"]
    return sorted(walk(filecmp.dircmp(stock.source, patched.source, ignore=ignore), ""))


def unpack(folder: Path, wanted: str) -> Path:
    """Unpack the files of the pinned sdist whose path matches a regular expression."""
    version, _ = native_build.pin()
    name = f"llama_cpp_python-{version}"
    sdist = os.environ.get("RAZOR_LOCAL_SDIST") or native_build.cache_dir() / f"{name}.tar.gz"
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(sdist, "r|*") as tar:
        for member in tar:
            path = member.name.partition("/")[2]
            if member.isfile() and re.fullmatch(wanted, path):
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())
    return folder


def unpack_python_tests(folder: Path) -> Path:
    """Unpack llama-cpp-python's tests, with the file that they open by path."""
    return unpack(folder, r"tests/[^/]+\.py|vendor/llama\.cpp/models/ggml-vocab-llama-spm\.gguf")


def unpack_server_tests(folder: Path, draft_model: Path) -> Path:
    """Unpack the tests of llama-server with the chat templates that they open by path."""
    unpack(folder, r"vendor/llama\.cpp/(tools/server/tests/.*|models/templates/.*)")
    tests = folder / "vendor/llama.cpp/tools/server/tests"
    (tests / "tmp").mkdir()  # for files that they download
    shutil.copy(draft_model, tests / "tmp" / upstream_models.DRAFT_MODEL)
    return tests


# -- running --


def run(
    command: Sequence[str | Path], limit: int, cwd: Path, env: dict[str, str]
) -> tuple[int | None, str]:
    """Run a command and return its exit code (None: time limit) and its output without colors."""
    # The user's environment must not choose another library or other options.
    drop = ("LD_", "DYLD_", "LLAMA_", "GGML_", "RAZOR_LOCAL_", "PYTEST_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        env=clean | {"OMP_WAIT_POLICY": "passive"} | env,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        exit_code = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        exit_code = None
    except BaseException:
        process.kill()
        raise
    return exit_code, re.sub(r"\x1b\[[0-9;]*m", "", output.decode("utf-8", "replace"))


def run_test(test: UpstreamTest, tree: Tree, paths: dict[str, Path]) -> Result:
    """Run a test, and repeat it if its text is missing: llama.cpp's log can lose the last lines."""
    args = [arg.format(**paths) for arg in test.args.split()]
    for _ in range(ATTEMPTS):
        with tempfile.TemporaryDirectory() as cwd:  # some write files
            command = [tree.bin / test.target, *args]
            exit_code, output = run(command, test.limit, Path(cwd), test.env)
        if test.says in output:
            break
    return Result(exit_code, test.cases(output, exit_code), output)


def run_pytest(
    plugin: str, target: str, tests: Path, tree: Tree, limit: int, env: dict[str, str], razor: bool
) -> Result:
    """Run upstream's pytest files in a folder with a plugin of tests/tools."""
    python_path = [str(ROOT / "tests" / "tools"), os.environ.get("PYTHONPATH", "")]
    env = env | {
        "PYTHONPATH": os.pathsep.join(filter(None, python_path)),
        "UPSTREAM_PATCHED": "0" if tree.name == "stock" else "1",
        "UPSTREAM_RAZOR": "1" if razor else "0",
    }
    with tempfile.TemporaryDirectory() as temp:
        report = Path(temp) / "junit.xml"
        options = ["-p", plugin, "-p", "no:cacheprovider", "-ra", "--rootdir", tests]
        command = [sys.executable, "-m", "pytest", *options, "--junitxml", report, target]
        exit_code, output = run(command, limit, tests, env)
        cases = cases_of_junit(report) if report.is_file() else {}
    return Result(exit_code, cases, output)


def run_python_tests(tests: Path, tree: Tree, models: Sequence[Path], *, razor: bool) -> Result:
    """Run llama-cpp-python's tests on the tree's library. razor: with razor_local's Llama."""
    lib = str(tree.bin)
    env = {"LLAMA_CPP_LIB_PATH": lib, "UPSTREAM_MODELS": os.pathsep.join(map(str, models))}
    if razor:
        env["RAZOR_LOCAL_LIB"] = lib
    return run_pytest("upstream_plugin", "tests", tests, tree, 600, env, razor)


def run_server_tests(tests: Path, tree: Tree, hub: Path, *, razor: bool) -> Result:
    """Run the tests of llama-server with the models in `hub`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {
        "LLAMA_SERVER_BIN_PATH": str(tree.bin / "llama-server"),
        "LLAMA_CACHE": str(hub),
        "PORT": str(port),
    }
    return run_pytest("upstream_server_plugin", "unit", tests, tree, 1200, env, razor)


# -- tables --


@dataclass(frozen=True)
class Row:
    """A test on both trees."""

    name: str
    stock: Result
    patched: Result

    @property
    def differences(self) -> list[str]:
        return differences(self.stock, self.patched)

    def as_json(self) -> dict:
        return {
            "name": self.name,
            "stock": self.stock.as_json(),
            "patched": self.patched.as_json(),
            "differences": self.differences,
        }


@dataclass(frozen=True)
class RazorRow:
    """A test on the patched tree with razor switched on, and the faults of its result."""

    name: str
    expected: str
    found: Result
    wrong: list[str]

    def as_json(self) -> dict:
        return asdict(self) | {"found": self.found.as_json()}


def judge(expected: RazorTest, found: Result) -> list[str]:
    """Return the faults of a run with razor, [] if it is as expected."""
    wrong = []
    if found.exit_code is None or (found.exit_code == 0) != expected.passes:
        wrong.append(
            f"{found}, expected exit 0" if expected.passes else f"{found}, expected a refusal"
        )
    if expected.test.says not in found.output:
        wrong.append(f"the output lacks '{expected.test.says}'")
    return wrong


def markdown(rows: Sequence[Row], razor_rows: Sequence[RazorRow]) -> str:
    lines = ["| test | stock tree | patched tree | same |", "|---|---|---|---|"]
    for row in rows:
        same = "**no**" if row.differences else "yes"
        lines.append(f"| {row.name} | {row.stock} | {row.patched} | {same} |")
    if razor_rows:
        lines += ["", "| with razor, patched tree | expected | found | as expected |"]
        lines += ["|---|---|---|---|"]
        for row in razor_rows:
            right = "**no**" if row.wrong else "yes"
            lines.append(f"| {row.name} | {row.expected} | {row.found} | {right} |")
    problems = [(r.name, d) for r in rows for d in r.differences]
    problems += [(r.name, w) for r in razor_rows for w in r.wrong]
    if problems:
        lines += ["", *(f"- {name}: {what}" for name, what in problems[:100])]
        if len(problems) > 100:
            lines.append(f"- and {len(problems) - 100} more")
    return "\n".join(lines)


def compare(
    stock: Tree, patched: Tree, folder: Path, patterns: Sequence[str], models: Path | None
) -> tuple[list[Row], list[RazorRow]]:
    """Run the tests whose names contain a pattern, or all tests without patterns."""

    def chosen(name: str) -> bool:
        return not patterns or any(p in name for p in patterns)

    archs = folder / "archs"
    shutil.rmtree(archs, ignore_errors=True)
    archs.mkdir()
    write = UpstreamTest("test-llama-archs", "-s 1 -o {archs}")
    with progress.status("test-llama-archs writes its models"):
        made = run_test(write, stock, {"archs": archs})
    if made.exit_code != 0:
        raise RuntimeError(f"test-llama-archs -o ended with {made}:\n{made.output}")
    paths = {
        "archs": archs,
        "model": upstream_models.without_razor(folder / "model.gguf"),
        "razor": upstream_models.BUILT_IN,
    }

    rows, razor_rows = [], []
    for test in TESTS:
        if chosen(test.name):
            with progress.status(test.name):
                row = Row(test.name, *(run_test(test, tree, paths) for tree in (stock, patched)))
            progress.print(f"{row.name}: {row.stock}; {row.patched}")
            rows.append(row)
    for expected in RAZOR_TESTS:
        if chosen(expected.test.name):
            with progress.status(f"{expected.test.name}, razor"):
                found = run_test(expected.test, patched, paths)
            wrong = judge(expected, found)
            razor_rows.append(RazorRow(expected.test.name, expected.reason, found, wrong))

    if chosen(PYTHON_TESTS):
        tests = unpack_python_tests(folder / "llama-cpp-python")
        given = [models] if models else []
        with progress.status(PYTHON_TESTS):
            plain = upstream_models.make_stand_ins(folder / "models", archs, razor=False)
            results = [
                run_python_tests(tests, t, [*given, plain], razor=False) for t in (stock, patched)
            ]
            razor = upstream_models.make_stand_ins(folder / "razor-models", archs, razor=True)
            found = run_python_tests(tests, patched, [razor, *given], razor=True)
        rows.append(Row(PYTHON_TESTS, *results))
        wrong = differences(results[0], found)
        name = f"{PYTHON_TESTS}, razor_local.Llama"
        razor_rows.append(RazorRow(name, "the verdicts of stock", found, wrong))

    if chosen(SERVER_TESTS):
        tests = unpack_server_tests(folder / "server", paths["model"])
        with progress.status(SERVER_TESTS):
            plain = upstream_models.make_server_stand_ins(folder / "hub", razor=False)
            results = [run_server_tests(tests, t, plain, razor=False) for t in (stock, patched)]
            razor = upstream_models.make_server_stand_ins(folder / "razor-hub", razor=True)
            found = run_server_tests(tests, patched, razor, razor=True)
        rows.append(Row(SERVER_TESTS, *results))
        for what in differences(results[0], found):
            progress.print(f"with razor, {what}")
        # pytest exits with 1 if a test failed; the words of other models fail on all trees
        wrong = [] if found.exit_code in (0, 1) else [str(found)]
        razor_rows.append(RazorRow(SERVER_TESTS, "runs; words may differ", found, wrong))
    return rows, razor_rows


@click.command(help=__doc__)
@click.argument("patterns", nargs=-1)
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where the trees are built and kept."
)
@click.option(
    "--models",
    type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path),
    help="Folder with models that llama-cpp-python's tests would download.",
)
@click.option("--json", "as_json", is_flag=True, help="All cases of all runs as JSON.")
def main(
    patterns: tuple[str, ...], folder: Path | None, models: Path | None, as_json: bool
) -> None:
    folder = (folder or native_build.cache_dir() / "upstream-tests").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    targets = sorted({t.target for t in TESTS})
    try:
        with progress.status("building the stock and the patched tree (minutes the first time)"):
            stock, patched = (build_tree(name, folder, targets) for name in ("stock", "patched"))
        rows, razor_rows = compare(stock, patched, folder, patterns, models)
    except (RuntimeError, OSError, tarfile.TarError) as error:
        raise click.ClickException(str(error)) from None
    if not rows:
        raise click.ClickException(f"no test is named like {' or '.join(patterns)}")
    changed = changed_files(stock, patched)
    if as_json:
        print(
            json.dumps(
                {
                    "changed_files": changed,
                    "tests": [row.as_json() for row in rows],
                    "with_razor": [row.as_json() for row in razor_rows],
                },
                indent=1,
            )
        )
    else:
        print(markdown(rows, razor_rows))
        print(f"\nFiles of llama.cpp that differ: {', '.join(changed)}")
    if any(row.differences for row in rows) or any(row.wrong for row in razor_rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
