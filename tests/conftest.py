"""Markers by folder and fixture; models made once per run, a worker on a stock llama.cpp build."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import native_build, tiny_models

NATIVE = Path(__file__).parent / "native"

# threads of several test processes share the cores; OpenMP reads this when the library is loaded
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of processes: one per core for folders, none but pytest's own for files,
    which are often done before others have started."""
    folders = all(Path(arg).is_dir() for arg in config.args)
    return min(os.cpu_count() or 1, 8) if folders else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the built library, and what needs a stock build to compare it with."""
    for item in items:
        if NATIVE in item.path.parents:
            item.add_marker("native")
        if "stock_folder" in getattr(item, "fixturenames", ()):
            item.add_marker("stock")


@pytest.fixture(scope="session", autouse=True)
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's data folder of this run and its child processes."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("data")
        patch.setenv("XDG_DATA_HOME", str(folder))
        yield folder / "razor_local"


@pytest.fixture(autouse=True)
def profile_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give each test its own profile cache. Child processes use that of the user."""
    from razor_local import profile_cache

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache") / "profiles"
        patch.setattr(profile_cache, "folder", lambda: folder)
        yield folder


@pytest.fixture(scope="session")
def built_library() -> Path:
    """The folder of the built library; tests of tests/unit that use it are skipped without one."""
    from razor_local.errors import RazorError
    from razor_local.native import library_folder

    try:
        return library_folder()
    except RazorError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny(spec, extra_kv) -> path of the GGUF, written once per run."""
    folder, paths = tmp_path_factory.mktemp("models"), {}

    def make(spec: tiny_models.TinySpec, extra_kv: dict[str, Any] | None = None) -> Path:
        key = (spec, repr(extra_kv))
        if key not in paths:
            name = f"{len(paths)}-{spec.arch}.gguf"
            paths[key] = tiny_models.make_model(folder / name, spec, extra_kv)
        return paths[key]

    return make


@pytest.fixture(scope="session")
def stock_folder() -> Path:
    """The folder of an unpatched build of the same llama.cpp, built where there is none yet."""
    from tests.support.stock import stock_lib_dir

    return stock_lib_dir()


@pytest.fixture(scope="session")
def stock(stock_folder: Path) -> Iterator[Any]:
    """Worker on that build: stock(runner function, arguments)."""
    from tests.support import runner

    with runner.Worker(stock_folder) as worker:
        assert not worker(runner.ping), f"{stock_folder} is patched, expected a stock build"
        yield worker


@pytest.fixture(scope="session")
def servers() -> Iterator[list[Any]]:
    """Two RPC servers on this machine."""
    from tests.support.rpc import RpcServer

    with RpcServer() as first, RpcServer() as second:
        yield [first, second]


@pytest.fixture
def addresses(servers: list[Any]) -> str:
    return ",".join(server.address for server in servers)


@pytest.fixture
def broken_tree() -> Iterator[Path]:
    """The folder in which broken_builds.py builds changed libraries, for one test at a time."""
    with native_build.locked("broken-build") as tree:
        yield tree


@pytest.fixture(scope="module")
def same_commit() -> Iterator[None]:
    """Someone may commit while the tests run, and a journal of another commit is refused."""
    from razor_local.bench import run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "describe_code", lambda: {"version": "1", "commit": "abc"})
        yield


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "razor-local-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
