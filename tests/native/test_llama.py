"""The Python runtime: llama_cpp's API on top of the razor cache, its errors and its accounting."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import sys
from contextlib import ExitStack, closing
from itertools import count
from threading import Thread

import numpy as np
import pytest

from razor_local import (
    ContextFullError,
    GGUFError,
    Llama,
    Profile,
    ProfileError,
    RazorError,
    StateError,
    UnsupportedError,
    evaluation,
    make_plan,
    native,
    read_model_shape,
)
from razor_local.cli.chat import DEFAULT_MODEL
from razor_local.evaluation import set_source
from razor_local.llama import llama_cpp
from razor_local.plan import KV_TYPES
from tests.support import tiny_models
from tests.support.embedded_model import no_numbers
from tests.support.gguf_bytes import gguf
from tests.support.other_models import make_other
from tests.support.texts import FACT, QUESTION, text_with

MESSAGES = [{"role": "user", "content": f"{text_with(FACT)}\n\n{QUESTION}"}]


@pytest.fixture(scope="module")
def llama():
    model = Llama(DEFAULT_MODEL, n_ctx=2048)
    yield model
    model.close()


@pytest.fixture(scope="module")
def precise():
    """Without flash attention, whose CPU code rounds differently for other batch sizes."""
    model = Llama(DEFAULT_MODEL, n_ctx=2048, type_k="f32", type_v="f32", flash_attn=False)
    yield model
    model.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model file without a razor profile."""
    path = tmp_path_factory.mktemp("plain") / "plain.gguf"
    return tiny_models.make_model(path, tiny_models.TinySpec())


def prompt(llama, n):
    tokens = llama.tokenize(text_with(FACT, 2 * n).encode(), add_bos=False)
    assert len(tokens) >= n
    return tokens[:n]


def logits(llama):
    """Of the last token, [n_vocab] f32."""
    return np.ctypeslib.as_array(llama._ctx.get_logits_ith(-1), shape=(llama.n_vocab(),)).copy()


def greedy(llama, tokens, n=10):
    return [token for token, _ in zip(llama.generate(tokens, temp=0), range(n), strict=False)]


# -- accounting --


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0", "q4_0"])
def test_memory_is_what_the_plan_says(kv_type, flash_attn):
    type_v = kv_type if flash_attn else "f16"
    with_types = dict(type_k=kv_type, type_v=type_v, flash_attn=flash_attn)
    llama = Llama(DEFAULT_MODEL, n_ctx=2000, **with_types)
    memory, plan = llama.memory(), llama.plan
    assert memory.active and memory.why is None and memory.n_ctx == 2048 and memory.n_tokens == 0
    assert memory.kv_bytes == plan.kv_bytes == sum(layer.kv_bytes for layer in memory.layers)
    assert memory.kv_bytes_full == plan.kv_bytes_full
    shape = read_model_shape(DEFAULT_MODEL)
    n_heads = sum(shape.n_head_kv)
    assert memory.kv_bytes_full_f16 == 2048 * n_heads * (shape.head_dim_k + shape.head_dim_v) * 2
    assert 0 < memory.share < 0.5
    heads = sum(layer.retrieval_kv_heads for layer in memory.layers)
    assert heads == plan.retrieval_kv_heads < n_heads
    full = Llama(DEFAULT_MODEL, n_ctx=2000, razor=False, **with_types).memory()
    assert not full.active and full.kv_bytes == full.kv_bytes_full == memory.kv_bytes_full
    assert full.why == "razor=False" and full.layers == () and full.share == 1.0
    assert full.weights_bytes == memory.weights_bytes > 10**6 and full.compute_bytes > 10**6


def test_memory_counts_tokens_and_stats_tell_what_was_folded(llama):
    llama.reset()
    tokens = prompt(llama, 600)
    llama.prefill(tokens)
    stats = llama.stats()
    assert llama.memory().n_tokens == stats.n_tokens == 600
    assert 0 < stats.n_folded == stats.frontier - llama.plan.sink_tokens < 600
    with pytest.raises(RazorError, match="no sequence 5"):
        llama.stats(5)
    with pytest.raises(RazorError, match="not active .*razor=False"):
        Llama(DEFAULT_MODEL, razor=False).stats()


def test_buffers_add_up(llama):
    stats = native.load().stats(llama.ctx)
    buffers = native.load().buffers(llama.ctx)
    assert sum(buffer.bytes for buffer in buffers) == stats.kv_bytes == llama.plan.kv_bytes
    assert stats.kv_bytes_local + stats.kv_bytes_retrieval == stats.kv_bytes
    assert {buffer.name for buffer in buffers} == {b"CPU"}


# -- which profile --


def test_a_model_without_profile_runs_the_stock_cache(plain):
    llama = Llama(plain, n_ctx=512)
    memory = llama.memory()
    assert not memory.active and memory.why == "the model file has no razor profile"
    assert memory.kv_bytes == memory.kv_bytes_full == llama.plan.kv_bytes


def test_a_window_as_large_as_the_context_runs_the_stock_cache():
    llama = Llama(DEFAULT_MODEL, n_ctx=2048, window=2048)
    assert not llama.memory().active and "saves nothing up to" in llama.memory().why


def test_options_replace_those_of_the_profile():
    llama = Llama(DEFAULT_MODEL, n_ctx=2048, window=300, sink_tokens=7, compensation=False)
    stats = native.load().stats(llama.ctx)
    assert (stats.window, stats.sink_tokens, stats.compensation) == (300, 7, 0)
    assert (llama.plan.window, llama.plan.sink_tokens) == (300, 7)


