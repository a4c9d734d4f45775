"""The report of a benchmark: figures against ones computed by hand, every format, comparison,
plots, the README's table.
"""

from __future__ import annotations

import copy
import json
import re
import runpy
import statistics
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from razor_local.bench.compare import differences, format_comparison
from razor_local.bench.figures import Report, median_ratio, prompt_seconds
from razor_local.bench.plot import plot_report
from razor_local.bench.report import FORMATS, format_report, readme_block
from razor_local.bench.saved import load_report
from razor_local.cli import main
from razor_local.errors import RazorError, UnsupportedError
from tests.support.bench import HEAD, make_report, saved

ROOT = Path(__file__).parents[2]
UPDATE = ROOT / "docs/benchmarks/update_tables.py"


# -- figures


def test_decode_ratio_is_the_median_of_pairs() -> None:
    row = make_report().rows[0]
    assert row["decode_ratio_full"] == 3  # of 2, 3, 4; the medians' own ratio is the same by chance
    assert (row["decode_ratio_full_q1"], row["decode_ratio_full_q3"]) == (2.5, 3.5)
    assert (row["razor_ms"], row["full_ms"], row["razor_over_read"]) == (11, 33, 2.2)
    assert row["decode_ratio_full_f16"] is None
    assert make_report().rows[4]["decode_ratio_full_f16"] == 3


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=50))
def test_quartiles_surround_the_median(pairs) -> None:
    above, below = zip(*pairs, strict=True)
    middle, low, high = median_ratio(above, below)
    ratios = [a / b for a, b in pairs]
    assert middle == pytest.approx(statistics.median(ratios))
    assert min(ratios) <= low <= middle <= high <= max(ratios)


def test_time_to_the_first_token_is_the_integral() -> None:
    rows = {(r["type_k"], r["depth"]): r for r in make_report().rows}
    assert rows["f16", 0]["first_token"] == rows["f16", 512]["first_token"] == "measured"
    assert rows["f16", 0]["razor_first_token_s"] == 0.011  # a prompt of one token
    assert rows["f16", 512]["full_first_token_s"] == 0.75
    for depth in (8192, 32768):
        row = rows["q8_0", depth]
        assert row["first_token"] == "integrated"
        # integral of 1 + x/1000 ms; the second context borrows the batch at depth 0 of the first
        assert row["full_first_token_s"] == pytest.approx((depth + depth**2 / 2000) / 1000)
        assert row["razor_first_token_s"] == pytest.approx((depth + depth**2 / 8000) / 1000)
        assert row["full_prefill_tok_s"] == pytest.approx(1e5 / (100 + (depth + 50) / 10))
    assert rows["f16", 512]["prefill_ratio"] == 1.5


@given(
    st.lists(st.integers(0, 10**5), min_size=2, max_size=6, unique=True),
    st.integers(1, 2 * 10**5),
    st.floats(0.01, 10),
    st.floats(0, 0.1),
)
def test_integral_of_a_line_is_exact(depths, n_tokens, start, slope) -> None:
    points = [
        {"depth": d, "tokens": 64, "ms": {"razor": [64 * (start + slope * (d + 32))]}}
        for d in sorted(depths)
    ]
    want = (start * n_tokens + slope * n_tokens**2 / 2) / 1e3
    assert prompt_seconds(points, "razor", n_tokens) == pytest.approx(want, rel=1e-6)


def test_longest_step_and_energy_and_check() -> None:
    report = make_report()
    fold = report.folds[0]
    assert (fold["longest_ratio"], fold["longest_fold_ratio"], fold["folds"]) == (2, 1.4, 1)
    assert report.energy[0]["joules_per_token"] == 5 and report.energy[0]["watts"] == 40
    razor, full = report.checks
    assert razor["integrated_over_real"] == pytest.approx((4 + 4000**2 / 8e6) / 6)
    assert full["random_over_real"] == pytest.approx(0.95)
    assert (razor["full_over_real"], full["full_over_real"]) == (2, 1)


def test_real_prefill_of_a_row_is_its_time_to_the_first_token() -> None:
    report = make_report()
    real = copy.deepcopy(report.records[-1]) | {"depth": 32768, "n_ctx": 33280}
    report.records.append(real)
    rows = {(r["type_k"], r["depth"]): r for r in report.rows}
    row = rows["f16", 32768]
    assert (row["razor_first_token_s"], row["full_first_token_s"]) == (6, 12)
    assert (row["first_token"], row["first_token_ratio"]) == ("measured", 2)
    assert row["prefill_at"] == 32768  # its speed is still that of a batch
    assert rows["q8_0", 32768]["first_token"] == rows["f16", 8192]["first_token"] == "integrated"
    assert [(c["side"], c["n_ctx"]) for c in report.checks[2:]] == [
        ("razor", 33280),
        ("full", 33280),
    ]
    text = format_report(report, "md")
    assert "| f16 | razor | 32,768 | 33,280 | 6.00 s | 2.00x |" in text
    assert "| f16 | full | 32,768 | 33,280 | 12.00 s |  |" in text
    real["depth"] = 8192  # in a larger context than the row's
    assert {r["first_token"] for r in report.rows if r["depth"] > 512} == {"integrated"}


