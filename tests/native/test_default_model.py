"""The model in the package: small, complete, with a profile that saves memory at its own length."""

from __future__ import annotations

import re
from importlib.resources import files
from random import Random

import pytest

from razor_local import Llama
from razor_local.evals.haystack import MadeText
from razor_local.evals.questions import Prompts, fit_text
from razor_local.gguf.header import ARRAY, STRING, read_header
from razor_local.model_file import read_model_shape, read_profile
from razor_local.plan import make_plan
from tests.support.cli import piped

PATH = files("razor_local") / "data" / "razor-default.gguf"


@pytest.fixture(scope="module")
def header():
    return read_header(PATH)


def test_it_is_small_and_complete(header):
    assert header.file_size <= 16 << 20
    assert header.string("general.name") == "razor-default"
    assert header.string("general.license") == "MIT"
    assert "<|im_start|>" in header.string("tokenizer.chat_template")
    assert header.entries["tokenizer.ggml.tokens"].count == 1024
    tokens = header.entries["tokenizer.ggml.tokens"]
    assert (tokens.kind, tokens.element) == (ARRAY, STRING)
    assert read_model_shape(PATH).n_ctx_train == 8192


def test_razor_is_active_at_its_own_length():
    shape, profile = read_model_shape(PATH), read_profile(PATH)
    assert [layer.tolist() for layer in profile.retrieval] == [
        [0, 0, 0, 0],
        [1, 1, 1, 1],
        *[[0, 0, 0, 0]] * 4,
    ]
    plan = make_plan(shape, profile, 0)
    assert plan.active and plan.n_ctx == 8192 and plan.window == 1024
    assert plan.share <= 0.35
    assert make_plan(shape, profile, 0, "q8_0", "q8_0").kv_bytes <= 0.19 * plan.kv_bytes_full_f16


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
def test_the_bytes_of_the_readme_are_allocated(kv_type):
    """The README's table holds the plan (tests/unit/test_readme.py)."""
    plan = make_plan(read_model_shape(PATH), read_profile(PATH), 8192, kv_type, kv_type)
    memory = Llama(PATH, n_ctx=8192, type_k=kv_type, type_v=kv_type).memory()
    assert (memory.kv_bytes, memory.kv_bytes_full) == (plan.kv_bytes, plan.kv_bytes_full)


@pytest.mark.parametrize("depth", [0, 0.3, 0.7])
def test_a_fact_in_a_text_of_6000_tokens_is_found_from_an_empty_folder(tmp_path, depth):
    """As a user's script would paste it, with razor active."""
    question = "What is the secret code of Marlow?"
    text, n_prompt = fit_text(
        Prompts(PATH),
        lambda: MadeText().pieces(Random(f"{depth}")),
        [(depth, "The secret code of Marlow is 48213.")],
        question,
        6000,
    )
    assert 5900 < n_prompt <= 6000
    done = piped(f"{text}\n\n{question}", tmp_path)
    assert done.stdout == "The secret code of Marlow is 48213.\n", done.stderr
    assert int(re.search(r"prompt (\d+) new tokens", done.stderr)[1]) == n_prompt
    assert int(re.search(r"instead of 48.0 MiB \(−(\d+) %\)", done.stderr)[1]) >= 65
