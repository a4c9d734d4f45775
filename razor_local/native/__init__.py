"""Finds and loads the patched llama.cpp library, and binds the functions of llama-razor.h.

The bindings (llama_cpp) read LLAMA_CPP_LIB_PATH once, when they are imported: load() sets it, so
razor_local.Llama has to be imported before llama_cpp. Nothing is searched outside the package's own
folder (or the folder named by RAZOR_LOCAL_LIB).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from ctypes import c_bool, c_char, c_char_p, c_int32, c_uint8, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LibraryError, RazorError
from ..printable import printable

if TYPE_CHECKING:
    from ..profile import Profile

API_VERSION = 3  # LLAMA_RAZOR_API_VERSION this file was written for
LIB_ENV = "RAZOR_LOCAL_LIB"  # a folder with libllama, instead of the package's own (development)
DISABLE_ENV = "RAZOR_LOCAL_DISABLE"  # LLAMA_RAZOR_DISABLE_ENV
REINSTALL = "reinstall razor-local ('razor-local doctor' tells more)"


class Params(ctypes.Structure):
    """struct llama_razor_params"""

    _fields_ = [
        ("size", c_uint32),
        ("enabled", c_uint32),
        ("sink_tokens", c_uint32),
        ("window", c_uint32),
        ("window_min", c_uint32),
        ("window_divisor", c_uint32),
        ("compensation", c_uint32),
        ("n_retrieval", c_uint32),
        ("retrieval", ctypes.POINTER(c_uint8)),
        ("own_attention", c_uint32),
    ]


class Stats(ctypes.Structure):
    """struct llama_razor_stats"""

    _fields_ = [
        ("size", c_uint32),
        ("active", c_uint32),
        ("n_ctx", c_uint32),
        ("n_layer", c_uint32),
        ("n_stream", c_uint32),
        ("sink_tokens", c_uint32),
        ("window", c_uint32),
        ("block", c_uint32),
        ("cells", c_uint32),
        ("compensation", c_uint32),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("kv_bytes", c_uint64),
        ("kv_bytes_retrieval", c_uint64),
        ("kv_bytes_local", c_uint64),
        ("n_buffers", c_uint32),
        ("own_attention", c_uint32),
    ]


class LayerStats(ctypes.Structure):
    """struct llama_razor_layer_stats"""

    _fields_ = [
        ("size", c_uint32),
        ("n_head_kv", c_uint32),
        ("n_retrieval", c_uint32),
        ("n_local", c_uint32),
        ("bytes_k", c_uint64),
        ("bytes_v", c_uint64),
        ("bytes_sums", c_uint64),
    ]


class SeqStats(ctypes.Structure):
    """struct llama_razor_seq_stats"""

    _fields_ = [
        ("size", c_uint32),
        ("n_tokens", c_uint32),
        ("frontier", c_uint32),
        ("n_folded", c_uint32),
        ("n_rollback", c_uint32),
        ("reserved", c_uint32),
    ]


class BufferStats(ctypes.Structure):
    """struct llama_razor_buffer_stats"""

    _fields_ = [
        ("size", c_uint32),
        ("reserved", c_uint32),
        ("bytes", c_uint64),
        ("name", c_char * 64),
    ]


class Memory(ctypes.Structure):
    """struct llama_razor_memory"""

    _fields_ = [
        ("size", c_uint32),
        ("is_host", c_uint32),
        ("weights", c_uint64),
        ("cache", c_uint64),
        ("compute", c_uint64),
        ("name", c_char * 64),
        ("device", c_char * 64),
    ]


# name: (argument types, result type)
_FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "llama_razor_api_version": ([], c_uint32),
    "llama_razor_build_info": ([], c_char_p),
    "llama_razor_set_override": ([ctypes.POINTER(Params)], c_bool),
    "llama_razor_last_error": ([], c_char_p),
    "llama_razor_get_stats": ([c_void_p, ctypes.POINTER(Stats)], c_bool),
    "llama_razor_get_layer": ([c_void_p, c_uint32, ctypes.POINTER(LayerStats)], c_bool),
    "llama_razor_get_seq": ([c_void_p, c_int32, ctypes.POINTER(SeqStats)], c_bool),
    "llama_razor_get_buffer": ([c_void_p, c_uint32, ctypes.POINTER(BufferStats)], c_bool),
    "llama_razor_get_memory": ([c_void_p, c_uint32, ctypes.POINTER(Memory)], c_bool),
    "llama_razor_log_keep": ([c_bool], None),
    "llama_razor_log_clear": ([], None),
    "llama_razor_log_get": ([c_char_p, c_int32], c_int32),
    "llama_razor_set_end_callback": ([ctypes.CFUNCTYPE(None, c_char_p)], None),
}

# functions of the bindings that llama_razor_try_... take the place of: the result that means
# failure, and what llama_razor_last_error() then completes (None: the caller finds it in the log)
_TRIED: dict[str, tuple[int | None, str | None]] = {
    "llama_model_load_from_file": (None, None),
    "llama_init_from_model": (None, None),
    "llama_tokenize": (
        -(2**31),
        "the text cannot be split into tokens, the vocabulary in the model file is malformed or"
        " has no tokens for single bytes",
    ),
    "llama_sampler_sample": (-1, "the next token cannot be chosen"),
}

# functions whose NULL the bindings hand on, to what does not look at it, and what it means
_GRAMMAR = "the grammar is malformed: a rule has bad syntax, is not defined or begins with itself"
_NOT_NULL = {
    "llama_sampler_init_grammar": _GRAMMAR,
    "llama_sampler_init_grammar_lazy_patterns": _GRAMMAR,
    "llama_adapter_lora_init": "lora_path is no LoRA adapter for this model",
}


@dataclass(frozen=True)
class Build:
    """What the library was built from: the pinned sdist and the build's options."""

    version: str
    sha256: str
    options: str


