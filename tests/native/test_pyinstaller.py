"""An application that PyInstaller makes, with the hooks of the package."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from razor_local.common import child
from razor_local.errors import RazorError
from tests.support.installed import make_environment

APPLICATION = """
import sys

from razor_local import Chat, Llama, Sampling
from razor_local.model_setup import DEFAULT_MODEL

llama = Llama(DEFAULT_MODEL, n_ctx=2048)
chat = Chat(llama, sampling=Sampling(temp=0))
print("".join(chat.say(sys.argv[1])))
print(llama.memory().active, {"numba", "llvmlite"} & set(sys.modules))
"""
PROMPT = "The secret code of Marlow is 48213. What is the secret code of Marlow?"


def test_a_frozen_application_starts_no_python(monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(RazorError, match="is a frozen application and cannot run Python code"):
        child.python_command("pass")


@pytest.mark.slow
def test_a_bundle_answers(tmp_path):
    """Build a folder with an executable, and run it outside the environment."""
    if find_spec("PyInstaller") is None:
        pytest.skip("needs PyInstaller: uv run --group dev --group desktop pytest")
    python = make_environment(tmp_path / "env")
    (tmp_path / "ask.py").write_text(APPLICATION)
    command = [python, "-m", "PyInstaller", "--log-level", "WARN", "ask.py"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=400)
    bundle = tmp_path / "dist" / "ask"
    (tmp_path / "env").rename(tmp_path / "gone")
    done = subprocess.run(
        [bundle / "ask", PROMPT], cwd="/", env={}, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.splitlines()[-1:] == ["True set()"], done.stderr
    assert "48213" in done.stdout and not done.stderr
    names = {path.name for path in bundle.rglob("*")}
    assert "razor-default.gguf" in names and any("libllama" in name for name in names)
    assert not any(name.startswith(("numba", "llvmlite", "libLLVM")) for name in names)
    n_bytes = sum(path.stat().st_size for path in bundle.rglob("*") if not path.is_symlink())
    assert n_bytes < 150e6, f"{n_bytes:,} bytes"


def test_measuring_names_a_missing_numba(monkeypatch):
    from razor_local.converters import calibrate

    monkeypatch.setitem(sys.modules, "numba", None)
    calibrate._kernel.cache_clear()
    with pytest.raises(RazorError, match="measuring heads needs numba .*; install it"):
        calibrate._kernel()


def test_hooks_are_where_the_entry_point_says():
    from razor_local.pyinstaller import hook_dirs

    (folder,) = map(Path, hook_dirs())
    assert {"hook-razor_local.py", "rthooks.dat"} <= {path.name for path in folder.iterdir()}
