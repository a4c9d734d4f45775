"""One request at a time, and nothing wrong after one that was left at any point."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
from contextlib import closing
from itertools import islice

import numpy as np
import pytest

from razor_local import ContextFullError, Llama, RazorError, StateError, evaluation
from razor_local.chat import Chat, Sampling, chat_template
from razor_local.cli.chat import DEFAULT_MODEL
from razor_local.json_schema import MAX_REPETITIONS
from razor_local.llama import llama_cpp
from tests.support.texts import FACT, QUESTION, text_with

PROMPT = f"{text_with(FACT, 12)}\n\n{QUESTION}"
MESSAGES = [{"role": "user", "content": PROMPT}]


@pytest.fixture
def llama():
    with closing(Llama(DEFAULT_MODEL, n_ctx=1024, n_threads=1, n_threads_batch=1)) as llama:
        yield llama


def answer(llama, prompt=PROMPT, n=8, **options):
    options = {"temperature": 0, "max_tokens": n} | options
    return llama.create_completion(prompt, **options)["choices"][0]["text"]


def text_of(chunks):
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


# -- who owns the model


def test_a_stream_owns_the_model_until_it_ends_or_is_closed(llama):
    expected = answer(llama)
    stream = llama.create_completion(PROMPT, temperature=0, max_tokens=8, stream=True)
    said = [next(stream)]
    for intrude in (
        lambda: answer(llama, "another one"),
        lambda: llama.eval([1]),
        lambda: next(llama.eval_logits([1])),
        lambda: llama.prefill([1, 2]),
        lambda: next(llama.generate([1])),
        lambda: llama.sample(temp=0),
        llama.reset,
        llama.save_state,
        lambda: llama.create_chat_completion(MESSAGES),
        lambda: next(Chat(llama, chat_template(llama)).say("hello")),
    ):
        with pytest.raises(RazorError, match=r"still answering an earlier request; exhaust or"):
            intrude()
    llama.tokenize(b"a word"), llama.memory(), llama.stats()  # these change nothing
    assert text_of([*said, *stream]) == expected
    closed = llama.create_completion(PROMPT, temperature=0, max_tokens=8, stream=True)
    next(closed)
    closed.close()
    assert answer(llama) == expected


def test_a_generator_that_was_not_begun_owns_nothing(llama):
    later = llama.generate([1, 2, 3], temp=0)
    expected = answer(llama)
    assert answer(llama) == expected
    next(later)
    del later  # nobody can ask it for more
    assert answer(llama) == expected


def test_two_streams_in_one_thread_do_not_mix(llama):
    first, second = (llama.generate([70, 71, n], temp=0) for n in (72, 73))
    expected = []
    for run in (llama.generate([70, 71, n], temp=0) for n in (72, 73)):
        expected.append(list(islice(run, 4)))
        run.close()
    found = [next(first)]
    with pytest.raises(RazorError, match="earlier request"):
        next(second)
    found += islice(first, 3)
    assert found == expected[0]


def test_threads_are_refused_or_wait():
    for wait in (False, True):
        with closing(Llama(DEFAULT_MODEL, n_ctx=512, n_threads=1, wait=wait)) as llama:
            prompts = [f"The secret code of {name} is" for name in ("Marlow", "Ingrid", "Ivo")]
            expected = {prompt: answer(llama, prompt, 6) for prompt in prompts}
            found, refused, wrong = [], [], []

            def ask(
                n,
                llama=llama,
                expected=expected,
                found=found,
                refused=refused,
                wrong=wrong,
                prompts=prompts,
            ):
                for i in range(8):
                    prompt = prompts[(n + i) % 3]
                    try:
                        said = answer(llama, prompt, 6)
                    except RazorError as error:
                        refused.append(str(error))
                        continue
                    found.append(said)
                    if said != expected[prompt]:
                        wrong.append((prompt, said))

            threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not wrong and found
            assert all("another thread is using this Llama" in text for text in refused)
            assert len(found) + len(refused) == 32 and (not refused or not wait)


def test_two_conversations_wait_for_each_other():
    with closing(Llama(DEFAULT_MODEL, n_ctx=1024, n_threads=1, wait=True)) as llama:
        chat = Chat(llama, chat_template(llama), sampling=Sampling(temp=0), max_tokens=6)
        threads = [
            threading.Thread(target=lambda n=n: list(chat.say(f"Number {n}."))) for n in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 3


def test_the_thread_that_holds_the_model_does_not_wait_for_itself():
    with closing(Llama(DEFAULT_MODEL, n_ctx=256, wait=True)) as llama:
        run = llama.generate([1, 2], temp=0)
        next(run)
        with pytest.raises(RazorError, match="earlier request"):
            llama.eval([1])


# -- from inside


def test_callbacks_cannot_use_the_model(llama):
    tokens = llama.tokenize(PROMPT.encode(), add_bos=False)
    expected = answer(llama)
    told = []

    def use(*_):
        for intrude in (lambda: llama.eval([1]), llama.close, llama.reset, llama.save_state):
            with pytest.raises(RazorError) as caught:
                intrude()
            told.append(str(caught.value))
        return False

    llama.reset()
    llama.prefill(tokens, progress=use, stop=use)
    assert told and all("computing" in text for text in told)
    assert llama.n_tokens == len(tokens)
    told.clear()

    def processor(ids, logits):
        use()
        return logits

    assert answer(llama, logits_processor=llama_cpp.LogitsProcessorList([processor])) == expected
    criteria = llama_cpp.StoppingCriteriaList([use])
    assert answer(llama, stopping_criteria=criteria) == expected
    assert told


def test_a_signal_handler_cannot_use_the_model(llama):
    tokens = [70 + i % 7 for i in range(800)]
    llama.eval(tokens)
    expected = llama._last_logits().copy()
    llama.reset()
    told = []

    def handler(*_):
        with pytest.raises(RazorError) as caught:
            llama.eval([1, 2, 3])
        told.append(str(caught.value))

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
        llama.eval(tokens)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert told and llama.n_tokens == 800
    np.testing.assert_array_equal(llama._last_logits(), expected)


def test_close_waits_for_nobody_and_frees_nothing_in_use(llama):
    tokens = llama.tokenize(PROMPT.encode(), add_bos=False)
    begun, told = threading.Event(), []

    def compute():
        llama.prefill(tokens * 8, stop=lambda: begun.set() and False)

    thread = threading.Thread(target=compute)
    thread.start()
    begun.wait()
    for _ in range(20):
        if thread.is_alive():
            try:
                llama.close()
                break
            except RazorError as error:
                told.append(str(error))
    thread.join()
    assert told and all("is computing; close it after" in text for text in told)
    run = llama.generate([1, 2], temp=0)
    next(run)
    llama.close()
    with pytest.raises(RazorError, match="this Llama is closed"):
        next(run)


# -- interrupts


class Boom(BaseException):
    pass


def interrupted(work, seconds):
    """Do work, and leave it with Boom from a signal handler after so many seconds."""

    def handler(*_):
        raise Boom

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        work()
        signal.setitimer(signal.ITIMER_REAL, 0)
        return False
    except Boom:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("razor", [True, False])
def test_answers_after_an_interrupt_are_right(razor):
    rng = random.Random(5)
    with closing(Llama(DEFAULT_MODEL, n_ctx=1024, n_threads=1, razor=razor)) as llama:
        prompts = [PROMPT, PROMPT + " And", text_with(FACT, 30), "Who?"]
        expected = {}
        for prompt in prompts:
            llama.reset()
            expected[prompt] = answer(llama, prompt)
        state = llama.save_state()
        started = time.perf_counter()
        llama.reset()
        answer(llama)
        whole = time.perf_counter() - started
        n_interrupted = 0
        for i in range(200):
            prompt = rng.choice(prompts)

            def work(prompt=prompt, i=i):
                if i % 5 == 4:
                    llama.load_state(state)
                stream = llama.create_completion(prompt, temperature=0, max_tokens=8, stream=True)
                text_of(stream)

            n_interrupted += interrupted(work, rng.uniform(1e-5, whole))
            for prompt in rng.sample(prompts, 2):
                # another split into batches rounds otherwise; the best token is clear enough
                assert answer(llama, prompt) == expected[prompt], i
        assert n_interrupted > 50


def interrupt_at_each_line(work, names):
    """Run work() again and again, and leave it at the next line of these functions each time."""
    for n in itertools.count():
        left = [n]

        def trace(frame, event, _arg, left=left):
            if frame.f_code.co_name not in names or "razor_local" not in frame.f_code.co_filename:
                return None

            def lines(_frame, event, _arg):
                if event == "line":
                    left[0] -= 1
                    if left[0] == -1:
                        raise Boom
                return lines

            return lines

        sys.settrace(trace)
        try:
            work()
        except Boom:
            sys.settrace(None)
            yield n
        else:
            return
        finally:
            sys.settrace(None)


def test_bookkeeping_survives_an_exception_at_every_line(llama):
    """The lines between the library's cache and what Python knows about it."""
    names = {"eval_batch", "rewind", "after_cached", "clear_cache", "load_state", "reset"}
    tokens = {n: [70 + i % n for i in range(300)] for n in (5, 7)}

    def logits(n):
        llama.prefill(tokens[n])
        return llama._last_logits().copy()

    expected = {}
    for n in tokens:
        llama.reset()
        expected[n] = logits(n)
    state = llama.save_state()

    def work():
        llama.prefill(tokens[5])
        llama.prefill([*tokens[5][:200], *tokens[7][:50]])
        llama.load_state(state)
        llama.eval([70])

    count = 0
    for count in interrupt_at_each_line(work, names):
        n = 5 if count % 2 else 7
        np.testing.assert_allclose(logits(n), expected[n], atol=2e-2)
        assert llama.n_tokens == evaluation.n_cached(llama) == 300
    assert count > 50


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("of stop"), SystemExit])
def test_what_callbacks_raise_arrives(llama, error):
    tokens = [70 + i % 7 for i in range(900)]
    for place in (1, 5, 20):
        asked = itertools.count()

        def stop(asked=asked, place=place):
            if next(asked) == place:
                raise error
            return False

        llama.reset()
        with pytest.raises(error if isinstance(error, type) else type(error)):
            llama.prefill(tokens, stop=stop)
        assert llama.n_tokens < 900
        assert llama.prefill(tokens).complete

    def fails(ids, logits):
        raise error

    for options in (
        {"logits_processor": llama_cpp.LogitsProcessorList([fails])},
        {"stopping_criteria": llama_cpp.StoppingCriteriaList([fails])},
    ):
        with pytest.raises(error if isinstance(error, type) else type(error)):
            answer(llama, **options)
        assert answer(llama) == answer(llama)


