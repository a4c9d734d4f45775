"""The sources of a profile: metadata, a sidecar beside the model, the cache, a list."""

from __future__ import annotations

import json
import os
import stat
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from razor_local.converters.write import write_copy, write_sidecar

from razor_local import known_profiles, profile_cache
from razor_local.errors import ProfileError
from razor_local.known_profiles import KnownProfile
from razor_local.model_file import ModelFile
from razor_local.model_setup import ModelSetup
from razor_local.profile import Profile
from razor_local.profile_cache import Note
from tests.support.cli import run
from tests.support.tiny_models import TinySpec, make_model

ONE, TWO, THREE, FOUR = (
    Profile(tuple(np.array([i >> 2 * il & 1, i >> 2 * il + 1 & 1]) for il in range(3)))
    for i in range(1, 5)
)
KNOWN = KnownProfile(
    model="Tiny", names=("tiny-model",), arch="llama", n_layer=3, n_head=4, n_head_kv=2,
    head_dim=32, heads=("00", "10", "00"), source="a test", license="MIT", record={},
)  # fmt: skip


@pytest.fixture
def model(tmp_path) -> Path:
    return make_model(tmp_path / "m.gguf", TinySpec())


@pytest.fixture
def known(model, monkeypatch) -> KnownProfile:
    shape = ModelFile(model).shape
    entry = replace(KNOWN, names=(shape.name,), n_head=shape.n_head[0], head_dim=shape.head_dim_k)
    monkeypatch.setattr(known_profiles, "lists", lambda: (entry,))
    return entry


def put_in_cache(model: Path, profile: Profile) -> Path:
    profile_cache.make_folder()
    path = profile_cache.path_of(ModelFile(model).shape)
    return write_sidecar(model, path, profile, force=True)


def source(model: Path) -> str:
    found = ModelFile(model).find_profile()
    return "" if found is None else found.source


@pytest.mark.usefixtures("built_library")
@pytest.mark.parametrize("args", [["inspect"], ["fit"], ["bench"], ["run", "-p", "hi"]])
def test_a_budget_for_a_list_without_scores(model, known, args):
    code, _, stderr = run(*args, "--budget", "0.2", "-m", model)
    assert code == 1 and stderr.splitlines()[-1] == (
        "Error: the list that razor-local ships for Tiny has no head scores by which --budget could"
        f" choose; measure them once with 'razor-local convert {model}', or leave out --budget"
    )


def test_the_order_of_sources(model, known, tmp_path, monkeypatch):
    copy = write_copy(model, tmp_path / "copy.gguf", ONE)
    assert source(model) == "list"
    cached = put_in_cache(model, THREE)
    found = ModelFile(model).find_profile()
    assert (found.source, found.where) == ("cache", str(cached))
    assert found.profile.flat().tolist() == THREE.flat().tolist()
    beside = write_sidecar(model, tmp_path / "m.razor.gguf", TWO)
    found = ModelFile(model).find_profile()
    assert str(found) == f"a sidecar ({beside})"
    assert found.profile.flat().tolist() == TWO.flat().tolist()
    write_sidecar(model, tmp_path / "copy.razor.gguf", TWO)
    found = ModelFile(copy).find_profile()
    assert (found.source, found.profile.flat().tolist()) == ("file", ONE.flat().tolist())
    # a sidecar that is named takes precedence over all
    assert ModelFile(copy).find_profile(beside).source == "sidecar"
    # Llama(razor=True) uses only the metadata
    assert ModelFile(model).choose_profile() is None


def test_the_sidecar_of_a_split_model_and_of_another_one(model, tmp_path):
    split = tmp_path / "big-00001-of-00003.gguf"
    split.write_bytes(model.read_bytes())
    assert ModelFile(split).sidecar_path == tmp_path / "big.razor.gguf"
    other = make_model(tmp_path / "other.gguf", TinySpec(seed=7))
    write_sidecar(other, tmp_path / "m.razor.gguf", ONE)
    with pytest.raises(ProfileError, match="is the sidecar of another model file"):
        ModelFile(model).find_profile()


def test_the_cache_is_private_and_a_damaged_file_counts_as_none(model, profile_folder):
    assert source(model) == "" and not profile_folder.exists()
    path = put_in_cache(model, ONE)
    assert path.parent == profile_folder
    assert stat.S_IMODE(profile_folder.stat().st_mode) == 0o700
    path.write_bytes(b"GGUF")
    assert source(model) == ""
    put_in_cache(model, ONE)
    shape = ModelFile(model).shape
    assert profile_cache.remove(shape) and not profile_cache.remove(shape)
    assert source(model) == ""


