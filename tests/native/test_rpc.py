"""RPC servers: their addresses, the command rpc-server, and --rpc of the other commands."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from contextlib import closing

import pytest

from razor_local import Llama, RazorError, UnsupportedError
from razor_local.fit import RAM, DryModel
from razor_local.model_setup import DEFAULT_MODEL
from razor_local.native import rpc
from tests.support.cli import MAIN, run
from tests.support.rpc import MESSAGES, RpcServer, answer
from tests.support.server import Server

pytestmark = pytest.mark.skipif(not rpc.is_supported(), reason="a build with RAZOR_RPC=OFF")

N_CTX = 2048


def test_models_share_a_connection(servers: list[RpcServer]) -> None:
    options = {"n_ctx": N_CTX, "rpc_servers": [servers[0].address]}
    with closing(Llama(DEFAULT_MODEL, **options)) as one:
        with closing(Llama(DEFAULT_MODEL, **options)) as two:
            assert answer(one) == answer(two)
        assert answer(one)
    assert not rpc._connections


@pytest.mark.parametrize("servers", ["", "a", "a:b", "a:0", "a:70000", "a:1,", "a:1,a:1", "a b:1"])
def test_malformed_addresses(servers: str) -> None:
    with pytest.raises(UnsupportedError, match="expected"):
        Llama(DEFAULT_MODEL, rpc_servers=servers)


def test_servers_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc.check_server, "__defaults__", (0.2,))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(RazorError, match="no RPC server can be reached at"):
            Llama(DEFAULT_MODEL, rpc_servers=address)
        listener.listen()
        with pytest.raises(RazorError, match="no RPC server answered at"):
            Llama(DEFAULT_MODEL, rpc_servers=address)
    with pytest.raises(RazorError, match="was not found"):
        Llama(DEFAULT_MODEL, rpc_servers="no.such.machine.invalid:1")


def test_a_server_serves_one_client_at_a_time(servers: list[RpcServer]) -> None:
    with closing(Llama(DEFAULT_MODEL, n_ctx=N_CTX, rpc_servers=servers[0].address)):
        with pytest.raises(RazorError, match="it may be busy with another client"):
            rpc.check_server(servers[0].address, timeout=0.3)


# -- the command line --


def test_fit_counts_the_memory_of_servers(addresses: str) -> None:
    with closing(rpc.Servers(addresses)) as servers, servers.in_use():
        with DryModel(DEFAULT_MODEL) as dry:
            devices, free = dry.devices(), dry.available()
    assert len(devices) == 2
    assert set(free) == {RAM, *devices} and all(n > 2**20 for n in free.values())
    code, out, err = run("fit", "--rpc", addresses, "-c", N_CTX, "-ctk", "f16")
    assert code == 0, err
    assert re.search(r"memory +RAM and RPC\d+, RPC\d+;", out)


def test_commands_use_servers(addresses: str) -> None:
    want = run("run", "-p", "Hello", "--temp", "0")
    assert run("run", "-p", "Hello", "--temp", "0", "--rpc", addresses)[:2] == want[:2]
    code, out, err = run("run", "-p", "Hello", "--rpc", "127.0.0.1:1")
    assert (code, out) == (1, "") and err.startswith("Error: no RPC server can be reached at")
    assert len(err.splitlines()) == 1


def test_bench_uses_servers(addresses: str) -> None:
    options = ["-d", "0", "-r", "1", "--seconds", "0.1", "--types", "f16", "--only", "memory"]
    code, out, err = run("bench", "--rpc", addresses, *options, "--json")
    assert code == 0, err
    report = json.loads(out)
    names = [device["name"] for device in report["head"]["library"]["devices"]]
    assert names == ["RPC0", "RPC1", "CPU"]
    assert all(record["device"] > record["kv_bytes"] > 0 for record in report["records"])


@pytest.mark.slow  # builds llama-server
def test_serve_uses_servers_and_ends_with_them() -> None:
    with RpcServer() as first, RpcServer() as second:
        options = ["--rpc", f"{first.address},{second.address}", "-c", N_CTX, "-np", "1"]
        server = Server(*options)
        try:
            with closing(Llama(DEFAULT_MODEL, n_ctx=N_CTX)) as llama:
                assert server.say(MESSAGES[0]["content"]) == answer(llama)
            stream = server.stream("Hello", max_tokens=2000, ignore_eos=True)
            next(stream)
            first.kill()
            assert server.process.wait(10) == 1
        finally:
            server.process.kill()
    sentence = f"error: the connection to the RPC server {first.address} was lost"
    assert server.stderr().splitlines()[-1].startswith(sentence)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_server(number: int) -> None:
    with RpcServer() as server:
        assert "CPU" in server.line
        server.process.send_signal(number)
        assert server.process.wait(5) == 0


def test_an_open_server_is_warned_about() -> None:
    command = [sys.executable, "-c", MAIN, "rpc-server", "--host", "0.0.0.0", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        assert p.stdout is not None and p.stderr is not None
        assert p.stdout.readline().startswith("listening on 0.0.0.0:")
        p.terminate()
        assert p.stderr.read().startswith("warning: anyone who can reach port ")


def test_addresses_that_the_server_refuses(servers: list[RpcServer]) -> None:
    port = servers[0].address.split(":")[1]
    code, _, err = run("rpc-server", "--port", port)
    assert code == 1 and "another program uses this port" in err
    code, _, err = run("rpc-server", "--host", "::1")
    assert code == 2 and "expected an IPv4 address" in err


def test_a_build_without_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "is_supported", lambda: False)
    with pytest.raises(UnsupportedError, match="RAZOR_RPC=ON"):
        Llama(DEFAULT_MODEL, rpc_servers="127.0.0.1:1")
