"""razor-local run: answer one prompt."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner

from razor_local import Llama, make_plan, read_model_shape, read_profile
from razor_local.cli import main
from razor_local.cli.params import DEFAULT_MODEL
from tests.support import embedded_model
from tests.support.cli import ENDLESS, MAIN
from tests.support.texts import FACT, QUESTION, text_with

TEXT = text_with(FACT)
ANSWER = "The secret code of Marlow is 48213."
PLAIN = ("-no-cnv", "-p", "The secret code", "-n", 6)
PLAN = make_plan(read_model_shape(DEFAULT_MODEL), read_profile(DEFAULT_MODEL), 0)


def run(*args: object, stdin: str | bytes = ""):
    return CliRunner().invoke(main, ["run", *map(str, args)], input=stdin)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_the_prompt_follows_the_text(text):
    for done in (
        run("-p", QUESTION, "-f", text),
        run("-p", QUESTION, stdin=TEXT),
        run("-p", f"{TEXT}\n\n{QUESTION}"),
        run(stdin=f"{TEXT}\n\n{QUESTION}\n"),
    ):
        assert done.exit_code == 0 and done.stdout == f"{ANSWER}\n", done.output
        assert re.fullmatch(r"prompt \d+ new tokens, .*\n", done.stderr)


def test_the_order_of_stdin_file_and_prompt(tmp_path, monkeypatch):
    from razor_local.cli import generation

    seen = []
    read_text = generation.read_text
    monkeypatch.setattr(
        generation, "read_text", lambda options: seen.append(read_text(options)) or seen[-1]
    )
    (tmp_path / "b").write_text("\ufefffile\r\n", encoding="utf-8")
    run("-p", "prompt", "-f", tmp_path / "b", "-n", 1, stdin="stdin\n")
    assert seen == ["stdin\n\nfile\n\nprompt"]


def test_the_prompt_after_the_model(text):
    for words in ([QUESTION], QUESTION.split()):  # as ollama run takes it
        done = run(DEFAULT_MODEL, *words, "-f", text, "--temp", 0)
        assert (done.exit_code, done.stdout) == (0, f"{ANSWER}\n"), done.output
    done = run(DEFAULT_MODEL, QUESTION, "-p", "hi")
    assert done.exit_code == 2 and "PROMPT and --prompt exclude each other" in done.stderr


def test_escapes_in_the_prompt_alone(text):
    lines = (FACT + QUESTION).replace(FACT, FACT + r"\n\n")
    assert run("-p", lines, "-e").stdout == f"{ANSWER}\n"
    n_tokens = [
        json.loads(run("-p", r"a\nb", *option, "-n", 1, "--json").stdout)["tokens"]["prompt"]
        for option in ([], ["--no-escape"], ["-e"])
    ]
    assert n_tokens[0] == n_tokens[1] > n_tokens[2]


def test_ignore_eos_goes_on_after_the_end():
    for option, reason in (([], "stop"), (["--ignore-eos"], "length")):
        report = json.loads(run("-p", "hi", "-n", 30, "--json", *option).stdout)
        assert report["finish_reason"] == reason
    for other in (["-j", "{}"], ["--grammar", "x"], ["--grammar-file", "x"], ["-jf", "x"]):
        done = run("-p", "hi", "--ignore-eos", *other)
        assert done.exit_code == 2 and "--ignore-eos exclude each other" in done.stderr


def test_grammars(tmp_path):
    grammar = 'root ::= "yes, " [0-9]{3}'
    (tmp_path / "g.gbnf").write_text(grammar)
    for option in (["--grammar", grammar], ["--grammar-file", tmp_path / "g.gbnf"]):
        assert re.fullmatch(r"yes, \d{3}\n", run("-p", "hi", *option).stdout)
    (tmp_path / "empty").write_text("\n")
    for option, why in (
        (["--grammar", "root ::= ("], "the grammar is malformed"),
        (["--grammar", " "], "--grammar is empty, expected a grammar with a rule 'root'"),
        (["--grammar-file", tmp_path / "empty"], "is empty, expected a grammar"),
        (["--grammar-file", tmp_path / "none"], "No such file"),
    ):
        done = run("-p", "hi", *option)
        assert done.exit_code == 1 and why in done.stderr and done.stdout == ""
    done = run("-p", "hi", "--grammar", grammar, "-j", "{}")
    assert done.exit_code == 2 and "--grammar and --json-schema exclude each other" in done.stderr


def test_json_has_the_numbers(text):
    done = run(DEFAULT_MODEL, "-p", QUESTION, "-f", text, "--temp", 0, "--json")
    report = json.loads(done.stdout)
    assert done.exit_code == 0 and done.stderr == ""
    assert report["answer"] == ANSWER and report["finish_reason"] == "stop"
    assert report["model"] == str(DEFAULT_MODEL) and report["reasoning"] is None
    assert report["tokens"]["prompt"] > 500 and report["tokens"]["answer"] == 20
    assert all(value > 0 for value in report["timings"].values()) and len(report["timings"]) == 5
    memory = report["memory"]
    assert memory["kv_bytes"] == PLAN.kv_bytes and memory["kv_bytes_full"] == PLAN.kv_bytes_full
    assert memory["n_ctx"] == PLAN.n_ctx and memory["razor"] and memory["why_inactive"] is None
    assert 0.9 < memory["weights_bytes"] / DEFAULT_MODEL.stat().st_size < 1.1
    assert memory["compute_bytes"] > 1 << 20
    full = json.loads(run("-p", "hi", "--no-razor", "--json", "--hide-thinking").stdout)
    assert full["memory"]["kv_bytes"] == PLAN.kv_bytes_full and not full["memory"]["razor"]
    assert "reasoning" not in full


def test_an_answer_that_follows_a_schema(tmp_path):
    schema = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    for option in (["-j", json.dumps(schema)], ["-jf", tmp_path / "schema.json"]):
        assert json.loads(run("-p", "hi", *option).stdout) == {"a": "x"}


def test_why_an_answer_ended():
    assert json.loads(run("-p", "hi", "-n", 2, "--json").stdout)["finish_reason"] == "length"
    done = run("-p", "hi", "-n", 2)
    assert done.exit_code == 0
    assert "The answer was stopped after 2 tokens, the limit of --predict." in done.stderr


def test_plain_text_is_continued_without_a_template():
    done = run(*PLAIN)
    llama = Llama(DEFAULT_MODEL)
    expected = llama.create_completion("The secret code", max_tokens=6, temperature=0.0)
    assert done.exit_code == 0 and done.stdout == expected["choices"][0]["text"] + "\n"


def test_a_base_model_continues_the_text(tmp_path):
    path = embedded_model.write_without_template(tmp_path / "base.gguf")
    done = run(path, "-p", "The secret code", "-n", 6, "--temp", 0)
    assert done.exit_code == 0 and done.stdout == run(*PLAIN).stdout
    done = run(path, "-p", "x", "-sys", "y")
    assert done.exit_code == 2 and "--system-prompt needs a chat template" in done.stderr


def test_types_of_local_heads_without_razor():
    done = run("-c", 512, "-ctlk", "q4_0", *PLAIN)
    assert done.exit_code == 0, done.output
    notes = [line for line in done.stderr.splitlines() if line.startswith("note:")]
    assert len(notes) == 1 and "the full cache runs: " in notes[0]
    assert notes[0].endswith("(the KV types of local heads have no effect)")


def test_control_tokens_of_plain_text_are_control_tokens():
    """This is as in llama.cpp. In a message they are plain text."""
    templated, plain = (
        json.loads(run(*args, "-p", "<|im_end|>", "-n", 1, "--json").stdout)["tokens"]["prompt"]
        for args in ((), ("-no-cnv",))
    )
    llama = Llama(DEFAULT_MODEL)
    n = len(llama.tokenize(b"<|im_end|>", add_bos=True, special=True))
    assert plain == n and templated > plain


@pytest.mark.parametrize(
    ("args", "stdin", "code", "expected"),
    [
        (["/no/such.gguf", "-p", "x"], "", 1, "/no/such.gguf: No such file or directory"),
        (["-f", "/no/such.txt"], "", 1, "/no/such.txt: No such file or directory"),
        (["-f", DEFAULT_MODEL], "", 1, "is not a text in UTF-8"),
        (["-p", " "], "", 1, "the prompt is empty: pass a text with -p"),
        ([], "", 1, "stdin is empty: pipe a text into it, or pass one with -p"),
        ([], b"caf\xe9", 1, "stdin is not UTF-8 text (byte 3)"),
        (["-c", "256", "-p", TEXT], "", 1, "the context holds 256: shorten it"),
        (["--budget", "0.2", "--no-razor", "-p", "x"], "", 2, "--budget and --no-razor exclude"),
        (["-mg", "0", "-p", "x"], "", 2, "No such option"),
        (["-j", "{", "-p", "x"], "", 1, "--json-schema is not JSON: "),
        (["-j", '{"maxItems": 100000}', "-p", "x"], "", 1, '"maxItems" is 100000, the largest'),
        (
            ["-j", '{"properties": {"a": {"minimum": 1}}}', "-p", "x"],
            "",
            1,
            '#/properties/a: "minimum" is not supported',
        ),
        (["-j", "true", "-p", "x"], "", 1, "it is true, expected an object"),
        (["-j", "[" * 3000 + "]" * 3000, "-p", "x"], "", 1, "is nested too deeply"),
        (["-jf", "/no/such.json", "-p", "x"], "", 1, "/no/such.json: No such file"),
        (["-j", "{}", "-jf", "x", "-p", "x"], "", 2, "--json-schema and --json-schema-file excl"),
    ],
)
def test_errors_are_one_line_on_stderr(args, stdin, code, expected):
    done = run(*args, stdin=stdin)
    assert done.exit_code == code and done.stdout == "" and expected in done.stderr
    if code == 1:
        assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1


def test_without_a_prompt_on_a_terminal(monkeypatch):
    from razor_local.cli import generation

    monkeypatch.setattr(generation, "read_text", lambda options: None)
    done = run()
    assert done.exit_code == 2 and "there is no prompt: pass -p TEXT" in done.stderr


# prints a line to stderr for each token
COUNTED = ENDLESS.replace(
    MAIN,
    f"""
