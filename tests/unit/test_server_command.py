"""What razor_local.server.command passes to llama-server."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict

import numpy as np
import pytest

from razor_local import Profile, RazorError, make_plan, read_model_shape, read_profile
from razor_local.cli.params import DEFAULT_MODEL
from razor_local.rewind_log import RewindLog
from razor_local.server.command import check_port, is_loopback, razor_environment

SHAPE, PROFILE = read_model_shape(DEFAULT_MODEL), read_profile(DEFAULT_MODEL)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("/tmp/a.sock", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("name.example", False),
        ("127.0.0.1,0.0.0.0", False),
        ("", False),
    ],
)
def test_loopback(host, expected):
    assert is_loopback(host) is expected


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        says = f"cannot listen on 127.0.0.1, port {port}: another program uses this port"
        with pytest.raises(RazorError, match=says):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)
    with pytest.raises(RazorError, match="this machine has no such address"):
        check_port("192.0.2.1", 8080)  # of documentation


def test_a_unix_socket(tmp_path):
    path = tmp_path / "a.sock"
    check_port(str(path), 0)
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(path))
        taken.listen()
        with pytest.raises(RazorError, match="another program does"):
            check_port(str(path), 0)
    check_port(str(path), 0)
    assert not path.exists()
    path.write_text("a file")
    with pytest.raises(RazorError, match="no socket"):
        check_port(str(path), 0)
    assert path.exists()


def test_the_environment_of_a_profile():
    plan = make_plan(SHAPE, PROFILE, 8192)
    env = razor_environment(PROFILE, plan, 3, type_k_local="q8_0")
    config = json.loads(env.pop("RAZOR_LOCAL_SERVER"))
    assert not env
    assert config["enabled"] == config["own_attention"] == config["compensation"] == 1
    assert config["retrieval"] == PROFILE.flat().tolist()
    assert (config["sink_tokens"], config["window_min"], config["window_divisor"]) == (
        PROFILE.sink_tokens,
        PROFILE.window_min,
        PROFILE.window_divisor,
    )
    assert (config["type_k_local"], config["type_v_local"]) == (8, -1)
    assert config["kv_bytes"] == 3 * plan.kv_bytes
    assert config["kv_bytes_full"] == 3 * plan.kv_bytes_full
    assert "scope" not in config


def test_the_environment_of_scopes():
    retrieval = (np.array([1, 0]), np.array([0, 0]))
    scope = (np.array([0, 64], np.uint32), np.array([512, 70_000], np.uint32))
    env = razor_environment(Profile(retrieval=retrieval, scope=scope), None, 1)
    config = json.loads(env["RAZOR_LOCAL_SERVER"])
    assert (config["retrieval"], config["scope"]) == ([1, 0, 0, 0], [0, 64, 512, 70_000])
    assert "kv_bytes_full" not in config


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (RewindLog(), (0, 0, None)),
        (RewindLog("ram", 1 << 20), (1, 1 << 20, None)),
        (RewindLog("disk", 4 << 30, "/home/jürgen/.cache"), (2, 4 << 30, "/home/jürgen/.cache")),
    ],
)
def test_the_environment_of_a_rewind_log(log, expected):
    config = json.loads(razor_environment(PROFILE, None, 1, **asdict(log))["RAZOR_LOCAL_SERVER"])
    names = ("rewind", "rewind_limit", "rewind_folder")
    assert tuple(config.get(name) for name in names) == expected


def test_a_folder_of_the_rewind_log_that_is_not_utf8():
    log = RewindLog("disk", 1, os.fsdecode(b"/tmp/\xff"))
    with pytest.raises(RazorError, match="not UTF-8; set XDG_CACHE_HOME .* or pass rewind='ram'$"):
        razor_environment(PROFILE, None, 1, **asdict(log))


def test_the_environment_without_a_profile():
    assert razor_environment(None, make_plan(SHAPE, None, 8192), 2) == {}
    assert razor_environment(PROFILE, None, 2, razor=False) == {"RAZOR_LOCAL_DISABLE": "1"}
