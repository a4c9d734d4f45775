"""The wheels of .ci/wheels, in environments without a compiler.

RAZOR_WHEELS names a folder with wheels that were built before. Otherwise they are built here, which
takes half an hour on two cores the first time.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import aarch64, native_build
from tests.support.native_build import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="needs Linux on x86-64"
    ),
]

QUESTION = "The secret code of Marlow is 48213. What is the secret code of Marlow?"
ANSWER = "The secret code of Marlow is 48213."
# the answer, and the features of the CPU backend
CODE = f"""
import razor_local, llama_cpp
from razor_local import Llama
from razor_local.cli.chat import DEFAULT_MODEL
llama = Llama(DEFAULT_MODEL, n_ctx=2048)
answer = llama.create_chat_completion([{{"role": "user", "content": {QUESTION!r}}}], temperature=0)
print(answer["choices"][0]["message"]["content"])
print(llama_cpp.llama_print_system_info().decode())
"""


@pytest.fixture(scope="session")
def wheels() -> Path:
    """The folder of the wheels. Other processes wait for the first one's build."""
    if folder := os.environ.get("RAZOR_WHEELS"):
        return Path(folder).resolve()
    with native_build.locked("wheels") as folder:
        run(["uv", "run", "--script", native_build.ROOT / ".ci/wheels", folder])
        return folder


@pytest.fixture(scope="session")
def installed(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment in which razor_local was installed with nothing but Python in PATH."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    run([sys.executable, "-m", "venv", folder])
    pip = [folder / "bin/pip", "--disable-pip-version-check", "install", "--find-links", wheels]
    begin = time.monotonic()
    run([*pip, "razor-local"], clean_environment(folder))
    print(f"installed in {time.monotonic() - begin:.0f} s")
    assert time.monotonic() - begin < 60
    return folder


def clean_environment(folder: Path) -> dict[str, str]:
    """Return the environment of this process without its compilers and its library."""
    kept = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "RAZOR_LOCAL_LIB")}
    return {**kept, "PATH": str(folder / "bin")}


def output(command: list, folder: Path) -> str:
    """Run a program of the environment. Return its output."""
    done = subprocess.run(
        list(map(str, command)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=folder,
        env=clean_environment(folder),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_environment_is_small(installed: Path) -> None:
    """The size excludes pip and compiled Python files, which uv does not install."""
    (folder,) = installed.glob("lib/python3.*/site-packages")
    n_bytes = sum(
        path.lstat().st_size
        for path in folder.rglob("*")
        if path.suffix != ".pyc" and path.relative_to(folder).parts[0] not in ("pip", "setuptools")
    )
    print(f"{n_bytes / 1e6:.0f} MB")
    assert n_bytes < 350e6


def test_llama_cpp_may_be_imported_first(installed: Path) -> None:
    first = (
        "import llama_cpp; from razor_local import Llama; print(issubclass(Llama, llama_cpp.Llama))"
    )
    assert output([installed / "bin/python", "-c", first], installed) == "True\n"
    second = "import razor_local, llama_cpp; print(llama_cpp.llama_cpp._lib._name)"
    name = output([installed / "bin/python", "-c", second], installed)
    assert name.endswith("/razor_local/lib/libllama.so\n")


def test_chat_answers(installed: Path) -> None:
    assert ANSWER in output(
        [installed / "bin/razor-local", "chat", "-st", "-p", QUESTION], installed
    )


def test_verify_passes(installed: Path) -> None:
    assert "\npass: all" in output([installed / "bin/razor-local", "verify"], installed)


def test_the_server_needs_no_compiler(installed: Path) -> None:
    (server,) = installed.glob("lib/python3.*/site-packages/razor_local/bin/llama-server")
    assert "--ctx-size" in output([server, "--help"], installed)


def test_threads_that_wait_yield_the_core(installed: Path) -> None:
    """Two threads on one core take 4 times as long as one, or 100 times on a busy machine."""
    code = """
import os, time
from razor_local import Llama
from razor_local.cli.chat import DEFAULT_MODEL
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
for n_threads in (1, 2):
    llama = Llama(DEFAULT_MODEL, n_ctx=512, n_threads=n_threads)
    llama.eval([1])
    begin = time.perf_counter()
    for token in range(20):
        llama.eval([token])
    print(time.perf_counter() - begin)
"""
    one, two = map(float, output([installed / "bin/python", "-c", code], installed).split())
    assert two < 500 * one


def test_the_best_cpu_backend_answers_as_haswell_does(installed: Path) -> None:
    """With AVX-512 only where the CPU has it; the emulated CPU has AVX2."""
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        pytest.skip("needs qemu-x86_64 (the Debian package qemu-user)")
    python = installed / "bin/python"
    answer, features = output([python, "-c", CODE], installed).splitlines()
    has_avx512 = "avx512vl" in Path("/proc/cpuinfo").read_text()
    assert ANSWER in answer and ("AVX512 = 1" in features) == has_avx512
    command = [qemu, "-cpu", "Haswell", python, "-c", CODE]
    emulated_answer, features = output(command, installed).splitlines()
    assert emulated_answer == answer and "AVX2 = 1" in features and "AVX512" not in features


def test_64_bit_arm(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing := [name for name in aarch64.NEEDS if shutil.which(name) is None]:
        pytest.skip(f"needs {' and '.join(missing)}")
    python = aarch64.python()
    version = output([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], tmp_path)
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(17, 29)]
    run([
        sys.executable, "-m", "pip", "install", f"--target={tmp_path}", "--only-binary=:all:",
        f"--find-links={wheels}", f"--python-version={version.strip()}", *platforms,
        "--platform=manylinux2014_aarch64", "razor-local",
    ])  # fmt: skip
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # children do not import from their folder
    answer, features = output([python, "-c", CODE], tmp_path).splitlines()
    assert ANSWER in answer and "NEON = 1" in features