def test_a_signal_during_the_native_computation_is_not_lost(llama, capfd):
    tokens = [70 + i % 7 for i in range(900)]
    n = 0
    for _ in range(20):
        llama.reset()
        n += interrupted(lambda: llama.prefill(tokens, stop=lambda: False), 0.01)
    assert n == 20
    assert "ignored" not in capfd.readouterr().err


# -- processes


def test_a_forked_process_is_told(llama):
    llama.eval([1, 2, 3])
    for use in (lambda: llama.eval([4]), lambda: Llama(DEFAULT_MODEL, n_ctx=256)):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                use()
            except RazorError as error:
                os.write(write, str(error).encode())
            os._exit(0)
        os.close(write)
        assert b"start processes with multiprocessing's 'spawn'" in os.read(read, 1000)
        os.waitpid(child, 0)
        os.close(read)
    assert llama.n_tokens == 3


def _one_token() -> int:
    with closing(Llama(DEFAULT_MODEL, n_ctx=256)) as llama:
        return next(llama.generate([1, 2], temp=0))


def test_a_spawned_process_computes(llama):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_one_token) == next(llama.generate([1, 2], temp=0))


# -- what was asked for


def test_the_next_token_after_load_state_is_that_of_the_state(llama):
    a, b = [70, 71, 72, 73], [90, 91, 92]
    llama.eval(a)
    of_a = llama.sample(temp=0)
    state = llama.save_state()
    llama.reset()
    llama.eval(b)
    of_b = llama.sample(temp=0)
    assert of_a != of_b
    llama.load_state(state)
    assert llama.sample(temp=0) == of_a
    llama.load_state(state)
    assert next(llama.generate([], reset=False, temp=0)) == of_a


