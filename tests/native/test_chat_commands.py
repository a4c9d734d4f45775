"""The slash commands of a chat, on a scripted model; test_cli_chat_commands.py has a terminal."""

from __future__ import annotations

import random
from functools import partial

import pytest

from razor_local import ContextFullError, RazorError
from razor_local.chat import Chat, Sampling
from razor_local.cli.chat_commands import COMMANDS, parse
from tests.support.scripted_model import ScriptedModel, make, render, roles


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/help", ("help", "")),
        ("/? ", ("help", "")),
        ("/quit", ("exit", "")),
        ("/system", ("system", "")),
        ("/system You  know codes.", ("system", "You  know codes.")),
        ("/system\n\nYou know codes.\nAnd words.\n", ("system", "You know codes.\nAnd words.")),
        ("/etc", ("etc", "")),
        ("/usr/bin/ls is a path", None),
        ("/exit code 3", None),
        ("/clear it all up", None),
        ("/etc holds files", None),
        (" /help", None),
        ("/help\n/clear", None),
        ("//", None),
        ("/", None),
        ("", None),
        ("hello", None),
    ],
)
def test_what_is_a_command(text, expected):
    assert parse(text) == expected


def test_help_fits_a_terminal_and_names_every_command():
    width = max(len(command.usage) for command in COMMANDS.values())
    for name, command in COMMANDS.items():
        assert command.usage.split()[0] == f"/{name}"
        assert width + 2 + len(command.help) <= 79, command.usage


# -- /undo, /regen, /edit


def cached(model, chat):
    """What the cache holds of the conversation: the whole of it, up to its last token at least."""
    n = chat.n_used - 1
    return n > 0 and model.cache[:n] == chat._known_now().tokens[:n]


def test_undo_takes_back_the_last_message_and_its_answer():
    model, chat = make(["one\0", "two\0", "three\0"], system="s")
    list(chat.say("first"))
    n_used = chat.n_used
    list(chat.say("second"))
    assert chat.undo() == "second" and chat.n_used == n_used
    assert roles(chat) == [("system", "s"), ("user", "first"), ("assistant", "one")]
    assert "".join(chat.say("third")) == "three"
    assert chat.last.n_reused == n_used + len("><u:") and cached(model, chat)
    assert chat.undo() == "third" and chat.undo() == "first"
    assert roles(chat) == [("system", "s")] and chat.n_used == 0
    assert chat.undo() is None and roles(chat) == [("system", "s")]


def test_another_answer_has_another_seed_and_reads_nothing_again():
    model, chat = make(["one\0", "two\0", "three\0"], sampling=Sampling(seed=5))
    list(chat.say("x"))
    assert "".join(chat.regenerate()) == "two" and model.sampling["seed"] == 6
    assert roles(chat) == [("user", "x"), ("assistant", "two")]
    assert chat.last.n_evaluated == 1 and cached(model, chat)
    assert "".join(chat.regenerate()) == "three"
    assert roles(chat) == [("user", "x"), ("assistant", "three")]


def test_an_edited_message_replaces_the_last_one():
    model, chat = make(["one\0", "two\0", "three\0"])
    list(chat.say("first"))
    list(chat.say("a long second message"))
    assert "".join(chat.edit("a long third message")) == "three"
    expected = [("user", "first"), ("assistant", "one"), ("user", "a long third message")]
    assert roles(chat) == [*expected, ("assistant", "three")]
    assert chat.last.n_reused == len("<u:first><a:one><u:a long ") and cached(model, chat)


def test_without_a_message_there_is_nothing_to_answer_again():
    _, chat = make([], system="s")
    for begin in (chat.regenerate, lambda: chat.edit("x")):
        with pytest.raises(RazorError, match="there is no message yet"):
            begin()
    assert roles(chat) == [("system", "s")]