def test_steps_in_a_row_are_told() -> None:
    report = make_report()
    assert "of which the median does" not in format_report(report, "md")
    report.records[0]["steps"] = 4
    assert "less than 50 ms, a turn is one warm-up step and 4 more" in format_report(report, "md")


# -- formats


def test_formats(tmp_path) -> None:
    report = make_report()
    text = format_report(report, "json")
    full = json.loads(text)
    assert full["rows"] == report.rows and len(full["rows"]) == 8
    assert full["rows"][7]["razor_ms"] == 11 and full["rows"][0]["decode_ratio_full_f16"] is None
    assert load_report(saved(report, tmp_path / "run.json")) == report
    lines = text.splitlines()  # a record each
    start = lines.index('"records":[') + 1
    records = [json.loads(line.rstrip(",")) for line in lines[start : start + len(report.records)]]
    assert records == report.records


def test_markdown_says_what_it_is_and_is_a_table() -> None:
    text = format_report(make_report(), "md")
    for said in (
        "random rows",
        "The weights are random",
        "integrated",
        "A CPU",
        "commit 0123456789ab",
        "llama.cpp of llama-cpp-python 1.2.3",
        "J per token",
        "3 of 20 KV heads",
    ):
        assert said in text
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.M)
    assert len(tables) == 6
    for table in tables:
        lines = table.splitlines()
        assert len(lines) > 2 and len({line.count("|") for line in lines}) == 1
    assert "| q8_0/q4_0 | 32,768 | 33,280 | 90.91 | 30.30 | 3.00x (2.50-3.50) |" in text


def test_nothing_but_decoding_is_a_report_too(tmp_path) -> None:
    report = Report(HEAD, [r for r in make_report().records if r["kind"] == "decode"])
    for kind in FORMATS:
        assert format_report(report, kind)
    plot_report(report, tmp_path / "run.png")


@pytest.mark.parametrize(
    ("kind", "sections"),
    [
        ("memory", ["Memory"]),
        ("decode", ["Decoding", "Prefill"]),  # the first token of an empty prompt is one step
        ("energy", ["Energy (package-0; idle power included)"]),
    ],
)
def test_sections_without_figures_are_left_out(kind, sections) -> None:
    report = Report(HEAD, [r for r in make_report().records if r["kind"] == kind])
    text = format_report(report, "md")
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == sections
    assert ("faster by" in text) == (kind != "memory") and "\n\n\n" not in text


def test_names_cannot_break_the_tables() -> None:
    report = make_report()
    report.head["model"]["name"] = "a | b\n# c <script>"
    assert format_report(report, "md").splitlines()[0] == "# razor-local bench: a ? b?# c ?script?"


def test_command_shows_a_saved_run(tmp_path) -> None:
    path = saved(make_report(), tmp_path / "run.json")
    out = tmp_path / "out.md"
    done = CliRunner().invoke(main, ["bench", "--report", str(path), "-o", str(out)])
    assert done.exit_code == 0 and done.output == ""
    assert out.read_text() == format_report(make_report(), "md")
    done = CliRunner().invoke(main, ["bench", "--report", str(path), "--json"])
    assert done.stdout == format_report(make_report(), "json")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "nan", '{"format": "razor-local bench"}', "[" * 100_000, "\0\xff"]
)
def test_other_files_are_no_reports(tmp_path, text) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RazorError, match="x.json is not a report of a benchmark"):
        load_report(path)


def test_report_of_another_version_is_refused(tmp_path) -> None:
    report = make_report()
    report.head["version"] = 2
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"format": "razor-local bench"} | vars(report)))
    with pytest.raises(
        RazorError, match="is a report of version 2, but this razor-local reads version 1"
    ):
        load_report(path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damaged_reports_are_refused_or_shown(tmp_path, data) -> None:
    """One value anywhere in a report replaced: never another exception than RazorError."""
    found = json.loads(format_report(make_report(), "json"))
    at = found[data.draw(st.sampled_from(["head", "records"]))]
    while isinstance(at, (dict, list)) and at:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], (dict, list)) or data.draw(st.integers(0, 3)) == 0:
            at[key] = data.draw(st.sampled_from([None, 0, -1, "x", [], {}, 1e308]))
            break
        at = at[key]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(found))
    try:
        report = load_report(path)
    except RazorError:
        return
    for kind in FORMATS:
        format_report(report, kind)


