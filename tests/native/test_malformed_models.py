"""GGUF files whose metadata no real model has: one sentence, and the process goes on.

What goes on is a process of its own here: a failure would end this one.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType

from razor_local.cli.chat import DEFAULT_MODEL
from tests.support.tiny_models import TinySpec, make_model, razor_kv

MAIN = "from razor_local.cli import main; main(prog_name='razor-local')"
U8, U32, F32, STR = (getattr(GGUFValueType, x) for x in ("UINT8", "UINT32", "FLOAT32", "STRING"))
ARRAY = GGUFValueType.ARRAY
N = 128
SPEC = TinySpec(n_layer=2, head_dim=32, n_vocab=N)
TOKENS = ["<s>", *(chr(c) for c in range(0x21, 0x7F)), *(f"word{i}" for i in range(N - 95))]
VOCABULARY = {
    "tokenizer.ggml.model": ("gpt2", STR),
    "tokenizer.ggml.pre": ("qwen2", STR),
    "tokenizer.ggml.tokens": (TOKENS, ARRAY),
    "tokenizer.ggml.merges": (["w o", "r d"], ARRAY),
    "tokenizer.ggml.token_type": (np.ones(N, np.int32), ARRAY),
    "tokenizer.ggml.bos_token_id": (0, U32),
    "tokenizer.ggml.eos_token_id": (0, U32),
    "tokenizer.chat_template": ("{{ messages[-1]['content'] }}", STR),
}
GGML = "tokenizer.ggml."

# name: (changed keys, None for a key that is not there; what the sentence says)
MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "tokens u8": ({"tokens": (bytes(N), ARRAY)}, "invalid gguf type for tokenizer.ggml.tokens"),
    "tokens no array": ({"tokens": ("x", STR)}, "invalid gguf type for tokenizer.ggml.tokens"),
    "tokens missing": ({"tokens": None}, "cannot find tokenizer vocab"),
    "tokens too few": ({"tokens": (TOKENS[:50], ARRAY)}, "has wrong shape"),
    "tokens all the same": ({"tokens": (["a"] * N, ARRAY)}, "token_to_id.size()) failed ("),
    "tokens not UTF-8": (
        {"tokens": ([b"\xff%d" % i for i in range(N)], ARRAY)},
        "has a token that is not UTF-8 (b'\\xff0'",
    ),
    "token_type strings": ({"token_type": (["1"] * N, ARRAY)}, "tokenizer.ggml.token_type"),
    "token_type too short": ({"token_type": (np.ones(5, np.int32), ARRAY)}, "toktypes (5 < 128)"),
    "token_type all bytes": ({"token_type": (np.full(N, 6, np.int32), ARRAY)}, "vocabulary: "),
    "scores strings": ({"scores": (["1"] * N, ARRAY)}, "tokenizer.ggml.scores"),
    "scores f64": ({"scores": (np.ones(N), ARRAY)}, "tokenizer.ggml.scores"),
    "merges missing": ({"merges": None}, "cannot find tokenizer merges"),
    "merges i32": ({"merges": (np.ones(3, np.int32), ARRAY)}, "tokenizer.ggml.merges"),
    "model unknown": ({"model": ("none of these", STR)}, "unknown tokenizer: 'none of these'"),
    "model none": ({"model": ("none", STR)}, "the text cannot be split into tokens"),
    "pre unknown": ({"pre": ("x", STR)}, "unknown pre-tokenizer type: 'x'"),
    "bos string": ({"bos_token_id": ("0", STR)}, "tokenizer.ggml.bos_token_id"),
    "no tokens for bytes": ({"model": ("llama", STR)}, "the text cannot be split into tokens"),
    "experts without number": (
        {"llama.expert_count": (4, U32)},
        "llama.expert_used_count is 0, expected 1 to 4",
    ),
    "rope scaling": (
        {"llama.rope.scaling.type": ("x", STR)},
        "llama.rope.scaling.type is 'x', expected one of",
    ),
    "epsilon": (
        {"llama.attention.layer_norm_rms_epsilon": (-1.0, F32)},
        "llama.attention.layer_norm_rms_epsilon is -1, expected 0 to 1",
    ),
    "epsilon nan": (
        {"llama.attention.layer_norm_rms_epsilon": (float("nan"), F32)},
        "llama.attention.layer_norm_rms_epsilon is nan, expected a finite number",
    ),
}

USE = """
import sys
from razor_local import Llama, RazorError
for path in sys.argv[1:]:
    for razor in (True, False):
        try:
            llama = Llama(path, n_ctx=256, razor=razor)
            llama("\\u00e9 x", max_tokens=1)
            print("nothing was refused")
        except RazorError as error:
            print(error)