def test_a_sampler_of_an_earlier_answer_is_not_used(llama):
    answer(llama, temperature=1.9, seed=3)
    tokens = [70, 71, 72]
    first = next(llama.generate(tokens, temp=0))
    llama.prefill(tokens)
    assert {llama.sample(temp=0) for _ in range(5)} == {first}


def test_seeds(llama):
    options = {"prompt": "The", "temperature": 1.5, "n": 12}
    fixed = answer(llama, seed=3, **options)
    assert answer(llama, seed=3, **options) == fixed
    for seed in (None, -1):
        found = {answer(llama, seed=seed, **options) for _ in range(4)}
        assert len(found) > 1, seed
    llama.set_seed(7)
    run = [answer(llama, **options) for _ in range(2)]
    llama.set_seed(7)
    assert [answer(llama, **options) for _ in range(2)] == run and run[0] != run[1]
    with pytest.raises(RazorError, match="seed is 'x', expected a whole number"):
        answer(llama, seed="x")


def test_seeds_differ_between_processes():
    code = (
        "from razor_local import Llama; from razor_local.cli.chat import DEFAULT_MODEL;"
        "m = Llama(DEFAULT_MODEL, n_ctx=256);"
        "print(repr(m('The', max_tokens=16, temperature=1.5)['choices'][0]['text']))"
    )
    import subprocess

    said = {subprocess.check_output([sys.executable, "-c", code]) for _ in range(3)}
    assert len(said) > 1


