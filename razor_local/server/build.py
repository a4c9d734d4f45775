"""Find llama-server, or build it from the sources that the package contains.

The build of the package leaves llama-server out, so that the first chat does not wait for it. It
installs the patched sources instead (native/server.cmake). They are compiled with a C++ compiler
alone and linked to the installed libllama; the result is kept in the user's cache folder. A build
with RAZOR_TOOLS=ON has a llama-server already.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..common.files import cache_folder, check_room
from ..common.machine import n_cores
from ..common.progress import Progress, Stop, check_stop, silent
from ..errors import RazorError
from ..native import library_folder

NAME = "llama-server"
LABEL = "building llama-server (only the first time)"
N_BYTES = 200 << 20  # of object files
HEADERS = 60_000  # bytes of a source file that take as much time as the headers that it includes
OPTIONS = (
    "-O1",  # a third less time than -O2; what takes time runs in libllama
    "-DNDEBUG",
    "-DLLAMA_SHARED",
    "-DLLAMA_SUBPROCESS",
    "-pthread",
    "-w",
    # as upstream's vendor/cpp-httplib/CMakeLists.txt
    "-DCPPHTTPLIB_FORM_URL_ENCODED_PAYLOAD_MAX_LENGTH=1048576",
    "-DCPPHTTPLIB_LISTEN_BACKLOG=512",
    "-DCPPHTTPLIB_REQUEST_URI_MAX_LENGTH=32768",
    "-DCPPHTTPLIB_TCP_NODELAY=1",
)
INCLUDES = (
    "razor", "include", "ggml/include", "common", "vendor", "vendor/hash", "tools/mtmd",
    "tools/server", ".",
)  # fmt: skip
LIBRARIES = ("llama", "ggml", "ggml-base", "ggml-cpu")
AS_CPP = ("sha1.c",)  # in a C++ namespace, see upstream's vendor/hash/CMakeLists.txt
INSTALL_COMPILER = (
    "install one (Debian and Ubuntu: apt install g++, Fedora: dnf install gcc-c++, macOS:"
    " xcode-select --install) or name yours in the environment variable CXX"
)


def find_server() -> Path | None:
    """Return the path of llama-server if it was built. Raises LibraryError, RazorError."""
    library = library_folder()
    installed = library.parent / "bin" / NAME  # RAZOR_TOOLS=ON
    if installed.is_file():
        return installed
    built = _target(library)
    return built if built.is_file() else None


def has_web_ui() -> bool:
    """Return True if llama-server contains llama.cpp's web page (RAZOR_WEB_UI=ON)."""
    header = _sources(library_folder()) / "razor" / "ui.h"
    return "#define LLAMA_UI_HAS_ASSETS" in header.read_text()


