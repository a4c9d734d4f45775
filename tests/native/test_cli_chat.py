"""razor-local chat: with a pipe, and on a real pseudo-terminal."""

from __future__ import annotations

import re
import signal
import struct
import subprocess
import sys
import threading
import time

import pytest
from click.testing import CliRunner

from razor_local import RazorError, make_plan, read_model_shape, read_profile
from razor_local.cli import main
from razor_local.cli.chat import DEFAULT_MODEL
from razor_local.cli.terminal import MessageReader
from razor_local.printable import printable
from tests.support import embedded_model, tiny_models
from tests.support.cli import ENDLESS, MAIN, piped
from tests.support.terminal import COUNTING, UP, paste, terminal
from tests.support.texts import FACT, QUESTION, text_with

TEXT = text_with(FACT)
PLAN = make_plan(read_model_shape(DEFAULT_MODEL), read_profile(DEFAULT_MODEL), 0)
FULL = f"{PLAN.kv_bytes_full / 2**20:.1f} MiB"


def run(*args: str, message: str | bytes = f"{TEXT}\n\n{QUESTION}\n"):
    return CliRunner().invoke(main, ["chat", *map(str, args)], input=message)


# -- piped --


def test_the_whole_of_stdin_is_one_message():
    result = run()
    assert result.exit_code == 0, result.output
    assert result.stdout == "The secret code of Marlow is 48213.\n"
    assert re.fullmatch(
        r"prompt \d+ new tokens, \d+\.\d tok/s \| answer \d+ tokens, \d+\.\d tok/s"
        rf" \| context \d+/{PLAN.n_ctx} \| KV cache \d+\.\d MiB instead of {FULL} \(−\d+ %\)\n",
        result.stderr,
    ), result.stderr


def test_the_line_of_numbers_is_the_plan():
    saved = f"(−{100 - 100 * PLAN.share:.0f} %)"
    share = f"KV cache {PLAN.kv_bytes / 2**20:.1f} MiB instead of {FULL} {saved}"
    assert share in run().stderr
    assert f"KV cache {FULL} (full)" in run("--no-razor").stderr
    quantized = run("-ctk", "q8_0", "-ctv", "q8_0")
    full = make_plan(read_model_shape(DEFAULT_MODEL), None, 0, "q8_0", "q8_0").kv_bytes / 2**20
    assert "48213" in quantized.stdout and f"instead of {full:.1f} MiB (−" in quantized.stderr
    local = run("-ctlk", "q8_0", "-ctlv", "q4_0", "-fa", "auto")
    assert "48213" in local.stdout and f"instead of {FULL} (−" in local.stderr
    assert "48213" in run("-fa", "off").stdout
    assert "48213" in run("-fa", "auto").stdout
    assert "/1024 |" in run("-c", "1000").stderr


def test_no_speed_is_shown_of_a_short_prompt():
    assert re.match(r"prompt \d+ new tokens \| answer \d+ tokens, ", run(message="hello").stderr)


def test_options_reach_the_answer():
    assert "The answer was stopped after 3 tokens, the limit of --predict." in run("-n", 3).stderr
    warm = ["--temp", "3", "--top-p", "1", "--min-p", "0", "-n", "12"]
    one, same, other = (run(*warm, "-s", seed).stdout for seed in (1, 1, 2))
    assert one == same != other
    small = run("-b", "32", "-ub", "16", "-t", "1", "--system", "You know codes.")
    assert "48213" in small.stdout


def test_a_model_and_its_sidecar(tmp_path):
    from razor_local.converters.write import write_sidecar

    profile = read_profile(DEFAULT_MODEL)
    sidecar = tmp_path / "side.gguf"
    write_sidecar(DEFAULT_MODEL, sidecar, profile)
    result = run(DEFAULT_MODEL, "--sidecar", sidecar, "--temp", "0")
    assert "48213" in result.stdout and f"instead of {FULL} (−" in result.stderr
    other = tiny_models.make_model(tmp_path / "other.gguf", tiny_models.TinySpec())
    result = run(other, "--sidecar", sidecar)
    assert result.exit_code == 1 and "sidecar of another model" in result.stderr


