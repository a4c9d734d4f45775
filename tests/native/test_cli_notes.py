"""Notes on options that this build ignores, and on context sizes that are rounded up."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from razor_local.cli import main
from razor_local.native.loaded import C
from tests.support.commands import commands

NO_GPU = "note: there is no GPU that this build can use, so {} has no effect\n"
NEEDED = {  # options without which a command ends before it reads its model
    "convert": ("--scope-by", "score"),
    "eval longbench": ("--data", "/no"),
    "eval perplexity": ("--text", "/no"),
    "tune": ("--text", "/no"),
}
ROUNDED = "note: the context has 512 tokens, because llama.cpp rounds 300 up to a multiple of 256\n"


def with_option(name: str) -> list[str]:
    """Return the commands with an option, by the name of its parameter."""
    return [
        path
        for path, command in commands().items()
        if not isinstance(command, click.Group)
        and any(param.name == name for param in command.params)
    ]


def notes(command: str, *args: str, **env: str) -> str:
    """Return what a command writes to stderr before it fails because the model file is missing."""
    args = (*args, *NEEDED.get(command, ()))
    done = CliRunner().invoke(main, [*command.split(), "/no.gguf", *args], input="x", env=env)
    assert done.exit_code != 0 and done.stdout == ""
    return done.stderr


@pytest.fixture
def gpu(monkeypatch) -> None:
    monkeypatch.setattr(C, "llama_supports_gpu_offload", lambda: True)


@pytest.fixture
def no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(C, "llama_supports_gpu_offload", lambda: False)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("command", with_option("n_gpu_layers"))
def test_layers_on_a_gpu_that_is_not_there(command):
    for value in ("5", "all"):
        assert notes(command, "-ngl", value).count(NO_GPU.format("-ngl")) == 1
    for args in ([], ["-ngl", "0"]):
        assert "GPU that" not in notes(command, *args)


@pytest.mark.usefixtures("no_gpu")
def test_variables_that_set_them_are_named():
    name = "LLAMA_ARG_N_GPU_LAYERS"
    assert NO_GPU.format(name) in notes("run", **{name: "99"})


@pytest.mark.usefixtures("no_gpu")
def test_memory_of_a_card_that_is_not_there():
    text = notes("fit", "--vram", "8GiB")
    assert "GPU that this build can use, so --vram counts as main memory\n" in text


@pytest.mark.usefixtures("gpu")
def test_no_note_with_a_gpu():
    assert "note" not in notes("fit", "--vram", "8GiB", "-ngl", "5")


def test_memory_that_cannot_be_locked(monkeypatch):
    expected = "note: this build cannot keep a model in RAM, so --mlock has no effect\n"
    for supported in (False, True):
        monkeypatch.setattr(C, "llama_supports_mlock", lambda value=supported: value)
        assert (expected in notes("run", "--mlock")) is not supported


@pytest.mark.parametrize("command", with_option("ctx_size"))
def test_contexts_that_are_rounded_up(command):
    assert notes(command, "-c", "300").count(ROUNDED) == 1
    assert "rounds" not in notes(command, "-c", "512")
