"""razor-local serve: real requests to the built-in model.

The first of these tests builds llama-server, which takes some minutes.
"""

from __future__ import annotations

import json
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from razor_local import make_plan, read_model_shape, read_profile
from razor_local.cli.params import DEFAULT_MODEL
from razor_local.server.build import build_server, has_web_ui
from tests.support.server import Server, chat_request
from tests.support.texts import FACT, QUESTION, text_with

pytestmark = pytest.mark.slow

PLAN = make_plan(read_model_shape(DEFAULT_MODEL), read_profile(DEFAULT_MODEL), 8192)
PROMPT = f"{FACT} {QUESTION}"
ANSWER = "The secret code of Marlow is 48213."
SCHEMA = {
    "type": "object",
    "properties": {"code": {"type": "integer"}},
    "required": ["code"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "open_door",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "integer"}, "door": {"enum": ["front", "back"]}},
            "required": ["code", "door"],
        },
    },
}
TEMPLATE_WITH_TOOLS = """
{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') }}
{%- for call in m.tool_calls %}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    build_server()
    with Server("-c", 8192, "--parallel", 4) as running:
        yield running


def schema_format(schema: object) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


# what a server says of itself


def test_the_cache_is_the_plan(server):
    full, ours = 4 * PLAN.kv_bytes_full / 2**20, 4 * PLAN.kv_bytes / 2**20
    assert server.line == (
        f"listening on http://{server.address}: 4 slots of 8192 tokens, KV cache {ours:.1f} MiB"
        f" instead of {full:.1f} MiB (-68 %)"
    )
    status, props = server.get("/props")
    assert status == 200 and props["total_slots"] == 4
    expected = {
        "active": True,
        "n_ctx": 8192,
        "n_slots": 4,
        "kv_bytes": 4 * PLAN.kv_bytes,
        "kv_bytes_full": 4 * PLAN.kv_bytes_full,
        "n_retrieval": PLAN.retrieval_kv_heads,
        "window": PLAN.window,
        "block": PLAN.block,
    }
    assert expected.items() <= props["razor"].items()
    status, metrics = server.get("/metrics")
    assert f"razor:kv_bytes {4 * PLAN.kv_bytes}\n" in metrics
    assert f"razor:kv_bytes_full {4 * PLAN.kv_bytes_full}\n" in metrics
    assert server.get("/v1/models")[1]["data"][0]["id"] == "razor-default"


def test_the_page(server):
    """In a build with RAZOR_WEB_UI=ON it is llama.cpp's page, which test_web_page.py tests."""
    if not has_web_ui():
        status, page = server.get("/")
        assert status == 200 and "v1/chat/completions" in page
    assert server.get("/nothing")[0] == 404


# answers


def test_chat_and_stream(server):
    answer = server.chat(PROMPT)["choices"][0]
    assert answer["message"]["content"].startswith(ANSWER)
    pieces = [event["choices"][0]["delta"].get("content") for event in server.stream(PROMPT)]
    assert "".join(filter(None, pieces)) == answer["message"]["content"]


def test_json_schema(server):
    answer = server.say(PROMPT, max_tokens=64, response_format=schema_format(SCHEMA))
    assert json.loads(answer).keys() == {"code"}


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_tool_calls(choice, tmp_path):
    """The model begins a call by copying its mark from the question. A grammar makes the rest."""
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE_WITH_TOOLS)
    with Server("-c", 4096, "--", "--chat-template-file", template) as server:
        answer = server.chat(
            PROMPT.replace("48213", "<tool_call>"),
            tools=[TOOL],
            tool_choice=choice,
            parallel_tool_calls=False,
            max_tokens=100,
        )
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "open_door"
    arguments = json.loads(call["function"]["arguments"])
    assert isinstance(arguments["code"], int) and arguments["door"] in ("front", "back")


def test_log_probabilities(server):
    answer = server.chat(PROMPT, max_tokens=4, logprobs=True, top_logprobs=3)
    tokens = answer["choices"][0]["logprobs"]["content"]
    assert len(tokens) == 4
    for token in tokens:
        assert len(token["top_logprobs"]) == 3 and -0.1 < token["logprob"] <= 0


