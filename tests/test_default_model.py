"""The model in the package: small, complete, with a profile that saves memory at its own length."""

from __future__ import annotations

from importlib.resources import files

import pytest

from razor_local.gguf_header import ARRAY, STRING, read_header
from razor_local.plan import make_plan
from razor_local.profile import read_model_shape, read_profile

PATH = files("razor_local") / "data" / "razor-default.gguf"


@pytest.fixture(scope="module")
def header():
    return read_header(PATH)


def test_it_is_small_and_complete(header):
    assert header.file_size <= 8 << 20
    assert header.string("general.name") == "razor-default"
    assert header.string("general.license") == "MIT"
    assert "<|im_start|>" in header.string("tokenizer.chat_template")
    assert header.entries["tokenizer.ggml.tokens"].count == 1024
    tokens = header.entries["tokenizer.ggml.tokens"]
    assert (tokens.kind, tokens.element) == (ARRAY, STRING)
    assert read_model_shape(PATH).n_ctx_train == 2048


def test_razor_is_active_at_its_own_length():
    shape, profile = read_model_shape(PATH), read_profile(PATH)
    assert [layer.tolist() for layer in profile.retrieval] == [
        [0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0],
    ]  # fmt: skip
    plan = make_plan(shape, profile, 0)
    assert plan.active and plan.n_ctx == 2048 and plan.cells == 512
    assert plan.share < 0.4
