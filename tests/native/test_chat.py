"""The chat engine: on a scripted model where timing matters, on the built-in model otherwise."""

from __future__ import annotations

import random
from contextlib import closing

import pytest

from razor_local import ContextFullError, Llama, RazorError
from razor_local.chat import Chat, Sampling, chat_template
from razor_local.cli.chat import DEFAULT_MODEL
from tests.support.embedded_model import write_without_template
from tests.support.scripted_model import ScriptedModel, make, render, roles
from tests.support.texts import FACT, QUESTION, text_with

GREEDY = Sampling(temp=0)


def test_a_turn_streams_and_is_remembered():
    model, chat = make(["hello\0", "again\0"], system="be brief")
    assert list(chat.say("hi")) == list("hello")
    assert roles(chat) == [("system", "be brief"), ("user", "hi"), ("assistant", "hello")]
    assert chat.last.ended == "end" and chat.last.n_answer == 5 and chat.last.n_reused == 0
    assert "".join(chat.say("more")) == "again"
    # everything up to the first answer was in the cache: "<s:be brief><u:hi><a:hello"
    assert chat.last.n_reused == len("<s:be brief><u:hi><a:hello")
    assert chat.last.n_evaluated == len("><u:more><a:")
    assert chat.n_used == len(render(chat.messages).removesuffix("><a:"))


def test_characters_arrive_whole():
    answer = "häß 漢字 🙂\0".encode()
    _, chat = make([answer])
    pieces = list(chat.say("x"))
    assert "".join(pieces) == "häß 漢字 🙂" and "🙂" in pieces
    assert not any("�" in piece for piece in pieces)


def test_an_unfinished_character_at_the_end_is_shown_as_such():
    model, chat = make(["é".encode()[:1] + b"\0", "ok\0"])
    assert "".join(chat.say("x")) == "�"
    assert "".join(chat.say("y")) == "ok"
    assert roles(chat)[1] == ("assistant", "�")


def test_max_tokens_and_reserve():
    _, chat = make(["abcdef\0"], max_tokens=3)
    assert chat.reserve == 3
    assert "".join(chat.say("x")) == "abc" and chat.last.ended == "length"


def test_a_prompt_that_does_not_fit_is_refused_with_numbers_and_nothing_changes():
    model, chat = make(["ok\0", "ok\0"], n_ctx=64)
    list(chat.say("fits"))
    before, cache = roles(chat), list(model.cache)
    with pytest.raises(ContextFullError, match=r"has \d+ tokens and 4 are kept .* holds 64"):
        list(chat.say("x" * 60))
    assert roles(chat) == before and model.cache == cache
    assert "".join(chat.say("y")) == "ok"


@pytest.mark.parametrize("n_prompt", [56, 59, 60])
def test_the_last_token_that_fits_is_used(n_prompt):
    model, chat = make(["a" * 100], n_ctx=64)
    text = "x" * (n_prompt - len("<u:><a:"))
    assert len("".join(chat.say(text))) == 64 - n_prompt
    assert chat.last.ended == "context" and chat.n_used == 64
    with pytest.raises(ContextFullError):
        list(chat.say("y"))
    chat.clear()
    with pytest.raises(ContextFullError, match="has 61 tokens and 4 are kept"):
        list(chat.say("x" * (61 - len("<u:><a:"))))
    assert chat.n_used == 0 and chat.messages == []


def test_a_refusal_proposes_no_context_beyond_the_training():
    model, chat = make([], n_ctx=256)
    with pytest.raises(ContextFullError, match="or use n_ctx=1024 or more$"):
        list(chat.say("x" * 1000))
    with pytest.raises(ContextFullError, match="holds 256: shorten it, or clear the conversation$"):
        list(chat.say("x" * 1100))


LETTERS = "".join(map(chr, range(48, 48 + 65)))


@pytest.mark.parametrize(
    ("period", "length"), [("7", 256), ("ab", 256), (LETTERS[:16], 256), (LETTERS[:64], 1024)]
)
def test_an_answer_that_repeats_itself_without_end_is_ended(period, length):
    model, chat = make(["Well: " + period * 300, "ok\0"], n_ctx=4096)
    said = "".join(chat.say("x"))
    assert chat.last.ended == "loop" and said == ("Well: " + period * 300)[: 6 + length]
    assert roles(chat)[-1] == ("assistant", said) and "".join(chat.say("y")) == "ok"
    _, chat = make(["Well: " + period * 300], n_ctx=4096, end_loops=False, max_tokens=300)
    assert len("".join(chat.say("x"))) == 300 and chat.last.ended == "length"


@pytest.mark.parametrize(
    "answer",
    [
        "-" * 255 + "\n" + "-" * 255,
        "".join(f"| {i:4} | {i * i:8} |\n" for i in range(200)),
        LETTERS * 40,
        f"{LETTERS[:32]}\n" * 15,
        ("0," * 100 + "\n") * 10,
    ],
)
def test_rows_and_tables_are_not_loops(answer):
    _, chat = make([f"{answer}\0"], n_ctx=8192)
    assert "".join(chat.say("x")) == answer and chat.last.ended == "end"