def test_a_profile_object_and_its_sidecar_give_the_same_context(plain, tmp_path):
    from razor_local.converters.write import write_sidecar

    shape = read_model_shape(plain)
    heads = [np.zeros(n, np.uint8) for n in shape.n_head_kv]
    heads[1][0] = 1
    profile = Profile(retrieval=tuple(heads), window_min=64, window_divisor=0)
    sidecar = tmp_path / "plain.razor.gguf"
    write_sidecar(plain, sidecar, profile)
    limit = 1 << 30  # the default depends on the free disk space
    by_object = Llama(plain, n_ctx=1024, razor=profile, rewind_limit=limit)
    by_file = Llama(str(plain), n_ctx=1024, razor=str(sidecar), rewind_limit=limit)
    assert by_object.memory().active and by_object.memory() == by_file.memory()
    assert by_object.plan.to_dict() == make_plan(shape, profile, 1024).to_dict()
    with pytest.raises(ProfileError, match="sidecar of another model"):
        Llama(DEFAULT_MODEL, razor=sidecar)
    with pytest.raises(ProfileError, match="is not a sidecar"):
        Llama(plain, razor=DEFAULT_MODEL)
    with pytest.raises(FileNotFoundError):
        Llama(plain, razor=tmp_path / "none.gguf")
    with pytest.raises(ProfileError, match="the profile is for"):
        Llama(DEFAULT_MODEL, n_ctx=2048, razor=profile)


def test_options_without_a_profile_say_how_to_get_one(plain):
    with pytest.raises(ProfileError, match="no razor profile .*'razor-local convert"):
        Llama(plain, window=64)
    with pytest.raises(ProfileError, match="razor=False switches off"):
        Llama(DEFAULT_MODEL, razor=False, sink_tokens=2)
    with pytest.raises(ProfileError, match="window is -1"):
        Llama(DEFAULT_MODEL, window=-1)


def test_the_environment_switches_razor_off(monkeypatch):
    monkeypatch.setenv("RAZOR_LOCAL_DISABLE", "1")
    memory = Llama(DEFAULT_MODEL, n_ctx=2048, window=300).memory()
    assert not memory.active and memory.why == "RAZOR_LOCAL_DISABLE is set"
    monkeypatch.setenv("RAZOR_LOCAL_DISABLE", "0")
    assert Llama(DEFAULT_MODEL, n_ctx=2048).memory().active


def test_the_override_ends_with_the_constructor():
    def raw_is_active():
        raw = llama_cpp.Llama(str(DEFAULT_MODEL), n_ctx=2048, verbose=False)
        return bool(native.load().stats(raw.ctx).active)

    assert raw_is_active()  # by the file's own metadata
    Llama(DEFAULT_MODEL, razor=False)
    assert raw_is_active()
    with pytest.raises(RazorError):  # fails inside the block where the override is set
        Llama(DEFAULT_MODEL, razor=False, progress=lambda _: False)
    assert raw_is_active()
    with pytest.raises(TypeError):
        Llama(DEFAULT_MODEL, razor=False, rope_freq_base="many")
    assert raw_is_active()


def test_options_that_razor_cannot_serve_are_refused(plain):
    with pytest.raises(UnsupportedError, match="embedding=True .* razor=False"):
        Llama(DEFAULT_MODEL, n_ctx=2048, embedding=True)
    embedding = Llama(DEFAULT_MODEL, n_ctx=512, razor=False, embedding=True).embed("hello")
    assert np.isfinite(embedding).all()
    Llama(plain, n_ctx=512, embedding=True)  # nothing to refuse without a profile


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"n_ctx": -1}, "n_ctx is -1, expected a whole number from 0 to 2147483647 or 'auto'"),
        ({"n_ctx": None}, "n_ctx is None"),
        ({"n_batch": -1}, "n_batch is -1, expected a whole number from 1"),
        ({"n_ubatch": 0}, "n_ubatch is 0, expected a whole number from 1"),
        ({"n_threads": 513}, "n_threads is 513, expected a whole number from 0 to 512 or None"),
        ({"lora_path": "nowhere.gguf"}, "lora_path is 'nowhere.gguf', which is not a file"),
        ({"window": 0}, "window is 0, expected 1 to"),
        ({"compensation": "no"}, "compensation is 'no', expected True or False"),
    ],
)
def test_values_that_would_end_the_process_are_refused(options, told):
    with pytest.raises(RazorError, match=re.escape(told)):
        Llama(DEFAULT_MODEL, **options)


def test_an_unknown_argument_is_not_swallowed():
    with pytest.raises(TypeError, match="no argument 'n_contexts'"):
        Llama(DEFAULT_MODEL, n_contexts=5)


def test_a_batch_is_never_larger_than_the_context():
    with closing(Llama(DEFAULT_MODEL, n_ctx=256, n_batch=10**9)) as llama:
        assert llama.n_batch == 256


def test_tokens_outside_the_vocabulary_are_refused(llama):
    llama.reset()
    llama.eval([1])
    for token in (-1, llama.n_vocab(), 10**6, 2**31, -(2**31) - 1, 2**32 + 1, 2**70):
        for use in (
            llama.piece,
            llama.is_end,
            llama.is_special,
            lambda t: llama.detokenize([1, t]),
            lambda t: llama.eval([t]),
            lambda t: llama.eval([1, t, 2]),
            lambda t: next(llama.eval_logits([t])),
            lambda t: llama.prefill([1, t]),
            lambda t: next(llama.generate([1, t])),
        ):
            with pytest.raises(RazorError, match=f"no token {token}: the vocabulary has 0 to"):
                use(token)
    assert llama.n_tokens == llama.stats().n_tokens == 1


