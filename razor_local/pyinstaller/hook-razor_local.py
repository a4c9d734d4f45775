"""Add the shared libraries, the built-in model and the metadata to an application.

numba and the packages of the command line stay out, unless the application imports them itself.
"""

from __future__ import annotations

from PyInstaller.utils.hooks import collect_data_files, copy_metadata

from razor_local.native import library_folder

_files = [file for file in sorted(library_folder().iterdir()) if file.is_file()]
_licenses = [file for file in _files if file.name.startswith("LICENSE")]
binaries = [(str(file), "razor_local/lib") for file in _files if file not in _licenses]
datas = [(str(file), "razor_local/lib") for file in _licenses]
datas += collect_data_files("razor_local", includes=["data/**"])
datas += copy_metadata("razor-local")
excludedimports = ["numba", "matplotlib", "rich", "prompt_toolkit"]
