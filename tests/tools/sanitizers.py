"""Run the native tests and the native fuzz targets on a library built with sanitizers.

    python -m tests.tools.sanitizers asan [pytest arguments]
    python -m tests.tools.sanitizers asan sequences|memories [arguments of the fuzzer]
    python -m tests.tools.sanitizers tsan [number of inputs]
    python -m tests.tools.sanitizers fuzz cache [libFuzzer arguments and corpus folders]
    python -m tests.tools.sanitizers fuzz metadata [libFuzzer arguments and corpus folders]

asan finds memory errors, undefined behavior and leaks in the tests or in a fuzzer of tests/fuzz.
tsan finds races, with random inputs in several threads.

The exit status is not 0 after a finding. This needs Linux and clang with its runtime libraries; CC
names another clang than the one in PATH. The builds instrument all of llama.cpp. They take minutes
the first time, and are kept in the user's cache folder and updated incrementally.

docs/verification.md lists what is checked and what was found.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support import native_build, stock, tiny_models
from tests.support.native_build import ROOT

FUZZ = ROOT / "tests" / "fuzz"
SUPPRESSIONS = FUZZ / "undefined-upstream.supp"
FOLDER = native_build.cache_dir() / "sanitizers"
TARGETS = ("cache", "metadata")
FUZZERS = ("sequences", "memories")  # in Python

# Build without asserts, as for users: llama.cpp has them in its innermost loops. _environment()
# makes a finding end the process.
COMMON = "-O1 -g1 -DNDEBUG -fno-omit-frame-pointer"
FLAGS = {
    "asan": "-fsanitize=address,undefined -shared-libasan",
    "tsan": "-fsanitize=thread",  # clang 14's shared runtime crashes at start
}


def main(args: list[str]) -> int:
    what, *rest = args or [""]
    if what == "asan":
        return run_asan(rest)
    if what == "tsan" and len(rest) < 2 and all(x.isdigit() for x in rest):
        return run_threads(int(rest[0]) if rest else 30)
    if what == "fuzz" and rest and rest[0] in TARGETS:
        return run_fuzzer(*rest)
    print(__doc__, file=sys.stderr)
    return 2


def run_asan(args: list[str]) -> int:
    """Run native tests or a fuzzer under ASan and UBSan, then report the leaks that LSan found."""
    lib = build("asan")
    if args and args[0] in FUZZERS:
        module = [f"tests.fuzz.{args[0]}", *args[1:]]
    else:
        tests = sorted(str(path) for path in (ROOT / "tests/native").glob("test_native_*.py"))
        module = ["pytest", "-q", "-p", "no:cacheprovider", *(args or tests)]
    with tempfile.TemporaryDirectory() as logs:
        env = _environment(Path(logs) / "log") | {
            "LD_PRELOAD": preload(),
            "RAZOR_LOCAL_LIB": str(lib),
            "LLAMA_CPP_LIB_PATH": str(lib),
            "RAZOR_STOCK_LIB": str(stock_with_our_ggml(lib)),
        }
        done = subprocess.run([sys.executable, "-m", *module], env=env, cwd=ROOT)
        reports = [path.read_text(errors="replace") for path in Path(logs).glob("log*")]
    leaks = [leak for text in reports for leak in our_leaks(text)]
    errors = [text for text in reports if "LeakSanitizer" not in text]
    for text in (*errors, *leaks):
        print(text, file=sys.stderr)
    print(f"{len(errors)} sanitizer reports, {len(leaks)} leaks", file=sys.stderr)
    return 1 if done.returncode or errors or leaks else 0


def stock_with_our_ggml(lib: Path) -> Path:
    """Build a stock libllama on the kernels of `lib`: another compiler's give other bits."""
    folder = FOLDER / "stock"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(lib, folder)
    shutil.copy(stock.stock_lib_dir() / "libllama.so", folder)
    return folder


def our_leaks(report: str) -> list[str]:
    """Return the leaks whose stack contains this library. Python itself leaks much at its exit."""
    leaks = re.split(r"\n(?=(?:Direct|Indirect) leak)", report)[1:]
    return [leak for leak in leaks if re.search("llama|ggml", leak)]


def run_fuzzer(target: str, *args: str) -> int:
    """Run a fuzz target with long inputs from the start.

    libFuzzer would start with a few bytes and let inputs grow over hours, but the plan of a cache
    alone takes about 15 bytes, and each operation some more.
    """
    whole = ("-len_control=0", "-max_len=200") if target == "cache" else ()
    return _run_target("asan", target, (*whole, *args))


def run_threads(n: int) -> int:
    """Run random inputs in two threads at a time, each with contexts of two threads."""
    return _run_target("tsan", "cache", (str(n),))


def _run_target(kind: str, target: str, args: tuple[str, ...]) -> int:
    program = build_target(kind, target)
    env = _environment() | {"RAZOR_FUZZ_MODELS": str(tiny_model_folder())}
    if kind == "asan":
        env["LD_PRELOAD"] = preload()
    return subprocess.run([program, *args], env=env).returncode


# builds