def test_a_bias_of_a_token_the_vocabulary_does_not_have_is_refused(llama):
    for token in (-1, llama.n_vocab(), "70000"):
        options = {"max_tokens": 1, "logit_bias": {5: 1.0, token: 5.0}}
        with pytest.raises(RazorError, match=f"no token {token}: the vocabulary has 0 to"):
            llama("a word", **options)
        with pytest.raises(RazorError, match=f"no token {token}: the vocabulary has 0 to"):
            next(llama("a word", stream=True, **options))
        with pytest.raises(RazorError, match=f"no token {token}: the vocabulary has 0 to"):
            llama.create_chat_completion(MESSAGES, **options)
    assert llama("a word", max_tokens=1, logit_bias={"5": 0.5})["usage"]["completion_tokens"] == 1


def test_a_bias_and_a_logits_processor_both_count(llama):
    first, second, third = llama.tokenize(b"zqx", add_bos=False)

    def only_two(ids, logits):
        kept = np.full_like(logits, -np.inf)
        kept[[first, second]] = 0
        return kept

    processors = llama_cpp.LogitsProcessorList([only_two])
    bias = {second: 5.0, third: 50.0}
    options = {"temperature": 0, "logit_bias": bias, "logits_processor": processors}
    answer = llama("a word", max_tokens=2, **options)["choices"][0]["text"]
    assert answer == llama.piece(second).decode() * 2
    assert processors == [only_two]


def test_the_vocabulary_is_asked_for_its_size_once_per_text(llama, monkeypatch):
    asked = []
    n_vocab = llama._model.n_vocab()
    monkeypatch.setattr(llama._model, "n_vocab", lambda: asked.append(None) or n_vocab)
    assert llama.detokenize([65] * 100) == llama.piece(65) * 100
    assert len(asked) <= 2
    assert llama.detokenize([]) == b""


def test_nothing_to_go_on_from_is_refused(llama):
    for options in ({}, {"stopping_criteria": lambda ids, logits: False}):
        with pytest.raises(RazorError, match="the prompt has no tokens"):
            next(llama.generate([], **options))
    vocabulary = Llama(DEFAULT_MODEL, vocab_only=True)
    assert vocabulary.tokenize(b"a word")
    with pytest.raises(UnsupportedError, match="vocab_only=True loads no weights"):
        vocabulary("a word", max_tokens=1)


@pytest.mark.parametrize("rules", ["root ::= missing", 'root ::= root "a"', 'root ::= "a'])
def test_a_malformed_grammar_is_refused(llama, rules):
    with pytest.raises(RazorError, match="the grammar is malformed"):
        llama("a word", grammar=llama_cpp.LlamaGrammar.from_string(rules), max_tokens=1)


def test_a_lora_adapter_that_is_none_is_refused():
    for path in (DEFAULT_MODEL, __file__):
        with pytest.raises(
            RazorError, match="lora_path is not a LoRA adapter .*: llama_adapter_lora"
        ):
            Llama(DEFAULT_MODEL, n_ctx=256, lora_path=str(path))


def test_a_closed_llama_says_so():
    llama = Llama(DEFAULT_MODEL, n_ctx=256)
    tokens = llama.tokenize(b"a word")
    running = llama.generate(tokens)
    next(running)
    llama.close()
    llama.close()
    for use in (
        llama.memory,
        llama.stats,
        llama.save_state,
        llama.n_vocab,
        lambda: llama.eval(tokens),
        lambda: llama.prefill(tokens),
        lambda: llama.tokenize(b"a word"),
        lambda: llama.piece(5),
        lambda: llama("a word", max_tokens=1),
        lambda: next(running),
    ):
        with pytest.raises(RazorError, match="this Llama is closed"):
            use()


