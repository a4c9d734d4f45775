"""razor-local doctor: show the installation, the loaded library, and problems."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from ..common.child import python_command
from ..common.machine import find_gpus
from ..errors import LibraryError, RazorError
from ..printable import printable
from .parser import Command
from .terminal import echo

REINSTALL = "reinstall razor-local (see native/README.md)"
PACKAGES = (
    "llama-cpp-python",
    "gguf",
    "numpy",
    "numba",
    "click",
    "rich",
    "prompt_toolkit",
    "psutil",
    "nvidia-ml-py",
    "huggingface_hub",
)
VARIABLES = ("LLAMA_CPP_LIB_PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
DEVICE_TYPES = ("CPU", "GPU", "integrated GPU", "accelerator", "meta device")
PROBE = "from razor_local.cli.doctor import probe; probe()"


EPILOG = """
\b
Examples:
  razor-local doctor
  razor-local doctor --json
"""


@click.command("doctor", cls=Command, epilog=EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def doctor(as_json: bool) -> None:
    """Show the loaded library, its backends and devices, and any problems.

    Exit code 1 if something is wrong.
    """
    report = examine()
    echo(json.dumps(report, indent=2) if as_json else _text(report))
    if report["problems"]:
        sys.exit(1)


def examine() -> dict[str, Any]:
    """Return the report as a dict for JSON; "problems" is a list of sentences."""
    problems: list[str] = []
    native = _native_report(problems)
    report: dict[str, Any] = {
        "razor_local": _version("razor-local"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("RAZOR_") or name in VARIABLES
        },
        "gpus": [name for name, _ in find_gpus()],
        "native": native,
        "default_model": _default_model(problems),
    }
    for name, version in report["packages"].items():
        if version is None and not any("llama_cpp is missing" in text for text in problems):
            problems.append(f"the Python package {name} is not installed; reinstall razor-local")
    unused = unused_gpu(native["build_options"]) if native else None
    return {**report, "notes": [unused] if unused else [], "problems": problems}


def unused_gpu(build_options: str) -> str | None:
    """Return a sentence about a GPU that this build cannot use; None if there is none.

    Args:
        build_options: the options of native.Build, such as "cpu,cuda,native".
    """
    built = build_options.split(",")
    for name, backend in find_gpus():
        if backend not in built:
            return (
                f"this build does not use the {name}; to use it, run 'export"
                f" RAZOR_{backend.upper()}=ON && uv sync --reinstall-package razor-local' in the"
                " folder of razor_local (see native/README.md)"
            )
    return None


def _native_report(problems: list[str]) -> dict[str, Any] | None:
    """Run probe() in a separate process, because a library for another CPU would end this one."""
    try:
        child = subprocess.run(python_command(PROBE), capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        problems.append(f"loading the library takes more than two minutes; {REINSTALL}")
        return None
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        hint = "it was built for another CPU: build it on this machine, or with RAZOR_NATIVE=OFF"
        problems.append(
            f"loading the library ends the process with {name};"
            f" {hint if name == 'SIGILL' else REINSTALL}"
        )
        return None
    try:
        found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        reason = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        problems.append(f"the library cannot be examined ({reason}); {REINSTALL}")
        return None
    if "error" in found:
        problems.append(found["error"])
        return None
    if not any(device["type"] == "CPU" for device in found["devices"]):
        problems.append(f"the library has no CPU backend; {REINSTALL}")
    return found


def probe() -> None:
    """Load the library and print a description of it as one line of JSON."""
    from .. import native

    try:
        loaded = native.load()
    except LibraryError as error:
        print(json.dumps({"error": str(error)}))
        return
    import ctypes

    import llama_cpp

    lib = loaded.lib

    def call(name: str, *args: Any, result: Any = ctypes.c_void_p) -> Any:
        function = getattr(lib, name)
        function.restype = result
        return function(*args)

    def text(name: str, handle: int) -> str:
        found = call(name, ctypes.c_void_p(handle), result=ctypes.c_char_p)
        return (found or b"").decode("utf-8", "replace")

    def device(i: int) -> dict[str, Any]:
        handle = call("ggml_backend_dev_get", ctypes.c_size_t(i))
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        pointers = ctypes.byref(free), ctypes.byref(total)
        call("ggml_backend_dev_memory", ctypes.c_void_p(handle), *pointers, result=None)
        kind = call("ggml_backend_dev_type", ctypes.c_void_p(handle), result=ctypes.c_int)
        return {
            "name": text("ggml_backend_dev_name", handle),
            "description": text("ggml_backend_dev_description", handle),
            "type": DEVICE_TYPES[kind] if kind < len(DEVICE_TYPES) else str(kind),
            "memory_free": free.value,
            "memory_total": total.value,
        }

    def backend(i: int) -> str:
        return text("ggml_backend_reg_name", call("ggml_backend_reg_get", ctypes.c_size_t(i)))

    n_backends = call("ggml_backend_reg_count", result=ctypes.c_size_t)
    n_devices = call("ggml_backend_dev_count", result=ctypes.c_size_t)
    report = {
        "library": str(loaded.path),
        "ggml": str(native.file_of(lib, "ggml_init") or ""),
        "llama_cpp_python": loaded.build.version,
        "sdist_sha256": loaded.build.sha256,
        "build_options": loaded.build.options,
        "api_version": lib.llama_razor_api_version(),
        "backends": [backend(i) for i in range(n_backends)],
        "devices": [device(i) for i in range(n_devices)],
        "cpu_features": llama_cpp.llama_print_system_info().decode("utf-8", "replace").strip(),
    }
    print(json.dumps(report))


def _default_model(problems: list[str]) -> dict[str, Any] | None:
    from ..model_file import ModelFile
    from ..model_setup import DEFAULT_MODEL

    try:
        model = ModelFile(DEFAULT_MODEL)
        shape, profile = model.shape, model.profile
    except FileNotFoundError:
        problems.append(f"the built-in model is missing ({DEFAULT_MODEL}); {REINSTALL}")
        return None
    except (RazorError, OSError) as error:
        problems.append(f"the built-in model cannot be read ({error}); {REINSTALL}")
        return None
    if profile is None:
        problems.append(f"the built-in model has no razor profile; {REINSTALL}")
    return {
        "path": str(DEFAULT_MODEL),
        "bytes": DEFAULT_MODEL.stat().st_size,
        "name": shape.name,
        "kv_heads": sum(shape.n_head_kv),
        "retrieval_kv_heads": int(profile.flat().sum()) if profile else None,
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _text(report: dict[str, Any]) -> str:
    rows: list[tuple[str, str]] = [
        ("razor-local", report["razor_local"] or "not installed as a package"),
        ("python", f"{report['python']}, {report['platform']}"),
        ("packages", ", ".join(f"{k} {v or 'missing'}" for k, v in report["packages"].items())),
    ]
    native = report["native"]
    if native:
        rows += [
            ("library", native["library"]),
            ("ggml", native["ggml"]),
            ("built from", f"llama-cpp-python {native['llama_cpp_python']}"),
            ("", f"sha256 {native['sdist_sha256']}"),
            ("options", native["build_options"]),
            ("razor API", f"version {native['api_version']}"),
            ("backends", ", ".join(native["backends"])),
        ]
        for i, d in enumerate(native["devices"]):
            memory = f", {d['memory_total'] / 2**30:.1f} GiB" if d["memory_total"] else ""
            rows.append(("" if i else "devices", f"{d['name']}: {d['description']}{memory}"))
        rows.append(("features", native["cpu_features"]))
    rows.append(("graphics", ", ".join(report["gpus"]) or "no GPU found"))
    model = report["default_model"]
    if model:
        heads = f"{model['retrieval_kv_heads']} of {model['kv_heads']} KV heads are retrieval heads"
        size = f"{model['bytes'] / 2**20:.1f} MiB"
        rows.append(("model", f"{Path(model['path']).name} ({model['name']}, {size}, {heads})"))
    for i, (name, value) in enumerate(report["environment"].items()):
        rows.append(("" if i else "environment", f"{name}={value}"))
    lines = [f"{name:<12} {printable(value, one_line=True)}".rstrip() for name, value in rows]
    notes = [f"note         {note}" for note in report["notes"]]
    problems = [f"problem      {problem}" for problem in report["problems"]]
    return "\n".join([*lines, "", *notes, *(problems or ["no problems found"])])
