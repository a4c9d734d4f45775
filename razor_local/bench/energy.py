"""Read the energy meters of CPUs and GPUs."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pynvml

from ..common.machine import nvidia_gpus

RAPL = Path("/sys/class/powercap")


class EnergyMeter:
    """Measure the energy of CPU packages (RAPL) and NVIDIA GPUs (NVML).

    The counters cover the whole package or board, including idle power and other programs.

    Attributes:
        sources: names of the counters that were found.
    """

    def __init__(self, rapl: Path = RAPL) -> None:
        self._counters: list[_Rapl | _Nvml] = [*_rapl_counters(rapl), *_nvml_counters()]
        self.sources = [counter.name for counter in self._counters]

    def start(self) -> None:
        self._began = time.perf_counter()
        self._values = [counter.read() for counter in self._counters]

    def stop(self) -> tuple[float, float]:
        """Return the joules and seconds since start()."""
        joules = 0.0
        for counter, before in zip(self._counters, self._values, strict=True):
            joules += (counter.read() - before) % counter.wraps_at * counter.joules
        return joules, time.perf_counter() - self._began


class _Rapl:
    joules = 1e-6

    def __init__(self, folder: Path) -> None:
        self.name = (folder / "name").read_text().strip()
        self.wraps_at = int((folder / "max_energy_range_uj").read_text()) + 1
        self._file = folder / "energy_uj"
        self.read()  # raises OSError where only root may read it

    def read(self) -> int:
        return int(self._file.read_text())


class _Nvml:
    joules = 1e-3
    wraps_at = 2**64

    def __init__(self, index: int, gpu: Any) -> None:
        self.name = f"GPU {index}"
        self._gpu = gpu
        self.read()  # raises OSError where the GPU has no counter

    def read(self) -> int:
        try:
            return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu))
        except pynvml.NVMLError as error:
            raise OSError(f"{self.name} does not report its energy ({error})") from None


def _rapl_counters(root: Path) -> list[_Rapl]:
    found = []
    # Count packages only: their subzones are part of them, or memory.
    for folder in sorted(root.glob("intel-rapl:*")):
        if folder.name.count(":") == 1:
            with suppress(OSError, ValueError):
                found.append(_Rapl(folder))
    return found


def _nvml_counters() -> list[_Nvml]:
    found = []
    for index, gpu in nvidia_gpus().items():
        with suppress(OSError):
            found.append(_Nvml(index, gpu))
    return found