def test_models_loaded_by_several_threads_leave_stdout_where_it_was(plain):
    def where():
        return [(os.fstat(fd).st_dev, os.fstat(fd).st_ino) for fd in (1, 2)]

    before, found = where(), []

    def load():
        for _ in range(4):
            with closing(Llama(plain, n_ctx=256)) as llama:
                found.append(llama.n_ctx())

    threads = [Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [256] * 16 and where() == before


def test_a_second_thread_is_refused_while_the_first_computes():
    with closing(Llama(DEFAULT_MODEL, n_ctx=1024)) as llama:
        tokens, refused, asked = prompt(llama, 900), [], count()

        def stop():
            if next(asked) == 1:  # the first time nothing is computed yet
                thread = Thread(target=intrude)
                thread.start()
                thread.join()
            return False

        def intrude():
            for use in (lambda: llama.eval(tokens[:1]), lambda: llama.prefill(tokens[:5])):
                with pytest.raises(RazorError, match="another thread is using this Llama"):
                    use()
                refused.append(use)

        expected = greedy(llama, tokens, 3)
        llama.reset()
        llama.prefill(tokens, stop=stop)
        assert len(refused) == 2
        assert greedy(llama, tokens, 3) == expected


def test_kv_types_by_name_and_number():
    for name, kv_type in KV_TYPES.items():
        by_name = Llama(DEFAULT_MODEL, n_ctx=2048, type_k=name)
        by_number = Llama(DEFAULT_MODEL, n_ctx=2048, type_k=kv_type.ggml_id)
        assert by_name.plan.type_k == by_number.plan.type_k == name
    for wrong in ("q9", 99):
        with pytest.raises(UnsupportedError, match="is not a KV cache type, expected one of f32"):
            Llama(DEFAULT_MODEL, type_v=wrong)
    with pytest.raises(UnsupportedError, match="flash attention"):
        Llama(DEFAULT_MODEL, type_v="q8_0", flash_attn=False)


def test_types_of_local_heads(plain):
    llama = Llama(DEFAULT_MODEL, n_ctx=2048, type_k_local="q8_0", type_v_local=2)
    memory, plan = llama.memory(), llama.plan
    types = (memory.type_k, memory.type_v, memory.type_k_local, memory.type_v_local)
    assert types == ("f16", "f16", "q8_0", "q4_0")
    assert memory.kv_bytes == plan.kv_bytes < Llama(DEFAULT_MODEL, n_ctx=2048).memory().kv_bytes
    assert memory.kv_bytes_full == Llama(DEFAULT_MODEL, n_ctx=2048, razor=False).memory().kv_bytes
    assert memory.own_attention
    copy = pickle.loads(pickle.dumps(llama))
    assert copy.plan.to_dict() == plan.to_dict() and copy.plan.has_local_types

    # they are never ignored silently
    said = "type_k_local and type_v_local have no effect without razor"
    for path, options in ((DEFAULT_MODEL, {"razor": False}), (plain, {})):
        with pytest.raises(UnsupportedError, match=said):
            Llama(path, n_ctx=2048, type_k_local="q8_0", **options)
    memory = Llama(DEFAULT_MODEL, n_ctx=256, type_k_local="q8_0").memory()
    assert not memory.active and memory.type_k_local == "f16"
    assert memory.why.endswith("(the KV types of local heads have no effect)")
    with pytest.raises(UnsupportedError, match="'q9_0' is not a KV cache type"):
        Llama(DEFAULT_MODEL, n_ctx=2048, type_k_local="q9_0")
    with pytest.raises(UnsupportedError, match="V cache of local heads .* needs flash attention"):
        Llama(DEFAULT_MODEL, n_ctx=2048, type_v_local="q8_0", flash_attn=False)


def test_all_layers_are_offloaded_by_default():
    assert Llama(DEFAULT_MODEL).model_params.n_gpu_layers == 2**31 - 1
    assert Llama(DEFAULT_MODEL, n_gpu_layers=3).model_params.n_gpu_layers == 3


def test_n_ctx_0_is_the_trained_length():
    assert Llama(DEFAULT_MODEL, n_ctx=0).n_ctx() == read_model_shape(DEFAULT_MODEL).n_ctx_train


@pytest.mark.parametrize("arch", ["deepseek2", "mamba"])
def test_other_architectures_are_refused_by_name_and_run_stock(arch, tmp_path):
    path = make_other(tmp_path / f"{arch}.gguf", arch)
    try:
        shape = read_model_shape(path)
    except ProfileError:
        shape = None
    if shape is not None:
        heads = tuple(np.zeros(n, np.uint8) for n in shape.n_head_kv)
        profile = Profile(retrieval=heads, window_min=64, window_divisor=0)
        with pytest.raises(UnsupportedError, match=rf"\.gguf: {arch}: .+ razor off"):
            Llama(path, n_ctx=1024, razor=profile)
    for razor in (True, False):
        llama = Llama(path, n_ctx=1024, razor=razor)
        llama.eval([1, 2, 3])
        memory = llama.memory()
        assert not memory.active and memory.why and memory.kv_bytes == memory.kv_bytes_full
        assert (llama.plan is None) or llama.plan.kv_bytes == memory.kv_bytes


# -- llama_cpp's API --


def test_chat_completion_finds_a_fact_behind_the_window(llama):
    result = llama.create_chat_completion(MESSAGES, temperature=0)
    assert "48213" in result["choices"][0]["message"]["content"]
    assert llama.stats().n_folded > 200
    chunks = llama.create_chat_completion(MESSAGES, temperature=0, stream=True)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == result["choices"][0]["message"]["content"]


def test_completion_stop_strings_grammar_and_callbacks(llama):
    text = "The secret code of"
    whole = llama(text, max_tokens=12, temperature=0)["choices"][0]
    assert whole["finish_reason"] == "length"
    stopped = llama(text, max_tokens=12, temperature=0, stop=[whole["text"][3:6]])["choices"][0]
    assert stopped["text"] == whole["text"][: whole["text"].index(whole["text"][3:6])]
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "yes" | "no"', verbose=False)
    assert llama(text, max_tokens=8, grammar=grammar)["choices"][0]["text"] in ("yes", "no")
    only = llama.tokenize(b"z", add_bos=False)[0]
    biased = llama(text, max_tokens=3, logit_bias={only: 1000.0})["choices"][0]["text"]
    assert biased == "zzz"


def test_a_tool_call_is_forced_into_its_schema(llama):
    tool = {
        "type": "function",
        "function": {
            "name": "lookup",
            "parameters": {"type": "object", "properties": {"n": {"type": "boolean"}}},
        },
    }
    result = llama.create_chat_completion(
        [{"role": "user", "content": "x"}],
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "lookup"}},
        max_tokens=32,
        temperature=0,
    )
    call = result["choices"][0]["message"]["tool_calls"][0]["function"]
    assert call["name"] == "lookup" and call["arguments"].startswith("{")


def test_logprobs_with_logits_all_after_a_rollback():
    llama = Llama(DEFAULT_MODEL, n_ctx=1024, logits_all=True)
    assert llama.memory().active
    first = llama(text_with(FACT, 200), max_tokens=4, temperature=0, logprobs=2)
    again = llama(text_with(FACT, 200), max_tokens=4, temperature=0, logprobs=2)
    assert first["choices"][0]["text"] == again["choices"][0]["text"]
    np.testing.assert_allclose(
        first["choices"][0]["logprobs"]["token_logprobs"],
        again["choices"][0]["logprobs"]["token_logprobs"],
        atol=1e-4,
    )


