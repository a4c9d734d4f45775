"""A model file is opened once per command, and its data are read only for a fingerprint."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from razor_local import model_shape
from razor_local.cli import main
from razor_local.cli.params import DEFAULT_MODEL
from razor_local.gguf import header
from razor_local.model_file import ModelFile, open_model, read_model_shape, read_profile
from tests.support.tiny_models import TinySpec, make_split_model


class Reads:
    """Headers parsed and fingerprints computed, by the name of the file (of the first one)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.headers: Counter[str] = Counter()
        self.fingerprints: Counter[str] = Counter()
        parse, fingerprint = header._Reader.header, model_shape.model_fingerprint

        def counting_parse(reader: header._Reader) -> header.Header:
            self.headers[reader.path.name] += 1
            return parse(reader)

        def counting_fingerprint(parts: tuple[header.Header, ...]) -> str:
            self.fingerprints[parts[0].path.name] += 1
            return fingerprint(parts)

        monkeypatch.setattr(header._Reader, "header", counting_parse)
        monkeypatch.setattr(model_shape, "model_fingerprint", counting_fingerprint)


@pytest.fixture
def reads(monkeypatch) -> Reads:
    return Reads(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """m.gguf, a list of its heads and a sidecar."""
    path = tmp_path_factory.mktemp("model_file")
    shutil.copy(DEFAULT_MODEL, path / "m.gguf")
    profile = read_profile(DEFAULT_MODEL)
    rows = ["\t".join(map(str, layer)) for layer in profile.retrieval]
    (path / "heads.tsv").write_text("\n".join(rows) + "\n")
    run("convert", "m.gguf", "--heads", "heads.tsv", "--sidecar", "-o", "side.gguf", cwd=path)
    return path


def run(*args: str, cwd: Path) -> None:
    before = os.getcwd()
    os.chdir(cwd)
    try:
        result = CliRunner().invoke(main, args, input="hi")
    finally:
        os.chdir(before)
    assert result.exit_code == 0, result.output


HEADS = ("--heads", "heads.tsv", "--no-proof")
COMMANDS = {  # arguments, fingerprints of the model
    "inspect": (["inspect", "m.gguf"], 0),
    "inspect, JSON": (["inspect", "m.gguf", "--json"], 1),
    "inspect, sidecar": (["inspect", "m.gguf", "--sidecar", "side.gguf"], 1),
    "fit": (["fit", "m.gguf", "--vram", "8GiB"], 0),
    "fit, sidecar": (["fit", "m.gguf", "--vram", "8GiB", "--sidecar", "side.gguf"], 1),
    "convert": (["convert", "m.gguf", *HEADS, "-o", "o.gguf", "--force"], 1),
    "convert, sidecar": (["convert", "m.gguf", *HEADS, "-o", "s.gguf", "--sidecar", "--force"], 1),
    "chat": (["chat", "m.gguf", "-n", "1"], 0),
    "chat, auto": (["chat", "m.gguf", "-n", "1", "-c", "auto"], 0),
    "chat, no razor": (["chat", "m.gguf", "-n", "1", "--no-razor"], 0),
    "chat, sidecar": (["chat", "m.gguf", "-n", "1", "--sidecar", "side.gguf"], 1),
    "verify": (["verify", "m.gguf", "-c", "1280", "--rows", "1"], 0),
}


@pytest.mark.parametrize(("args", "n_fingerprints"), COMMANDS.values(), ids=COMMANDS)
def test_a_command_reads_a_model_once(folder, reads, args, n_fingerprints) -> None:
    run(*args, cwd=folder)
    assert reads.headers.pop("m.gguf") == 1
    assert all(n == 1 for n in reads.headers.values()), reads.headers  # a sidecar, a new file
    assert reads.fingerprints["m.gguf"] == n_fingerprints


def test_the_files_of_a_split_model_are_read_once(tmp_path, folder, reads) -> None:
    make_split_model(tmp_path, TinySpec())
    (first, *rest) = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / "heads.tsv").write_text("1\t0\n0\t0\n0\t1\n")
    run("inspect", first, cwd=tmp_path)
    assert reads.headers == dict.fromkeys([first, *rest], 1)
    reads.headers.clear()
    run("convert", first, *HEADS, "--sidecar", "-o", "side.gguf", cwd=tmp_path)
    assert {name: reads.headers[name] for name in (first, *rest)} == dict.fromkeys(
        [first, *rest], 1
    )


def test_a_model_file_is_a_path_that_is_not_read_again(reads) -> None:
    file = ModelFile(DEFAULT_MODEL)
    assert os.fspath(file) == str(file) == str(DEFAULT_MODEL) and Path(file) == DEFAULT_MODEL
    assert open_model(file) is file
    assert read_model_shape(file) is file.shape and read_profile(file) is file.profile
    assert reads.headers == {DEFAULT_MODEL.name: 1} and not reads.fingerprints
    assert file.shape.fingerprint == read_model_shape(DEFAULT_MODEL).fingerprint
    assert reads.fingerprints == {DEFAULT_MODEL.name: 2}
    assert file.shape.fingerprint and reads.fingerprints == {DEFAULT_MODEL.name: 2}