@pytest.mark.parametrize("n", [2, 4])
def test_several_answers(server, n):
    """The prompt is computed once, and its cache copied."""
    long = text_with(FACT, 1500) + QUESTION
    answers = server.chat(long, n=n)["choices"]
    assert [answer["message"]["content"] for answer in answers] == [server.say(long)] * n


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        ({"max_tokens": "many"}, 400, "max_tokens"),
        ({"n": 9}, 400, "'n'"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"messages": "text"}, 400, "messages"),
        ({"response_format": schema_format({"type": "nonsense"})}, 400, "nonsense"),
        ({"grammar": "root ::= ("}, 400, "rammar"),
    ],
)
def test_errors_of_requests(server, options, status, says):
    found, answer = server.post("/v1/chat/completions", chat_request(PROMPT) | options)
    assert found == status and says in answer["error"]["message"], answer
    assert server.say(PROMPT).startswith(ANSWER)


def test_a_prompt_that_is_too_long(server):
    status, answer = server.post("/v1/chat/completions", chat_request("a " * 20000))
    assert status == 400 and "8192 tokens" in answer["error"]["message"]


# the cache


def test_an_agent_that_edits_far_back(server):
    """Each request changes the conversation at some place, often far before the last fold."""
    rng = random.Random(0)
    parts = [text_with(FACT, 200, seed) for seed in range(20)]
    for n in range(100):
        cut = rng.randrange(len(parts))
        parts[cut:] = [text_with(FACT, 200, rng.random()) for _ in parts[cut:]]
        text = " ".join(parts[: rng.randrange(1, len(parts) + 1)]) + QUESTION
        again = {"id_slot": n % 4} if n % 10 == 0 else {}
        answer = server.chat(text, max_tokens=8, **again)
        if n % 10 == 0:
            fresh = server.chat(text, max_tokens=8, cache_prompt=False)
            assert answer["choices"] == fresh["choices"]


def test_an_edit_reuses_the_beginning(server):
    text = text_with(FACT, 2000)
    server.say(text, id_slot=0)
    answer = server.chat(text, server.say(text, id_slot=0), QUESTION, id_slot=0)
    usage = answer["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens"] - 200


def metric(server: Server, name: str) -> int:
    return int(re.search(rf"^razor:{name} (\d+)$", server.get("/metrics")[1], re.M)[1])


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_an_edit_far_back_reuses_the_beginning(where):
    """Only what follows the edit is computed again, and the answer is that without a cache."""
    parts = [text_with(FACT, 500, seed) for seed in range(8)]
    with Server("-c", 8192, "--parallel", 2, "--rewind", where) as server:
        assert metric(server, "rewind_bytes") == 0
        before = server.chat(" ".join(parts) + QUESTION, id_slot=0)["usage"]
        assert before["prompt_tokens"] > PLAN.window + 8 * PLAN.block
        n_bytes = metric(server, "rewind_bytes")
        for n_kept in (6, 3, 1, 2):
            parts[n_kept:] = [text_with(FACT, 500, 10 * n_kept + n) for n in range(n_kept, 8)]
            text = " ".join(parts) + QUESTION
            edited = server.chat(text, id_slot=0, logprobs=True)
            n_cached = edited["usage"]["prompt_tokens_details"]["cached_tokens"]
            status, kept = server.post("/tokenize", {"content": " ".join(parts[:n_kept])})
            assert status == 200 and n_cached >= len(kept["tokens"])
            assert edited["timings"]["cache_n"] == n_cached
            fresh = server.chat(text, id_slot=1, logprobs=True, cache_prompt=False)
            assert edited["choices"] == fresh["choices"]
        assert metric(server, "rewind_bytes") == 2 * n_bytes > 0
        razor = server.get("/props")[1]["razor"]
        assert (razor["rewind"], razor["rewind_failure"]) == (where, "")
        assert razor["rewind_bytes"] <= razor["rewind_limit"] == metric(server, "rewind_limit")