class Drafts:
    """A draft model that proposes the expected text, with some wrong tokens."""

    def __init__(self, tokens, size):
        self.tokens, self.size, self.rng = tokens, size, np.random.default_rng(0)

    def __call__(self, input_ids, **_):
        draft = np.array(self.tokens[len(input_ids) :][: self.size], np.intc)
        wrong = self.rng.random(len(draft)) < self.rng.choice([0, 0.05, 0.5])
        return np.where(wrong, 7, draft)


@pytest.mark.parametrize("options", [{}, {"rewind": "off"}])
@pytest.mark.parametrize("size", [3, 100])
def test_drafts_do_not_change_the_answer(options, size):
    def answers(draft_model=None, **wanted):
        with closing(Llama(DEFAULT_MODEL, n_ctx=2048, draft_model=draft_model, **options)) as llama:
            tokens = llama.tokenize(text_with(FACT, 700).encode())[:1400]
            seen = []
            for token in llama.generate(tokens, temp=0, **wanted):
                seen.append((token, llama._last_logits()[token]))
                if len(seen) == 300:
                    break
            assert llama.n_tokens == len(tokens) + 299
            assert llama._input_ids.tolist() == [*tokens, *(token for token, _ in seen[:-1])]
            # another request finds a valid cache
            again = next(llama.generate([*tokens, *(token for token, _ in seen)], temp=0))
        return tokens, seen, again

    tokens, expected, last = answers()
    draft_model = Drafts([*tokens, *(token for token, _ in expected)], size)
    _, seen, again = answers(draft_model)
    assert [token for token, _ in seen] == [token for token, _ in expected] and again == last
    np.testing.assert_allclose([x for _, x in seen], [x for _, x in expected], atol=1e-3)
    # with what a logits processor and a stopping criterion see
    lengths = []
    _, seen, _ = answers(
        draft_model,
        logits_processor=lambda ids, logits: logits,
        stopping_criteria=lambda ids, _: bool(lengths.append(len(ids))),
    )
    assert [token for token, _ in seen] == [token for token, _ in expected]
    assert lengths[:300] == list(range(len(tokens), len(tokens) + 300))


@pytest.mark.parametrize(
    "draft", [None, 3, "text", [[1, 2]], [1.5], [1, -5], np.array([np.nan]), np.array(3), [[1], []]]
)
def test_drafts_that_are_not_tokens(draft):
    with closing(Llama(DEFAULT_MODEL, n_ctx=1024, draft_model=lambda _: draft)) as llama:
        with pytest.raises(RazorError, match=r"token"):
            llama("one two three", max_tokens=4)
        llama.draft_model = lambda _: []
        assert llama("one two three", max_tokens=4)


@pytest.mark.parametrize(("razor", "precision"), [(True, 1e-3), (False, 0.05)])
def test_drafts_in_a_completion(razor, precision):
    options = {"max_tokens": 20, "temperature": 0, "logprobs": 2}
    prompt = f"{text_with(FACT, 300)} {QUESTION}"
    with closing(Llama(DEFAULT_MODEL, n_ctx=2048, razor=razor)) as llama:
        expected = llama(prompt, **options)["choices"][0]
        tokens = llama.tokenize((prompt + expected["text"]).encode())
    draft_model = Drafts(tokens, 4)
    with closing(Llama(DEFAULT_MODEL, n_ctx=2048, razor=razor, draft_model=draft_model)) as llama:
        choice = llama(prompt, **options)["choices"][0]
    assert choice["text"] == expected["text"]
    for name in ("tokens", "text_offset"):
        assert choice["logprobs"][name] == expected["logprobs"][name]
    np.testing.assert_allclose(
        choice["logprobs"]["token_logprobs"],
        expected["logprobs"]["token_logprobs"],
        atol=precision,
    )


def test_pieces_of_any_length(llama):
    tokens = llama.tokenize("häß 🙂 text".encode(), add_bos=False)
    assert b"".join(map(llama.piece, tokens)) == "häß 🙂 text".encode()
    assert llama.piece(llama.token_eos()) == b"" and llama.is_end(llama.token_eos())
    assert llama.is_special(llama.token_eos()) and not llama.is_special(tokens[0])


def test_pickle_keeps_the_options():
    llama = Llama(DEFAULT_MODEL, n_ctx=2048, window=300, type_k="q8_0")
    copy = pickle.loads(pickle.dumps(llama))
    assert copy.plan.to_dict() == llama.plan.to_dict() and copy.plan.window == 300


# -- evaluation --


@pytest.mark.parametrize("n_keep", [1, 100, 560, 599, 600])
def test_going_back_gives_the_logits_of_a_fresh_evaluation(precise, n_keep):
    """n_keep 1 and 100 lie behind folds: eval() must notice that the cache cannot go back."""
    tokens, other = prompt(precise, 600), prompt(precise, 640)[600:]
    precise.reset()
    precise.eval(tokens)
    precise.n_tokens = n_keep
    precise.eval(other)
    assert precise.n_tokens == n_keep + 40 and precise.stats().n_tokens == n_keep + 40
    found = logits(precise)
    precise.reset()
    precise.eval(tokens[:n_keep] + other)
    np.testing.assert_allclose(found, logits(precise), atol=1e-4)


def test_prefill_reuses_what_it_can_and_is_what_generate_starts_from(llama):
    tokens = prompt(llama, 700)
    llama.reset()
    assert llama.prefill(tokens) == (0, 700, True)
    assert llama.prefill(tokens) == (700, 0, True)
    expected = greedy(llama, tokens)
    assert llama.prefill(tokens + expected[:5]).n_reused >= 700
    assert llama.prefill(tokens[:300]) == (299, 1, True), "a fold lies in between"
    assert llama.stats().n_tokens == 300
    llama.reset()
    assert llama.prefill(tokens).complete
    assert greedy(llama, tokens) == expected
    with pytest.raises(RazorError, match="no tokens"):
        llama.prefill([])