def test_stopping_while_the_prompt_is_read_takes_the_message_back():
    model, chat = make(["one\0", "two\0"])
    list(chat.say("first"))
    before = roles(chat)
    assert list(chat.say("second", stop=lambda: len(model.cache) > 5)) == []
    assert chat.last.ended == "stopped" and chat.last.n_answer == 0
    assert roles(chat) == before
    assert "".join(chat.say("second")) == "two"


def test_stopping_an_answer_keeps_what_was_said():
    model, chat = make(["abcdef\0", "ok\0"])
    said: list[str] = []
    for piece in chat.say("x", stop=lambda: said == ["a", "b", "c"]):
        said.append(piece)
    assert said == ["a", "b", "c"] and chat.last.ended == "stopped"
    assert roles(chat)[-1] == ("assistant", "abc")
    assert "".join(chat.say("go on")) == "ok"
    assert roles(chat)[-2:] == [("user", "go on"), ("assistant", "ok")]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("when", ["prefill", "answer", "closed"])
def test_an_exception_anywhere_leaves_a_valid_conversation(when, error):
    model, chat = make(["abcdef\0", "ok\0"])

    def progress(done, total, label):
        if when == "prefill" and done == 3:
            raise error

    turn = chat.say("x", progress)
    if when == "closed":
        next(turn)
        turn.close()
    elif when == "prefill":
        with pytest.raises(error):
            next(turn)
    else:
        next(turn)
        with pytest.raises(error):
            turn.throw(error)
    expected = [] if when == "prefill" else [("user", "x"), ("assistant", "a")]
    assert roles(chat) == expected
    model.answers = [list(b"ok\0")]
    assert "".join(chat.say("y")) == "ok"
    assert roles(chat) == [*expected, ("user", "y"), ("assistant", "ok")]


def test_system_prompt_is_replaced_and_survives_clear():
    _, chat = make(["ok\0"] * 2, system="one")
    list(chat.say("x"))
    chat.set_system("two")
    assert chat.system == "two" and roles(chat)[0] == ("system", "two") and len(roles(chat)) == 3
    chat.clear()
    assert roles(chat) == [("system", "two")]
    chat.set_system(None)
    assert chat.system is None and chat.messages == []


def test_sampling_reaches_the_model_and_seeds_differ_by_turn():
    sampling = Sampling(temp=0.5, top_k=7, top_p=0.9, min_p=0.1, repeat_penalty=1.1, seed=0)
    model, chat = make(["ok\0"] * 2, sampling=sampling)
    list(chat.say("x"))
    values = {"temp": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "repeat_penalty": 1.1}
    assert model.sampling == values | {"seed": 0}
    list(chat.say("x"))
    assert model.sampling["seed"] == 1


def test_without_turn_markers_the_whole_conversation_is_tokenized_again():
    class Merging(ScriptedModel):
        """Has a token for "k" at the end of a line, as word-piece tokenizers would."""

        def tokenize(self, text, add_bos=True, special=False):
            parts = text.split(b"k\n")
            return [t for i, part in enumerate(parts) for t in ([300] if i else []) + list(part)]

    def plain(messages):
        return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant: "

    model = Merging([b"ok\0", b"ok\0"])
    chat = Chat(model, plain)
    list(chat.say("x"))
    list(chat.say("y"))
    whole = "user: x\nassistant: ok\nuser: y\nassistant: "
    assert model.cache[: chat.last.n_prompt] == model.tokenize(whole.encode())
    assert 300 in model.cache


def test_a_leading_space_of_sentencepiece_is_not_part_of_the_answer():
    class Words(ScriptedModel):
        def piece(self, token):
            return b" Hi" if token == 200 else bytes([token])

    model = Words([bytes([200]) + b" you\0", b"ok\0"])
    chat = Chat(model, render)
    assert "".join(chat.say("x")) == "Hi you"


# -- the real model --


@pytest.fixture(scope="module")
def llama():
    model = Llama(DEFAULT_MODEL, n_ctx=2048)
    yield model
    model.close()


def test_the_built_in_model_finds_a_fact_with_razor_active(llama):
    chat = Chat(llama, sampling=GREEDY)
    seen = []
    answer = "".join(chat.say(f"{text_with(FACT)}\n\n{QUESTION}", lambda *n: seen.append(n)))
    assert "48213" in answer and chat.last.ended == "end"
    assert llama.memory().active and llama.stats().n_folded > 0
    assert seen[-1] == (chat.last.n_prompt, chat.last.n_prompt, "reading the prompt")
    # the second turn evaluates its own tokens alone
    answer = "".join(chat.say(QUESTION))
    assert "48213" in answer
    assert chat.last.n_reused >= chat.last.n_prompt - 40 and chat.last.n_evaluated <= 40


def test_a_model_without_a_chat_template(tmp_path):
    with closing(Llama(write_without_template(tmp_path / "base.gguf"), n_ctx=512)) as base:
        with pytest.raises(RazorError, match="has no chat template"):
            Chat(base)
        assert "".join(Chat(base, None, max_tokens=2).say("The code")) != ""