@pytest.mark.parametrize("stop", [("e",), {"e"}, frozenset("e"), iter("e"), ["e"], "e"])
def test_every_form_of_stop_counts(llama, stop):
    assert "e" not in answer(llama, n=20, stop=stop)
    for wrong in ([""], [5], 7):
        with pytest.raises(RazorError, match="stop contains"):
            answer(llama, stop=wrong)


def test_echo_with_stream(llama):
    options = {"temperature": 0, "max_tokens": 5, "echo": True}
    whole = llama.create_completion(PROMPT, **options)["choices"][0]["text"]
    assert text_of(llama.create_completion(PROMPT, stream=True, **options)) == whole
    assert whole.startswith(PROMPT)


SCHEMA = {"type": "object", "properties": {"n": {"enum": ["one", "two"]}}, "required": ["n"]}


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
        {"type": "json_object", "schema": SCHEMA},
    ],
)
def test_a_schema_constrains_the_answer(llama, response_format):
    said = llama.create_chat_completion(
        MESSAGES, response_format=response_format, max_tokens=40, temperature=0
    )["choices"][0]["message"]["content"]
    assert json.loads(said)["n"] in ("one", "two")


@pytest.mark.parametrize(
    ("response_format", "told"),
    [
        ({"type": "yaml"}, "response_format is of the type 'yaml', expected text, json_object or"),
        ("json", "response_format is of the type 'json'"),
        ({"type": "json_schema"}, r"has no json_schema\.schema"),
        (
            {"type": "json_object", "schema": {"$ref": "#/nowhere"}},
            "cannot be converted to a grammar",
        ),
        (
            {"type": "json_object", "schema": {"type": "string", "pattern": "^(?=a)b$"}},
            "cannot be converted to a grammar",
        ),
        ({"type": "json_object", "schema": {"enum": []}}, "grammar"),
    ],
)
def test_a_constraint_that_cannot_be_kept_is_refused(llama, response_format, told):
    with pytest.raises(RazorError, match=told):
        llama.create_chat_completion(MESSAGES, response_format=response_format, max_tokens=4)