def test_logits_of_each_token_come_batch_by_batch(precise):
    tokens = prompt(precise, 1300)
    whole = Llama(
        DEFAULT_MODEL, n_ctx=2048, type_k="f32", type_v="f32", flash_attn=False, logits_all=True
    )
    whole.eval(tokens)
    expected = whole.scores[: len(tokens)]
    precise.reset()
    batches = [rows.copy() for rows in precise.eval_logits(tokens)]
    assert [len(rows) for rows in batches] == [512, 512, 276]
    np.testing.assert_allclose(np.concatenate(batches), expected, atol=1e-3)

    # some of them, after going back behind a fold
    precise.n_tokens = 700
    wanted = [i % 3 == 0 for i in range(500)]
    rows = np.concatenate([r.copy() for r in precise.eval_logits(tokens[700:1200], wanted)])
    np.testing.assert_allclose(rows, expected[700:1200][wanted], atol=1e-3)
    assert precise.n_tokens == 1200
    # the last one has no logits, so that generating evaluates it again
    assert greedy(precise, tokens[:1200]) == greedy(whole, tokens[:1200])
    with pytest.raises(ContextFullError):
        list(precise.eval_logits(tokens))


@pytest.mark.parametrize("n_calls", [0, 1, 50, 333, 700, 1100])
def test_a_stopped_prefill_leaves_a_valid_cache(precise, n_calls):
    tokens = prompt(precise, 700)
    precise.reset()
    precise.prefill(tokens)
    expected = logits(precise)
    precise.prefill([1] * 700)  # other tokens, that must not be taken for these
    precise.reset()
    calls = iter(range(n_calls))
    result = precise.prefill(tokens, stop=lambda: next(calls, None) is None)
    assert not result.complete and 0 <= precise.n_tokens < 700
    assert precise.n_tokens == result.n_evaluated
    if n_calls:
        assert precise.stats().n_tokens == precise.n_tokens
    resumed = precise.prefill(tokens)
    assert resumed.complete and resumed.n_reused == result.n_evaluated
    np.testing.assert_allclose(logits(precise), expected, atol=1e-4)


def test_an_exception_in_a_progress_function_leaves_a_valid_cache(llama):
    def progress(done, total, label):
        if done:
            raise KeyboardInterrupt

    tokens = prompt(llama, 700)
    llama.reset()
    with pytest.raises(KeyboardInterrupt):
        llama.prefill(tokens, progress=progress)
    assert llama.n_tokens in (0, 699), "a prompt that was not read by all layers is dropped"
    assert llama.prefill(tokens).complete


def test_a_full_context_is_an_error_with_numbers_and_no_harm(llama):
    tokens = prompt(llama, 600)
    llama.reset()
    llama.prefill(tokens)
    expected = greedy(llama, tokens)
    llama.prefill(tokens)
    with pytest.raises(ContextFullError, match="600 tokens .* 1449 more .* 2048"):
        llama.eval([1] * 1449)
    with pytest.raises(ContextFullError, match="2049 tokens, the context 2048"):
        llama.prefill([1] * 2049)
    assert llama.n_tokens == 600 and greedy(llama, tokens) == expected
    llama.reset()
    llama.eval([1] * 2048)
    with pytest.raises(ContextFullError):
        llama.eval([1])


def test_a_refused_batch_is_an_error_with_the_librarys_reason(llama):
    llama.reset()
    llama.eval(prompt(llama, 20))
    with pytest.raises(RazorError, match="llama_decode|invalid token|failed"):
        evaluation.eval_batch(llama, [llama.n_vocab() + 5])  # what eval() does not let through
    assert llama.n_tokens == llama.stats().n_tokens == 20
    llama.eval([1])


# -- state --


def test_a_state_continues_where_it_was_saved(llama):
    tokens = prompt(llama, 600)
    llama.reset()
    llama.prefill(tokens)
    state = llama.save_state()
    expected = greedy(llama, tokens)
    for target in (llama, Llama(DEFAULT_MODEL, n_ctx=2048)):
        target.prefill(prompt(llama, 50))
        target.load_state(pickle.loads(pickle.dumps(state)))
        assert target.n_tokens == 600 and target.stats().n_tokens == 600
        assert target.prefill(tokens).n_reused == 599  # one for its logits
        assert greedy(target, tokens) == expected


def test_the_ram_cache_of_the_base_class_works():
    llama = Llama(DEFAULT_MODEL, n_ctx=2048)
    expected = llama.create_chat_completion(MESSAGES, temperature=0)["choices"]
    llama.set_cache(llama_cpp.LlamaRAMCache())
    for _ in range(2):
        assert llama.create_chat_completion(MESSAGES, temperature=0)["choices"] == expected
        llama("something else", max_tokens=2)


@pytest.mark.parametrize(
    "other", [{"window": 300}, {"razor": False}, {"type_k": "q8_0"}, {"type_k_local": "q8_0"}]
)
def test_a_state_of_another_plan_is_refused_and_changes_nothing(llama, other):
    tokens = prompt(llama, 300)
    llama.prefill(tokens)
    expected = greedy(llama, tokens)
    llama.prefill(tokens)
    state = llama.save_state()
    target = Llama(DEFAULT_MODEL, n_ctx=2048, **other)
    target.prefill(tokens[:100])
    with pytest.raises(StateError, match="cannot be loaded: .+"):
        target.load_state(state)
    assert target.n_tokens == 100 and target.prefill(tokens).complete
    with pytest.raises(StateError, match="cannot be loaded: .+"):
        llama.load_state(target.save_state())
    assert llama.n_tokens == 300 and greedy(llama, tokens) == expected