@dataclass(frozen=True)
class Native:
    """The loaded library. lib: the ctypes handle that llama_cpp uses, with our functions bound."""

    path: Path
    build: Build
    lib: ctypes.CDLL

    def last_error(self) -> str:
        """Why the last razor call, load or context creation of this thread was refused, or ""."""
        return (self.lib.llama_razor_last_error() or b"").decode("utf-8", "replace")

    @contextlib.contextmanager
    def override(self, params: Params) -> Iterator[None]:
        """Contexts that this thread creates inside the block follow params. Raises ValueError."""
        if not self.lib.llama_razor_set_override(ctypes.byref(params)):
            raise ValueError(self.last_error())
        try:
            yield
        finally:
            self.lib.llama_razor_set_override(None)

    def stats(self, ctx: int) -> Stats:
        """Of a whole context. ctx: llama_context pointer."""
        return self._get("llama_razor_get_stats", Stats(), ctx)

    def layer(self, ctx: int, il: int) -> LayerStats:
        return self._get("llama_razor_get_layer", LayerStats(), ctx, il)

    def seq(self, ctx: int, seq_id: int) -> SeqStats:
        return self._get("llama_razor_get_seq", SeqStats(), ctx, seq_id)

    def buffers(self, ctx: int) -> list[BufferStats]:
        n = self.stats(ctx).n_buffers
        return [self._get("llama_razor_get_buffer", BufferStats(), ctx, i) for i in range(n)]

    def memory(self, ctx: int) -> list[Memory]:
        """What a context and its model take, one entry per buffer type."""
        found: list[Memory] = []
        with contextlib.suppress(IndexError):
            while True:
                found.append(self._get("llama_razor_get_memory", Memory(), ctx, len(found)))
        return found

    def _get(self, function: str, out: Any, *args: Any) -> Any:
        out.size = ctypes.sizeof(out)
        if not getattr(self.lib, function)(*args, ctypes.byref(out)):
            raise IndexError(f"{function}{args[1:]} has nothing for this context")
        return out


def make_params(profile: Profile | None, own_attention: bool = False) -> Params:
    """Return what override() takes.

    Args:
        profile: None switches razor off.
        own_attention: with llama.cpp's own cache, in the host's memory, our attention runs; False:
            llama.cpp's. With a profile it is ours.
    """
    params = Params(size=ctypes.sizeof(Params), own_attention=own_attention or profile is not None)
    if profile is None:
        return params  # enabled = 0
    heads = profile.flat()
    params.enabled = 1
    params.sink_tokens = profile.sink_tokens
    params.window_min = profile.window_min
    params.window_divisor = profile.window_divisor
    params.compensation = profile.compensation
    params.n_retrieval = heads.size
    params.retrieval = (c_uint8 * heads.size)(*heads.tolist())
    return params


def is_disabled() -> bool:
    """Return True where the environment switches razor off."""
    return os.environ.get(DISABLE_ENV, "") not in ("", "0")


