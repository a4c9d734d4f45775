"""Run the native tests with layers and KV cache on another backend than the CPU.

    python -m tests.tools.other_backend lavapipe           # Vulkan on Mesa's software driver
    python -m tests.tools.other_backend cuda               # a GPU and its toolkit
    python -m tests.tools.other_backend cuda -k reference  # further arguments go to pytest

Other backends are metal and vulkan.

This builds a stock library and the patched one with that backend in the user's cache folder (5 to
20 minutes the first time, incrementally later). It then runs tests/native/test_native_*.py with all
layers offloaded. The tests measure the error of stock on the device and use it as the tolerance for
razor (tests/support/device.py). The exit status is pytest's.

On Debian lavapipe needs mesa-vulkan-drivers libvulkan-dev glslc spirv-headers. It takes an hour or
more on two cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support import native_build
from tests.support.native_build import ROOT, cache_dir

BACKENDS = {"lavapipe": "VULKAN", "vulkan": "VULKAN", "cuda": "CUDA", "metal": "METAL"}

# tests of decisions on the host, which do not depend on the device
SKIPPED = ["test_native_refusals.py", "test_native_memory.py"]
# lavapipe's shader compiler does not support bfloat16
LAVAPIPE = "not bf16 and not q5_0 and not q5_1 and not q4_1"


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in BACKENDS:
        names = "|".join(BACKENDS)
        raise SystemExit(f"usage: python -m tests.tools.other_backend {names} [pytest ...]")
    name, *options = arguments
    env = environment(name)
    for library in build(name, env):
        print(library, file=sys.stderr)
    tests = [p for p in (ROOT / "tests/native").glob("test_native_*.py") if p.name not in SKIPPED]
    if name == "lavapipe":
        preload(env)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, sorted(tests))]
    if name == "lavapipe" and "-k" not in options:
        command += ["-k", LAVAPIPE]
    return subprocess.run([*command, *options], cwd=ROOT, env=env).returncode


def environment(name: str) -> dict[str, str]:
    """Return the environment of the build and the tests."""
    env = dict(os.environ) | {"RAZOR_TEST_GPU_LAYERS": "all"}
    if name == "lavapipe":
        drivers = sorted(Path("/usr/share/vulkan/icd.d").glob("lvp_icd.*.json"))
        if not drivers:
            raise SystemExit("no lavapipe driver found: install mesa-vulkan-drivers")
        header = ROOT / "tests/tools/lavapipe/layer_settings.h"
        env["CXXFLAGS"] = f"{env.get('CXXFLAGS', '')} -include {header}".strip()
        env["VK_ICD_FILENAMES"] = env["VK_DRIVER_FILES"] = str(drivers[0])
        env["GGML_VK_VISIBLE_DEVICES"] = "0"  # otherwise ggml skips devices that are CPUs
        # Use F32 shaders: slow F16 ones would only increase the error of stock and so the bounds.
        env.setdefault("GGML_VK_DISABLE_F16", "1")
        # Keep compiled shaders: compiling them takes most of a first run.
        env["MESA_SHADER_CACHE_DIR"] = str(cache_dir() / "backend-lavapipe")
    return env


def preload(env: dict[str, str]) -> None:
    """Preload tests/tools/lavapipe/preload.c in the tests, but not in the build's compilers."""
    library = cache_dir() / "backend-lavapipe" / "preload.so"
    source = ROOT / "tests/tools/lavapipe/preload.c"
    native_build.run([env.get("CC", "cc"), "-O2", "-shared", "-fPIC", source, "-o", library])
    env["LD_PRELOAD"] = f"{library} {env.get('LD_PRELOAD', '')}".strip()


def build(name: str, env: dict[str, str]) -> tuple[Path, Path]:
    """Return the folders of the stock and the patched library, for the tests' environment.

    Both use one build folder: they differ in libllama, and with CUDA in two files of its backend.
    """
    folder = cache_dir() / f"backend-{name}"
    pin = (ROOT / "native/llama-cpp-python.txt").read_text()
    stock, ours, stamp = folder / "stock", folder / "razor", folder / "stock" / "pin"
    if not stamp.is_file() or stamp.read_text() != pin:
        make(folder / "build", stock, "ON", name, env)
        stamp.write_text(pin)
    make(folder / "build", ours, "OFF", name, env)
    libraries = stock / "razor_local/lib", ours / "razor_local/lib"
    env["RAZOR_STOCK_LIB"] = str(libraries[0])
    env["RAZOR_LOCAL_LIB"] = env["LLAMA_CPP_LIB_PATH"] = str(libraries[1])
    return libraries


def make(folder: Path, prefix: Path, stock: str, name: str, env: dict[str, str]) -> None:
    what = "a stock library" if stock == "ON" else "our library"
    print(f"building {what} with {name} in {folder} (minutes)", file=sys.stderr)
    more = env.get("CMAKE_ARGS", "").split()
    options = [f"-DRAZOR_STOCK={stock}", f"-DRAZOR_{BACKENDS[name]}=ON", "-DRAZOR_TOOLS=OFF"]
    native_build.build(folder, *options, *more, env=env)
    native_build.install(folder, prefix)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