def object_of(**properties):
    return {"type": "object", "properties": properties, "required": list(properties)}


@pytest.mark.parametrize(
    ("schema", "follows"),
    [
        ({"enum": ['a"b\\\n☺']}, lambda value: value == 'a"b\\\n☺'),
        ({"items": {}, "minItems": 2, "maxItems": 2}, lambda value: len(value) == 2),
        ({"type": ["string", "null"], "maxLength": 3}, lambda value: len(value or "") <= 3),
        ({"pattern": r"^\d{2}\.[^a-z ]$"}, lambda value: re.fullmatch(r"\d\d\.[^a-z ]", value)),
        (
            {"allOf": [{"$ref": "#/$defs/a"}, object_of(y={"const": 2})],
             "$defs": {"a": object_of(x={"const": 1})}},
            lambda value: value == {"x": 1, "y": 2},
        ),
        (  # the names of rules that the converter has, and of a property and a definition
            {**object_of(date_time={"const": 1}, a={"const": 2}, b={"$ref": "#/$defs/a"}),
             "$defs": {"a": {"const": 3}}},
            lambda value: value == {"date_time": 1, "a": 2, "b": 3},
        ),
    ],
)  # fmt: skip
def test_answers_follow_their_schema(llama, schema, follows):
    for seed in range(3):
        answer = llama.create_chat_completion(
            MESSAGES, response_format={"type": "json_object", "schema": schema}, temperature=2,
            seed=seed, max_tokens=200,
        )["choices"][0]  # fmt: skip
        if answer["finish_reason"] == "stop":
            assert follows(json.loads(answer["message"]["content"]))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "maxLength": MAX_REPETITIONS},
        {"type": "string", "minLength": MAX_REPETITIONS},
        {"type": "array", "items": {"type": "array", "maxItems": MAX_REPETITIONS},
         "maxItems": MAX_REPETITIONS},
        {"type": "string", "pattern": f"^((a|b){{0,30}}c){{0,{MAX_REPETITIONS // 30}}}$"},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(200)}},
    ],
)  # fmt: skip
def test_the_largest_grammars_are_understood(llama, schema):
    llama.create_chat_completion(
        MESSAGES, response_format={"type": "json_object", "schema": schema}, max_tokens=4
    )


def calling(llama, parameters: dict, how: str, name: str = "f") -> dict:
    """Force a tool call in the new or the old form, and return its arguments."""
    function = {"name": "f", "parameters": parameters}
    forced = {
        "tools": {
            "tools": [{"type": "function", "function": function}],
            "tool_choice": {"type": "function", "function": {"name": name}},
        },
        "functions": {"functions": [function], "function_call": {"name": name}},
    }[how]
    answer = llama.create_chat_completion(MESSAGES, max_tokens=40, temperature=0, **forced)
    return answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]


@pytest.mark.parametrize("how", ["tools", "functions"])
def test_a_tool_whose_schema_cannot_be_enforced_is_refused(llama, how):
    for schema, why in (
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"type": "object", "properties": {"n": {"type": "integer", "minimum": 3}}}, '"minimum"'),
        ({"type": "array", "uniqueItems": True}, '"uniqueItems" is not supported'),
        (None, "it is null"),
    ):
        with pytest.raises(RazorError, match="parameters of 'f' cannot be converted to") as error:
            calling(llama, schema, how)
        assert why in str(error.value)
    with pytest.raises(RazorError, match="names 'g', expected one of the tools"):
        calling(llama, {"type": "object"}, how, name="g")


