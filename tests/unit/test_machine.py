"""The graphics cards of a machine, and the note on a build that does not use them."""

from __future__ import annotations

import pytest

from razor_local.cli import doctor
from razor_local.common import machine


@pytest.fixture
def cards(tmp_path, monkeypatch):
    """Return a function that adds a graphics card as Linux describes it."""
    monkeypatch.setattr(machine, "_CARDS", tmp_path)
    monkeypatch.setattr(machine, "describe_gpus", list)
    monkeypatch.setattr("sys.platform", "linux")

    def add(number: int, bus: str, **files: str) -> None:
        device = tmp_path / "devices" / bus
        device.mkdir(parents=True)
        (tmp_path / f"card{number}").mkdir()
        (tmp_path / f"card{number}/device").symlink_to(device)
        for name, text in files.items():
            (device / name).write_text(f"{text}\n")

    return add


def test_cards_of_linux(cards):
    assert machine.find_gpus() == []
    cards(0, "0000:03:00.0", vendor="0x1002", mem_info_vram_total=str(16 << 30))
    cards(
        1, "0000:0b:00.0", vendor="0x1002", mem_info_vram_total=str(512 << 20)
    )  # part of a processor
    cards(2, "0000:00:02.0", vendor="0x8086")  # part of a processor
    cards(3, "0000:04:00.0", vendor="0x8086")
    cards(4, "0000:05:00.0", vendor="0x1a03")  # the console of a server
    assert machine.find_gpus() == [("AMD GPU with 16 GiB", "vulkan"), ("Intel GPU", "vulkan")]


def test_a_build_that_does_not_use_a_card_says_so(cards, monkeypatch):
    assert doctor.unused_gpu("cpu,native") is None
    monkeypatch.setattr(machine, "describe_gpus", lambda: [{"name": "NVIDIA H100"}])
    assert doctor.unused_gpu("cpu,native") == (
        "this build does not use the NVIDIA H100; to use it, run 'export RAZOR_CUDA=ON && uv sync"
        " --reinstall-package razor-local' in the folder of razor_local (see native/README.md)"
    )
    assert doctor.unused_gpu("cpu,cuda,native") is None
    cards(0, "0000:03:00.0", vendor="0x1002", mem_info_vram_total=str(16 << 30))
    assert "AMD GPU with 16 GiB; to use it, run 'export RAZOR_VULKAN=ON" in (
        doctor.unused_gpu("cpu,cuda") or ""
    )


@pytest.mark.parametrize(
    ("physical", "usable", "expected"), [(4, 8, 4), (8, 2, 2), (None, 3, 3), (None, None, 1)]
)
def test_threads_are_physical_cores_that_may_be_used(monkeypatch, physical, usable, expected):
    monkeypatch.setattr(machine.psutil, "cpu_count", lambda logical: physical)
    monkeypatch.delattr(machine.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: usable)
    assert machine.n_cores() == expected