def build_server(progress: Progress | None = None, stop: Stop | None = None) -> Path:
    """Return the path of llama-server, which is built if it was not.

    A second process waits for the first one's build.

    Raises:
        LibraryError: the package was not built.
        RazorError: there is no compiler, or the sources could not be compiled.
        Stopped: stop() returned True; nothing of the build is left.
        OSError: the cache folder cannot be written to.
    """
    found = find_server()
    if found is not None:
        return found
    library = library_folder()
    compiler = find_compiler()
    target = _target(library)
    target.parent.mkdir(parents=True, exist_ok=True)
    check_room(target, N_BYTES)
    report = progress or silent
    with _lock(target.parent / "lock", report, stop):
        if target.is_file():
            return target
        for left in target.parent.glob("*.part"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(suffix=".part", dir=target.parent))
        try:
            objects = _compile(compiler, _sources(library), folder, report, stop)
            _link(compiler, objects, library, folder / NAME)
            os.replace(folder / NAME, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return target


def find_compiler() -> list[str]:
    """Return the command of a C++ compiler. Raises RazorError if there is none."""
    named = os.environ.get("CXX", "")
    for command in [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]:
        if command and shutil.which(command[0]):
            return command
    what = f" (CXX is '{named}')" if named else ""
    raise RazorError(
        f"llama-server has to be built once, and no C++ compiler was found{what}:"
        f" {INSTALL_COMPILER}"
    )


def _sources(library: Path) -> Path:
    """Return the folder of the sources. Raises RazorError."""
    folder = library.parent / "share" / NAME
    if not (folder / "razor").is_dir():
        raise RazorError(
            f"the sources of llama-server are missing in {folder}: reinstall razor-local, or build"
            " it with RAZOR_TOOLS=ON"
        )
    return folder


def _target(library: Path) -> Path:
    """Return the path of the llama-server that is built from these sources for this library."""
    folder = _sources(library)
    digest = hashlib.sha256("\0".join([str(library), *OPTIONS]).encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"\0{path.relative_to(folder)}\0".encode())
        digest.update(path.read_bytes())
    return cache_folder() / "server" / digest.hexdigest()[:16] / NAME


def _compile(
    compiler: list[str], sources: Path, folder: Path, progress: Progress, stop: Stop | None
) -> list[Path]:
    """Compile all sources into folder. Return the object files."""
    options = [*OPTIONS, *(f"-I{sources / name}" for name in INCLUDES)]
    files = [path for path in sources.rglob("*.c*") if path.suffix in (".c", ".cpp")]
    costs = {path: path.stat().st_size + HEADERS for path in files}
    # the largest first, so that no core idles at the end
    waiting = sorted(files, key=lambda path: -costs[path])
    done = 0
    objects: list[Path] = []
    running: dict[subprocess.Popen[bytes], tuple[Path, Path]] = {}
    try:
        while waiting or running:
            progress(done, sum(costs.values()), LABEL)
            while waiting and len(running) < max(n_cores(), 1):
                path = waiting.pop(0)
                objects.append(folder / f"{len(objects)}.o")
                is_c = path.suffix == ".c" and path.name not in AS_CPP
                kind = ["-x", "c"] if is_c else ["-x", "c++", "-std=c++17"]
                log = objects[-1].with_suffix(".log")
                command = [*compiler, *options, *kind, "-c", str(path), "-o", str(objects[-1])]
                with open(log, "wb") as output:
                    # a group of its own: Ctrl-C reaches this process alone, which ends them
                    process = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                        start_new_session=True,
                    )  # fmt: skip
                running[process] = (path, log)
            time.sleep(0.05)
            check_stop(stop)
            for process in [process for process in running if process.poll() is not None]:
                path, log = running.pop(process)
                done += costs[path]
                if process.returncode:
                    raise _failure(path.relative_to(sources), process.returncode, log)
    finally:
        for process in running:
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return objects


def _link(compiler: list[str], objects: list[Path], library: Path, target: Path) -> None:
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    libraries = [library / f"lib{name}{suffix}" for name in LIBRARIES]
    command = [*compiler, "-pthread", "-o", str(target), *map(str, objects)]
    command += [*map(str, filter(Path.is_file, libraries)), f"-Wl,-rpath,{library}"]
    if sys.platform != "darwin":
        command.append("-s")
    log = target.with_suffix(".log")
    with open(log, "wb") as output:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    if done.returncode:
        raise _failure(Path(NAME), done.returncode, log)


def _failure(what: Path, status: int, log: Path) -> RazorError:
    if status < 0:
        return RazorError(
            f"llama-server could not be built: the compiler was killed by signal {-status} at"
            f" {what}; it needs up to 1 GB of memory"
        )
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if re.search(r"\b(error|undefined)\b", line)]
    why = (errors or lines or ["no message"])[0].strip()
    return RazorError(f"llama-server could not be built: {what}: {why[:300]}")


@contextmanager
def _lock(path: Path, progress: Progress, stop: Stop | None) -> Iterator[None]:
    """Hold the lock of a file; wait while another process holds it."""
    try:
        import fcntl
    except ImportError:
        raise RazorError("llama-server can be built on Linux and macOS only") from None
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress(0, 1, "waiting for another process that builds llama-server")
                check_stop(stop)
                time.sleep(0.2)
        yield
