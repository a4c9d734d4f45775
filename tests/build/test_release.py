""".ci/release, with small wheels in a repository made here."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.native_build import ROOT

FILES = {
    "pyproject.toml": '[project]\nname = "razor-local"\nversion = "1.2.3"\n',
    "CITATION.cff": "cff-version: 1.2.0\nversion: 1.2.3\n",
    "CHANGELOG.md": "# Changelog\n\n## 1.2.3 (2030-01-31)\n\n## 1.2.2 (2030-01-01)\n",
    "native/llama-cpp-python.txt": "# the pin\nllama-cpp-python==0.9.1 --hash=sha256:00\n",
}
WHEELS = {
    "razor_local-1.2.3-py3-none-manylinux_2_28_x86_64.whl": ">=3.10",
    "llama_cpp_python-0.9.1+razor-py3-none-any.whl": ">=3.8",
}


def git(repository: Path, *arguments: str) -> None:
    options = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *options, *arguments], cwd=repository, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A tagged repository with the script."""
    folder = tmp_path / "repository"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/release", folder / ".ci")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "all")
    git(folder, "tag", "v1.2.3")
    return folder


@pytest.fixture
def dist(tmp_path: Path) -> Path:
    folder = tmp_path / "dist"
    for backend in ("cpu", "cuda"):
        (folder / backend).mkdir(parents=True)
        for name, python in WHEELS.items():
            project, version = name.split("-")[:2]
            with zipfile.ZipFile(folder / backend / name, "w") as wheel:
                wheel.writestr(
                    f"{project}-{version}.dist-info/METADATA",
                    f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n"
                    f"Requires-Python: {python}\n",
                )
                wheel.writestr(f"{project}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    return folder


def release(repository: Path, dist: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, repository / ".ci/release", dist]
    return subprocess.run(command, capture_output=True, text=True)


def test_sums_and_indexes(repository: Path, dist: Path) -> None:
    assert release(repository, dist).returncode == 0
    sums = dict(line.split("  ")[::-1] for line in (dist / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == {f"{backend}/{name}" for backend in ("cpu", "cuda") for name in WHEELS}
    for name, digest in sums.items():
        assert hashlib.sha256((dist / name).read_bytes()).hexdigest() == digest
    assert '<a href="razor-local/">razor-local</a>' in (dist / "cuda/index.html").read_text()
    (wheel, _) = WHEELS
    assert (
        f'<a href="../{wheel}#sha256={sums[f"cpu/{wheel}"]}" data-requires-python="&gt;=3.10">'
        in (dist / "cpu/razor-local/index.html").read_text()
    )


def test_pip_reads_the_index(repository: Path, dist: Path, tmp_path: Path) -> None:
    release(repository, dist)
    index = (dist / "cpu").as_uri()
    command = [sys.executable, "-m", "pip", "--isolated", "download", "--no-deps", "--no-cache-dir"]
    command += ["--index-url", index, "--dest", str(tmp_path / "got"), "llama-cpp-python==0.9.1"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": ""})
    assert [path.name for path in (tmp_path / "got").iterdir()] == [list(WHEELS)[1]], done.stderr


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("CITATION.cff", "version: 1.2.2\n", "CITATION.cff has version 1.2.2, expected 1.2.3"),
        ("CHANGELOG.md", "## 1.2.3 (unreleased)\n", "expected '1.2.3 (YYYY-MM-DD)'; set the date"),
        ("README.md", "", "there are uncommitted changes"),
    ],
)
def test_differences_are_named(
    repository: Path, dist: Path, file: str, text: str, says: str
) -> None:
    (repository / file).write_text(text)
    done = release(repository, dist)
    assert done.returncode == 1 and says in done.stderr
    assert not (dist / "SHA256SUMS").exists()


def test_a_commit_without_a_tag(repository: Path, dist: Path) -> None:
    git(repository, "commit", "-qm", "more", "--allow-empty")
    done = release(repository, dist)
    assert done.stderr == "Error: this commit has no tag v1.2.3; run git tag v1.2.3\n"


def test_wrong_wheels(repository: Path, dist: Path) -> None:
    wheel, bindings = (dist / "cpu" / name for name in WHEELS)
    wheel.rename(wheel.with_name(wheel.name.replace("1.2.3", "1.2.2")))
    bindings.unlink()
    assert release(repository, dist).stderr == (
        f"Error: {dist}/cpu has no wheel of llama_cpp_python; run .ci/wheels {dist}/cpu\n"
        f"Error: {dist}/cpu has razor_local 1.2.2, expected 1.2.3; delete it\n"
    )
