"""The command line and the environment of llama-server."""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import socket
import stat
from pathlib import Path
from typing import Any

from .. import native
from ..errors import RazorError, options
from ..plan import Plan
from ..profile import Profile

ENV = "RAZOR_LOCAL_SERVER"  # RAZOR_SERVER_ENV of native/src/server/razor-server.h
KEY_ENV = "LLAMA_API_KEY"
PAGE = Path(__file__).parents[1] / "data" / "web"  # what / shows without llama.cpp's own page


def is_loopback(host: str) -> bool:
    """Return True if only this machine can reach an address, or the path of a Unix socket."""
    if host.endswith(".sock") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_port(host: str, port: int) -> None:
    """Raise RazorError if a server could not listen there now.

    A Unix socket that no program listens to is removed, because it would be in the way.
    """
    if host.endswith(".sock"):
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(host)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            if stat.S_ISSOCK(os.stat(host).st_mode):
                return os.unlink(host)
        except OSError as error:
            raise RazorError(f"cannot listen on {host}: {error.strerror or error}") from None
        raise RazorError(f"cannot listen on {host}: another program does, or it is no socket")
    try:
        (family, *_, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            what = "another program uses this port; choose another one, or 0 for any free one"
        elif error.errno == errno.EACCES:
            what = "this port needs the rights of an administrator; choose one from 1024 on"
        elif error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
            what = "this machine has no such address; use 127.0.0.1, or 0.0.0.0 for all of them"
        else:
            what = error.strerror or str(error)
        raise RazorError(f"cannot listen on {host}, port {port}: {what}") from None


def razor_environment(
    profile: Profile | None,
    plan: Plan | None,
    n_slots: int,
    *,
    razor: bool = True,
    **params: Any,
) -> dict[str, str]:
    """Return the environment variables that make a server follow a profile.

    Args:
        profile: None for the metadata of the model.
        plan: the plan of one slot.
        razor: whether to use razor at all.
        params: the KV types of local heads and the rewind log, as arguments of
            native.make_params().

    Raises:
        RazorError: the folder of the rewind log has a name that is not UTF-8.
    """
    if not razor:
        return {native.DISABLE_ENV: "1"}
    config: dict[str, Any] = {}
    if profile is not None:
        struct = native.make_params(profile, own_attention=True, **params)
        for name in (field[0] for field in struct._fields_):
            value = getattr(struct, name)
            if isinstance(value, int):
                config[name] = value
            elif isinstance(value, bytes):
                config[name] = _utf8(value)
            elif value:
                config[name] = value[: struct.n_retrieval]
    if plan is not None and plan.active:
        config["kv_bytes"] = plan.kv_bytes * n_slots
        config["kv_bytes_full"] = plan.kv_bytes_full * n_slots
    return {ENV: json.dumps(config)} if config else {}


def library_environment() -> dict[str, str]:
    """Return the environment variables that make a server use the best CPU backend.

    Raises LibraryError.
    """
    backend = native.best_backend(native.library_folder())
    if backend is None:
        return {}
    folders = [str(backend.parent), os.environ.get("LD_LIBRARY_PATH")]
    return {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, folders))}


def _utf8(folder: bytes) -> str:
    try:
        return folder.decode()
    except UnicodeDecodeError:
        raise RazorError(
            f"the user's cache folder {os.fsdecode(folder)!r} has a name that is not UTF-8; set"
            f" XDG_CACHE_HOME to another one, or pass {options(rewind='ram')}"
        ) from None