@pytest.mark.parametrize(
    ("args", "message", "code", "expected"),
    [
        (["/no/such/model.gguf"], "x", 1, "Error: /no/such/model.gguf: No such file or directory"),
        ([__file__], "x", 1, "not a GGUF file"),
        ([], "", 1, "Error: stdin is empty"),
        ([], " \n", 1, "Error: stdin is empty"),
        ([], b"caf\xe9", 1, "Error: stdin is not UTF-8 text (byte 3)"),
        (["-c", "256"], TEXT, 1, "the context holds 256: shorten it"),
        (["--sidecar", "x", "--no-razor"], "x", 2, "exclude each other"),
        (["-n", "0"], "x", 2, "0 is not a number of tokens, or -1 for unlimited"),
        (["--temp", "nan"], "x", 2, "nan is not a number"),
        (["--top-p", "nan"], "x", 2, "nan is not a number"),
        (["-t", "1000000"], "x", 2, "1000000 is not in the range 1<=x<=512"),
        (["-ctk", "q9"], "x", 2, "'q9' is not one of"),
        (["-ctv", "q8_0", "-fa", "off"], "x", 1, "needs flash attention"),
        (["-ctlv", "q8_0", "-fa", "off"], "x", 1, "V cache of local heads (q8_0) needs flash"),
        (["-ctlk", "q8_0", "--no-razor"], "x", 2, "--cache-type-local-k and --no-razor exclude"),
    ],
)
def test_errors_are_one_line_on_stderr(args, message, code, expected):
    result = run(*args, message=message)
    assert result.exit_code == code and result.stdout == ""
    assert expected in result.stderr
    if code == 1:
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1


def test_a_model_without_chat_template_is_refused(tmp_path):
    path = tiny_models.make_model(tmp_path / "base.gguf", tiny_models.TinySpec())
    result = run(path, message="x")
    assert result.exit_code == 1 and "has no chat template" in result.stderr


def test_what_llama_cpp_cannot_bear_is_one_sentence_too(tmp_path):
    """Its assertions end the process; without a debugger's backtrace, and without silence."""
    data = bytearray(DEFAULT_MODEL.read_bytes())
    key = b"llama.attention.layer_norm_rms_epsilon"
    struct.pack_into("<f", data, data.index(key) + len(key) + 4, -1.0)
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    unchecked = "import razor_local.gguf.header as h; h.find_fault = lambda arch, values: None"
    done = subprocess.run(
        [sys.executable, "-c", f"{unchecked}\n{MAIN}", "chat", path],
        input="x",
        capture_output=True,
        text=True,
    )
    assert done.returncode not in (0, 1) and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "llama.cpp ended the process: GGML_ASSERT(eps >= 0.0f) failed (ops.cpp:" in line
    assert line.endswith("the model file is malformed, or this is a bug")


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_closed_streams_are_one_sentence(closed):
    command = f'"$0" -c "$1" chat -n 1 {closed}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, MAIN], input="x", capture_output=True, text=True
    )
    assert done.returncode == 2 and "Error: stdin or stdout is closed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_context_beyond_the_training_is_said():
    said = f"trained for {PLAN.n_ctx} tokens, -c {2 * PLAN.n_ctx} goes beyond"
    assert said in run("-c", 2 * PLAN.n_ctx).stderr


def test_a_process_with_a_pipe_is_silent_apart_from_its_result(tmp_path):
    code = f"import sys\ntry:\n {MAIN}\nfinally:\n print(sorted(sys.modules), file=sys.stderr)"
    done = piped(f"{TEXT}\n\n{QUESTION}", tmp_path, code)
    assert done.returncode == 0 and done.stdout == "The secret code of Marlow is 48213.\n"
    numbers, modules = done.stderr.splitlines()
    assert numbers.startswith("prompt ")
    for slow in ("numba", "rich", "prompt_toolkit", "gguf"):
        assert f"'{slow}'" not in modules, f"{slow} is not needed to answer a pipe"


