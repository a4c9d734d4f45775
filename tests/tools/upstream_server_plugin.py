"""A pytest plugin with which upstream_tests.py runs the tests of llama.cpp's server offline.

LLAMA_CACHE holds replacements for the models of the tests, in folders like those of a Hugging Face
cache (upstream_models.make_server_stand_ins). A test that needs another model, the network or a
package that is not installed is skipped with the name of what it needs. UPSTREAM_PATCHED: 1 if the
server must be the patched one. UPSTREAM_RAZOR: 1 if razor must be active in one of the servers.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import requests

HUB = Path(os.environ["LLAMA_CACHE"])
NETWORK_TESTS = {
    "test_mcp_proxy": "example.com",
    "test_router_delete_model": "a download",
    "test_router_download_model": "a download",
}
n_active = 0  # servers in which razor was active


def skip(what: str) -> None:
    pytest.skip(f"needs {what}")


class MissingClient:
    def __init__(self, **options: Any) -> None:
        skip("the package openai")


wget = ModuleType("wget")
wget.download = lambda url, out: skip(Path(url).name)
sys.modules["wget"] = wget
if find_spec("openai") is None:
    sys.modules["openai"] = ModuleType("openai")
    sys.modules["openai"].OpenAI = MissingClient


def pytest_configure() -> None:
    import utils  # of the tests: their folder is in sys.path now

    utils.ServerPreset.load_all = staticmethod(lambda: None)  # it downloads all models
    start, get = utils.ServerProcess.start, requests.get

    def start_offline(server: Any, *args: Any, **options: Any) -> None:
        global n_active
        repo = (server.model_hf_repo or "").partition(":")[0]
        folder = HUB / f"models--{repo.replace('/', '--')}" / "snapshots"
        if repo and not any(folder.glob(f"*/{server.model_hf_file or '*'}")):
            skip(server.model_hf_file or f"a model of {repo}")
        server.offline = True
        start(server, *args, **options)
        key = f"Bearer {server.api_key}"
        props = server.make_request("GET", "/props", headers={"Authorization": key}).body
        if ("razor" in props) != (os.environ["UPSTREAM_PATCHED"] == "1") and repo:
            pytest.exit("this is not the expected server", returncode=3)
        n_active += props.get("razor", {}).get("active", False)

    def get_local(url: str, **options: Any) -> requests.Response:
        if url.startswith("https://"):
            skip(Path(url).name)
        return get(url, **options)

    utils.ServerProcess.start = start_offline
    requests.get = get_local


def pytest_runtest_setup(item: pytest.Item) -> None:
    if (what := NETWORK_TESTS.get(item.name)) is not None:
        skip(what)


def pytest_sessionfinish(session: pytest.Session) -> None:
    print(f"\nrazor was active in {n_active} servers")
    if (n_active > 0) != (os.environ["UPSTREAM_RAZOR"] == "1"):
        session.exitstatus = 4