@cache
def load() -> Native:
    """Loads the library and the bindings on top of it, once per process. Raises LibraryError."""
    folder = library_folder()
    path = _library_in(folder)
    bindings = _import_bindings(folder)
    lib = bindings.llama_cpp._lib
    used = Path(lib._name)
    if not used.exists() or not used.resolve().samefile(path.resolve()):
        raise LibraryError(
            f"llama_cpp was imported before razor_local and loaded {used}, razor-local needs"
            f" {path}; import razor_local.Llama first, in a new process"
        )
    for name in [*_FUNCTIONS, *map(_tried, _TRIED)]:
        if not hasattr(lib, name):
            raise LibraryError(
                f"{path} is a llama.cpp without razor (it has no {name}); {REINSTALL},"
                f" or unset {LIB_ENV} if it is set"
            )
    for name, (argtypes, restype) in _FUNCTIONS.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = argtypes, restype
    version = lib.llama_razor_api_version()
    if version != API_VERSION:
        raise LibraryError(
            f"{path} speaks razor API version {version}, this Python code {API_VERSION};"
            f" {REINSTALL}"
        )
    build = _parse_build(lib.llama_razor_build_info())
    if build.version != bindings.__version__:
        raise LibraryError(
            f"{path} was built from llama-cpp-python {build.version}, the installed bindings are"
            f" {bindings.__version__}; install llama-cpp-python=={build.version}"
        )
    _check_dependencies(lib, path)
    if lib.ggml_backend_reg_count() == 0:  # a build whose backends are plug-ins
        lib.ggml_backend_load_all_from_path(os.fsencode(folder))
    lib.llama_razor_log_keep(False)
    lib.llama_razor_set_end_callback(_on_end)
    _try_instead(bindings, lib)
    return Native(path=path, build=build, lib=lib)


def _tried(name: str) -> str:
    return name.replace("llama_", "llama_razor_try_", 1)


def _try_instead(bindings: Any, lib: ctypes.CDLL) -> None:
    """Lets the bindings call what raises an exception here instead of ending the process."""
    for name, (failure, what) in _TRIED.items():
        function = getattr(lib, _tried(name))
        plain = getattr(bindings.llama_cpp, name)
        function.argtypes, function.restype = plain.argtypes, plain.restype
        if what is not None:
            function.errcheck = _raise_on(failure, what, lib.llama_razor_last_error)
        for module in (bindings, bindings.llama_cpp):
            setattr(module, name, function)
    for name, what in _NOT_NULL.items():
        getattr(bindings.llama_cpp, name).errcheck = _raise_on(None, what, _last_error_line)


def _last_error_line() -> bytes:
    return "".join(error_lines()[-1:]).encode()


def _raise_on(failure: int | None, what: str, why: Callable[[], bytes]) -> Callable[..., Any]:
    """For errcheck: RazorError where the result is the one that means failure (None: NULL)."""

    def check(result: Any, _function: Any, _arguments: Any) -> Any:
        if result == failure if failure is not None else not result:
            reason = why().decode("utf-8", "replace")
            raise RazorError(f"{what}: {reason}" if reason else what)
        return result

    return check


def library_folder() -> Path:
    """The folder that has to hold libllama. Raises LibraryError if none does."""
    named = os.environ.get(LIB_ENV)
    folders = [Path(named)] if named else _package_folders()
    for folder in folders:
        if _library_in(folder).is_file():
            return folder.absolute()
    where = " and ".join(str(folder) for folder in folders) or "the package"
    what = f"correct or unset {LIB_ENV}" if named else REINSTALL
    raise LibraryError(f"there is no {_library_name()} in {where}; {what}")


def _package_folders() -> list[Path]:
    """Where an installation can have put the library, the most likely first.

    An editable installation leaves the Python sources in the checkout and puts what CMake installs
    into site-packages, which only the distribution's list of files tells for certain.
    """
    from importlib.metadata import PackageNotFoundError, files

    import razor_local

    folders = [Path(entry) / "lib" for entry in razor_local.__path__]
    with contextlib.suppress(PackageNotFoundError):
        for file in files("razor-local") or []:
            if file.name == _library_name():
                folders.append(Path(str(file.locate())).parent)
    return list(dict.fromkeys(folders))


def _library_name() -> str:
    if sys.platform == "win32":
        return "llama.dll"
    return "libllama.dylib" if sys.platform == "darwin" else "libllama.so"


def _library_in(folder: Path) -> Path:
    return folder / _library_name()


