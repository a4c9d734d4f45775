"""An environment in which the package is installed as its wheel installs it, without building one.

The development environment has an editable installation, which type checkers and PyInstaller do not
follow.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from shutil import copytree

import numpy

from razor_local.errors import RazorError
from razor_local.native import library_folder
from tests.support.native_build import ROOT

PACKAGES = {"razor_local": "razor_local", "razor_local/converters": "converters"}  # of the wheel
METADATA = "Metadata-Version: 2.1\nName: razor-local\nVersion: 0+test\n"
ENTRY_POINTS = """\
[pyinstaller40]
hook-dirs = razor_local.pyinstaller:hook_dirs
"""


def make_environment(folder: Path) -> Path:
    """Return the Python of a new environment; its other packages are those of this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    for name, source in PACKAGES.items():
        copytree(ROOT / source, site / name, dirs_exist_ok=True)
    try:
        copytree(library_folder(), site / "razor_local" / "lib", dirs_exist_ok=True)
    except RazorError:  # what needs no library runs without one
        pass
    info = site / "razor_local-0+test.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (info / "RECORD").write_text("")
    (site / "others.pth").write_text(f"{Path(numpy.__file__).parents[1]}\n")
    return python
