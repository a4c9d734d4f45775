"""razor-local doctor: what it shows, and that it works where nothing else does."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from razor_local import model_setup
from razor_local.cli import doctor, main
from razor_local.native import API_VERSION, load


def run(*args: str):
    return CliRunner().invoke(main, ["doctor", *args])


def problems() -> list[str]:
    result = run("--json")
    found = json.loads(result.stdout)["problems"]
    assert result.exit_code == (1 if found else 0)
    return found


def test_all_is_well():
    result = run("--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    native = report["native"]
    assert native["library"] == str(load().path) and native["llama_cpp_python"] == "0.3.36"
    assert native["api_version"] == API_VERSION and len(native["sdist_sha256"]) == 64
    assert (
        "CPU" in native["backends"]
        and "SSE3" in native["cpu_features"]
        or "NEON" in native["cpu_features"]
    )
    cpu = next(device for device in native["devices"] if device["type"] == "CPU")
    assert cpu["memory_total"] > 2**28 and cpu["description"]
    assert report["packages"]["llama-cpp-python"] == "0.3.36"
    model = report["default_model"]
    assert 0 < model["retrieval_kv_heads"] < model["kv_heads"] and model["bytes"] > 10**6


def test_text_says_the_same():
    result = run()
    assert result.exit_code == 0 and result.stdout.endswith("\nno problems found\n")
    assert result.stderr == ""
    names = [line.split("  ")[0].strip() for line in result.stdout.splitlines()]
    for name in ("razor-local", "library", "built from", "backends", "devices", "model"):
        assert name in names
    assert str(load().path) in result.stdout


def test_a_missing_library_is_the_only_problem(monkeypatch, tmp_path):
    monkeypatch.setenv("RAZOR_LOCAL_LIB", str(tmp_path))
    assert problems() == [
        f"there is no libllama.so in {tmp_path}; correct or unset RAZOR_LOCAL_LIB"
    ]
    result = run()
    assert result.exit_code == 1 and f"RAZOR_LOCAL_LIB={tmp_path}" in result.stdout
    assert "problem      there is no libllama.so" in result.stdout


def test_a_broken_library(monkeypatch, tmp_path):
    (tmp_path / "libllama.so").write_text("x")
    monkeypatch.setenv("RAZOR_LOCAL_LIB", str(tmp_path))
    (found,) = problems()
    assert "cannot be loaded" in found


@pytest.mark.parametrize(
    ("probe", "expected"),
    [
        ("import os; os.kill(os.getpid(), 4)", "SIGILL; it was built for another CPU"),
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV; reinstall razor-local"),
        ("raise OSError('disk on fire')", "cannot be examined (OSError: disk on fire)"),
        ("print('nonsense')", "cannot be examined"),
    ],
)
def test_a_library_that_ends_the_process(monkeypatch, probe, expected):
    monkeypatch.setattr(doctor, "PROBE", probe)
    (found,) = problems()
    assert expected in found


def test_the_built_in_model(monkeypatch, tmp_path):
    path = tmp_path / "model.gguf"
    monkeypatch.setattr(model_setup, "DEFAULT_MODEL", path)
    assert "built-in model is missing" in problems()[0]
    path.write_bytes(b"GGUF but no more")
    assert "built-in model cannot be read" in problems()[0]


def test_missing_packages(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("numpy", "no-such-package"))
    assert problems() == [
        "the Python package no-such-package is not installed; reinstall razor-local"
    ]


def test_a_card_that_the_build_does_not_use_is_a_note(monkeypatch):
    monkeypatch.setattr(doctor, "find_gpus", lambda: [("A GPU", "metal")])
    report = json.loads(run("--json").stdout)
    assert report["gpus"] == ["A GPU"] and report["problems"] == []
    (note,) = report["notes"]
    assert note.startswith("this build does not use the A GPU; to use it, run 'export RAZOR_METAL")
    result = run()
    assert result.exit_code == 0 and result.stdout.endswith(
        f"\nnote         {note}\nno problems found\n"
    )
    assert "\ngraphics     A GPU\n" in result.stdout