def test_notes(model, profile_folder):
    shape = ModelFile(model).shape
    assert profile_cache.read_note(shape) == Note()
    note = Note("no head stands out", 12.5, "2 threads")
    profile_cache.write_note(shape, note)
    assert profile_cache.read_note(shape) == note
    (path,) = profile_folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    good = json.loads(path.read_text())
    for bad in ("{", "[]", "null", json.dumps(good | {"version": 2}),
                json.dumps(good | {"seconds": "x"}), json.dumps(good | {"more": 1}),
                json.dumps(good).replace("12.5", "1e999"), json.dumps(good | {"saved": 10**400}),
                *(json.dumps(good | {"why": "", "seconds": seconds})
                  for seconds in (float("inf"), float("nan"), -1, 0, 10**400))):  # fmt: skip
        path.write_text(bad)
        assert profile_cache.read_note(shape) == Note()


def test_an_estimate_holds_for_a_day_and_a_reason_for_good(model, monkeypatch):
    shape = ModelFile(model).shape
    for note in (Note(seconds=12.5), Note(why="no head stands out")):
        profile_cache.write_note(shape, note)
        now = time.time()
        for hours in (23, 25, -1):
            monkeypatch.setattr(profile_cache.time, "time", lambda t=now + hours * 3600: t)
            holds = bool(note.why) or hours == 23
            assert profile_cache.read_note(shape) == (note if holds else Note())
        monkeypatch.undo()


DAMAGE = {
    "truncated": lambda path, other: path.write_bytes(b"GGUF"),
    "empty": lambda path, other: path.write_bytes(b""),
    "a folder": lambda path, other: path.mkdir(),
    "a pipe": lambda path, other: os.mkfifo(path),
    "a loop": lambda path, other: path.symlink_to(path.name),
    "another model's": lambda path, other: path.write_bytes(other.read_bytes()),
}


@pytest.mark.usefixtures("built_library")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_profile_in_the_cache_is_named(model, tmp_path, damage):
    other = make_model(tmp_path / "other.gguf", TinySpec(seed=7))
    other = put_in_cache(other, ONE)
    shape = ModelFile(model).shape
    path = profile_cache.path_of(shape)
    assert profile_cache.damaged(shape) is None
    DAMAGE[damage](path, other)
    assert profile_cache.damaged(shape) == path
    code, _, stderr = run("inspect", model)
    instead = f" or run 'razor-local convert {model}'" if path.is_file() else ""
    note = f"note: the profile {path} is damaged; remove it{instead}\n"
    assert code == 0 and stderr == note
    assert run("fit", model, "-c", 512)[2].startswith(note)
    code, _, stderr = run("inspect", model, "--heads")
    assert code == 1 and f"(the one in the profile cache, {path}, is damaged)" in stderr
    beside = write_sidecar(model, tmp_path / "m.razor.gguf", TWO)
    assert run("inspect", model)[2] == "" and run("inspect", model, "--sidecar", beside)[2] == ""


def test_a_list_needs_name_architecture_and_shape(model, known):
    shape = ModelFile(model).shape
    assert known.fits(shape)
    assert known.fits(replace(shape, name=f" {shape.name.upper().replace(' ', '-')}"))
    for other in (
        replace(shape, name="other"),
        replace(shape, name=""),
        replace(shape, arch="qwen2"),
        replace(shape, n_head_kv=(1, 2, 2)),
        replace(shape, n_layer=2, n_head=shape.n_head[:2], n_head_kv=shape.n_head_kv[:2]),
        replace(shape, head_dim_k=shape.head_dim_k * 2),
    ):
        assert not known.fits(other)
    profile = known.profile()
    profile.check_shape(shape)
    assert profile.flat().tolist() == [0, 0, 1, 0, 0, 0]
    assert profile.calibration == {"source": "a test", "license": "MIT"}


@pytest.mark.parametrize("known", known_profiles.lists(), ids=lambda known: known.model)
def test_the_lists_of_the_package(known):
    profile = known.profile()
    assert len(known.heads) == known.n_layer and known.names
    assert {len(layer) for layer in known.heads} == {known.n_head_kv}
    assert 0.05 < profile.flat().mean() <= 0.5
    assert known.source and known.license
    licenses = json.loads(known_profiles.PATH.read_text())["licenses"]
    assert known.license in licenses


def test_inspect_and_fit_say_where_the_profile_comes_from(model, known, tmp_path):
    code, stdout, _ = run("inspect", model)
    assert code == 0 and "source   the list that razor-local ships for Tiny\n" in stdout
    cached = put_in_cache(model, ONE)
    code, stdout, _ = run("inspect", model)
    assert code == 0 and f"source   the profile cache ({cached})\n" in stdout
    profile = json.loads(run("inspect", model, "--json")[1])["profile"]
    assert (profile["source"], profile["where"]) == ("cache", str(cached))
    beside = write_sidecar(model, tmp_path / "m.razor.gguf", TWO)
    assert f"source   a sidecar ({beside})\n" in run("inspect", model)[1]


def test_a_setup_reads_the_profile_that_is_found(model, profile_folder):
    put_in_cache(model, ONE)
    setup = ModelSetup(str(model), window_min=64)
    _, profile = setup.read()
    assert profile.window_min == 64 and profile.flat().tolist() == ONE.flat().tolist()
    assert setup.found.origin == "the profile cache"
