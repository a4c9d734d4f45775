"""Chat templates: what real ones need works, and whatever a foreign one does ends in a sentence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime

import pytest

from razor_local import Chat, GGUFError, Llama, RazorError
from razor_local.chat import chat_template
from razor_local.cli.chat import DEFAULT_MODEL
from razor_local.prompt import templates
from razor_local.prompt.templates import Template
from tests.support.embedded_model import write_variant

ASK = [{"role": "user", "content": "Hi"}]
FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama(DEFAULT_MODEL, n_ctx=256)


def render(source: str, **variables) -> str:
    return Template(source).render(messages=ASK, **variables)


# -- what real templates do


def test_blocks_are_trimmed_as_for_transformers():
    source = "{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}"
    assert render(source) == "user\n"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i > 3 %}{% break %}"
         "{% endif %}{{ i }}{% endfor %}", "023"),
        ("{% generation %}{{ messages[0]['content'] }}{% endgeneration %}", "Hi"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
         "{{ ns.n }}", "1"),
        ("{{ tools | tojson }}", '[{"name": "é <x>"}]'),
        ("{{ tools | tojson(indent=2) }}", '[\n  {\n    "name": "é <x>"\n  }\n]'),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(bos_token) }}", "<<s>>"),
        ("{% if tools is defined and tools is not none %}{{ tools[0].name.split(' ')[-1] }}"
         "{% endif %}{% if functions is defined and functions %}no{% endif %}", "<x>"),
        ("{{- messages | map(attribute='content') | join(', ') | trim -}}", "Hi"),
        ("{{ '%s-%d' | format('a', 7) }}{{ messages | length }}{{ messages[-1].role == 'user' }}",
         "a-71True"),
    ],
)  # fmt: skip
def test_what_templates_use(source, text):
    assert render(source, tools=[{"name": "é <x>"}], bos_token="<s>", functions=None) == text


def test_functions_are_there_whatever_the_variables_are():
    assert render("{{ strftime_now('x') }}", strftime_now="y", raise_exception="z") == "x"


def test_the_current_date():
    assert render("{{ strftime_now('%Y') }}") == datetime.now().strftime("%Y")


def test_same_text_as_the_formatter_of_llama_cpp(llama):
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    source = llama.metadata["tokenizer.chat_template"]
    theirs = Jinja2ChatFormatter(source, eos_token="<|im_end|>", bos_token="<s>")
    conversation = [{"role": "system", "content": "Be é."}, *ASK]
    ours = Template(source).render(
        messages=conversation, eos_token="<|im_end|>", bos_token="<s>", add_generation_prompt=True
    )
    assert ours == theirs(messages=conversation).prompt


def test_rendering_takes_no_noticeable_time():
    template = Template("{% for m in messages %}{{ m.role + m.content }}{% endfor %}")
    messages = [{"role": "user", "content": "word " * 200}] * 100
    template.render(messages=messages)  # starts the process
    started = time.perf_counter()
    for _ in range(10):
        template.render(messages=messages)
    assert (time.perf_counter() - started) / 10 < 0.1


# -- what no template should do


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% break %}", "is malformed: 'break' outside loop"),
        ("{{ dict(a=1,a=2) }}", "is malformed: keyword argument repeated: a"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "is malformed: it is nested too deeply"),
        ("{% include 'x' %}", "no loader for this environment"),
        ("{{ '%0999999999d' % 3 }}", "it takes more than 1024 MiB of memory"),
        ("{{ 'x' * 20000000 }}", "cannot be rendered: its text has more than 16777216 "),
        ("{{ 'x' | center(9999999999) }}", "it takes more than 1024 MiB of memory"),
        (
            "{% set n = namespace(s='x') %}"
            "{% for i in range(64) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            "cannot be rendered: it takes more than 1024 MiB of memory",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it is nested too deeply"),
        ("{{ raise_exception('no\nsystem role') }}", "refuses this: no system role"),
        ("{{ raise_exception('\x1b[2J') }}", "refuses this: \\x1b[2J"),
        ("{{ messages[7].content }}", "refuses this: "),
        ("{{ ''.__class__.__mro__ }}", "refuses this: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "refuses this: "),
        (r"{{ '\ud800' }}", r"is not valid Unicode: it holds '\ud800'"),
        ("x" * (1 << 20) + "x", "has 1048577 characters, expected at most 1048576"),
    ],
)
def test_what_is_wrong_is_one_sentence(source, says):
    with pytest.raises(RazorError) as refused:
        render(source)
    assert says in str(refused.value) and str(refused.value).isprintable()
    assert render("{{ messages[0].content }}") == "Hi"  # the next template is rendered


@pytest.mark.parametrize(
    "source",
    [
        "{{ 9**(9**9) }}",
        FOREVER,
        "{% set x = 1 %}{% set xs = [0] %}"
        + "".join("{% set xs = [xs, xs] %}" for _ in range(60))
        + "{{ xs == [xs[0], xs[1]] }}{{ xs | string | length }}",
    ],
)
def test_time_is_limited(source, monkeypatch):
    monkeypatch.setattr(templates, "MAX_SECONDS", 1.5)
    started = time.perf_counter()
    with pytest.raises(GGUFError, match="chat template (takes more than 1.5 s|.* MiB of memory)"):
        render(source)
    assert time.perf_counter() - started < 8
    monkeypatch.undo()
    assert render("{{ messages[0].content }}") == "Hi"


def test_messages_that_are_no_json_are_one_sentence():
    with pytest.raises(RazorError, match="cannot be passed to the chat template: .*bytes"):
        Template("x").render(messages=[{"role": "user", "content": b"x"}])


def test_templates_of_a_file_do_not_run_when_it_is_loaded(tmp_path):
    """Neither the default one nor those that nobody asks for."""
    path = write_variant(tmp_path / "m.gguf", "{{ 9**(9**9) }}", {"other": "{{ 9**(9**9) }}"})
    started = time.perf_counter()
    llama = Llama(path, n_ctx=256)
    assert llama("The", max_tokens=1)["choices"]
    assert time.perf_counter() - started < 8


@pytest.mark.parametrize("stream", [False, True])
def test_llama_renders_in_the_child(stream, tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "MAX_SECONDS", 1.5)
    llama = Llama(write_variant(tmp_path / "m.gguf", FOREVER), n_ctx=256)
    with pytest.raises(GGUFError, match="takes more than 1.5 s"):
        llama.create_chat_completion(ASK, stream=stream)
    with pytest.raises(GGUFError, match="takes more than 1.5 s"):
        next(Chat(llama, chat_template(llama)).say("Hi"))


def test_named_templates_can_be_chosen(tmp_path):
    path = write_variant(tmp_path / "m.gguf", "{{ raise_exception('default') }}", {"other": "Hi"})
    llama = Llama(path, n_ctx=256, chat_format="chat_template.other")
    assert llama.create_chat_completion(ASK, max_tokens=1)["usage"]["prompt_tokens"] > 0


def test_lone_surrogates_in_messages_are_one_sentence(llama):
    for text in ("\ud800", "\udcff"):
        with pytest.raises(RazorError, match="a lone surrogate"):
            llama.create_chat_completion([{"role": "user", "content": text}])


# -- the process


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_child_that_is_stopped_is_waited_for(monkeypatch):
    """Its own time counts: a machine may sleep, or be busy with others."""
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.5)
    assert render("{{ 1 }}") == "1"
    pid = templates._child.process.pid
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(1.5, os.kill, (pid, signal.SIGCONT)).start()
    assert render("{{ 2 }}") == "2"
    assert templates._child.process.pid == pid


def test_threads_share_the_process():
    texts = {}

    def work(i: int) -> None:
        texts[i] = render(f"{i}{{{{ messages[0].content }}}}")

    threads = [threading.Thread(target=work, args=[i]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {i: f"{i}Hi" for i in range(8)}


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_process_that_was_ended_is_started_again():
    render("x")
    child = templates._child.process
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert render("y") == "y"


def test_the_process_ends_with_this_one():
    code = """
from razor_local.prompt import templates
print(templates.Template("{{ 1 + 1 }}").render(), templates._child.process.pid)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.stderr == "" and done.stdout.startswith("2 ")
    if os.name != "nt":
        with pytest.raises(ProcessLookupError):
            os.kill(int(done.stdout.split()[1]), 0)


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_an_interrupt_at_any_line_leaves_a_process_that_answers():
    """Of subprocess, too, whose locks an exception can leave locked."""
    source = "{{ messages[0].content }}"
    for n in range(0, 400, 7):
        left = [n]

        def trace(frame, event, _arg, left=left):
            if (
                "templates.py" in frame.f_code.co_filename
                or "subprocess" in frame.f_code.co_filename
            ):
                if event == "line":
                    left[0] -= 1
                    if left[0] == 0:
                        raise KeyboardInterrupt
                return trace
            return trace

        sys.settrace(trace)
        try:
            render(source)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        if left[0] > 0:
            break
        assert render(source) == "Hi"
