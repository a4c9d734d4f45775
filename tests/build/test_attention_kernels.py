"""The attention kernels alone, compiled for this CPU and for others that can be emulated, against
plain loops in double precision (kernels/attention.cpp).

ARM: g++-aarch64-linux-gnu and qemu-user-static (Debian) must be there, else it is left out.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.native_build import ROOT

SOURCES = ROOT / "native/src/cpu"
X86 = {"avx512": ["-mavx512f", "-mfma", "-mf16c"], "avx2": ["-mavx2", "-mfma", "-mf16c"]}
ARM = ("aarch64-linux-gnu-g++", "qemu-aarch64-static")
SANITIZE = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compile_and_run(
    compiler: str,
    folder: Path,
    kernels: dict[str, list[str]],
    emulator: str | None,
    link: list[str],
) -> str:
    include, objects = f"-I{SOURCES}", []
    for isa in ("avx512", "avx2", "neon"):
        objects.append(folder / f"{isa}.o")
        options = ["-O3", "-ffp-contract=fast", "-Wno-psabi", *kernels.get(isa, [])]
        source = SOURCES / f"llama-razor-attn-{isa}.cpp"
        run([compiler, "-std=c++17", include, *options, *link, "-c", source, "-o", objects[-1]])
    program = folder / "attention"
    source = ROOT / "tests/build/attention_kernels.cpp"
    run([compiler, "-std=c++17", "-O1", include, *link, source, *objects, "-o", program])
    return run([emulator, program] if emulator else [program])


def run(command: list) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the kernels need GCC or Clang")
def test_kernels_of_this_cpu(tmp_path) -> None:
    """Under AddressSanitizer and UndefinedBehaviorSanitizer."""
    kernels = {}
    if platform.machine() in ("x86_64", "AMD64"):
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        kernels = {
            isa: options
            for isa, options in X86.items()
            if flags and f"{isa.replace('512', '512f')} " in flags
        }
        if not kernels:
            pytest.skip("this CPU has neither AVX2 nor AVX-512, or does not tell")
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    output = compile_and_run(compiler, tmp_path, kernels, None, SANITIZE)
    assert all(f"{isa}: largest error" in output for isa in kernels or ["neon"])


@pytest.mark.skipif(not all(map(shutil.which, ARM)), reason=f"needs {' and '.join(ARM)}")
def test_kernel_of_arm(tmp_path) -> None:
    compiler, emulator = ARM
    output = compile_and_run(compiler, tmp_path, {}, emulator, ["-static"])
    assert "neon: largest error" in output
