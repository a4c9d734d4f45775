"""inspect: exact output, and JSON that agrees with the planner."""

from __future__ import annotations

import json

import pytest
from razor_local.converters.write import write_sidecar

from razor_local.model_file import read_model_shape, read_profile
from razor_local.plan import make_plan
from tests.support.cli import run
from tests.support.gguf_bytes import U32, kv, razor_keys, small_model
from tests.support.tiny_models import TinySpec, make_model, razor_kv

MASK = [[1, 0], [0, 0], [1, 1]]


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect")
    razor = razor_kv(MASK, window_min=512, window_divisor=8)
    make_model(path / "razor.gguf", TinySpec(n_ctx_train=4096), razor)
    make_model(path / "plain.gguf", TinySpec(n_ctx_train=4096))
    make_model(path / "odd.gguf", TinySpec(head_dim=48))
    write_sidecar(path / "plain.gguf", path / "side.gguf", read_profile(path / "razor.gguf"))
    return path


def test_a_model_with_a_profile(folder):
    """Rows of 64 bytes; 4 + 4 + 512 + 128 + 64 = 712 -> 768 cells; 3 KV heads keep 4,096."""
    code, stdout, stderr = run("inspect", folder / "razor.gguf")
    assert (code, stderr) == (0, "")
    assert lines(stdout) == [
        "model    tiny llama: llama, 3 layers, 4/2 query/KV heads of size 32,"
        " trained for 4,096 tokens",
        "profile  3 of 6 KV heads are retrieval heads (50.0%), 4 sinks,"
        " window max(512, context/8), compensation on",
        "source   the metadata of the model file",
        "context  4,096 tokens, K f16, V f16, flash attention on",
        "plan     3 KV heads keep 4,096 tokens; 3 keep 4 sinks and the last 512"
        " (768 cells each, folded in blocks of 128)",
        "",
        "layer  KV heads (# retrieval, . local)  retrieval   MiB",
        "    0  #.                                     1/2  0.59",
        "    1  ..                                     0/2  0.19",
        "    2  ##                                     2/2  1.00",
        "",
        "KV cache         full MiB  razor MiB  razor / full",
        "f16 (this plan)      3.00       1.78         59.4%",
        "q8_0                 1.59       0.95         59.5%",
        "q4_0                 0.84       0.50         59.6%",
    ]


def test_a_model_without_a_profile(folder):
    code, stdout, stderr = run("inspect", folder / "plain.gguf", "-c", 1000, "-ctk", "q8_0")
    note = "the context has 1,024 tokens, because llama.cpp rounds 1,000 up to a multiple of 256"
    assert (code, stderr) == (0, f"note: {note}\n")
    out = lines(stdout)
    assert out[1:4] == [
        "profile  none: every KV head keeps every token; 'razor-local convert' adds one",
        "context  1,024 tokens, K q8_0, V f16, flash attention on",
        "plan     full cache: no profile",
    ]
    assert out[-5:] == [
        "KV cache              full MiB",
        "q8_0/f16 (this plan)      0.57",
        "f16                       0.75",
        "q8_0                      0.40",
        "q4_0                      0.21",
    ]


def test_types_of_local_heads(folder):
    """A row takes 64 bytes in retrieval heads, and 34 (K) or 18 (V) bytes in local heads."""
    code, stdout, stderr = run("inspect", folder / "razor.gguf", "-ctlk", "q8_0", "-ctlv", "q4_0")
    assert (code, stderr) == (0, "")
    out = lines(stdout)
    assert out[3] == (
        "context  4,096 tokens, K f16, V f16 (local heads K q8_0, V q4_0), flash attention on"
    )
    assert out[-5:] == [
        "KV cache   full MiB  razor MiB  razor / full",
        "this plan      3.00       1.62         53.9%",
        "f16            3.00       1.78         59.4%",
        "q8_0           1.59       0.95         59.5%",
        "q4_0           0.84       0.50         59.6%",
    ]
    _, stdout, _ = run("inspect", folder / "razor.gguf", "-c", 768, "-ctlk", "q8_0")
    assert "(the KV types of local heads have no effect)\n" in stdout


def test_a_context_too_short_for_razor_says_so(folder):
    _, stdout, _ = run("inspect", folder / "razor.gguf", "-c", 768)
    said = "plan     full cache: RazorAttention saves nothing up to 768 tokens of context\n"
    assert said in stdout