@pytest.mark.parametrize(
    ("begin", "how"),
    [
        ("edit", "stopped"),
        ("edit", "interrupted"),
        ("edit", "too long"),
        ("regenerate", "interrupted"),
        ("regenerate", "too long"),
    ],
)
def test_an_answer_that_never_begins_replaces_nothing(begin, how):
    model, chat = make(["one\0", "two\0", "three\0"], max_tokens=None)
    list(chat.say("first"))
    list(chat.say("second"))
    before, n_used = roles(chat), chat.n_used
    again = chat.regenerate if begin == "regenerate" else partial(chat.edit, "other")
    if how == "stopped":
        assert list(again(stop=lambda: True)) == []
    elif how == "interrupted":

        def interrupt(*_):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            list(again(interrupt))
    else:
        chat.max_tokens = 199
        with pytest.raises(ContextFullError):
            list(again())
        chat.max_tokens = None
    assert roles(chat) == before and chat.n_used == n_used
    assert "".join(chat.say("third")) == "three"
    assert roles(chat)[:-2] == before and cached(model, chat)


class Merging(ScriptedModel):
    """Reads "ab" as one token, which its answers never have: tokens 300 and b"ab" are one text."""

    def tokenize(self, text, add_bos=True, special=False):
        parts = text.split(b"ab")
        return [t for i, part in enumerate(parts) for t in ([300] if i else []) + list(part)]

    def piece(self, token):
        return b"ab" if token == 300 else super().piece(token)


def test_answers_keep_the_tokens_that_the_model_produced():
    model = Merging([b"ab1\0", b"ab2\0", b"ab3\0", b"ab4\0"])
    chat = Chat(model, render)
    for text in ("one", "two", "three"):
        list(chat.say(text))
    n_cached = len(model.cache)
    assert 300 not in model.cache
    list(chat.regenerate())
    assert chat.last.n_evaluated == 1 and chat.last.n_prompt + 3 == n_cached
    chat.undo()
    model.answers = [b"ab5\0"]
    list(chat.say("four"))
    assert 300 not in model.cache and chat.last.n_evaluated == len("four><a:")
    assert model.cache == list(b"<u:one><a:ab1><u:two><a:ab2><u:four><a:ab5")


def test_answers_that_were_tokenized_again_keep_those_tokens():
    """After another system prompt the conversation is read again, as the tokenizer has it."""
    model = Merging([b"ab1\0", b"ab2\0", b"ab3\0", b"ab4\0"])
    chat = Chat(model, render)
    list(chat.say("one"))
    chat.set_system("s")
    list(chat.say("two"))
    assert model.cache.count(300) == 1
    list(chat.regenerate())
    assert chat.last.n_evaluated == 1
    chat.undo()
    assert chat.n_used == len(b"<s:s><u:one><a:*1><a:")  # nothing was kept of it: as it is rendered
    list(chat.say("three"))
    assert chat.last.n_reused == len("<s:s><u:one><a:*1><u:t")


def test_random_turns_leave_a_conversation_that_a_fresh_cache_would_have():
    rng = random.Random(0)
    model, chat = make([], n_ctx=2000)
    for turn in range(300):
        model.answers = [f"{rng.choice('abc') * rng.randint(0, 5)}{turn}\0".encode()]
        stop_at = rng.choice([None, None, None, 0, 1])
        n_before = len(chat.messages)
        action = rng.choice(["say", "say", "say", "regenerate", "edit", "undo", "system", "clear"])
        if chat.last_message is None and action in ("regenerate", "edit"):
            continue
        if action == "undo":
            chat.undo()
        elif action == "system":
            chat.set_system(rng.choice([None, "s", "t"]))
        elif action == "clear" and turn % 10 == 0:
            chat.clear()
        else:
            text = [] if action == "regenerate" else [f"{rng.choice('xyz') * rng.randint(1, 9)}"]
            begin = {"regenerate": chat.regenerate, "edit": chat.edit}.get(action, chat.say)
            said = []
            try:
                for piece in begin(*text, stop=lambda at=stop_at, said=said: len(said) == at):
                    said.append(piece)
            except ContextFullError:
                chat.clear()
            if chat.last.n_answer:
                assert (
                    model.cache[: chat.n_used]
                    == list(render(chat.messages)[:-4].encode())[: len(model.cache)]
                )
                assert cached(model, chat)
        said = [m["role"] for m in chat.messages if m["role"] != "system"]
        assert said == ["user", "assistant"] * (len(said) // 2), n_before