def test_a_reader_that_goes_away_ends_it_quietly():
    done = subprocess.run(
        f'{sys.executable} -c "{MAIN}" chat | true',
        shell=True,
        input=f"{TEXT}\n\n{QUESTION}",
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


# -- on a terminal --

WITH_A_CARD = f"""
from razor_local.cli import doctor
doctor.find_gpus = lambda: [("A GPU", "metal")]
{MAIN}
"""


def test_a_session():
    with terminal("-c", "2048") as t:
        start = t.expect(">>>")
        assert "KV cache 4.5 MiB instead of 12.0 MiB (−" in start and "built-in model" in start
        t.send(paste(TEXT.replace(". ", ".\n")))
        t.expect("lines]")
        t.send(f"{QUESTION}\r")
        t.expect("The secret code of Marlow is 48213.\n")
        t.expect(" %)")
        t.expect(">>>")
        t.send(f"{QUESTION}\r")  # a second turn, from the cache
        numbers = t.expect(" %)")
        assert "48213" in numbers and int(re.search(r"prompt (\d+) new", numbers)[1]) < 40
        t.expect(">>>")
        t.send("/context\r")
        used = r"\d{3,} of 2048 tokens used by 4 messages; \d+ left"
        assert re.search(used, t.expect("answer"))
        t.send("/stats\r")
        assert re.search(
            r"the average of those between \([1-9][\d,]*\s+so\s+far", t.expect("context")
        )
        t.expect(">>>")
        t.send("/clear\r")
        t.expect("the conversation is empty")
        t.send("/context\r")
        t.expect("0 of 2048 tokens used by 0 messages")
        t.send("/system\r")
        t.expect("system prompt: none")
        t.send("/system You answer questions.\r")
        t.expect("system prompt: You answer questions.")
        t.send("/nonsense\r")
        t.expect("there is no /nonsense")
        t.send("/help\r")
        t.expect("/clear")
        t.expect(">>>")
        t.send("\x03")
        t.expect("/exit or Ctrl-D to leave")
        t.expect(">>>")
        t.send("/exit\r")
        assert t.wait()[0] == 0


def test_what_is_said_of_model_and_memory():
    with terminal("-c", "2048", "-t", "1", code=WITH_A_CARD) as t:
        start = t.expect(">>>").splitlines()
        plan = make_plan(read_model_shape(DEFAULT_MODEL), read_profile(DEFAULT_MODEL), 2048)
        full, saved = plan.kv_bytes_full / 2**20, round(100 * (1 - plan.share))
        kv = f"{plan.kv_bytes / 2**20:.1f} MiB instead of {full:.1f} MiB (−{saved} %)"
        assert start[0] == "razor-default · Q8_0 · CPU, 1 thread"
        assert re.fullmatch(
            rf"weights 4\.\d MiB · KV cache {re.escape(kv)} · compute \d+\.\d MiB"
            r" · context 2,048 tokens",
            start[1],
        )
        assert start[2].startswith("note: this build does not use the A GPU; to use it, run")
        t.send("/stats\r")
        t.expect("device    CPU, 1 thread\n")
        t.expect(f"KV cache  {kv}, f16\n")
        t.expect(
            "heads     4 of 24 keep every token; the others keep the first 4 and the last 256, and"
        )
        t.expect("context   0 of 2,048 tokens used")
        t.expect(">>>")
        t.send("hello\r")
        t.expect(" %)")
        t.expect(">>>")
        t.send("/stats\r")
        assert re.search(
            r"prompt    \d+ new tokens\nanswer    \d+ tokens, ", t.expect("per second")
        )
    with terminal("-c", "256", "-ngl", "0", code=WITH_A_CARD, PYTHONIOENCODING="ascii") as t:
        start = t.expect(">>>")
        assert "A GPU" not in start and "-default | Q8_0 | CPU, " in start
        assert "\nRazorAttention saves nothing up to 512 tokens of context, so the full" in start


def test_a_prompt_is_the_first_message():
    with terminal("-p", f"{FACT} {QUESTION}", "-c", "2048") as t:
        t.expect("The secret code of Marlow is 48213.\n")
        t.expect(">>>")
        t.send("/context\r")
        t.expect("used by 2 messages")
        t.send("/exit\r")
        assert t.wait()[0] == 0
    with terminal("-p", text_with(FACT, 3000), "-c", "512") as t:
        t.expect("Error: the conversation with this message has")
        t.expect(">>>")
        t.send("\x04")
        assert t.wait()[0] == 0


def test_a_block_between_quotes_and_a_prompt_that_is_too_long():
    with terminal("-c", "2048") as t:
        t.expect(">>>")
        t.send('"""\r')
        t.expect("...")
        for line in (FACT, "", QUESTION):
            t.send(f"{line}\r")
            t.expect("...")
        t.send('"""\r')
        t.expect("The secret code of Marlow is 48213.")
        t.expect(">>>")
        t.send(paste(text_with(FACT, 3000).replace(". ", ".\n")) + "\r")
        t.expect("Error: the conversation with this message has")
        t.expect(">>>")
        t.send(f"{QUESTION}\r")  # the refused message is not in the conversation
        t.expect("The secret code of Marlow is 48213.")
        t.expect(">>>")
        t.send("\x04")
        assert t.wait()[0] == 0


def test_a_recalled_message_has_its_pasted_text():
    text = f"{FACT}\nSecond.\nThird."
    sent = f"<{len(text) + 5} {text[:20]!r} 5 lines>"
    with terminal(code=COUNTING) as t:
        t.expect(">>>")
        t.send(paste(text))
        t.expect("3 lines]")
        t.send("Q?\r")
        t.expect(sent.replace(str(len(text) + 5), str(len(text) + 4)))
        t.expect(">>>")
        t.send(UP)
        t.expect("3 lines]Q?")
        t.send("\r")
        t.expect(sent.replace(str(len(text) + 5), str(len(text) + 4)))


def test_a_line_that_only_looks_like_a_command():
    with terminal("-n", "1", code=COUNTING) as t:
        for line in ("/usr/bin/ls is a path", "/exit code 3", "/etc", "/clear it all up", "//"):
            t.expect(">>>")
            t.send(f"{line}\r")
            refused = {
                "/etc": "there is no /etc",
                "/exit code 3": "/exit takes no text",
                "/clear it all up": "/clear takes no text",
            }
            t.expect(refused.get(line, f"<{len(line)} "))
        t.expect(">>>")
        t.send("/exit\r")
        assert t.wait()[0] == 0


def test_a_prompt_follows_what_is_piped(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    assert "48213" in run("-p", QUESTION, message=TEXT).stdout
    assert "48213" in run("-p", QUESTION, "-f", tmp_path / "text.txt", message="").stdout


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert "<2 'hi' 1 lines>" in piped("\ufeffhi", tmp_path, COUNTING).stdout


@pytest.mark.parametrize("term", ["dumb", "xterm-256color"])
def test_terminals_without_colors_or_escape_sequences(term):
    """NO_COLOR leaves the sequences that move the cursor."""
    with terminal(TERM=term, NO_COLOR="1") as t:
        t.expect(">>>")
        t.send('"""\r')
        t.expect("...")
        t.send(f'{FACT}\r{QUESTION}"""\r')
        t.expect("The secret code of Marlow is 48213.\n")
        t.expect(">>>")
        t.send("\x03")
        t.expect("/exit or Ctrl-D to leave")
        t.expect(">>>")
        t.send("\x04")
        assert t.wait()[0] == 0
        styles = set(re.findall(r"\x1b\[([0-9;]*)m", t.raw))
        assert styles <= ({"", "0"} if term != "dumb" else set())
        assert term != "dumb" or "\x1b" not in t.raw


@pytest.mark.parametrize("module", ["click", "razor_local.cli.chat", "razor_local.llama"])
def test_ctrl_c_during_the_imports_is_no_traceback(tmp_path, module):
    code = f"""
import os, signal, sys
class Interrupt:
    def find_spec(self, name, *args):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from razor_local.__main__ import main; main()
"""
    done = piped("hi", tmp_path, code)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "\nAborted!\n")


# -- what a terminal would obey --

HOSTILE = "\x1b]0;title\x07\x9b2J\u202eevil"  # a title, an erased screen, text from right to left
SHOWN = r"\x1b]0;title\x07\x9b2J\u202eevil"


def test_printable_text():
    assert printable("漢字 🙂\u200d é\u00a0\tx\n") == "漢字 🙂\u200d é\u00a0\tx\n"
    assert printable(HOSTILE) == SHOWN and printable("a\r\nb\rc\udc80") == r"a" "\n" r"b\rc\udc80"
    assert printable("a\nb\tc", one_line=True) == r"a\nb\tc"
    assert str(RazorError(f"a\n{HOSTILE}")) == rf"a\n{SHOWN}"


def hostile_model(path):
    """The built-in model with codes in its name and in the error of its chat template."""
    embedded_model.write_variant(path, "{{ raise_exception('no\x1b[2J') }}")
    data = path.read_bytes()
    key = b"general.name"
    at = data.index(key) + len(key) + 4
    (length,) = struct.unpack_from("<Q", data, at)
    name = b"\x1b[2J\nn".ljust(length)
    path.write_bytes(data[: at + 8] + name + data[at + 8 + length :])
    return path


def test_names_and_errors_of_a_model_move_no_cursor(tmp_path):
    path = hostile_model(tmp_path / "model.gguf")
    with terminal(str(path), "--calibrate", "never") as t:
        t.expect(r"\x1b[2J\nn")
        t.expect(">>>")
        t.send("x\r")
        t.expect(r"refuses this: no\x1b[2J")
        t.send("/exit\r")
        assert t.wait()[0] == 0
    error = run(path, "--calibrate", "never", message="x").stderr
    assert error == "Error: the model's chat template refuses this: no\\x1b[2J\n"
    for command in (["inspect"], ["fit", "--vram", "8GiB"]):
        result = CliRunner().invoke(main, [*command, str(path)])
        assert result.exit_code == 0 and r"\x1b[2J\nn" in result.output
        assert "\x1b" not in result.output


# an answer that would erase the screen
ERASING = f"""
from razor_local import llama
piece = llama.Llama.piece
llama.Llama.piece = lambda self, token: piece(self, token) + b"\\x1b[2J"
{MAIN}
"""


def test_answers_are_printable_on_a_terminal_and_as_they_are_in_a_pipe(tmp_path):
    with terminal("-n", "2", code=ERASING) as t:
        t.expect(">>>")
        t.send("hi\r")
        assert r"\x1b[2J" in t.expect(" %)")
    assert piped("hi", tmp_path, ERASING).stdout.count("\x1b[2J") > 1


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on():
    with terminal("-s", "7", code=ENDLESS) as t:
        t.expect(">>>")
        t.send(paste(f"{FACT}\n\n{QUESTION}") + "\r")
        t.expect("48213.")
        time.sleep(0.3)  # it goes on
        t.send("\x03")
        t.expect("Stopped. The answer so far is kept.")
        t.expect(">>>")
        t.send("/context\r")
        t.expect("tokens used by 2 messages")
        t.expect(">>>")
        t.send(f"{QUESTION}\r")
        t.expect("48213")  # in which words depends on how far the endless answer went
        t.expect("prompt ")
        t.expect(">>>")
        t.send("/exit\r")
        assert t.wait()[0] == 0


def test_what_is_pasted_during_an_answer_is_one_message():
    text = "\n".join(f"Line {i}: {FACT}" for i in range(200))  # longer than a terminal's buffer
    with terminal("-s", "7", "-n", "100", code=ENDLESS.replace(MAIN, COUNTING)) as t:
        t.expect(">>>")
        t.send(paste(f"{FACT}\n\n{QUESTION}") + "\r")
        t.expect("48213.")
        marked = t.raw.rfind("\x1b[?2004h") > t.raw.rfind("\x1b[?2004l")
        pasted = paste(text) if marked else text  # as a terminal does it
        writer = threading.Thread(target=t.send, args=(pasted + "\r",))
        writer.start()  # it waits until the program reads
        t.expect(" %)")
        t.expect(">>>")
        t.expect("200 lines]")
        t.expect(f"<{len(text)} {text[:20]!r} 200 lines>")
        writer.join()
        t.expect(">>>")
        t.send("/exit\r")
        assert t.wait()[0] == 0 and t.raw.rfind("\x1b[?2004h") < t.raw.rfind("\x1b[?2004l")


SLOW_PREFILL = f"""
import time
from razor_local import evaluation
eval_batch = evaluation.eval_batch
def slowly(llama, batch):
    time.sleep(0.1)
    eval_batch(llama, batch)
evaluation.eval_batch = slowly
{MAIN}
"""


def test_ctrl_c_while_the_prompt_is_read_takes_the_message_back():
    with terminal("-b", "64", "--prefill", "razor", code=SLOW_PREFILL) as t:
        t.expect(">>>")
        t.send(paste(f"{TEXT}\n\n{QUESTION}") + "\r")
        t.expect("reading the prompt")
        t.send("\x03")
        t.expect("Stopped. The message is not kept.")
        t.expect("answer 0 tokens")
        t.expect(">>>")
        t.send("/context\r")
        t.expect(f"0 of {PLAN.n_ctx} tokens used by 0 messages")
        t.expect(">>>")
        t.send(paste(f"{TEXT}\n\n{QUESTION}") + "\r")
        t.expect("The secret code of Marlow is 48213.")
        t.expect(">>>")
        t.send("\x04")
        assert t.wait()[0] == 0


def test_a_single_turn():
    model = str(DEFAULT_MODEL)
    with terminal(model, "Hello", "-st", "--temp", "0") as t:
        t.expect("tok/s | context")
        assert t.wait()[0] == 0
    with terminal("--single-turn") as t:
        t.expect(">>>")
        t.send("/set\r")  # not a turn
        t.expect("top_k 40")
        t.send("Hello\r")
        t.expect("tok/s | context")
        assert t.wait()[0] == 0


def test_grammar_from_the_command_line():
    with terminal("--grammar", 'root ::= "maybe so"') as t:
        t.expect(">>>")
        t.send("/json\r")
        t.expect("answers follow the grammar of --grammar; /json off turns it off")
        t.send("Hello\r")
        t.expect("maybe so")


def test_color_off_and_on():
    for args, env, dimmed in (
        ((), {}, True),
        (("--color", "off"), {}, False),
        ((), {"NO_COLOR": "1"}, False),
        (("--color", "on"), {"NO_COLOR": "1"}, True),
    ):
        with terminal(*args, **env) as t:
            t.expect(">>>")
            assert ("\x1b[2m" in t.raw) is dimmed, (args, env)


def test_ctrl_c_with_a_pipe_ends_with_130():
    child = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, "chat", "-s", "7"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    child.stdin.write(f"{FACT}\n\n{QUESTION}".encode())
    child.stdin.close()
    first = child.stdout.read(10)
    child.send_signal(signal.SIGINT)
    rest = child.stdout.read()
    assert child.wait(timeout=300) == 130
    assert first == b"The secret" and rest.endswith(b"\n")
    stderr = child.stderr.read()
    assert b"Stopped.\n" in stderr and b"kept" not in stderr  # nothing is


def test_from_start_to_prompt_takes_less_than_three_seconds():
    """Of CPU time: the machine may be busy with other tests."""
    with terminal() as t:
        t.expect(">>>")
        t.send("\x04")
        code, seconds = t.wait()
    assert code == 0 and seconds < 3


# -- pasted texts --


@pytest.fixture
def reader() -> MessageReader:
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import DummyInput

    with create_app_session(input=DummyInput()):
        yield MessageReader()


def test_a_pasted_line_stays_a_line(reader):
    assert reader.add_paste("one line\r\n") == "one line"
    assert reader.expand("one line") == "one line"


def test_pasted_texts_are_set_off_by_empty_lines(reader):
    first = reader.add_paste("a\r\nb\rc\n")
    second = reader.add_paste("d\n\ne")
    assert first == "[pasted text 1: 3 lines]" and second == "[pasted text 2: 3 lines]"
    assert reader.expand(f"{first}What?") == "a\nb\nc\n\nWhat?"
    assert reader.expand(f"See {first} and {second}!") == "See\n\na\nb\nc\n\nand\n\nd\n\ne\n\n!"
    assert reader.expand(first) == "a\nb\nc"


def test_a_marker_inside_a_pasted_text_is_left_alone(reader):
    marker = reader.add_paste("x [pasted text 2: 2 lines]\ny")
    other = reader.add_paste("p\nq")
    assert reader.expand(f"{other} {marker}") == "p\nq\n\nx [pasted text 2: 2 lines]\ny"


def test_stdin_that_never_ends_is_refused(monkeypatch):
    import razor_local.cli.generation as module

    monkeypatch.setattr(module, "MAX_TEXT", 1 << 20)
    done = CliRunner().invoke(main, ["chat"], input="y\n" * (1 << 20))
    assert done.exit_code == 1 and "stdin has more than 1 MiB, more than any context" in done.output
