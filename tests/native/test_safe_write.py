"""What is written never replaces what the same command reads."""

from __future__ import annotations

import os
import shutil
import stat

import pytest
from click.testing import CliRunner
from razor_local.converters.head_map import plot_heads
from razor_local.converters.write import write_copy, write_sidecar

from razor_local import RazorError
from razor_local.cli import main
from razor_local.cli.params import DEFAULT_MODEL
from razor_local.common.files import check_outputs, new_file
from razor_local.common.journal import Journal
from razor_local.common.markdown import save_text
from razor_local.profile import read_model_shape, read_profile
from razor_local.scores import profile_scores, save_scores


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_outputs_follow_the_umask(tmp_path, umask, mode):
    model = shutil.copy(DEFAULT_MODEL, tmp_path / "m.gguf")
    os.chmod(model, 0o666)
    scores = profile_scores(read_profile(model), read_model_shape(model))
    before = os.umask(umask)
    try:
        with new_file(tmp_path / "a.txt") as file:
            file.write(b"x")
        save_scores(scores, tmp_path / "s.json")
        write_copy(model, tmp_path / "c.gguf", read_profile(model))
        write_sidecar(model, tmp_path / "side.gguf", read_profile(model))
        save_text("x", tmp_path / "report.md")
        plot_heads(read_profile(model), read_model_shape(model), tmp_path / "heads.svg")
        with Journal(tmp_path / "run.jsonl", {"version": 1}, "a test", dict) as journal:
            journal.begin({"version": 1})
    finally:
        os.umask(before)
    assert len(list(tmp_path.iterdir())) == 8
    for name in sorted({path.name for path in tmp_path.iterdir()} - {"m.gguf"}):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode, name


def test_a_copy_is_as_private_as_the_model(tmp_path):
    model = shutil.copy(DEFAULT_MODEL, tmp_path / "m.gguf")
    os.chmod(model, 0o400)
    out = write_copy(model, tmp_path / "c.gguf", read_profile(model))
    assert stat.S_IMODE(out.stat().st_mode) == 0o600


READ = "is read by this command; choose another name for what is written"
TWICE = "is named for two results; choose another name for what is written"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with one file of each kind that commands read; the current one."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(DEFAULT_MODEL, "model.gguf")
    (tmp_path / "link.gguf").symlink_to("model.gguf")
    (tmp_path / "texts").mkdir()
    for name in ("book.txt", "texts/a.txt", "heads.tsv", "run.json", "side.gguf", "map.png"):
        (tmp_path / name).write_text("mine\n")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("eval needle model.gguf -o model.gguf", f"model.gguf {READ}"),
        ("eval needle model.gguf -o link.gguf", f"link.gguf {READ}"),
        ("eval needle link.gguf -o ./texts/../model.gguf", READ),
        ("eval needle model.gguf --haystack texts -o texts/a.txt", f"texts/a.txt {READ}"),
        ("eval needle model.gguf --sidecar side.gguf -o side.gguf", f"side.gguf {READ}"),
        ("eval ruler model.gguf --policies full,heads=heads.tsv -o heads.tsv", f"heads.tsv {READ}"),
        ("eval ruler model.gguf --resume new.json -o new.json", f"new.json {TWICE}"),
        ("eval needle model.gguf --plot a.png --plot-curve a.png", f"a.png {TWICE}"),
        ("eval perplexity --text book.txt -o book.txt", f"book.txt {READ}"),
        ("eval longbench model.gguf --data texts -o model.gguf", f"model.gguf {READ}"),
        ("bench model.gguf -o model.gguf", f"model.gguf {READ}"),
        ("bench model.gguf --resume model.gguf", f"model.gguf {READ}"),
        ("bench --report run.json -o run.json", f"run.json {READ}"),
        ("bench --compare run.json book.txt -o book.txt", f"book.txt {READ}"),
        ("convert model.gguf -o heads.tsv --heads heads.tsv --force", f"heads.tsv {READ}"),
        ("convert model.gguf -o run.json --scores run.json --force", f"run.json {READ}"),
        ("convert model.gguf -o link.gguf --force", "link.gguf is the model itself"),
        ("inspect model.gguf --compare map.png --plot map.png", f"map.png {READ}"),
    ],
)
def test_no_command_overwrites_what_it_reads(files, command, told):
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    result = CliRunner().invoke(main, command.split(), prog_name="razor-local")
    assert result.exit_code == 1 and result.stdout == ""
    assert told in result.stderr and result.stderr.count("\n") == 1
    assert before == {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}


def test_other_names_are_taken(files):
    check_outputs([None, "new.json", files / "texts" / "new.txt", "run.json"], [None, "book.txt"])
    with pytest.raises(RazorError, match="the folder nowhere does not exist"):
        check_outputs(["nowhere/new.json"], [])
