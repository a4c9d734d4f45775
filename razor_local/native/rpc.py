"""Connect to RPC servers, whose devices compute a part of a model on other machines.

ggml's RPC backend aborts if it cannot connect, and waits forever for a server that is busy with
another client. The address and the server are therefore checked first.
"""

from __future__ import annotations

import ctypes
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_bool, c_char_p, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import RazorError, UnsupportedError
from .fork import refuse_after_fork

TIMEOUT = 5.0  # seconds
MAX_SERVERS = 16  # GGML_RPC_MAX_SERVERS
START = "start one there with 'razor-local rpc-server'"

_HELLO = 14  # RPC_CMD_HELLO of ggml-rpc.cpp
_CAPS = 24  # RPC_CONN_CAPS_SIZE of ggml-rpc/transport.h: bytes
_VERSION = (7, 0)  # RPC_PROTO_MAJOR_VERSION and the newest RPC_PROTO_MINOR_VERSION of ggml-rpc.h
_CPU, *_GPUS = 0, 1, 2  # GGML_BACKEND_DEVICE_TYPE_CPU, _GPU and _IGPU

_current = threading.local()  # .servers: the Servers for models that this thread loads


def parse_servers(text: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the addresses in "HOST:PORT,HOST:PORT". Raises UnsupportedError."""
    if text is None:
        return ()
    parts = text.split(",") if isinstance(text, str) else list(text)
    servers = tuple(str(part).strip() for part in parts)
    for server in servers:
        match = re.fullmatch(r"([A-Za-z0-9_.-]+):([0-9]{1,5})", server)
        if match is None or not 0 < int(match[2]) < 65536:
            raise UnsupportedError(
                f"{server!r} is not the address of an RPC server, expected HOST:PORT such as"
                " 192.168.1.20:50052, and commas between several"
            )
    if not 0 < len(servers) <= MAX_SERVERS or len(set(servers)) < len(servers):
        raise UnsupportedError(
            f"there are {len(servers)} RPC servers, expected 1 to {MAX_SERVERS} different ones"
        )
    return servers


@dataclass
class _Connection:
    """The connection to one server, which all models of this process share."""

    devices: list[int]  # pointers
    close: Callable[[], None]
    n_users: int = 0


_connections: dict[str, _Connection] = {}  # by address
_lock = threading.RLock()  # a Llama may be freed at any time, also while another one connects


class Servers:
    """Connections to RPC servers, in the order in which they get layers.

    Attributes:
        addresses: of the servers.
        devices: of all servers, as pointers.

    Args:
        servers: see parse_servers(). None: no servers.

    Raises:
        UnsupportedError: an address is malformed, or the library has no RPC backend.
        RazorError: a server cannot be reached, is busy, has another version, or was lost.
    """

    def __init__(self, servers: str | Sequence[str] | None) -> None:
        self.addresses: list[str] = []
        self.devices: list[int] = []
        self._list: Any = None  # of devices, ends with NULL; the library reads it when it loads
        wanted = parse_servers(servers)
        try:
            for address in wanted:
                with _lock:
                    self.devices += _connect(address)
                self.addresses.append(address)
        except BaseException:
            self.close()
            raise
        if wanted:
            devices = [*self.devices, *local_devices()]
            self._list = (c_void_p * (len(devices) + 1))(*devices)

    def close(self) -> None:
        """Close the connections, as soon as no other model uses them."""
        addresses, self.addresses = self.addresses, []
        with _lock:
            for address in addresses:
                connection = _connections[address]
                connection.n_users -= 1
                if connection.n_users == 0:
                    _connections.pop(address).close()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Offload layers to the servers, of all models that this thread loads inside the block.

        Without servers, those of an outer block are used. An exception closes the connections.
        """
        before = getattr(_current, "servers", None)
        if self.addresses:
            _current.servers = self
        try:
            yield
        except BaseException:
            self.close()
            raise
        finally:
            _current.servers = before


def is_supported() -> bool:
    """Return True if the library has an RPC backend."""
    from .library import load

    return hasattr(load().lib, "ggml_backend_rpc_add_server")


def local_devices() -> list[int]:
    """Return the GPUs of this machine that the library uses. Integrated GPUs are the last choice.

    llama.cpp chooses the same ones if it is not given a list.
    """
    lib = _library()
    devices = [lib.ggml_backend_dev_get(i) for i in range(lib.ggml_backend_dev_count())]
    by_type = [[d for d in devices if lib.ggml_backend_dev_type(d) == kind] for kind in _GPUS]
    return by_type[0] or by_type[1]


def has_devices() -> bool:
    """Return True if models that this thread loads can have layers on a device.

    llama_supports_gpu_offload() is true for every library with an RPC backend.
    """
    return getattr(_current, "servers", None) is not None or bool(local_devices())


def lost_server() -> str | None:
    """Return the address of a server in use to which the connection was lost."""
    servers = getattr(_current, "servers", None)
    return None if servers is None else next(filter(_is_lost, servers.addresses), None)


def find_device(name: str) -> int | None:
    """Return the device of a server by its name, such as "RPC0", None if there is none."""
    lib = _library()
    devices = [device for connection in _connections.values() for device in connection.devices]
    return next((d for d in devices if lib.ggml_backend_dev_name(d) == name.encode()), None)


def lost_sentence(address: str) -> str:
    return (
        f"the connection to the RPC server {address} was lost, and with it a part of the model;"
        " start the server again, and then load the model again"
    )


def install(bindings: Any, lib: ctypes.CDLL) -> None:
    """Make the bindings load models on the servers in use, and report lost connections."""
    default_params = bindings.llama_cpp.llama_model_default_params

    def model_default_params() -> Any:
        params = default_params()
        servers = getattr(_current, "servers", None)
        if servers is not None:
            params.devices = ctypes.addressof(servers._list)
        return params

    lost = lib.llama_razor_lost_server

    def check(result: Any, _function: Any, arguments: tuple[Any, ...]) -> Any:
        address = lost(arguments[0])
        if address is not None:
            raise RazorError(lost_sentence(address.decode()))
        return result

    for module in (bindings, bindings.llama_cpp):
        module.llama_model_default_params = model_default_params
        module.llama_supports_gpu_offload = has_devices
    for name in (
        "llama_decode", "llama_encode", "llama_state_get_data", "llama_state_set_data",
        "llama_state_seq_get_data", "llama_state_seq_set_data",
        "llama_state_seq_get_data_ext", "llama_state_seq_set_data_ext",
    ):  # fmt: skip
        getattr(bindings.llama_cpp, name).errcheck = check


def _library() -> ctypes.CDLL:
    """Return the library with the functions of ggml that are called here."""
    from .library import load

    lib = load().lib
    for name, argtypes, restype in (
        ("ggml_backend_dev_count", [], c_size_t),
        ("ggml_backend_dev_get", [c_size_t], c_void_p),
        ("ggml_backend_dev_type", [c_void_p], c_int),
        ("ggml_backend_dev_name", [c_void_p], c_char_p),
        ("ggml_backend_free", [c_void_p], None),
        ("ggml_backend_reg_dev_count", [c_void_p], c_size_t),
        ("ggml_backend_reg_dev_get", [c_void_p, c_size_t], c_void_p),
    ):
        function = getattr(lib, name)
        function.argtypes, function.restype = argtypes, restype
    return lib


def _refuse_unsupported() -> None:
    if not is_supported():
        raise UnsupportedError(
            "this build has no RPC backend; build it with RAZOR_RPC=ON (see native/README.md)"
        )


def _is_lost(address: str) -> bool:
    is_lost = _library().ggml_razor_rpc_is_lost
    is_lost.argtypes, is_lost.restype = [c_char_p], c_bool
    return bool(is_lost(address.encode()))


def _connect(address: str) -> list[int]:
    """Connect to a server, or share the connection that exists, and return its devices."""
    _refuse_unsupported()
    refuse_after_fork()
    lib = _library()
    if address in _connections:
        if _is_lost(address):
            raise RazorError(
                f"the connection to the RPC server {address} was lost; first close the models that"
                " used it"
            )
    else:
        check_server(address)
        backend = c_void_p()
        reg = lib.llama_razor_try_rpc_connect(address.encode(), ctypes.byref(backend))
        if not reg or backend.value is None:
            reason = " ".join((lib.llama_razor_last_error() or b"").decode().split())
            raise RazorError(f"no connection to the RPC server {address} could be made: {reason}")
        n = lib.ggml_backend_reg_dev_count(reg)
        devices = [lib.ggml_backend_reg_dev_get(reg, i) for i in range(n)]
        _connections[address] = _Connection(devices, partial(lib.ggml_backend_free, backend))
    _connections[address].n_users += 1
    return _connections[address].devices


def check_server(address: str, timeout: float = TIMEOUT) -> None:
    """Raise RazorError unless an RPC server of the same version answers at an address."""
    host, _, port = address.rpartition(":")
    try:
        target = socket.gethostbyname(host), int(port)  # llama.cpp uses IPv4 only
        with socket.create_connection(target, timeout) as server:
            server.settimeout(timeout)
            server.sendall(struct.pack("<BQ", _HELLO, _CAPS) + bytes(_CAPS))
            size, major, minor, patch = struct.unpack("<QBBB", _receive(server, 11))
    except TimeoutError:
        raise RazorError(
            f"no RPC server answered at {address} within {timeout:g} seconds; it may be busy with"
            f" another client (it serves one at a time), or be another program: {START}"
        ) from None
    except (socket.gaierror, UnicodeError):  # the latter: a part of the name is too long
        raise RazorError(
            f"the machine {host!r} of the RPC server {address} was not found; correct the address"
        ) from None
    except OSError as error:
        raise RazorError(
            f"no RPC server can be reached at {address} ({error.strerror or error}); {START}, or"
            " correct the address"
        ) from None
    if size != 4 + _CAPS:
        raise RazorError(f"the program at {address} is not an RPC server; {START}")
    if major != _VERSION[0] or minor > _VERSION[1]:
        raise RazorError(
            f"the RPC server {address} has protocol version {major}.{minor}.{patch}, expected"
            f" {_VERSION[0]}.{_VERSION[1]}; run the same release of llama.cpp on both machines"
        )


def _receive(server: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n:
        part = server.recv(n - len(data))
        if not part:
            raise ConnectionError("the program there closed the connection")
        data += part
    return data


def served_devices() -> dict[str, int]:
    """Return what serve() serves by name: the GPUs of this machine, or its CPU."""
    lib = _library()
    devices = local_devices() or [
        device
        for device in map(lib.ggml_backend_dev_get, range(lib.ggml_backend_dev_count()))
        if lib.ggml_backend_dev_type(device) == _CPU
    ]
    return {lib.ggml_backend_dev_name(device).decode(): device for device in devices}


def serve(host: str, port: int, n_threads: int) -> None:
    """Serve the devices of this machine to one client after the other. Returns only on failure.

    The library writes to stdout. Raises UnsupportedError.
    """
    _refuse_unsupported()
    devices = served_devices().values()
    start = _library().ggml_backend_rpc_start_server
    start.argtypes = [c_char_p, c_char_p, c_size_t, c_size_t, ctypes.POINTER(c_void_p)]
    start.restype = None
    pointers = (c_void_p * len(devices))(*devices)
    start(f"{host}:{port}".encode(), None, n_threads, len(devices), pointers)
