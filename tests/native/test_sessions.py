"""Saved conversations: exact continuation, kills at any moment, and what is refused."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import struct
import subprocess
import sys
import time

import pytest

from razor_local import Llama, RazorError, StateError, sessions
from razor_local.chat import Chat, Sampling, chat_template
from razor_local.cli.params import DEFAULT_MODEL
from tests.support import embedded_model
from tests.support.scripted_model import ScriptedModel, make, render, roles
from tests.support.texts import FACT, QUESTION, text_with

TEXT = f"{text_with(FACT)}\n\n{QUESTION}"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder of the sessions, empty."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data" / "razor_local" / "sessions"


@pytest.fixture(scope="module")
def llama():
    model = Llama(DEFAULT_MODEL, n_ctx=2048)
    yield model
    model.close()


def talk(llama, **kwargs):
    return Chat(llama, chat_template(llama), **{"sampling": Sampling(temp=0), **kwargs})


# -- exact continuation

# temperatures so hot that every seed and every bit of the logits counts
CHILD = f"""
import hashlib, json, os, signal, sys
from razor_local import Llama, sessions
from razor_local.chat import Chat, Sampling, chat_template
options, actions = json.loads(sys.argv[1])
llama = Llama({str(DEFAULT_MODEL)!r}, n_ctx=2048, **options)
sampling = Sampling(temp=5.0, top_k=0, top_p=1.0, min_p=0.0, seed=3)
chat = Chat(llama, chat_template(llama), sampling=sampling, max_tokens=30)
for action in actions:
    if action == "save":
        sessions.save("work", llama, chat)
    elif action == "load":
        chat = Chat(llama, chat_template(llama), max_tokens=30, sampling=Sampling(
            temp=5.0, top_k=0, top_p=1.0, min_p=0.0))
        sessions.load("work", llama, chat)
    elif action == "undo":
        chat.undo()
    elif action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "regenerate":
        list(chat.regenerate())
    else:
        list(chat.say(action))
logits = hashlib.sha256(llama._last_logits().tobytes()).hexdigest()
print(json.dumps([chat.messages, logits, chat.last.n_reused, chat.last.n_evaluated, chat.n_used]))
"""


def run(options, *actions):
    command = [sys.executable, "-c", CHILD, json.dumps([options, actions])]
    done = subprocess.run(command, stdout=subprocess.PIPE)
    if actions[-1] == "kill":
        assert done.returncode == -signal.SIGKILL
        return None
    assert done.returncode == 0
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "options", [{}, {"type_k": "q8_0", "type_v": "q8_0"}, {"razor": False}], ids=str
)
def test_a_killed_process_is_continued_bit_for_bit(options):
    first = ["One. " + TEXT, "Two. " + TEXT[:900]]
    expected = run(options, *first, "Three.")
    run(options, *first, "save", "kill")
    found = run(options, "load", "Three.")
    assert found == expected
    assert found[3] < 40, "more than the new message was evaluated"


def test_going_back_after_a_load_reuses_as_much_as_without(llama):
    first = ["One. " + TEXT, "Two.", "Three."]
    expected = run({}, *first, "undo", "undo", "Four.", "regenerate")
    run({}, *first, "save", "kill")
    assert run({}, "load", "undo", "undo", "Four.", "regenerate") == expected


# answers that differ in length, saved over and over until the process is killed
SAVER = f"""
import sys
from razor_local import Llama, sessions
from razor_local.chat import Chat, chat_template
llama = Llama({str(DEFAULT_MODEL)!r}, n_ctx=2048)
chat = Chat(llama, chat_template(llama), max_tokens=1)
i = 0
while True:
    list(chat.say(f"Message {{i}}."))
    sessions.save("work", llama, chat)
    i += 1
    print(i, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_session(llama, folder):
    rng = random.Random(0)
    for _ in range(5):
        child = subprocess.Popen([sys.executable, "-c", SAVER], stdout=subprocess.PIPE)
        n_saved = int(child.stdout.readline())
        time.sleep(rng.uniform(0, 0.5))
        child.kill()
        n_saved = int((child.stdout.read().split() or [n_saved])[-1])
        child.wait()
        chat = talk(llama)
        session = sessions.load("work", llama, chat)
        n = len(chat.messages) // 2
        assert n - 1 <= n_saved <= n, "it is neither the last nor the one before"
        assert chat.last_message == f"Message {n - 1}." and session.n_tokens == llama.n_tokens
        list(chat.say("x"))
        assert chat.last.n_evaluated < 20
    left = {path.name for path in folder.iterdir()} - {"work.session"}
    assert all(name.startswith(".work.session.") and name.endswith(".part") for name in left)
    assert sessions.names() == ["work"]


# -- the file


def test_only_the_user_may_read_it_whatever_the_umask(llama, folder):
    chat = talk(llama)
    list(chat.say("hello"))
    before = os.umask(0)
    try:
        sessions.save("work", llama, chat)
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "work.session").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_what_is_saved_is_listed_and_removed(llama):
    assert sessions.names() == []
    chat = talk(llama)
    list(chat.say("hello"))
    for name in ("work", "Über uns 2.0", "a-b_c+d"):
        saved = sessions.save(name, llama, chat)
        assert sessions.read(name) == saved
    assert sessions.names() == ["a-b_c+d", "work", "Über uns 2.0"]
    assert saved.model == {"name": "razor-default", "file": DEFAULT_MODEL.name}
    assert saved.n_tokens == llama.n_tokens and abs(saved.saved - time.time()) < 60
    sessions.remove("work")
    with pytest.raises(
        RazorError, match=r"there is no session work; there are: a-b_c.d, Über uns 2.0$"
    ):
        sessions.remove("work")
    with pytest.raises(
        RazorError, match=r"there is no session work; there are: a-b_c.d, Über uns 2.0$"
    ):
        sessions.load("work", llama, chat)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", ".hidden", "a\0b", "x" * 61, "a\nb"]
)
def test_what_cannot_be_a_name_is_refused(llama, name):
    for function in (sessions.path_of, sessions.read, sessions.remove):
        with pytest.raises(RazorError, match="cannot be the name of a session: use up to 60"):
            function(name)