def test_sidecar(folder):
    side = folder / "side.gguf"
    whole = run("inspect", folder / "razor.gguf")
    code, stdout, stderr = run("inspect", folder / "plain.gguf", "--sidecar", side)
    assert stdout.splitlines()[2] == f"source   a sidecar ({side})"
    stdout = stdout.replace(f"a sidecar ({side})", "the metadata of the model file")
    assert (code, stdout, stderr) == whole
    assert run("inspect", folder / "side.gguf") == whole  # a sidecar can be inspected alone
    code, stdout, stderr = run("inspect", folder / "odd.gguf", "--sidecar", folder / "side.gguf")
    assert code == 1 and stdout == "" and "sidecar of another model file" in stderr


def test_json_is_the_plan(folder):
    code, stdout, stderr = run(
        "inspect", folder / "razor.gguf", "-c", 32768, "-ctk", "q8_0", "-ctv", "q4_0", "--json"
    )
    assert (code, stderr) == (0, "")
    data = json.loads(stdout)
    shape = read_model_shape(folder / "razor.gguf")
    plan = make_plan(shape, read_profile(folder / "razor.gguf"), 32768, "q8_0", "q4_0")
    assert plan.to_dict().items() <= data.items()
    assert (data["n_ctx"], data["type_k"], data["type_v"]) == (32768, "q8_0", "q4_0")
    assert (data["kv_heads"], data["retrieval_kv_heads"]) == (6, 3)
    assert (data["sink_tokens"], data["window"], len(data["layers"])) == (4, 4096, 3)
    assert data["kv_bytes_full_as"] == {
        t: plan.kv_bytes_full_as(t) for t in ("f16", "q8_0", "q4_0")
    }
    assert data["model"]["fingerprint"] == shape.fingerprint
    assert data["profile"]["retrieval"] == MASK


def test_json_without_a_profile(folder):
    data = json.loads(run("inspect", folder / "plain.gguf", "--json")[1])
    assert data["profile"] is None and data["active"] is False
    assert data["kv_bytes"] == data["kv_bytes_full"] == 4096 * 6 * 2 * 64
    assert data["retrieval_kv_heads"] == data["kv_heads"] == 6


def test_head_size_that_quantized_types_do_not_fit(folder):
    code, stdout, stderr = run("inspect", folder / "odd.gguf", "-ctk", "q8_0")
    assert (code, stdout) == (1, "")
    assert stderr == (
        "Error: a q8_0 KV cache needs a head size that is a multiple of 32, this model has 48;"
        " use f16\n"
    )
    _, stdout, _ = run("inspect", folder / "odd.gguf")
    assert "q8_0             head size does not fit" in stdout
    assert (
        json.loads(run("inspect", folder / "odd.gguf", "--json")[1])["kv_bytes_full_as"]["q4_0"]
        is None
    )


def test_quantized_v_needs_flash_attention(folder):
    code, stdout, stderr = run("inspect", folder / "razor.gguf", "-ctv", "q8_0", "-fa", "off")
    assert (code, stdout) == (1, "")
    assert stderr == (
        "Error: a quantized V cache (q8_0) needs flash attention; switch it on or use f16 for V\n"
    )


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (small_model(razor_keys([1, 0, 0, 7])), "layer 1 holds other values than 0 and 1"),
        (small_model(razor_keys([1, 0, 0, 0]))[:-1], "the file ends inside tensor 'b.weight'"),
        (small_model([kv("razor.version", U32, 7)]), "of version 7, this razor-local reads"),
        (b"not a model", "not a GGUF file"),
    ],
)
def test_malformed_files_are_one_line(tmp_path, raw, text):
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    code, stdout, stderr = run("inspect", path)
    assert (code, stdout) == (1, "")
    assert stderr.startswith(f"Error: {path}: ") and text in stderr and stderr.count("\n") == 1


def test_a_name_cannot_control_the_terminal(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(small_model().replace(b"small", b"\x1b[2Jx"))
    _, stdout, _ = run("inspect", path)
    assert lines(stdout)[0].startswith(r"model    \x1b[2Jx: llama")


def test_features_that_razor_does_not_support_are_noted(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(small_model([kv("llama.attention.key_length_mla", U32, 64)]))
    code, stdout, stderr = run("inspect", path)
    assert code == 0 and stdout and stderr.startswith("Note: the model has multi-head latent")


def test_help_names_every_command_that_exists():
    code, stdout, _ = run("--help")
    assert code == 0
    for command in ("chat", "convert", "doctor", "inspect"):
        assert f"\n  {command} " in stdout
        assert "Usage: razor-local " + command in run(command, "--help")[1]
    assert run("nonsense")[0] == 2


def test_a_narrow_terminal_cuts_no_number(monkeypatch):
    from razor_local.cli.params import DEFAULT_MODEL

    monkeypatch.setenv("COLUMNS", "200")
    wide = run("inspect", DEFAULT_MODEL)
    monkeypatch.setenv("COLUMNS", "30")
    assert run("inspect", DEFAULT_MODEL) == wide