def test_the_limit_of_the_rewind_log():
    """Tokens that the log has dropped are computed again."""
    text = text_with(FACT, 4000)
    with Server("-c", 8192, "--parallel", 1, "--rewind-limit", "2M") as server:
        server.say(text)
        assert 0 < metric(server, "rewind_bytes") <= metric(server, "rewind_limit") == 2 << 20
        edited = server.chat(text[: len(text) // 4] + QUESTION)
        assert edited["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        fresh = server.chat(text[: len(text) // 4] + QUESTION, cache_prompt=False)
        assert edited["choices"] == fresh["choices"]


def test_no_rewind_log():
    text = text_with(FACT, 4000)
    with Server("-c", 8192, "--parallel", 1, "--rewind", "off") as server:
        server.say(text)
        assert server.get("/props")[1]["razor"]["rewind"] == "off"
        assert "razor:rewind" not in server.get("/metrics")[1]
        edited = server.chat(text[: len(text) // 2] + QUESTION)
        assert edited["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_clients_do_not_change_each_other(server):
    """8 clients on 4 slots for 5 minutes: every answer is that of the same request alone."""
    sizes = random.Random(1).sample(range(5, 2500), 24)
    texts = [f"{text_with(FACT, n, n)} {QUESTION}" for n in sizes]
    alone = [server.say(text, cache_prompt=False) for text in texts]
    begin = time.monotonic()
    memory: list[int] = []  # bytes, at each answer

    def client(number: int) -> int:
        rng, n = random.Random(number), 0
        while time.monotonic() < begin + 300:
            i = rng.randrange(len(texts))
            assert server.say(texts[i]) == alone[i]
            memory.append(psutil.Process(server.process.pid).memory_info().rss)
            n += 1
        return n

    with ThreadPoolExecutor(8) as clients:
        assert sum(clients.map(client, range(8))) > 150
    fifth = len(memory) // 5
    print(f"{len(memory)} answers, {max(memory[: 2 * fifth]):,} to {max(memory[-fifth:]):,} bytes")
    assert max(memory[-fifth:]) < 1.05 * max(memory[: 2 * fifth])


def test_a_client_that_leaves_frees_its_slot(server):
    for _ in range(8):
        events = server.stream(text_with(FACT), max_tokens=4000, ignore_eos=True)
        next(events)
        events.close()
    deadline = time.monotonic() + 20
    while server.n_busy() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.n_busy() == 0
    assert server.say(PROMPT).startswith(ANSWER)


def test_a_full_context(server):
    """The answer ends; local heads cannot be shifted."""
    with Server("-c", 2048, "--parallel", 1, "--", "--context-shift") as small:
        options = {"max_tokens": 4000, "ignore_eos": True}
        answer = small.chat(text_with(FACT), **options)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["total_tokens"] == 2048
        assert small.say(PROMPT).startswith(ANSWER)


def test_speculative_decoding(server):
    """Rejected drafts are taken back, also across a fold."""
    options = ("-md", DEFAULT_MODEL, "--spec-type", "draft-simple", "--spec-draft-n-max", 16)
    with Server("-c", 8192, "--parallel", 2, "--", *options) as drafting:
        n_rejected = 0
        for n in range(300, 1500, 200):
            text = text_with(FACT, n, n) + QUESTION
            request = {"ignore_eos": True, "max_tokens": 300}
            answer = drafting.chat(text, **request)
            assert answer["choices"] == server.chat(text, **request)["choices"]
            n_rejected += answer["timings"]["draft_n"] - answer["timings"]["draft_n_accepted"]
        assert n_rejected > 0


def test_saved_slots(server, tmp_path):
    text = text_with(FACT, 1500) + QUESTION
    with Server("-c", 8192, "--parallel", 2, "--", "--slot-save-path", f"{tmp_path}/") as saving:
        answer = saving.say(text, id_slot=0)
        assert saving.post("/slots/0?action=save", {"filename": "a.bin"})[0] == 200
        assert saving.post("/slots/1?action=restore", {"filename": "a.bin"})[0] == 200
        again = saving.chat(text, id_slot=1)
        assert again["choices"][0]["message"]["content"] == answer
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 1000
        for name in ("../a.bin", "/etc/passwd", "a/b", "..", "a\0b", ""):
            status, error = saving.post("/slots/0?action=save", {"filename": name})
            assert status == 400, (name, error)
        (tmp_path / "b.bin").write_bytes(b"not a state" * 1000)
        assert saving.post("/slots/0?action=restore", {"filename": "b.bin"})[0] == 400
        assert saving.say(text, id_slot=0) == answer


# hostile requests


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:8080"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost"}, 200),
        ({"Host": "LOCALHOST:1234"}, 200),
        ({"Host": "127.0.0.1:1"}, 200),
        ({"Host": "[::1]:1"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Origin": "http://localhost.evil.example"}, 403),
    ],
)
def test_other_sites(server, headers, status):
    for path in ("/", "/props"):
        assert server.request("GET", path, headers=headers)[0] == status, path
    found, answer = server.request("POST", "/tokenize", {"content": "a"}, headers)
    assert found == status
    assert status == 200 or answer["error"]["type"] == "permission_error"


def test_preflight_requests(server):
    """The answer is the one of llama.cpp's server: no other site is allowed."""
    for origin, allowed in ("https://evil.example", None), ("http://localhost:3000",) * 2:
        connection = server.connect()
        connection.request("OPTIONS", "/v1/chat/completions", headers={"Origin": origin})
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b"")
        assert response.headers["Access-Control-Allow-Origin"] == allowed
        connection.close()


def test_bodies(server):
    url = "/v1/chat/completions"
    for body in ("", "{", "[]", "null", "1", '{"messages": 1}', b"\xff\xfe", "[" * 100_000):
        status, _ = server.post(url, body)
        assert 400 <= status < 500 or status == 500, body
    try:
        assert server.post(url, b"a" * (100 << 20))[0] == 413
    except OSError:  # the server closes the connection while the client still sends
        pass
    assert server.say(PROMPT).startswith(ANSWER)


def test_many_connections(server):
    host, port = server.address.split(":")
    held = [socket.create_connection((host, int(port)), 20) for _ in range(1000)]
    for connection in held[::2]:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
    assert server.say(PROMPT).startswith(ANSWER)
    for connection in held:
        connection.close()
    assert server.say(PROMPT).startswith(ANSWER)


def test_api_key():
    with Server("--api-key", "secret", "-c", 1024, "--parallel", 1) as server:
        for headers in ({}, {"Authorization": "Bearer other"}, {"X-Api-Key": "secre"}):
            assert server.request("POST", "/v1/chat/completions", "{}", headers)[0] == 401
        key = {"Authorization": "Bearer secret", "Host": "name.example"}
        body = chat_request(PROMPT)
        assert server.request("POST", "/v1/chat/completions", body, key)[0] == 200
        assert server.get("/health")[0] == 200
        listed = subprocess.run(["ps", "-o", "args=", str(server.process.pid)], capture_output=True)
        assert b"secret" not in listed.stdout


# the process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_server(number):
    server = Server("-c", 4096, "--parallel", 1)
    events = server.stream(text_with(FACT), max_tokens=4000, ignore_eos=True)
    next(events)
    assert server.end(number) == 0, server.stderr()
    with pytest.raises(OSError):
        server.get("/health")


def test_a_signal_that_comes_twice():
    """As Ctrl-C does, from the terminal and from a parent process."""
    server = Server("-c", 4096, "--parallel", 1)
    for _ in range(3):
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    assert server.process.wait(20) == 0, server.stderr()
    assert "Thread" not in server.stderr()


def test_the_full_cache():
    with Server("--no-razor", "-c", 8192, "--parallel", 2) as server:
        assert re.search(r"2 slots of 8192 tokens, KV cache 96\.0 MiB \(full\)$", server.line)
        assert server.get("/props")[1]["razor"]["active"] is False
        assert server.say(PROMPT).startswith(ANSWER)


def test_options_of_the_profile():
    """The budget and the types of local heads reach the server."""
    args = ("--budget", 0.5, "-ctlk", "q8_0", "-ctlv", "q8_0", "-c", 8192, "--parallel", 1)
    with Server(*args) as server:
        razor = server.get("/props")[1]["razor"]
        assert (razor["n_retrieval"], razor["n_local"]) == (12, 12)
        assert (razor["type_k"], razor["type_k_local"]) == ("f16", "q8_0")
        assert server.say(PROMPT).startswith(ANSWER)


def test_options_of_llama_server_that_change_the_cache():
    """The size of a full cache is not known then."""
    with Server("-c", 4096, "--parallel", 2, "--", "-c", 4096) as server:
        assert re.search(r": 2 slots of 2048 tokens, KV cache [0-9.]+ MiB$", server.line)
        assert "kv_bytes_full" not in server.get("/props")[1]["razor"]
        assert "razor:kv_bytes_full" not in server.get("/metrics")[1]


def test_unknown_options_of_llama_server():
    with pytest.raises(AssertionError, match="invalid argument: --nonsense"):
        Server("-c", 1024, "--", "--nonsense")