def build(kind: str) -> Path:
    """Build the library and return its folder."""
    compiler = clang()
    flags = f"{COMMON} {FLAGS[kind]}"
    if kind == "asan":
        flags += f" -fsanitize=fuzzer-no-link -fsanitize-coverage-allowlist={FUZZ / 'covered.txt'}"
    print(
        f"building llama.cpp with {FLAGS[kind].split()[0]} (minutes the first time)",
        file=sys.stderr,
    )
    folder = FOLDER / kind
    native_build.build(
        folder,
        f"-DCMAKE_C_COMPILER={compiler}",
        f"-DCMAKE_CXX_COMPILER={compiler.replace('clang', 'clang++')}",
        "-DCMAKE_BUILD_TYPE=Sanitize",  # CMake's own build types would add flags
        f"-DCMAKE_C_FLAGS={flags}",
        f"-DCMAKE_CXX_FLAGS={flags}",
        "-DGGML_OPENMP=OFF",  # ggml's own threads, which ThreadSanitizer understands
    )
    return native_build.install(folder, folder / "installed")


def build_target(kind: str, target: str) -> Path:
    """Build the library and a fuzz target linked with it, and return the program."""
    lib, compiler = build(kind), clang()
    program = FOLDER / kind / f"fuzz-{target}"
    tree = FOLDER / kind / "llama.cpp"
    flags = COMMON.split() + FLAGS[kind].split()
    flags += ["-fsanitize=fuzzer"] if kind == "asan" else ["-DRAZOR_FUZZ_THREADS", "-pthread"]
    native_build.run([
        compiler.replace("clang", "clang++"), "-std=c++17", "-Wall", "-Wextra", *flags,
        f"-I{tree / 'include'}", f"-I{tree / 'ggml/include'}", f"-I{ROOT / 'native/src'}",
        FUZZ / f"{target}.cpp", "-o", program, f"-L{lib}", "-lllama", "-lggml", "-lggml-base",
        f"-Wl,-rpath,{lib}",
    ])  # fmt: skip
    return program


def tiny_model_folder() -> Path:
    """Write the models of the fuzz targets and return their folder."""
    folder = FOLDER / "models"
    folder.mkdir(parents=True, exist_ok=True)
    shape = {"n_embd": 32, "n_ff": 32, "n_vocab": 32, "sharpness": 1.0}
    specs = {
        # groups of two, three KV heads: any order of retrieval and local heads
        "llama": tiny_models.TinySpec("llama", 2, 6, 3, 32, **shape),
        # heads of 64: quantized rows are rotated
        "rotated": tiny_models.TinySpec("llama", 2, 2, 2, 64, **shape),
        # another number of KV heads in each layer, a layer without attention
        "deci": tiny_models.TinySpec("deci", 3, 4, (2, 0, 1), 32, **shape),
    }
    with tempfile.TemporaryDirectory(dir=folder) as temp:
        for name, spec in specs.items():
            written = tiny_models.make_model(Path(temp) / "model.gguf", spec)
            written.replace(folder / f"{name}.gguf")  # another run may have the old one mapped
    return folder


def clang() -> str:
    name = os.environ.get("CC", "clang")
    path = shutil.which(name)
    if path is None or "clang" not in Path(path).name:
        raise SystemExit(
            f"the sanitizers need clang, found {path or f'no {name}'}: install it or name it in CC"
        )
    return path


def preload() -> str:
    """Return LD_PRELOAD: ASan's runtime, then the C++ library whose exceptions it intercepts."""
    compiler = clang()
    runtime = _file(compiler, f"libclang_rt.asan-{os.uname().machine}.so")
    return f"{runtime} {_file(compiler, 'libstdc++.so.6')}"


def _file(compiler: str, name: str) -> Path:
    done = subprocess.run([compiler, f"--print-file-name={name}"], capture_output=True, text=True)
    path = Path(done.stdout.strip())
    if not path.is_absolute() or not path.is_file():
        raise SystemExit(f"clang has no {name}: install its runtime libraries (libclang-rt-dev)")
    return path


def _environment(log: Path | None = None) -> dict[str, str]:
    """Return an environment in which every finding except a leak ends the process."""
    more = f":log_path={log}" if log else ""
    asan = "halt_on_error=1:detect_stack_use_after_return=1:strict_string_checks=1:detect_leaks=1"
    ubsan = f"halt_on_error=1:print_stacktrace=1:suppressions={SUPPRESSIONS}"
    return os.environ | {
        "ASAN_OPTIONS": asan + more,
        "UBSAN_OPTIONS": ubsan + more,
        "LSAN_OPTIONS": f"exitcode={0 if log else 23}",
        "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
        "ASAN_SYMBOLIZER_PATH": str(_symbolizer()),
    }


def _symbolizer() -> Path:
    """Return llvm-symbolizer without LD_PRELOAD, with which it would report its own leaks."""
    wrapper = FOLDER / "llvm-symbolizer"
    wrapper.write_text('#!/bin/sh\nunset LD_PRELOAD\nexec llvm-symbolizer "$@"\n')
    wrapper.chmod(0o755)
    return wrapper


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except RuntimeError as error:
        sys.exit(str(error))