def test_a_damaged_state_is_refused_and_the_context_stays_usable(llama):
    tokens = prompt(llama, 300)
    llama.prefill(tokens)
    expected = greedy(llama, tokens)
    llama.prefill(tokens)
    state = llama.save_state()
    state.llama_state = state.llama_state[: len(state.llama_state) // 2]
    with pytest.raises(
        StateError, match=f"{len(state.llama_state)} of its {state.llama_state_size}"
    ):
        llama.load_state(state)
    state.llama_state_size = len(state.llama_state)
    with pytest.raises(StateError, match="cannot be loaded"):
        llama.load_state(state)
    assert llama.n_tokens == llama.stats().n_tokens in (0, 300)
    assert llama.prefill(tokens).complete and greedy(llama, tokens) == expected
    state.n_tokens = 5000
    with pytest.raises(StateError, match="holds 5000 tokens, the context only 2048"):
        llama.load_state(state)


# -- errors and noise --


def test_bad_files_are_one_sentence(tmp_path):
    text = tmp_path / "text.gguf"
    text.write_text("not a model")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(DEFAULT_MODEL.read_bytes()[:-1000])
    for razor in (True, False):
        with pytest.raises((GGUFError, RazorError), match="text.gguf"):
            Llama(text, razor=razor)
        with pytest.raises((GGUFError, RazorError), match="cut.gguf"):
            Llama(cut, razor=razor)
        with pytest.raises(FileNotFoundError):
            Llama(tmp_path / "none.gguf", razor=razor)


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="names are Unicode there")
def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.gguf"
    shutil.copy(DEFAULT_MODEL, path)
    with pytest.raises(UnsupportedError, match="udcff.gguf' is not UTF-8, .* rename the file"):
        Llama(os.fsdecode(path))


def test_a_malformed_chat_template_is_one_sentence(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(DEFAULT_MODEL.read_bytes().replace(b"endfor", b"endfog"))
    llama = Llama(path)  # for plain text the template does not matter
    with pytest.raises(GGUFError, match="the model's chat template is malformed: .*endfog"):
        llama.create_chat_completion(MESSAGES)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_not_sampled(tmp_path, value):
    path = no_numbers(tmp_path / "model.gguf", value)
    with closing(Llama(path, n_ctx=256)) as llama:
        with pytest.raises(RazorError, match="computes logits that are not numbers"):
            llama("The secret code of", max_tokens=2)
        with pytest.raises(RazorError, match="computes logits that are not numbers"):
            next(llama.generate([1, 2, 3]))


def test_quiet_by_default_and_the_native_log_if_verbose(capfd, tmp_path):
    llama = Llama(DEFAULT_MODEL, n_ctx=2048)
    llama.create_chat_completion(MESSAGES, max_tokens=2)
    with pytest.raises(RazorError):
        llama.eval([llama.n_vocab() + 5])
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf([]))
    with pytest.raises(RazorError, match="could not be loaded: .*failed to load model"):
        Llama(broken, razor=False)
    llama.close()
    assert capfd.readouterr() == ("", "")
    Llama(DEFAULT_MODEL, n_ctx=2048, verbose=True).close()
    out, err = capfd.readouterr()
    assert out == "" and "llama_context" in err
    Llama(DEFAULT_MODEL, n_ctx=2048).close()
    assert capfd.readouterr() == ("", "")


def test_loading_reports_progress_and_can_be_stopped():
    seen = []
    Llama(DEFAULT_MODEL, progress=seen.append)
    assert seen[-1] == 1.0 and seen == sorted(seen)
    with pytest.raises(RazorError, match=r"loading .* was stopped: progress\(\) returned False"):
        Llama(DEFAULT_MODEL, progress=lambda part: False)

    def interrupt(part):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Llama(DEFAULT_MODEL, progress=interrupt)
    Llama(DEFAULT_MODEL)


def test_a_prompt_reports_progress(llama):
    tokens, seen = prompt(llama, 1100), []
    llama.reset()
    llama.prefill(tokens, progress=lambda *call: seen.append(call))
    done = [n for n, _, _ in seen]
    assert seen == [(n, 1100, "reading the prompt") for n in done]
    assert done == sorted(done) and [done[0], *done[-2:]] == [0, 1099, 1100]


def test_how_prompts_are_read(llama):
    tokens = prompt(llama, 1100)
    for prefill, full in (("auto", True), ("full", True), ("razor", False)):
        with closing(Llama(DEFAULT_MODEL, n_ctx=2048, prefill=prefill)) as model:
            assert model.memory().prefill == ("full" if full else "razor")
            assert model.memory().prefill_why == (None if full else "prefill='razor'")
            assert model.prefill(tokens) == (0, 1100, True)
            asked = model.plan.prefill_bytes(1099, model.n_embd()) if full else 0
            assert model.memory().prefill_bytes == asked
            first = logits(model)
            model.eval([1])
            assert model.prefill(tokens) == (1099, 1, True)
            np.testing.assert_array_equal(logits(model), first)
    with closing(Llama(DEFAULT_MODEL, n_ctx=2048, razor=False)) as model:
        assert (model.memory().prefill, model.memory().prefill_why) == ("full", None)
    with pytest.raises(UnsupportedError, match="prefill is 'fast', expected 'auto', 'full' or"):
        Llama(DEFAULT_MODEL, prefill="fast")


