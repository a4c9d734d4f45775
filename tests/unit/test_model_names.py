"""What MODEL may be, which file a quantization means, and the catalog."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from razor_local.cli import COMMANDS, main
from razor_local.errors import RazorError
from razor_local.models import parse, resolve
from razor_local.models.catalog import entries, nearest, search
from razor_local.models.names import HubName
from razor_local.models.quants import choose, model_files, quant_of

FILES = [
    "README.md",
    "imatrix.gguf",
    "m-F16.gguf",
    "m-Q4_0.gguf",
    "m-Q4_K_M.gguf",
    "m-Q8_0-00001-of-00002.gguf",
    "m-Q8_0-00002-of-00002.gguf",
    "mmproj-m-Q4_K_M.gguf",
]


# -- quantizations


@pytest.mark.parametrize(
    ("files", "quant", "chosen"),
    [
        (FILES, "", ["m-Q4_K_M.gguf"]),
        (FILES, "q4_0", ["m-Q4_0.gguf"]),
        (FILES, "Q8_0", ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"]),
        (FILES[:-2], "Q8_0", []),  # a part is missing
        (FILES, "Q6_K", []),
        (FILES, "Q4_K", []),  # whole words, not the beginning of Q4_K_M
        ([name for name in FILES if "Q4_K_M" not in name], "", [FILES[5], FILES[6]]),
        (["b-F16.gguf", "a-IQ2_M.gguf"], "", ["b-F16.gguf"]),  # neither default: the first
        (["mmproj-F16.gguf"], "", []),
        (["README.md"], "", []),
        (["Q4_K_M/m.gguf"], "Q4_K_M", []),  # as in llama.cpp, a "-" or "." follows the quant
        (["UD/m-UD-Q4_K_M.gguf"], "q4_k_m", ["UD/m-UD-Q4_K_M.gguf"]),
        (["m.Q4_K_M.gguf"], "", ["m.Q4_K_M.gguf"]),
    ],
)
def test_choice_of_a_file(files, quant, chosen) -> None:
    assert choose(files, quant) == chosen


def test_models_among_files() -> None:
    assert model_files(FILES) == FILES[2:6]
    assert [quant_of(name) for name in FILES[2:6]] == ["F16", "Q4_0", "Q4_K_M", "Q8_0"]
    assert quant_of("model.gguf") == ""


# -- names


def test_a_file_comes_before_a_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(parse("smollm2:135m")) == "smollm2:135m" != parse("smollm2:135m")
    Path("smollm2:135m").touch()
    assert parse("smollm2:135m") == Path("smollm2:135m")
    assert parse("no/file") == Path("no/file") and parse("no.gguf") == Path("no.gguf")
    assert resolve("no.gguf") == Path("no.gguf")  # who opens it says that it is missing


def test_names_of_repositories() -> None:
    assert parse("hf:a/b-GGUF") == HubName("a/b-GGUF")
    assert parse("hf:a/b.c_d-GGUF:q4_k_m") == HubName("a/b.c_d-GGUF", "q4_k_m")
    for wrong in ("hf:", "hf:a", "hf:a/b/c", "hf:a/../b", "hf:a/b:", "hf:a/b:x/y", "hf:a/b.git"):
        with pytest.raises(RazorError, match="expected hf:OWNER/REPO or hf:OWNER/REPO:QUANT"):
            parse(wrong)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf.co/a/b-GGUF", "hf:a/b-GGUF"),  # as in ollama
        ("hf.co/a/b-GGUF:Q8_0", "hf:a/b-GGUF:Q8_0"),
        ("huggingface.co/a/b-GGUF:Q8_0", "hf:a/b-GGUF:Q8_0"),
        ("https://huggingface.co/a/b-GGUF", "hf:a/b-GGUF"),
        ("HTTPS://www.HuggingFace.co/a/b-GGUF/", "hf:a/b-GGUF"),
        ("https://hf.co/a/b-GGUF?local-app=x#readme", "hf:a/b-GGUF"),
        ("https://huggingface.co/a/b-GGUF/tree/main", "hf:a/b-GGUF"),
        ("https://huggingface.co/a/b-GGUF/blob/main/m-Q4_0.gguf", "hf:a/b-GGUF/m-Q4_0.gguf"),
        ("https://huggingface.co/a/b/resolve/main/x/m%201.gguf?download=true", "hf:a/b/x/m 1.gguf"),
        ("https://huggingface.co/a/b?show_file_info=m-Q4_0.gguf", "hf:a/b/m-Q4_0.gguf"),
        ("hf:https://huggingface.co/a/b", "hf:a/b"),  # -hf
        ("hf:a/b/m.gguf", "hf:a/b/m.gguf"),
    ],
)
def test_addresses_of_the_hub(text, name) -> None:
    parsed = parse(text)
    assert isinstance(parsed, HubName) and str(parsed) == name and parse(name) == parsed


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("https://huggingface.co/", "is not the name of a repository"),
        ("https://huggingface.co/a", "is not the name of a repository"),
        ("https://huggingface.co/datasets/a/b", "is not the name of a repository"),
        ("https://huggingface.co/a/b/blob/main/README.md", "is not the name of a repository"),
        ("https://huggingface.co/a/b/blob/main/../x.gguf", "is not the name of a repository"),
        ("https://huggingface.co/a/b/tree/v2", "names the revision v2"),
        ("https://example.org/m.gguf", "is not a Hugging Face URL; download the file"),
        ("hf:a/b/../c.gguf", "is not the name of a repository"),
    ],
)
def test_other_addresses_are_refused(text, why) -> None:
    with pytest.raises(RazorError, match=re.escape(f"'{text}' {why}")):
        parse(text)


def test_a_file_of_a_repository() -> None:
    assert HubName("a/b", file="m-Q4_0.gguf").choose(FILES) == ["m-Q4_0.gguf"]
    assert HubName("a/b", file=FILES[6]).choose(FILES) == [FILES[5], FILES[6]]
    assert HubName("a/b", file="m-Q4_1.gguf").choose(FILES) == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("llama3.1", "llama3.1:8b"),
        ("llama3.2:latest", "llama3.2:3b"),
        ("Qwen3", "qwen3:8b"),
        ("SmolLM2:LATEST", "smollm2:1.7b"),
        ("SmolLM2:135M", "smollm2:135m"),
    ],
)
def test_names_without_a_tag(text, name) -> None:
    assert str(parse(text)) == name


def test_unknown_names_and_what_is_near() -> None:
    assert nearest("llama3") == ["llama3.1:8b", "llama3.2:1b", "llama3.2:3b"]
    assert nearest("qwen3:06b")[0] == "qwen3:0.6b"
    with pytest.raises(RazorError) as error:
        parse("smolm2:135m")
    assert str(error.value).startswith(
        "'smolm2:135m' is neither a file nor the name of a model; similar names: smollm2:135m, "
    )
    with pytest.raises(RazorError, match="name of a model; 'razor-local models search' shows"):
        parse("xyzzy")


# -- the catalog


def test_catalog_is_well_formed() -> None:
    for name, entry in entries().items():
        assert re.fullmatch(r"[a-z0-9.-]+:[a-z0-9.]+", name) and parse(name) is entry
        assert parse(f"hf:{entry.repo}") == HubName(entry.repo)
        assert model_files([entry.file]) == [entry.file] and entry.license
        assert entry.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.sha256)
        assert (entry.sha256 is None) == (entry.bytes is None)
        if entry.wheel is not None:
            assert entry.wheel.member.endswith(entry.file) and entry.sha256
    latest = [entry.family for entry in entries().values() if entry.latest]
    assert sorted(latest) == sorted({entry.family for entry in entries().values()})
    assert [entry.name for entry in search("smollm2 135")] == ["smollm2:135m"]
    assert len(search("")) == len(entries()) and search("no such thing") == []


def run(*args: object):
    return CliRunner().invoke(main, list(map(str, args)))


def test_search() -> None:
    done = run("models", "search", "mit")
    assert done.exit_code == 0 and "phi4:14b" in done.stdout and "qwen" not in done.stdout[:40]
    assert '"name": "phi4:14b"' in run("models", "search", "phi4", "--json").stdout
    done = run("models", "search", "nothing")
    assert done.exit_code == 1 and "no name of the catalog contains 'nothing'" in done.stderr


# -- commands


def test_all_commands_take_a_name() -> None:
    for name in COMMANDS:
        found = main.get_command(None, name)
        for command in getattr(found, "commands", {"": found}).values():
            params = {param.name: param for param in command.params}
            if "model" in params:
                assert "-hf" in params["hf_repo"].opts, command.name


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["chat", "lama"], "'lama' is neither a file nor the name of a model"),
        (["inspect", "hf:x"], "'hf:x' is not the name of a repository"),
        (["fit", "-hf", "x"], "'hf:x' is not the name of a repository"),
        (["verify", "-hf", "a/b", "llama3.2:1b"], "MODEL and --hf-repo exclude each other"),
        (["bench", "qwen9:1b"], "similar names: qwen3:"),
        (["eval", "needle", "qwen9"], "is neither a file nor the name of a model"),
        (["convert", "qwen9", "-o", "x.gguf"], "is neither a file nor the name of a model"),
        (["models", "path", "./x.gguf"], "x.gguf is a path; expected the name of a model"),
    ],
)
def test_mistakes_end_with_code_2(args, text) -> None:
    done = run(*args)
    assert done.exit_code == 2 and text in done.stderr, done.stderr


def test_without_a_model_the_built_in_one_is_used(tmp_path) -> None:
    assert "24 KV heads" in run("inspect", "-c", "8192").stdout
