"""razor-local rpc-server: compute layers for razor_local or llama.cpp on other machines."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from typing import Any

import click

from ..errors import RazorError
from .params import THREADS, Whole
from .parser import Command
from .terminal import echo, say

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # end the server

EPILOG = """
\b
Examples:
  razor-local rpc-server
  razor-local rpc-server --host 192.168.1.20

Commands on another machine use this one with --rpc 192.168.1.20:50052.

The protocol has no password and no encryption: anyone who can reach the port may be able to run
programs as you.
Use trusted networks only, or a tunnel (ssh -L 50052:127.0.0.1:50052 MACHINE).
"""


@click.command("rpc-server", cls=Command, epilog=EPILOG)
@click.option(
    "--host", default="127.0.0.1", show_default=True, metavar="ADDRESS",
    help="IPv4 address to listen on; 0.0.0.0 is all addresses of this machine.",
)  # fmt: skip
@click.option(
    "--port", type=Whole(0, 65535), default=50052, show_default=True, metavar="N",
    help="Port to listen on (0: any free one).",
)  # fmt: skip
@click.option(
    "-t", "--threads", type=THREADS, metavar="N",
    help="Number of CPU threads.  [default: physical cores]",
)  # fmt: skip
@click.option("-v", "--verbose", is_flag=True, help="Show the log of llama.cpp on stderr.")
def rpc_server(host: str, port: int, threads: int | None, verbose: bool) -> None:
    """Compute layers of models for one client at a time, on the GPUs of this machine or its CPU.

    The client has the model file and sends its weights. Ctrl-C and SIGTERM end the server.
    """
    from ..available_memory import device_memory
    from ..common.machine import n_cores
    from ..native import load
    from ..native.rpc import check_server, serve, served_devices
    from ..server.command import check_port, is_loopback

    try:
        socket.inet_aton(host)
    except OSError:
        raise click.UsageError(
            f"--host is {host!r}, expected an IPv4 address such as 127.0.0.1"
        ) from None
    check_port(host, port)
    port = port or _free_port(host)
    load().show_log(verbose)
    devices = [
        f"{name} ({device_memory(name)[0] / 2**30:.1f} GiB free)" for name in served_devices()
    ]
    if not is_loopback(host):
        say(
            f"warning: anyone who can reach port {port} of {host} may be able to run programs as"
            " you: the protocol has no password and no encryption; use trusted networks only"
        )
    for number in SIGNALS:
        signal.signal(number, _end)
    _redirect_library(verbose)
    failed: list[str] = []

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # they would end the library's accept()
        try:
            serve(host, port, threads or n_cores())
        except RazorError as error:
            failed.append(str(error))

    # signals reach the main thread, and the library's loop does not return to Python
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    address = f"{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    while thread.is_alive():
        try:
            check_server(address)
        except RazorError:
            time.sleep(0.05)
        else:
            echo(f"listening on {host}:{port}: {', '.join(devices)}")
            break
    while thread.is_alive():
        thread.join(0.5)
    raise RazorError((failed or [f"the RPC server at {host}:{port} ended; see its log with -v"])[0])


def _redirect_library(verbose: bool) -> None:
    """Send what the library writes to stdout to stderr or nowhere; Python keeps stdout."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2 if verbose else os.open(os.devnull, os.O_WRONLY), 1)


def _free_port(host: str) -> int:
    with socket.socket() as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])


def _end(*_: Any) -> None:
    """End the process at once: clients notice it, and there is nothing to save or to flush."""
    os._exit(0)
