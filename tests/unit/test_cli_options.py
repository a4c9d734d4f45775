"""Options are matched by their whole names, and read from llama.cpp's environment variables."""

from __future__ import annotations

import shlex
from typing import Any

import click
import pytest
from click.testing import CliRunner

from razor_local.cli import COMMANDS, main
from razor_local.cli.chat import chat
from razor_local.cli.chat_commands import SETTINGS
from razor_local.cli.generation import ENVVARS
from razor_local.cli.generation import _unescaped as unescaped
from razor_local.cli.parser import Command, Group
from razor_local.cli.run import run
from tests.support.cli import run as razor_local
from tests.support.commands import PAGE, all_examples, commands, examples, page


def parsed(*args: str, command: click.Command = run, **env: str) -> dict[str, Any]:
    """Return the parameters of a command without calling it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        context = command.make_context(command.name, list(args), help_option_names=["-h", "--help"])
        return context.params


def refusal(*args: str, **env: str) -> str:
    with pytest.raises(click.UsageError) as caught:
        parsed(*args, **env)
    return caught.value.format_message()


def test_all_commands_match_options_by_their_whole_names():
    for name, command in commands().items():
        assert isinstance(command, (Command, Group)), name


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["-sys", "ys"], {"system": "ys", "seed": -1}),
        (["--system-prompt", "ys"], {"system": "ys"}),
        (["-s", "7"], {"seed": 7, "system": None}),
        (["-ctk", "q8_0"], {"cache_type_k": "q8_0", "ctx_size": None}),
        (["-c", "8192"], {"ctx_size": 8192}),
        (["-c", "32k"], {"ctx_size": 32768}),
        (["-c", "auto"], {"ctx_size": "auto"}),
        (["-c=512"], {"ctx_size": 512}),
        (["--ctx-size=512"], {"ctx_size": 512}),
        (["-ngl", "all"], {"n_gpu_layers": -1}),
        (["-ngl", "0"], {"n_gpu_layers": 0}),
        (["--gpu-layers", "3"], {"n_gpu_layers": 3}),
        (["-fa", "auto"], {"flash_attn": "auto"}),
        (["-fa", "1"], {"flash_attn": "on"}),
        (["-fa", "0"], {"flash_attn": "off"}),
        (["-n", "-1"], {"predict": None}),
        (["-n", "5"], {"predict": 5}),
        (["--n-predict", "5"], {"predict": 5}),
        (["--temperature", "0.5"], {"temp": 0.5}),
        (["--top-k", "3", "--repeat-penalty", "1.1"], {"top_k": 3, "repeat_penalty": 1.1}),
        (["-p", "-mg"], {"prompt": "-mg"}),  # a value that looks like an option
        (["-p=a=b"], {"prompt": "a=b"}),
        (["-p", ""], {"prompt": ""}),
        (["--jinja", "-v", "--mlock", "--no-mmap"], {"verbose": True, "mlock": True}),
        (["-no-cnv"], {"plain": True}),
        (["a.gguf", "Why?"], {"words": ("Why?",), "prompt": None}),
        (["a.gguf", "-n", "5", "is", "it", "so?"], {"words": ("is", "it", "so?"), "predict": 5}),
        (["-e"], {"escape": True}),
        (["--escape", "--no-escape"], {"escape": False}),
        (["--color", "off", "-st", "--ignore-eos"], {"ignore_eos": True}),
        (["-co"], {}),
        (["--grammar", 'root ::= "a"'], {"grammar": 'root ::= "a"'}),
        (["--", "-m.gguf"], {"model_option": None}),
    ],
    ids=" ".join,
)
def test_options_are_those_of_llama_cpp(args, expected):
    assert expected.items() <= parsed(*args).items()


@pytest.mark.parametrize(
    ("args", "option", "suggested"),
    [
        (["-mg", "0"], "-mg", "-m"),
        (["-cx", "1"], "-cx", "-c"),
        (["-systm", "x"], "-systm", "-sys"),
        (["-n20"], "-n20", "-n 20"),
        (["-ctx", "1"], "-ctx", "-ct"),
        (["--modle", "x"], "--modle", "--model"),
        (["--ctx", "1"], "--ctx", "--ctx-size"),
        (["-vv"], "-vv", "-v"),
        (["-p", "x", "-dev", "none"], "-dev", ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_unknown_options_suggest_the_nearest(args, option, suggested):
    message = refusal(*args)
    assert message.startswith("No such option") and f"'{option}'" in message
    assert suggested in message.partition(option)[2]


@pytest.mark.parametrize("command", [run, chat])
def test_seeds_have_one_range(command):
    for seed in (-1, 0, 2**31 - 1):
        assert parsed("-s", str(seed), command=command)["seed"] == seed
        assert SETTINGS["seed"].convert(str(seed), None, None) == seed
    for seed in (-5, 2**31, 2**32 + 1, 10**23 - 1):
        with pytest.raises(click.BadParameter, match=f"{seed} is not in the range -1<=x<="):
            parsed("-s", str(seed), command=command)
        with pytest.raises(click.BadParameter, match=f"{seed} is not in the range -1<=x<="):
            SETTINGS["seed"].convert(str(seed), None, None)


def test_values_that_are_not_numbers():
    expected = "'auto' is not a number of layers, or all"
    assert expected in refusal("-ngl", "auto")
    assert expected in refusal(LLAMA_ARG_N_GPU_LAYERS="auto")
    assert "-2 is not in the range x>=-1" in refusal("-ngl", "-2")
    for option in ("-t", "-b", "-s", "--top-k"):
        assert "'auto' is not a valid integer." in refusal(option, "auto")


def test_other_commands_refuse_them_too():
    for name, command in commands().items():
        if isinstance(command, click.Group):
            continue
        done = CliRunner().invoke(main, [*name.split(), "-mg", "0"])
        assert done.exit_code == 2 and "No such option" in done.stderr and "'-mg'" in done.stderr


def test_values_that_may_be_left_out():
    bench = commands()["bench"]
    assert parsed("--real-prefill", command=bench)["real_prefill"] == 0
    assert parsed("--real-prefill", "-r", "3", command=bench)["pairs"] == 3
    assert parsed("--real-prefill", "512", command=bench)["real_prefill"] == 512
    assert parsed("--compare", "a", "-b", command=bench)["compare"][1].name == "-b"


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        ("chta", "Did you mean 'razor-local chat'?"),
        ("pull llama3.2:1b", "Did you mean 'razor-local models pull'?"),
        ("list", "Did you mean 'razor-local models'?"),
        ("perplexity", "Did you mean 'razor-local eval perplexity'?"),
        ("models serch", "Did you mean 'razor-local models search'?"),
        ("xyzzy", "'razor-local --help' shows the commands."),
    ],
)
def test_unknown_commands_suggest_the_nearest(words, suggestion):
    code, stdout, stderr = razor_local(*words.split())
    name = words.split()[words.startswith("models")]
    assert (code, stdout) == (2, "")
    assert stderr.endswith(f"\n\nError: No such command '{name}'. {suggestion}\n")


def test_context_sizes_have_one_form():
    for name, command in commands().items():
        for param in command.params:
            if "--ctx-size" in param.opts:
                value = param.type_cast_value(None, ["32k"] if param.multiple else "32k")
                assert value == (((32768,),) if param.multiple else 32768), name


@pytest.mark.parametrize("text", ["What is it?", "what/is it?", "two\nlines"])
def test_a_prompt_in_place_of_the_model(text):
    for command in (run, chat):
        with pytest.raises(click.UsageError, match="is not a model; without MODEL before it"):
            parsed(text, command=command)


def test_models_may_have_spaces_in_their_names(tmp_path):
    (tmp_path / "a b").touch()
    for path in (tmp_path / "a b", tmp_path / "no file.gguf"):
        assert parsed(str(path))["model"] == path


def test_escape_sequences_are_those_of_llama_cpp():
    for text, expected in (
        (r"a\nb\rc\td", "a\nb\rc\td"),
        (r"\'\"\\n", "'\"\\n"),
        (r"\x41\xe2\x82\xac", "A€"),
        (r"\q\x4\xzz\\", "\\q\\x4\\xzz\\"),
        ("\\", "\\"),
        ("caf\udce9 \\xff", "caf\udce9 \udcff"),  # bytes that are not UTF-8
    ):
        assert unescaped(text) == expected


# -- help --


def test_the_page_of_the_help_is_up_to_date():
    """`python -m tests.support.commands` writes it."""
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_command_has_examples_of_itself():
    for name, command in commands().items():
        assert examples(command), name
        assert all(f"razor-local {name}".strip() in line for line in examples(command))


@pytest.mark.parametrize("line", all_examples())
def test_examples_have_options_that_exist(line):
    """tests/native/test_examples.py runs them."""
    args = shlex.split(line.rpartition("| ")[2])[1:]
    found = commands()
    name = " ".join(args[:2]) if " ".join(args[:2]) in found else args[0]
    parsed(*args[len(name.split()) :], command=found[name])


def test_a_missing_value_is_one_sentence():
    assert refusal("-n") == "Option '-n' requires an argument."


# -- environment variables --


def test_variables_are_read_and_shown():
    for command in (chat, run):
        help_text = CliRunner().invoke(main, [command.name, "--help"], terminal_width=500).output
        assert len(ENVVARS) > 10
        for variable in ENVVARS.values():
            assert f"[env var: {variable}" in help_text


@pytest.mark.parametrize(
    ("variable", "value", "name", "expected"),
    [
        ("LLAMA_ARG_CTX_SIZE", "16k", "ctx_size", 16384),
        ("LLAMA_ARG_N_GPU_LAYERS", "all", "n_gpu_layers", -1),
        ("LLAMA_ARG_THREADS", "3", "threads", 3),
        ("LLAMA_ARG_BATCH", "64", "batch_size", 64),
        ("LLAMA_ARG_UBATCH", "32", "ubatch_size", 32),
        ("LLAMA_ARG_CACHE_TYPE_K", "q8_0", "cache_type_k", "q8_0"),
        ("LLAMA_ARG_CACHE_TYPE_V", "q4_0", "cache_type_v", "q4_0"),
        ("LLAMA_ARG_FLASH_ATTN", "1", "flash_attn", "on"),
        ("LLAMA_ARG_N_PREDICT", "9", "predict", 9),
        ("LLAMA_ARG_TEMPERATURE", "0.1", "temp", 0.1),
        ("LLAMA_ARG_TOP_K", "4", "top_k", 4),
        ("LLAMA_ARG_TOP_P", "0.4", "top_p", 0.4),
        ("LLAMA_ARG_MIN_P", "0.2", "min_p", 0.2),
        ("LLAMA_ARG_REPEAT_PENALTY", "1.2", "repeat_penalty", 1.2),
    ],
)
def test_values_of_variables(variable, value, name, expected):
    assert parsed(**{variable: value})[name] == expected
    if variable != "LLAMA_ARG_FLASH_ATTN":
        message = refusal(**{variable: "nonsense"})
        assert variable in message and "nonsense" in message


def test_the_command_line_comes_before_the_environment():
    assert parsed("-c", "512", LLAMA_ARG_CTX_SIZE="nonsense")["ctx_size"] == 512


@pytest.mark.usefixtures("built_library")
@pytest.mark.parametrize(
    ("args", "env", "expected"),
    [
        ([], {"LLAMA_ARG_MODEL": "/env.gguf"}, "/env.gguf: No such file"),
        (["/a.gguf"], {"LLAMA_ARG_MODEL": "/env.gguf"}, "/a.gguf: No such file"),
        (["-m", "/a.gguf"], {"LLAMA_ARG_HF_REPO": "a/b"}, "/a.gguf: No such file"),
        (["/a.gguf", "-m", "/b.gguf"], {}, "MODEL and --model exclude each other"),
        (["/a.gguf", "-hf", "a/b"], {}, "MODEL and --hf-repo exclude each other"),
        (
            [],
            {"LLAMA_ARG_MODEL": "/env.gguf", "LLAMA_ARG_HF_REPO": "a/b"},
            "LLAMA_ARG_MODEL and LLAMA_ARG_HF_REPO exclude each other",
        ),
    ],
)
def test_which_model_is_meant(args, env, expected):
    done = CliRunner().invoke(main, ["run", "-p", "x", *args], env=env)
    assert done.exit_code in (1, 2) and expected in done.stderr and done.stdout == ""


def test_commands_that_measure_read_no_variables():
    for name in COMMANDS:
        if name not in ("chat", "run", "serve"):
            for param in commands()[name].params:
                assert param.envvar is None