def test_a_prompt_without_memory_for_its_buffers(monkeypatch):
    monkeypatch.setattr(evaluation, "_SMALL", 0)
    monkeypatch.setattr(evaluation, "available_ram", lambda: 2**20)
    with closing(Llama(DEFAULT_MODEL, n_ctx=2048)) as model:
        tokens = prompt(model, 1100)
        assert model.prefill(tokens).complete
        why = r"the temporary buffers of a prompt of 1,099 tokens \(\d\.\d MiB\) do not fit"
        assert re.search(why, model.memory().prefill_why)
        assert model.memory().prefill_bytes == 0
        model.reset()
        assert model.prefill(tokens[:200]).complete and model.memory().prefill_why is None
    with closing(Llama(DEFAULT_MODEL, n_ctx=2048, prefill="full")) as model:
        with pytest.raises(RazorError, match=f"{why} into the free memory; use prefill='razor'"):
            model.prefill(tokens)
        assert model.prefill(tokens[:200]).complete


def test_a_plan_that_the_library_does_not_follow_is_noticed(monkeypatch):
    from razor_local import LibraryError

    make_params = native.make_params
    monkeypatch.setattr(native, "make_params", lambda *_, **__: make_params(None))  # razor off
    with pytest.raises(LibraryError, match="but the plan has"):
        Llama(DEFAULT_MODEL, n_ctx=2048)


def test_full_caches_on_cpus_have_our_attention(plain):
    """The same request has the same answer, however its prompt is split."""
    tokens = [i * i % 101 for i in range(400)]
    for options, own in (({}, True), ({"razor": False}, False), ({"flash_attn": False}, False)):
        with closing(Llama(plain, n_ctx=512, n_threads=1, **options)) as llama:
            memory = llama.memory()
            assert not memory.active and memory.own_attention == own
            llama.eval(tokens)
            whole = llama._last_logits().copy()
            llama.prefill(tokens[:-1])
            llama.eval(tokens[-1:])
            if own:
                np.testing.assert_allclose(llama._last_logits(), whole, rtol=0, atol=1e-5)
    assert Llama(DEFAULT_MODEL, n_ctx=2048).memory().own_attention


def test_progress_may_print_while_a_model_loads(capfd):
    printing = Thread(target=lambda: [print(f"beside {i}", flush=True) for i in range(200)])
    printing.start()
    Llama(DEFAULT_MODEL, n_ctx=256, progress=print)
    printing.join()
    said = capfd.readouterr().out  # lines of two threads may share a line
    assert "1.0" in said and said.count("beside ") == 200


def test_retrieval_is_an_alias_of_budget():
    plans = [
        Llama(DEFAULT_MODEL, n_ctx=2048, **{name: 0.5}).plan for name in ("budget", "retrieval")
    ]
    assert plans[0] == plans[1] and plans[0].retrieval_kv_heads == 12
    with pytest.raises(UnsupportedError, match="are the same option; pass budget alone"):
        Llama(DEFAULT_MODEL, budget=0.5, retrieval=0.5)


def test_threads_are_the_physical_cores_unless_they_are_given():
    from razor_local.common.machine import n_cores

    with closing(Llama(DEFAULT_MODEL, n_ctx=256)) as llama:
        assert llama.n_threads == llama.n_threads_batch == n_cores()
    with closing(Llama(DEFAULT_MODEL, n_ctx=256, n_threads=3)) as llama:
        assert llama.n_threads == llama.n_threads_batch == 3
    with closing(Llama(DEFAULT_MODEL, n_ctx=256, n_threads=1, n_threads_batch=2)) as llama:
        assert (llama.n_threads, llama.n_threads_batch) == (1, 2)


@pytest.mark.parametrize("razor", [3, None, "", "Auto", 0.5, b"x"])
def test_what_razor_cannot_be(razor):
    with pytest.raises(UnsupportedError) as caught:
        Llama(DEFAULT_MODEL, razor=razor)
    assert str(caught.value) == (
        f"razor is {razor!r}, expected True, False, 'auto', a Profile or the path of a sidecar"
    )


def test_caches_share_what_a_source_reads():
    """The caches are the same as if they had read their prompts themselves."""
    n_head_kv = read_model_shape(DEFAULT_MODEL).n_head_kv
    every = Profile(retrieval=tuple(np.ones(n, np.uint8) for n in n_head_kv))
    with ExitStack() as stack:

        def open_llama(**options):
            return stack.enter_context(closing(Llama(DEFAULT_MODEL, n_ctx=2048, **options)))

        alone, first, second = open_llama(), open_llama(), open_llama(window=128)
        source = open_llama(razor=every)
        assert set_source(first, source) and set_source(second, source)
        tokens = prompt(alone, 1500)
        for end in (1500, 1200, 1499):
            for llama in (alone, first, second):
                llama.reset()
            assert alone.prefill(tokens[:end]) == first.prefill(tokens[:end])
            assert first.save_state().llama_state == alone.save_state().llama_state
            assert np.array_equal(logits(first), logits(alone))
            n_read = source.n_tokens
            assert second.prefill(tokens[:end]).complete and source.n_tokens == n_read >= end - 1
        # a conversation: the second prompt is read by each cache, after what it has dropped
        more = [*tokens[:1499], *prompt(alone, 400)]
        assert alone.prefill(more) == first.prefill(more)
        assert np.array_equal(logits(first), logits(alone)) and source.n_tokens == n_read
        # a stop while the source reads
        alone.reset()
        first.reset()
        assert not first.prefill(tokens[::-1], stop=lambda: source.n_tokens == 0).complete
        assert first.n_tokens == 0
        assert first.prefill(tokens).complete and alone.prefill(tokens).complete
        assert np.array_equal(logits(first), logits(alone))
        assert not set_source(open_llama(type_k="q8_0"), source)
        assert not set_source(open_llama(prefill="razor"), source)
        assert not set_source(source, source)
        assert set_source(first, None) and first._source is None