def test_a_full_disk_leaves_the_session_as_it_was(llama, folder, monkeypatch):
    chat = talk(llama)
    list(chat.say("hello"))
    sessions.save("work", llama, chat)
    before = (folder / "work.session").read_bytes()
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    with pytest.raises(RazorError, match="has 1 KiB free, work.session needs .* KiB"):
        sessions.save("work", llama, chat)
    assert (folder / "work.session").read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["work.session"]


# -- what is refused


def damage(data: bytes):
    """What is wrong, and the damaged file; head, messages, tokens and state in turn."""
    magic, n_json, n_tokens, n_state, _ = struct.unpack("<8sQIQ16s", data[:44])
    tokens, state = 44 + n_json, 44 + n_json + 4 * n_tokens
    for what, at in {
        "magic": 3, "sizes": 10, "digest": 40, "first message": 60, "last message": tokens - 3,
        "first token": tokens, "last token": state - 4, "state": state + 100,
        "middle of the state": (state + len(data)) // 2, "seal": len(data) - 5,
    }.items():  # fmt: skip
        yield what, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    yield "empty", b""
    yield "head alone", data[:44]
    yield "cut off", data[:-1]
    yield "more at the end", data + b"\0"
    yield "one token less", data[:16] + struct.pack("<I", n_tokens - 1) + data[20:]


def test_damaged_files_are_refused_and_nothing_is_loaded(llama, folder):
    chat = talk(llama)
    list(chat.say(TEXT))
    sessions.save("work", llama, chat)
    data = (folder / "work.session").read_bytes()
    chat = talk(llama)
    list(chat.say(f"Another fact. {FACT}"))
    before, n_cached = roles(chat), llama.n_tokens
    for what, damaged in damage(data):
        (folder / "work.session").write_bytes(damaged)
        with pytest.raises(RazorError) as caught:
            sessions.load("work", llama, chat)
        assert "session work" in str(caught.value) and "damaged" in str(caught.value), what
        assert "session work the state" not in str(caught.value), what
        assert roles(chat) == before and llama.n_tokens == n_cached, what
    assert "48213" in "".join(chat.say(QUESTION)) and chat.last.n_reused >= n_cached - 1
    # the messages have a digest of their own
    (folder / "work.session").write_bytes(data[:-5] + b"damag")
    assert sessions.load("work", llama, chat, messages_only=True).name == "work"
    assert "48213" in "".join(chat.say(QUESTION))