@pytest.mark.parametrize("how", ["tools", "functions"])
def test_a_tool_call_follows_what_llama_cpp_converts_wrongly(llama, how):
    """llama_cpp's converter does not escape backslashes."""
    values = ["a\\nb", 'c"d', "e\\\\"]
    schema = {
        "type": "object",
        "properties": {"v": {"enum": values}},
        "required": ["v"],
    }
    assert json.loads(calling(llama, schema, how))["v"] in values


def test_tools_that_the_model_may_choose_are_checked(llama, monkeypatch):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"minimum": 1}}}]
    message = "parameters of 'f' cannot be converted to a grammar"
    for chat_format, choice in (
        ("chatml-function-calling", "auto"),
        ("functionary-v2", "auto"),
        ("functionary-v2", None),
    ):
        monkeypatch.setattr(llama, "chat_format", chat_format)
        with pytest.raises(RazorError, match=message):
            llama.create_chat_completion(MESSAGES, tools=tools, tool_choice=choice)
    monkeypatch.undo()
    llama.create_chat_completion(MESSAGES, tools=tools, tool_choice="auto", max_tokens=1)


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (None, "returned NoneType, expected an array of"),
        (np.zeros(3), r"returned an array of shape \[3\]"),
        ("text", "returned str"),
        ("nan", "unusable scores: NaN"),
        ("inf", "unusable scores: NaN"),
        ("-inf", "only -inf"),
    ],
)
def test_a_logits_processor_that_gives_no_logits_is_refused(llama, returned, told):
    expected = answer(llama)

    def processor(ids, logits):
        if str(returned) in ("nan", "inf"):
            logits[5] = float(returned)
            return logits
        return np.full_like(logits, -np.inf) if str(returned) == "-inf" else returned

    with pytest.raises(RazorError, match=told):
        answer(llama, logits_processor=llama_cpp.LogitsProcessorList([processor]))
    assert answer(llama) == expected


def test_logits_that_a_processor_changed_are_not_used_again(llama):
    tokens = [70, 71, 72]
    expected = next(llama.generate(tokens, temp=0))
    other = (expected + 1) % llama.n_vocab()

    def only_other(ids, logits):
        logits[:] = -np.inf
        logits[other] = 0
        return logits

    processors = llama_cpp.LogitsProcessorList([only_other])
    assert next(llama.generate(tokens, temp=0, logits_processor=processors)) == other
    assert next(llama.generate(tokens, temp=0)) == expected


# -- errors


def test_errors_are_razor_errors(llama, capfd):
    n_ctx = llama.n_ctx()
    for use, told in (
        (lambda: answer(llama, [70] * n_ctx), f"has {n_ctx} tokens and the context holds {n_ctx}"),
        (lambda: answer(llama, None), "the prompt is of the type NoneType"),
        (lambda: answer(llama, b"bytes"), "the prompt is of the type bytes"),
        (lambda: answer(llama, [70, "x"]), "the prompt has 'x' as a token"),
        (lambda: answer(llama, "half \ud800 a pair"), "a lone surrogate"),
        (lambda: llama.create_chat_completion([]), "expected a list of one message or more"),
        (lambda: llama.create_chat_completion(["hello"]), "'hello' is not a message"),
        (
            lambda: llama.create_chat_completion([{"role": "user", "content": None}]),
            "the content of the user message is None",
        ),
        (
            lambda: llama.create_chat_completion([{"role": "user", "content": "\ud800"}]),
            "the content of the user message has a lone surrogate",
        ),
        (
            lambda: llama.create_chat_completion(
                [{"role": "user", "content": [{"type": "image_url"}]}]
            ),
            "a part of the type 'image_url', this model reads text",
        ),
        (
            lambda: answer(llama, grammar=llama_cpp.LlamaGrammar.from_string("root ::= x")),
            "the grammar is malformed",
        ),
    ):
        with pytest.raises(RazorError, match=told):
            use()
    with pytest.raises(ContextFullError):
        answer(llama, [70] * n_ctx)
    parts = [{"type": "text", "text": PROMPT}]
    said = [
        llama.create_chat_completion(
            [{"role": "user", "content": content}], temperature=0, max_tokens=5
        )["choices"][0]["message"]
        for content in (PROMPT, parts)
    ]
    assert said[0] == said[1]
    assert capfd.readouterr().err == ""


