"""A Python for 64-bit ARM that runs in an emulator (the Debian package qemu-user).

Debian's packages are unpacked into the user's cache folder, without installing them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.support import native_build

NEEDS = ("qemu-aarch64", "apt-get", "dpkg-deb")
APT = """
APT::Architecture "arm64";
APT::Architectures {{ "arm64"; }};
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Dir::State "{folder}/apt/state";
Dir::State::status "{folder}/apt/state/status";
Dir::Cache "{folder}/apt/cache";
"""


def python() -> Path:
    """Return the path of a program that is Python for 64-bit ARM. Downloads it the first time."""
    with native_build.locked("aarch64-python") as folder:
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(prefix="aarch64-", dir=folder.parent) as temp:
                _unpack(Path(temp))
                Path(temp, "root").rename(folder)
        (found,) = folder.glob("usr/bin/python3.??")
        # children are started by the path of the program: an emulated one has to start them, too
        program = folder / "python"
        program.write_text(
            "#!/bin/sh\n"
            f"export PYTHONHOME={folder}/usr\n"
            f'exec {shutil.which("qemu-aarch64")} -0 "$0" -L {folder} {found} "$@"\n'
        )
        program.chmod(0o755)
    return program


def _unpack(folder: Path) -> None:
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / "apt" / name).mkdir(parents=True)
    (folder / "apt/state/status").touch()
    (folder / "apt.conf").write_text(APT.format(folder=folder))
    env = {**os.environ, "APT_CONFIG": str(folder / "apt.conf")}
    native_build.run(["apt-get", "update"], env)
    native_build.run(
        ["apt-get", "install", "--yes", "--download-only", "python3", "libstdc++6"], env
    )
    for package in folder.glob("apt/cache/archives/*.deb"):
        subprocess.run(["dpkg-deb", "--extract", package, folder / "root"], check=True)