def test_cached_turns_answer_as_a_fresh_context_would(llama):
    """Tokens that the cache reuses must be the conversation, after stops and clears too."""
    chat = Chat(llama, chat_template(llama), sampling=GREEDY, max_tokens=12)
    rng = random.Random(3)
    for turn in range(8):
        if turn == 4:
            chat.clear()
        elif turn == 6:
            chat.set_system("You answer questions.")
        stop_at, said = rng.choice([None, None, 2, 5]), []
        text = text_with(FACT, rng.randint(10, 120), turn)
        for piece in chat.say(text, stop=lambda at=stop_at, said=said: len(said) == at):
            said.append(piece)
    tokens = chat._known.tokens
    llama.prefill(tokens)
    reused = llama.stats()
    again = [token for token, _ in zip(llama.generate(tokens, temp=0), range(8), strict=False)]
    llama.reset()
    assert llama.prefill(tokens).n_reused == 0
    fresh = [token for token, _ in zip(llama.generate(tokens, temp=0), range(8), strict=False)]
    assert again == fresh
    assert reused.n_tokens == len(tokens)


def test_stop_inside_the_computation_of_a_prompt(llama, monkeypatch):
    chat = Chat(llama, chat_template(llama), sampling=GREEDY)
    llama.reset()
    calls = iter(range(700))
    text = f"{text_with(FACT)}\n\n{QUESTION}"
    assert list(chat.say(text, stop=lambda: next(calls, None) is None)) == []
    assert chat.last.ended == "stopped" and chat.messages == []
    assert llama.n_tokens == 0, "no layer but the last one would know all of a part"
    assert "48213" in "".join(chat.say(text))


def test_a_long_prompt_is_refused_with_the_size_that_would_hold_it(llama):
    chat = Chat(llama, chat_template(llama))
    with pytest.raises(ContextFullError, match="context holds 2048: .* or use n_ctx=") as caught:
        list(chat.say(text_with(FACT, 5000)))
    needed = int(str(caught.value).rsplit("n_ctx=", 1)[1].split()[0])
    assert needed > 2048 and needed % 256 == 0


def test_an_answer_ends_where_the_context_ends(llama):
    chat = Chat(llama, chat_template(llama), sampling=Sampling(temp=0), max_tokens=None)
    n_words = 400
    while True:  # the longest prompt that leaves just the reserve
        rendered = chat._render([{"role": "user", "content": text_with(FACT, n_words + 20)}])
        if len(chat._tokenize(rendered)) + chat.reserve > llama.n_ctx():
            break
        n_words += 20
    original = llama.is_end
    llama.is_end = lambda token: False
    try:
        list(chat.say(text_with(FACT, n_words)))
    finally:
        llama.is_end = original
    assert chat.last.ended == "context"
    assert chat.last.n_prompt + chat.last.n_answer == llama.n_ctx() == chat.n_used
    with pytest.raises(ContextFullError):
        list(chat.say("more"))
    chat.clear()
    assert "48213" in "".join(chat.say(f"{text_with(FACT)}\n\n{QUESTION}"))


def test_the_same_seed_gives_the_same_conversation(llama):
    def run(seed):
        # so hot that it has a choice: it is very sure of its greeting
        sampling = Sampling(temp=5.0, top_p=1.0, min_p=0.0, seed=seed)
        chat = Chat(llama, chat_template(llama), sampling=sampling, max_tokens=20)
        return ["".join(chat.say(text)) for text in ("one", "two")]

    assert run(0) == run(0) == run(0)
    assert run(1) != run(0)


def test_templates_that_fail_are_one_sentence(llama, monkeypatch):
    from llama_cpp import llama_cpp as C

    def use(template):
        monkeypatch.setattr(C, "llama_model_chat_template", lambda *_: template)
        return chat_template(llama)

    with pytest.raises(RazorError, match="has no chat template: it is not a chat model"):
        use(None)
    with pytest.raises(RazorError, match="chat template is malformed: Expected an expression"):
        use(b"{% for %}")
    refuses = use(b"{{ raise_exception('no system role') }}")
    with pytest.raises(RazorError, match="refuses this: no system role"):
        refuses([{"role": "user", "content": "x"}])
    with pytest.raises(RazorError, match="refuses this"):
        use(b"{{ messages[7].content }}")([])


def test_random_turns(capfd):
    """Run tests/fuzz/chat.py for a few seconds."""
    from tests.fuzz import chat

    report = chat.run(DEFAULT_MODEL, seconds=600, seed=1, n_ctx=4096, turns=30, max_growth=0.1)
    assert report.compared >= 10 and len(report.done) > 5, report


def test_a_wrong_answer_is_noticed(monkeypatch):
    from tests.fuzz import chat

    generate = Llama._UNGUARDED["generate"]

    def wrong(llama, tokens, **options):
        for i, token in enumerate(generate(llama, tokens, **options)):
            yield token + 1 if i == 4 else token

    monkeypatch.setitem(Llama._UNGUARDED, "generate", wrong)
    with pytest.raises(chat.Finding, match="a fresh context gives"):
        chat.run(DEFAULT_MODEL, seconds=600, seed=1, n_ctx=4096, turns=30, max_growth=0.1)