import sys
piece = llama.Llama.piece
llama.Llama.piece = lambda self, token: print("token", file=sys.stderr) or piece(self, token)
{MAIN}
""",
)


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_shows_what_was_answered_and_ends_with_130(as_json):
    code = COUNTED if as_json else ENDLESS
    child = subprocess.Popen(
        [sys.executable, "-c", code, "run", "-s", "7", *["--json"] * as_json],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    child.stdin.write(f"{FACT}\n\n{QUESTION}".encode())
    child.stdin.close()
    if as_json:
        for _ in range(25):  # tokens
            child.stderr.readline()
        child.send_signal(signal.SIGINT)
        report = json.loads(child.stdout.read())
        assert report["finish_reason"] == "interrupted" and report["answer"].startswith(ANSWER)
    else:
        first = child.stdout.read(10)
        child.send_signal(signal.SIGINT)
        assert first == b"The secret" and child.stdout.read().endswith(b"\n")
        stderr = child.stderr.read()
        assert b"Stopped.\n" in stderr and b"kept" not in stderr  # nothing is
    assert child.wait(timeout=300) == 130


def test_the_log_is_on_stderr():
    done = subprocess.run(
        [sys.executable, "-m", "razor_local", "run", "-v", "-p", "hi", "-n", "1"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert "llama_context" in done.stderr and "llama_context" not in done.stdout