def test_a_named_pipe_is_refused(llama, folder):
    folder.mkdir(parents=True)
    os.mkfifo(folder / "work.session")
    with pytest.raises(RazorError, match="work.session is a named pipe, expected a saved session"):
        sessions.load("work", llama, talk(llama))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"n_ctx": 4096}, r"plan \(window 256, here 512, context 2048, here 4096\)"),
        ({"window": 300}, r"plan \(window 256, here 300\)"),
        ({"sink_tokens": 0}, r"plan \(sink tokens 4, here 0\)"),
        ({"compensation": False}, r"plan \(compensation on, here off\)"),
        ({"budget": 0.34}, r"plan \(retrieval heads 4, here 9\)"),
        ({"type_k": "q8_0"}, r"plan \(type of keys f16, here q8_0\)"),
        (
            {"type_v_local": "q4_0"},
            r"local keys same as for other heads, here f16, type of local values",
        ),
        ({"razor": False}, r"plan \(razor on, here off\)"),
        ({"rope_freq_base": 20000.0}, "other weights of razor-default .* another RoPE"),
    ],
    ids=str,
)
def test_another_plan_is_refused_by_name(llama, options, expected):
    chat = talk(llama)
    list(chat.say(TEXT))
    sessions.save("work", llama, chat)
    other = Llama(DEFAULT_MODEL, **{"n_ctx": 2048, **options})
    chat = talk(other)
    list(chat.say("hello"))
    before = roles(chat)
    with pytest.raises(StateError, match=f"^session work was saved with .*{expected}") as caught:
        sessions.load("work", other, chat)
    assert "or read its messages again with '/load work --messages'" in str(caught.value)
    assert roles(chat) == before
    list(chat.say("hello"))
    sessions.load("work", other, chat, messages_only=True)
    assert chat.last_message == TEXT
    assert "".join(chat.say(QUESTION)) and chat.last.n_reused < 20


def test_another_model_is_refused_by_name(llama, tmp_path):
    chat = talk(llama)
    list(chat.say(TEXT))
    sessions.save("work", llama, chat)
    other = Llama(embedded_model.write_random(tmp_path / "other.gguf"), n_ctx=2048)
    with pytest.raises(
        StateError, match=r"with razor-default \(razor-default.gguf\), this is razor"
    ):
        sessions.load("work", other, talk(other))


def test_a_renamed_model_is_the_same(llama, tmp_path):
    import shutil

    chat = talk(llama)
    list(chat.say(TEXT))
    sessions.save("work", llama, chat)
    other = Llama(shutil.copy(DEFAULT_MODEL, tmp_path / "other.gguf"), n_ctx=2048)
    chat = talk(other)
    sessions.load("work", other, chat)
    assert "48213" in "".join(chat.say(QUESTION)) and chat.last.n_evaluated < 40


# -- Chat.dump() and restore(), on the scripted model


def test_a_dumped_conversation_goes_on():
    model, chat = make(["one\0", "two\0"], system="s", sampling=Sampling(seed=7))
    list(chat.say("first"))
    dumped = json.loads(json.dumps(chat.dump()))
    model.answers = [b"two\0"]
    other = Chat(model, render, sampling=Sampling(seed=100))
    other.restore(dumped)
    assert roles(other) == roles(chat) and other.n_used == chat.n_used
    list(other.say("second"))
    assert other.last.n_evaluated == len("><u:second><a:") and model.sampling["seed"] == 8


MESSAGES = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


@pytest.mark.parametrize(
    "dumped",
    [
        {},
        [],
        {"messages": [], "seed": None, "n_turns": 0},
        {"messages": 5, "seed": 0, "n_turns": 0},
        {"messages": [5], "seed": 0, "n_turns": 0},
        {"messages": [{"role": "user"}], "seed": 0, "n_turns": 0},
        {"messages": [{"role": "user", "content": None}], "seed": 0, "n_turns": 0},
        {"messages": MESSAGES[:1], "seed": 0, "n_turns": 0},
        {"messages": MESSAGES[::-1], "seed": 0, "n_turns": 0},
        {"messages": [*MESSAGES, {"role": "system", "content": "x"}], "seed": 0, "n_turns": 0},
        {"messages": [MESSAGES[0], MESSAGES[1] | {"tokens": ["x"]}], "seed": 0, "n_turns": 0},
        {"messages": [MESSAGES[0], MESSAGES[1] | {"tokens": [300]}], "seed": 0, "n_turns": 0},
    ],
    ids=str,
)
def test_what_is_no_conversation_is_refused(dumped):
    class Vocabulary(ScriptedModel):
        def piece(self, token):
            if not 0 <= token < 256:
                raise RazorError(f"there is no token {token}")
            return bytes([token])

    chat = Chat(Vocabulary([b"ok\0"]), render, system="s")
    list(chat.say("x"))
    before = roles(chat)
    with pytest.raises(RazorError):
        chat.restore(dumped)
    assert roles(chat) == before