# -- states


def test_damaged_states_are_refused(llama):
    llama.eval([70, 71, 72, 73])
    state = llama.save_state()
    expected = llama.sample(temp=0)
    llama.eval([80])
    rng = random.Random(1)
    whole = state.llama_state
    for _ in range(200):
        at = rng.randrange(len(whole))
        state.llama_state = (
            whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]
        )
        with pytest.raises(StateError, match="cannot be loaded"):
            llama.load_state(state)
        assert llama.n_tokens == 5
    state.llama_state = whole
    for change in ({"n_tokens": 3}, {"n_tokens": 5}, {"n_tokens": -1}):
        before = {name: getattr(state, name) for name in change}
        vars(state).update(change)
        with pytest.raises(StateError, match="says"):
            llama.load_state(state)
        vars(state).update(before)
    ids = state.input_ids
    state.input_ids = ids.copy()
    state.input_ids[2] = 99
    with pytest.raises(StateError, match="not those that were saved"):
        llama.load_state(state)
    state.input_ids = ids
    llama.load_state(state)
    assert llama.sample(temp=0) == expected


def test_states_of_another_model_are_refused(llama, tmp_path):
    llama.eval([70, 71, 72, 73])
    state = llama.save_state()
    other = tmp_path / "other.gguf"
    data = bytearray(DEFAULT_MODEL.read_bytes())
    data[len(data) - 200_000 :] = bytes(200_000)  # other weights of the same shape
    other.write_bytes(data)
    same = tmp_path / "same.gguf"
    same.write_bytes(DEFAULT_MODEL.read_bytes())
    with closing(Llama(same, n_ctx=1024)) as another:
        another.load_state(state)
        assert another.n_tokens == 4
    for path, options in ((other, {}), (same, {"rope_freq_base": 5000.0})):
        with closing(Llama(path, n_ctx=1024, **options)) as another:
            with pytest.raises(StateError, match="other weights, another adapter or another RoPE"):
                another.load_state(state)
            assert another.n_tokens == 0


# -- at random


def test_random_operations(capfd):
    """A minute of tests/fuzz/api.py."""
    from tests.fuzz import api

    done = api.run(10**6, seed=1, seconds=60)
    assert sum(done.values()) > 300 and len(done) > 15, done


def test_a_wrong_logit_and_a_wrong_token_are_noticed(monkeypatch):
    from tests.fuzz import api

    def forgets(llama, tokens):  # n_tokens ahead of the cache
        keep = min(evaluation.common_prefix(llama, tokens), len(tokens) - 1)
        llama._ctx.kv_cache_seq_rm(-1, max(keep - 1, 0), -1)
        llama.n_tokens, llama._requires_eval = keep, True
        return keep

    monkeypatch.setattr(evaluation, "rewind", forgets)
    monkeypatch.setattr(evaluation, "after_cached", lambda llama, tokens: list(tokens))
    with pytest.raises(api.Finding):
        api.run(2000, seed=1)


# -- what strangers found