# -- comparison


def test_comparison(tmp_path) -> None:
    here, there = make_report(), make_report()
    for r in there.records:
        if r["kind"] == "decode":
            r["ms"]["razor"] = [ms / 2 for ms in r["ms"]["razor"]]
    there.head["machine"]["cpu"] = "Another"
    there.records[:] = [r for r in there.records if r["depth"] != 512]
    rows = json.loads(format_comparison(here, there, "json"))["rows"]
    assert [r["depth"] for r in rows] == [0, 8192, 32768] * 2
    assert all(r["razor_tok_s_change"] == 2 and r["full_tok_s_change"] == 1 for r in rows)
    assert differences(here, there) == ["machine.cpu: A CPU in A, Another in B"]

    paths = [saved(here, tmp_path / "a.json"), saved(there, tmp_path / "b.json")]
    done = CliRunner().invoke(main, ["bench", "--compare", *map(str, paths)])
    assert done.exit_code == 0, done.output
    assert "| f16 | 8,192 | 90.91 | 181.8 | 2.00x |" in done.stdout
    assert "Note: the runs differ in machine.cpu" in done.stderr
    done = CliRunner().invoke(main, ["bench", "--compare", *map(str, paths), "--plot", "x.png"])
    assert done.exit_code == 2 and "--compare draws nothing" in done.stderr
    there.records[:] = [r for r in there.records if r["kind"] != "decode"]
    with pytest.raises(RazorError, match="no KV type and depth in common"):
        format_comparison(here, there, "md")


# -- plots


def test_plots_are_pictures(tmp_path) -> None:
    report = make_report()
    png = plot_report(report, tmp_path / "run.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB`\x82")
    svg = ElementTree.parse(plot_report(report, tmp_path / "run.svg")).getroot()
    assert svg.tag.endswith("svg") and len(list(svg.iter())) > 200
    with pytest.raises(UnsupportedError, match="run.txt is not the name of a picture"):
        plot_report(report, tmp_path / "run.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.png", "run.svg"]


# -- the page of results


def test_a_page_is_updated_between_its_marks(tmp_path) -> None:
    updated = runpy.run_path(str(UPDATE))["updated"]
    saved(make_report(), tmp_path / "run.json")
    readme = tmp_path / "README.md"
    readme.write_text("# x\n<!-- bench run.json -->\nold\nold\n<!-- /bench -->\nafter\n")
    text = updated(readme)
    table = readme_block(make_report())
    assert text == f"# x\n<!-- bench run.json -->\n{table}\n<!-- /bench -->\nafter\n"
    readme.write_text(text)
    assert updated(readme) == text
    assert "| q8_0/q4_0 | 32,768 | 3.0 | 6.0 | 90.91 | 30.30 | 3.00x | 3.00x |" in table
    for broken in ("# x\n", "<!-- bench run.json -->\nno end\n"):
        readme.write_text(broken)
        with pytest.raises(RazorError, match="has no lines"):
            updated(readme)


def test_tables_are_those_of_the_saved_runs() -> None:
    page = UPDATE.with_name("README.md")
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^<!-- bench (.+\.json) -->$", text, re.M)) == 2
    assert runpy.run_path(str(UPDATE))["updated"](page) == text


def test_rows_of_the_readme_are_in_these_tables() -> None:
    page = UPDATE.with_name("README.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## How fast it is") : readme.index("## What fits")]
    rows = re.findall(r"^\| ([\d,]+) \| (.+) \|$", section, re.M)
    assert len(rows) == 4
    for depth, cells in rows:
        cells = [cell.removesuffix(" tok/s") for cell in cells.split(" | ")]
        for three in (cells[:3], cells[3:]):
            pattern = rf"\| f16 \| {depth} \| .*\| {re.escape(' | '.join(three))} \|"
            assert re.search(pattern, page), (depth, three)


def test_gpus_are_named() -> None:
    report = make_report()
    assert "driver" not in format_report(report, "md")
    gpu = {"name": "A GPU", "memory_total": 80 << 30, "driver": "550.1", "cuda": "12.4"}
    report.head["machine"]["gpus"] = [gpu, dict.fromkeys(gpu)]
    text = format_report(report, "md")
    assert "- A GPU, 80 GiB, driver 550.1, CUDA 12.4.\n- a GPU.\n" in text
    assert any("machine.gpus" in line for line in differences(make_report(), report))
    assert "A GPU" not in readme_block(report)  # no layer was there
    report.head["setup"]["n_gpu_layers"] = -1
    assert "; A GPU, 80 GiB, driver 550.1, CUDA 12.4; a GPU;" in readme_block(report)
