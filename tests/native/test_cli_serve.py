"""The command line of razor-local serve, up to the start of llama-server."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from razor_local import make_plan, read_model_shape, read_profile
from razor_local.cli import serve as module
from razor_local.cli.params import DEFAULT_MODEL
from razor_local.errors import MemoryFullError
from razor_local.fit import RAM, ContextOptions, DryModel
from razor_local.server import build, slots
from razor_local.server.slots import choose_slots
from tests.support.cli import run
from tests.support.commands import all_examples
from tests.support.tiny_models import TinySpec

PROFILE = read_profile(DEFAULT_MODEL)
PLAN = make_plan(read_model_shape(DEFAULT_MODEL), PROFILE, 8192)


class Started:
    """What llama-server would be started with."""

    def __init__(self, arguments: list[str], env: dict[str, str]) -> None:
        self.arguments, self.env = arguments, env

    def __getitem__(self, option: str) -> str:
        return self.arguments[self.arguments.index(option) + 1]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Any:
    """serve(arguments) -> what would be started and stderr, or the exit code and stderr."""
    calls: list[Started] = []
    monkeypatch.setattr(module, "run", lambda *args: calls.append(Started(*args)))
    monkeypatch.setattr(build, "find_server", lambda: Path("/bin/llama-server"))
    monkeypatch.setattr(build, "has_web_ui", lambda: False)
    for name in ("LLAMA_API_KEY", "LLAMA_ARG_HOST", "LLAMA_ARG_PORT", "LLAMA_ARG_N_PARALLEL"):
        monkeypatch.delenv(name, raising=False)

    def call(*args: object) -> tuple[Any, str]:
        calls.clear()
        code, stdout, stderr = run("serve", "--port", 0, *args)
        assert not stdout and (code == 0) == bool(calls)
        return (calls[0] if calls else code), stderr

    return call


def test_the_defaults(serve):
    started, stderr = serve()
    assert not stderr
    assert started.arguments[0] == "/bin/llama-server"
    assert started["-m"] == str(DEFAULT_MODEL) and started["--alias"] == DEFAULT_MODEL.stem
    assert (started["-c"], started["-np"]) == (str(4 * 8192), "4")
    assert (started["--host"], started["--cors-origins"]) == ("127.0.0.1", "localhost")
    assert (Path(started["--path"]) / "index.html").is_file()
    assert 0 < int(started["--cache-ram"]) <= 8192
    assert "--no-kv-unified" in started.arguments
    config = json.loads(started.env["RAZOR_LOCAL_SERVER"])
    assert config["retrieval"] == PROFILE.flat().tolist()
    assert config["kv_bytes_full"] == 4 * PLAN.kv_bytes_full
    assert "LLAMA_API_KEY" not in started.env


def test_the_web_page_of_llama_server(serve, monkeypatch):
    monkeypatch.setattr(build, "has_web_ui", lambda: True)
    started, _ = serve()
    assert "--path" not in started.arguments


def test_options(serve):
    started, _ = serve(
        *("-c", "4k", "--parallel", 2, "-ctk", "q8_0", "-ctv", "q8_0", "-t", 3, "-ub", 256, "-v"),
        *("--budget", 0.5, "-ctlk", "q4_0", "--", "--slots", "-c", 1),
    )
    assert (started["-c"], started["-np"], started["-t"], started["-ub"]) == (
        "8192",
        "2",
        "3",
        "256",
    )
    assert (started["-ctk"], started["-ctv"], started["-lv"]) == ("q8_0", "q8_0", "3")
    assert started.arguments[-3:] == ["--slots", "-c", "1"]
    config = json.loads(started.env["RAZOR_LOCAL_SERVER"])
    assert sum(config["retrieval"]) == 12
    assert (config["type_k_local"], config["type_v_local"]) == (2, -1)


def test_a_full_cache(serve):
    started, _ = serve("--no-razor")
    assert started.env["RAZOR_LOCAL_DISABLE"] == "1" and "RAZOR_LOCAL_SERVER" not in started.env
    started, stderr = serve("-c", 512)
    assert "the full cache runs: " in stderr and "RAZOR_LOCAL_SERVER" in started.env


def test_a_model_without_a_profile(serve, tiny):
    path = tiny(TinySpec("llama"))
    started, _ = serve(path, "--calibrate", "never")
    assert "RAZOR_LOCAL_SERVER" not in started.env and started["--alias"] == path.stem


def test_variables_of_llama_server(serve, monkeypatch):
    """Those that serve reads are not passed on, because llama-server would warn of them."""
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "2048")
    monkeypatch.setenv("LLAMA_ARG_N_PREDICT", "7")
    started, _ = serve()
    assert started["-c"] == str(4 * 2048)
    assert "LLAMA_ARG_CTX_SIZE" not in started.env and started.env["LLAMA_ARG_N_PREDICT"] == "7"


def test_keys(serve, monkeypatch):
    """A key is in no command line, which other users can read."""
    started, _ = serve("--api-key", "secret", "--host", "0.0.0.0")
    assert started.env["LLAMA_API_KEY"] == "secret" and "secret" not in started.arguments
    monkeypatch.setenv("LLAMA_API_KEY", "other")
    assert serve("--host", "0.0.0.0")[0].env["LLAMA_API_KEY"] == "other"


def test_other_machines_need_a_key(serve):
    for host in ("0.0.0.0", "::", "name.example"):
        code, stderr = serve("--host", host)
        assert code == 2 and f"other machines can reach {host}: set a key" in stderr
    code, stderr = serve("--", "--host", "127.0.0.1", "--host", "0.0.0.0")
    assert code == 2 and "other machines can reach 0.0.0.0: set a key" in stderr
    assert serve("--host", "0.0.0.0", "--insecure")[0]["--host"] == "0.0.0.0"
    assert serve("--host", "0.0.0.0", "--", "--api-key-file", "keys")[0]["--host"] == "0.0.0.0"


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--no-razor", "--budget", 0.2], 2, "--budget and --no-razor exclude each other"),
        (["--no-razor", "-ctlk", "q8_0"], 2, "--cache-type-local-k and --no-razor exclude"),
        (["--api-key", ""], 2, "--api-key is empty"),
        (["--", "--swa-full"], 2, "--swa-full (LLAMA_ARG_SWA_FULL) is not supported"),
        (["--parallel", 0], 2, "0 is not in the range"),
        (["--port", 65536], 2, "65536 is not in the range"),
        (["no-such.gguf"], 1, "no-such.gguf: No such file"),
        (["--sidecar", "no-such.gguf"], 1, "no-such.gguf: No such file"),
        (["--parallel", 256, "-c", "1M"], 1, "256 slots of 1,048,576 tokens cannot be planned"),
    ],
)
def test_errors(serve, args, code, says):
    found, stderr = serve(*args)
    assert found == code and says in stderr and "Traceback" not in stderr
    assert stderr.count("Error: ") == 1


@pytest.mark.parametrize("line", [n for n in all_examples() if n.startswith("razor-local serve")])
def test_examples(serve, line):
    args = shlex.split(line)[2:]
    args[:1] = [str(DEFAULT_MODEL)] * (args[:1] != ["--"])
    assert serve(*args)[0]["-m"] == str(DEFAULT_MODEL)


def test_building_is_announced(serve, monkeypatch):
    monkeypatch.setattr(build, "find_server", lambda: None)
    monkeypatch.setattr(build, "build_server", lambda progress, stop: Path("/built"))
    started, stderr = serve()
    assert started.arguments[0] == "/built" and "llama-server is built once" in stderr


# slots


def test_slots_have_caches_of_their_own():
    """The bytes of several slots are those that the library lays out."""
    options = ContextOptions(profile=PROFILE, n_slots=3)
    with DryModel(DEFAULT_MODEL) as dry:
        need = dry.need(8192, options)
    assert need.n_ctx == 8192 and need.kv == 3 * PLAN.kv_bytes


def with_memory(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    monkeypatch.setattr(DryModel, "available", lambda self, n_batch: {RAM: n_bytes + slots.MARGIN})


def test_fewer_slots_where_razor_would_save_nothing(monkeypatch):
    options = ContextOptions(profile=replace(PROFILE, window_min=2000))
    with DryModel(DEFAULT_MODEL) as dry:
        least = next(n for n in range(512, 8192, 256) if dry.need(n, options).active)
        two = dry.need(least, replace(options, n_slots=2))
    with_memory(monkeypatch, two.total)
    chosen = choose_slots(DEFAULT_MODEL, options)
    assert chosen.n_slots == 2 and chosen.n_ctx == least and chosen.need.active
    assert chosen.why_fewer == "with more of them, razor would save nothing"
    chosen = choose_slots(DEFAULT_MODEL, options, n_slots=4)
    assert chosen.n_slots == 4 and not chosen.need.active and chosen.why_fewer is None
    with_memory(monkeypatch, 2**35)
    chosen = choose_slots(DEFAULT_MODEL, options, n_max=4096)
    assert (chosen.n_slots, chosen.n_ctx, chosen.why_fewer) == (4, 4096, None)
    assert chosen.prompt_cache == slots.MAX_PROMPT_CACHE


def test_slots_that_do_not_fit(monkeypatch):
    options = ContextOptions(profile=PROFILE)
    with DryModel(DEFAULT_MODEL) as dry:
        one = dry.need(8192, options)
    with_memory(monkeypatch, one.total - slots.MARGIN)
    chosen = choose_slots(DEFAULT_MODEL, options, n_ctx=8192)
    assert (chosen.n_slots, chosen.why_fewer) == (1, "no more fit")
    with pytest.raises(MemoryFullError, match="or fewer slots"):
        choose_slots(DEFAULT_MODEL, options, n_ctx=8192, n_slots=2)
    with_memory(monkeypatch, 0)
    with pytest.raises(MemoryFullError, match="even a context of 1,024 tokens needs"):
        choose_slots(DEFAULT_MODEL, options)