def test_the_earliest_stop_ends_an_answer(llama):
    for stop in (["48", "code", "e"], ["e", "code", "48"], [" c", "The s", "he"]):
        options = {"temperature": 0, "max_tokens": 12, "stop": stop}
        whole = llama.create_completion(PROMPT, **options)["choices"][0]["text"]
        assert text_of(llama.create_completion(PROMPT, stream=True, **options)) == whole
        assert not any(one in whole for one in stop)


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("error", [TimeoutError("late"), ValueError("x"), Cancelled(), OSError()])
def test_what_is_raised_during_a_chat_arrives_as_it_is(llama, error):
    def fails(ids, logits):
        raise error

    with pytest.raises(type(error)) as caught:
        llama.create_chat_completion(
            MESSAGES, logits_processor=llama_cpp.LogitsProcessorList([fails])
        )
    assert caught.value is error
    assert not isinstance(caught.value, RazorError)


def test_an_alarm_while_a_template_is_rendered_arrives():
    def handler(*_):
        raise TimeoutError("late")

    with closing(Llama(DEFAULT_MODEL, n_ctx=1024, n_threads=1)) as llama:
        expected = llama.create_chat_completion(MESSAGES, temperature=0, max_tokens=4)["choices"]
        before = signal.signal(signal.SIGALRM, handler)
        try:
            for i in range(40):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.0002 * i)
                    llama.create_chat_completion(MESSAGES, temperature=0, max_tokens=4)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except TimeoutError:
                    pass
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        found = llama.create_chat_completion(MESSAGES, temperature=0, max_tokens=4)["choices"]
        assert found == expected


def test_a_signal_handler_that_renders_another_template_is_refused(llama):
    from razor_local.prompt import templates

    told = []
    with closing(Llama(DEFAULT_MODEL, n_ctx=256)) as other:
        slow = templates.Template(
            "{% for i in range(90000) %}{% for j in range(9) %}{% endfor %}{% endfor %}x"
        )
        assert slow.render(messages=[]) == "x"

        def handler(*_):
            try:
                other.create_chat_completion([{"role": "user", "content": "hi"}], max_tokens=1)
            except RazorError as error:
                told.append(str(error))

        before = signal.signal(signal.SIGALRM, handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            assert slow.render(messages=[]) == "x"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert told and "a signal handler cannot use a chat template" in told[0]


def test_a_text_without_tokens_is_not_embedded():
    with closing(Llama(DEFAULT_MODEL, n_ctx=256, razor=False, embedding=True)) as llama:
        good = llama.embed("hello")
        for texts in ("", ["", "hello"], ["hello", "", "world"], [None]):
            with pytest.raises(RazorError, match="cannot be embedded; expected a text with tokens"):
                llama.embed(texts)
            with pytest.raises(RazorError, match="cannot be embedded"):
                llama.create_embedding(texts)
        assert llama.embed("hello") == good
    with closing(Llama(DEFAULT_MODEL, n_ctx=256)) as llama:
        with pytest.raises(RazorError, match="needs a Llama that was made with embedding=True"):
            llama.embed("hello")


def test_a_kept_answer_of_another_context_is_not_found():
    cache = llama_cpp.LlamaRAMCache()
    answers = []
    for options in ({"n_ctx": 2048}, {"n_ctx": 1536}, {"n_ctx": 2048, "razor": False}):
        with closing(Llama(DEFAULT_MODEL, n_threads=1, **options)) as llama:
            llama.set_cache(cache)
            answers.append(answer(llama, PROMPT, n=5))
    assert len(set(answers)) == 1


def test_a_tool_that_is_not_there_is_refused(llama):
    function = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    for choice in ("required", "sure"):
        with pytest.raises(RazorError, match=f"tool_choice is '{choice}', expected auto, none, or"):
            llama.create_chat_completion(MESSAGES, tools=tools, tool_choice=choice)
    with pytest.raises(RazorError, match="tool_choice names 'g', expected one of the tools"):
        llama.create_chat_completion(
            MESSAGES,
            tools=tools,
            tool_choice={"type": "function", "function": {"name": "g"}},
        )
