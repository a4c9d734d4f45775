"""Find and load the patched llama.cpp library, and bind the functions of llama-razor.h.

The bindings (llama_cpp) read LLAMA_CPP_LIB_PATH once, when they are imported. load() sets it, so
razor_local.Llama has to be imported before llama_cpp. Nothing is searched outside the package's own
folder (or the folder named by RAZOR_LOCAL_LIB).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from ctypes import c_bool, c_char_p, c_int32, c_uint8, c_uint32, c_void_p
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import LibraryError
from ..plan import KV_TYPES
from . import cpu, errors, log, rpc
from .structs import REWIND, BufferStats, LayerStats, Memory, Params, SeqStats, Stats

if TYPE_CHECKING:
    from ..profile import Profile

API_VERSION = 10  # LLAMA_RAZOR_API_VERSION this file was written for
LIB_ENV = "RAZOR_LOCAL_LIB"  # a folder with libllama, instead of the package's own (development)
DISABLE_ENV = "RAZOR_LOCAL_DISABLE"  # LLAMA_RAZOR_DISABLE_ENV
REINSTALL = "reinstall razor-local (see 'razor-local doctor')"

Out = TypeVar("Out", Stats, LayerStats, SeqStats, BufferStats, Memory)

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
    "llama_razor_set_full_prefill": ([c_void_p, c_bool], c_bool),
    "llama_razor_set_source": ([c_void_p, c_void_p], c_bool),
    "llama_razor_log_keep": ([c_bool], None),
    "llama_razor_log_clear": ([], None),
    "llama_razor_log_get": ([c_char_p, c_int32], c_int32),
    "llama_razor_set_end_callback": ([ctypes.CFUNCTYPE(None, c_char_p)], None),
    "llama_razor_try_rpc_connect": ([c_char_p, ctypes.POINTER(c_void_p)], c_void_p),
    "llama_razor_lost_server": ([c_void_p], c_char_p),
}


@dataclass(frozen=True)
class Build:
    """Build information: the pinned sdist and the build options."""

    version: str
    sha256: str
    options: str


@dataclass(frozen=True)
class Native:
    """The loaded library.

    Attributes:
        path: the file of libllama.
        build: its build information.
        lib: the ctypes handle that llama_cpp uses, with the functions of llama-razor.h bound.
    """

    path: Path
    build: Build
    lib: ctypes.CDLL

    def show_log(self, shown: bool) -> None:
        """Let the library print its log to stderr from now on, or keep it quiet."""
        log.show(self.lib, shown)

    def clear_errors(self) -> None:
        """Forget why earlier calls of this thread failed. This ends override()."""
        errors.clear(self.lib)

    def last_error(self) -> str:
        """Return why razor refused the last call of this thread, or ""."""
        return errors.last_error(self.lib)

    def reason(self, otherwise: str = "llama.cpp gives no reason") -> str:
        """Return why the last call of this thread failed. Call clear_errors() before that call.

        Args:
            otherwise: what to return where the library gives no reason.
        """
        return errors.reason(self.lib, otherwise)

    def is_out_of_memory(self) -> bool:
        """Return True if the last call of this thread failed because memory ran out."""
        return errors.is_out_of_memory(self.lib)

    @contextlib.contextmanager
    def override(self, params: Params) -> Iterator[None]:
        """Apply params to the contexts that this thread creates in the block. Raises ValueError."""
        if not self.lib.llama_razor_set_override(ctypes.byref(params)):
            raise ValueError(self.last_error())
        try:
            yield
        finally:
            self.lib.llama_razor_set_override(None)

    def stats(self, ctx: int) -> Stats:
        """Return the statistics of a context. ctx: llama_context pointer."""
        return self._get("llama_razor_get_stats", Stats(), ctx)

    def layer(self, ctx: int, il: int) -> LayerStats:
        return self._get("llama_razor_get_layer", LayerStats(), ctx, il)

    def seq(self, ctx: int, seq_id: int) -> SeqStats:
        return self._get("llama_razor_get_seq", SeqStats(), ctx, seq_id)

    def buffers(self, ctx: int) -> list[BufferStats]:
        n = self.stats(ctx).n_buffers
        return [self._get("llama_razor_get_buffer", BufferStats(), ctx, i) for i in range(n)]

    def memory(self, ctx: int) -> list[Memory]:
        """Return the memory of a context and its model, one entry per buffer type."""
        found: list[Memory] = []
        with contextlib.suppress(IndexError):
            while True:
                found.append(self._get("llama_razor_get_memory", Memory(), ctx, len(found)))
        return found

    def _get(self, function: str, out: Out, *args: Any) -> Out:
        out.size = ctypes.sizeof(out)
        if not getattr(self.lib, function)(*args, ctypes.byref(out)):
            raise IndexError(f"{function}{args[1:]} has nothing for this context")
        return out


def make_params(
    profile: Profile | None,
    own_attention: bool = False,
    type_k_local: str | None = None,
    type_v_local: str | None = None,
    rewind: str = "off",
    rewind_limit: int = 0,
    rewind_folder: str = "",
) -> Params:
    """Return what override() takes.

    Args:
        profile: None switches razor off.
        own_attention: whether a full cache in host memory runs razor's attention kernel instead of
            llama.cpp's. With a profile razor's kernel always runs.
        type_k_local, type_v_local: KV types of local heads; None: those of the context.
        rewind: where the rewind log is: "off", "ram" or "disk".
        rewind_limit: its maximum size in bytes, 0: unlimited.
        rewind_folder: the folder of its file.
    """
    params = Params(size=ctypes.sizeof(Params), own_attention=own_attention or profile is not None)
    params.type_k_local = KV_TYPES[type_k_local].ggml_id if type_k_local else -1
    params.type_v_local = KV_TYPES[type_v_local].ggml_id if type_v_local else -1
    if profile is None:
        return params  # enabled = 0
    heads = profile.flat()
    params.enabled = 1
    params.sink_tokens = profile.sink_tokens
    params.window_min = profile.window_min
    params.window_divisor = profile.window_divisor
    params.compensation = profile.compensation
    params.rewind = REWIND[rewind]
    params.rewind_limit = rewind_limit
    params.rewind_folder = os.fsencode(rewind_folder) or None
    params.n_retrieval = heads.size
    params.retrieval = (c_uint8 * heads.size)(*heads.tolist())
    if profile.scope is not None:
        scopes = [scope for layer in profile.scope for scope in layer.tolist()]
        params.scope = (c_uint32 * heads.size)(*scopes)
    return params


def is_disabled() -> bool:
    """Return True where the environment switches razor off."""
    return os.environ.get(DISABLE_ENV, "") not in ("", "0")


@cache
def load() -> Native:
    """Load the library and the bindings on top of it, once per process. Raises LibraryError."""
    # 1. Import the bindings with this library.
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
    # 2. Check and bind the functions of llama-razor.h.
    for name in [*_FUNCTIONS, *errors.TRIED_FUNCTIONS.values()]:
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
            f"{path} has razor API version {version}, but this Python code needs {API_VERSION};"
            f" {REINSTALL}"
        )
    # 3. Check that the bindings and ggml belong to the same build.
    build = _parse_build(lib.llama_razor_build_info())
    if build.version != bindings.__version__:
        raise LibraryError(
            f"{path} was built from llama-cpp-python {build.version}, but the installed bindings"
            f" are {bindings.__version__}; install llama-cpp-python=={build.version} (if"
            " razor-local came from a folder of wheels, add --find-links FOLDER)"
        )
    _check_dependencies(lib, path)
    # 4. Prepare the library: backends, log and error handling.
    if lib.ggml_backend_reg_count() == 0:  # a build whose backends are plug-ins
        lib.ggml_backend_load_all_from_path(os.fsencode(folder))
    log.show(lib, False)
    cpu.use_best_backend(lib, folder)
    lib.llama_razor_set_end_callback(log.on_end)
    errors.raise_in_bindings(bindings, lib)
    rpc.install(bindings, lib)
    return Native(path=path, build=build, lib=lib)


def library_folder() -> Path:
    """Return the folder that contains libllama. Raises LibraryError if none does."""
    named = os.environ.get(LIB_ENV)
    folders = [Path(named)] if named else _package_folders()
    for folder in folders:
        if _library_in(folder).is_file():
            return folder.absolute()
    where = " and ".join(str(folder) for folder in folders) or "the package"
    what = f"correct or unset {LIB_ENV}" if named else REINSTALL
    raise LibraryError(f"there is no {_library_name()} in {where}; {what}")


def _package_folders() -> list[Path]:
    """Return the folders where an installation may have put the library, most likely first.

    An editable installation leaves the Python sources in the checkout and puts the files that CMake
    installs into site-packages. Their place is only listed in the distribution's metadata.
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
    """Import llama_cpp with the library in folder. Raises LibraryError."""
    before = os.environ.get("LLAMA_CPP_LIB_PATH")
    os.environ["LLAMA_CPP_LIB_PATH"] = str(folder)
    try:
        import llama_cpp
        import llama_cpp.llama_cpp
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        if file := _other_llama_cpp():
            raise LibraryError(
                f"{file} hides the Python package llama_cpp; rename it, or move it to a folder"
                " that Python does not search"
            ) from error
        if isinstance(error, ModuleNotFoundError):
            raise LibraryError(
                f"the Python package {error.name} is missing; install it again with razor-local, as"
                " docs/install.md describes (from a folder of wheels: --find-links FOLDER)"
            ) from error
        raise LibraryError(
            f"{_library_in(folder)} cannot be loaded ({error}); {REINSTALL}"
        ) from error
    finally:
        # Restore the variable: a child process may use another llama_cpp.
        if before is None:
            del os.environ["LLAMA_CPP_LIB_PATH"]
        else:
            os.environ["LLAMA_CPP_LIB_PATH"] = before
    return llama_cpp


def _other_llama_cpp() -> str | None:
    """Return the file of a module llama_cpp that is not the bindings' package, if there is one."""
    with contextlib.suppress(ImportError, ValueError):
        spec = find_spec("llama_cpp")
        if spec is not None and spec.origin is not None:
            file = Path(spec.origin)
            if file.name != "__init__.py" or not file.with_name("llama_cpp.py").is_file():
                return spec.origin
    return None


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
    """Return the file from which a function of the library was loaded, None if unknown."""
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
    # LD_LIBRARY_PATH, or another llama.cpp in this process, can replace the ggml beside libllama.
    for symbol in ("ggml_backend_dev_count", "ggml_init"):
        found = file_of(lib, symbol)
        if found is not None and found.resolve().parent != path.resolve().parent:
            raise LibraryError(
                f"{path} uses {found} instead of the ggml beside it; unset LD_LIBRARY_PATH, or"
                " import razor_local before the package that loaded it"
            )