def _import_bindings(folder: Path) -> Any:
    """Imports llama_cpp so that it loads its library from folder. Raises LibraryError."""
    before = os.environ.get("LLAMA_CPP_LIB_PATH")
    os.environ["LLAMA_CPP_LIB_PATH"] = str(folder)
    try:
        import llama_cpp
        import llama_cpp.llama_cpp
    except ModuleNotFoundError as error:
        raise LibraryError(f"the Python package {error.name} is missing; {REINSTALL}") from error
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise LibraryError(
            f"{_library_in(folder)} cannot be loaded ({error}); {REINSTALL}"
        ) from error
    finally:
        # a process started from this one may want a llama_cpp of its own
        if before is None:
            del os.environ["LLAMA_CPP_LIB_PATH"]
        else:
            os.environ["LLAMA_CPP_LIB_PATH"] = before
    return llama_cpp


def _parse_build(info: bytes) -> Build:
    version, sha256, options = (*info.decode("utf-8", "replace").split(" ", 2), "", "", "")[:3]
    return Build(version, sha256, options)


class _DlInfo(ctypes.Structure):
    _fields_ = [
        ("dli_fname", c_char_p),
        ("dli_fbase", c_void_p),
        ("dli_sname", c_char_p),
        ("dli_saddr", c_void_p),
    ]


def file_of(lib: ctypes.CDLL, symbol: str) -> Path | None:
    """The file that a function of the loaded library really comes from; None if not known."""
    try:
        dladdr = ctypes.CDLL(None).dladdr
        function = ctypes.cast(getattr(lib, symbol), c_void_p)
    except (AttributeError, OSError, TypeError):
        return None
    info = _DlInfo()
    dladdr.argtypes, dladdr.restype = [c_void_p, ctypes.POINTER(_DlInfo)], ctypes.c_int
    if not dladdr(function, ctypes.byref(info)) or not info.dli_fname:
        return None
    return Path(os.fsdecode(info.dli_fname))


def _check_dependencies(lib: ctypes.CDLL, path: Path) -> None:
    # LD_LIBRARY_PATH or an earlier llama.cpp in this process can put another ggml under ours
    for symbol in ("ggml_backend_dev_count", "ggml_init"):
        found = file_of(lib, symbol)
        if found is not None and found.resolve().parent != path.resolve().parent:
            raise LibraryError(
                f"{path} runs on {found} instead of the ggml beside it; unset LD_LIBRARY_PATH, or"
                " import razor_local before the package that loaded it"
            )


# The native log: errors are kept as the reason for exceptions, and all of it is shown if the Llama
# created last is verbose. (The callback of the bindings takes warnings for errors and prints them.)


def show_log(shown: bool) -> None:
    """Let the library print its log to stderr from now on, or keep it quiet."""
    load().lib.llama_razor_log_keep(shown)


def clear_errors() -> None:
    """Forget the error lines of the native log."""
    load().lib.llama_razor_log_clear()


def error_lines() -> list[str]:
    """Return the error lines of the native log since clear_errors(), oldest first, at most 8."""
    buffer = ctypes.create_string_buffer(1 << 14)
    load().lib.llama_razor_log_get(buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace").splitlines()


_ended = threading.Lock()


@ctypes.CFUNCTYPE(None, c_char_p)
def _on_end(sentence: bytes) -> None:
    """Called before an assertion of llama.cpp, or an uncaught exception, ends the process."""
    if not _ended.acquire(blocking=False):  # several threads may fail at once
        return
    said = " ".join(sentence.decode("utf-8", "replace").split())
    line = f"Error: {printable(said)}; the model file is malformed, or this is a bug\n"
    with contextlib.suppress(OSError):  # stderr may be closed
        os.write(2, line.encode())


# The library's threads are not in a forked process, which would wait for them for ever.

_has_computed = False
_is_forked = False


def computed() -> None:
    """Remember that the library has started threads, or a GPU, in this process."""
    global _has_computed
    _has_computed = True


def is_forked() -> bool:
    """Return True in a process that was forked after computed()."""
    return _is_forked


def refuse_after_fork() -> None:
    """Raise RazorError in a process that was forked after computed()."""
    if _is_forked:
        raise RazorError(
            "this process was forked from one in which razor_local had computed, and has none of"
            " its threads; start processes with multiprocessing's 'spawn' instead of 'fork'"
        )


def _after_fork() -> None:
    global _is_forked
    _is_forked = _has_computed


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