"""


def make(path: Path, changes: dict[str, Any]) -> Path:
    kv = VOCABULARY | razor_kv(((0, 1), (0, 0)), window_min=16)
    for key, value in changes.items():
        key = key if "." in key else GGML + key
        kv[key] = value
        if value is None:
            del kv[key]
    return make_model(path, SPEC, kv)


def python(code: str, *args: Any, message: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, input=message, capture_output=True, text=True)


def test_the_unchanged_model_answers(tmp_path):
    """The table's other end."""
    done = python(MAIN, "chat", "-n", 2, make(tmp_path / "m.gguf", {}), message="word")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", MALFORMED)
def test_chat_says_one_sentence(name, tmp_path):
    changes, says = MALFORMED[name]
    done = python(MAIN, "chat", make(tmp_path / "m.gguf", changes), message="é x")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == ""
    assert line.startswith("Error: ") and says in line


def test_python_gets_exceptions_and_goes_on(tmp_path):
    paths = [make(tmp_path / f"{i}.gguf", MALFORMED[name][0]) for i, name in enumerate(MALFORMED)]
    done = python(USE, *paths)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "") and len(lines) == 2 * len(paths)
    for i, name in enumerate(MALFORMED):
        for line in lines[2 * i : 2 * i + 2]:
            assert MALFORMED[name][1] in line, name


def test_every_command_refuses_a_bad_hyper_parameter(tmp_path):
    path = make(tmp_path / "m.gguf", MALFORMED["epsilon"][0])
    out = tmp_path / "out.gguf"
    for command in (["convert", path, "-o", out], ["inspect", path], ["fit", path], ["chat", path]):
        done = python(MAIN, *command, message="x")
        assert done.returncode == 1 and done.stdout == ""
        assert MALFORMED["epsilon"][1] in done.stderr and done.stderr.count("\n") == 1
    assert not out.exists()


def test_overrides_of_metadata_are_checked(tmp_path):
    code = """
import sys
from razor_local import Llama, RazorError
try:
    Llama(sys.argv[1], kv_overrides={"llama.attention.layer_norm_rms_epsilon": -1.0})("a")
except RazorError as error:
    print(error)
"""
    done = python(code, make(tmp_path / "m.gguf", {}))
    assert (done.returncode, done.stderr) == (0, "")
    says = "kv_overrides: llama.attention.layer_norm_rms_epsilon is -1.0, expected 0 to 1"
    assert done.stdout.strip() == says


def test_a_grammar_that_no_token_fits_is_an_exception(tmp_path):
    """Nothing is left to choose from, so the library chooses what the grammar forbids."""
    code = """
import sys
from razor_local import Llama, RazorError
from llama_cpp import LlamaGrammar
llama = Llama(sys.argv[1], n_ctx=256)
grammar = LlamaGrammar.from_string('root ::= "\u00e9"')
try:
    llama("word", grammar=grammar, max_tokens=2)
except RazorError as error:
    print(error)
"""
    done = python(code, make(tmp_path / "m.gguf", {}))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("the next token cannot be chosen: Unexpected empty grammar stack")


def test_an_exception_that_nobody_catches_is_one_sentence(tmp_path):
    """Of what the bindings call directly."""
    code = f"""
from razor_local.llama import C, Llama
llama = Llama({str(DEFAULT_MODEL)!r}, n_ctx=256)
C.llama_vocab_get_text(llama._model.vocab, 10**9)
"""
    done = python(code)
    assert done.returncode not in (0, 1) and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: a C++ exception that nobody caught ended the process: vector")
    assert line.endswith("; the model file is malformed, or this is a bug")
