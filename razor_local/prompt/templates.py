"""Render the chat templates of model files in a separate process.

A template is a program that comes with the model. Jinja's sandbox keeps it from files and modules,
but not from running forever or using all memory. This cannot be prevented within the process: one
`9**(9**9)`, or the text of a list nested in itself, is a single call that cannot be interrupted.
A child process with a memory limit therefore compiles and renders templates, and is killed when it
takes too long. One child serves all templates and starts with the first of them.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import IO, Any

from ..common.child import TEMPLATES, is_frozen, python_command
from ..errors import GGUFError, RazorError

MAX_SECONDS = 10.0  # of CPU time; real templates take milliseconds
MAX_WAIT_SECONDS = 60.0  # wall-clock limit, for a child that sleeps
MAX_MEMORY = 1 << 30
MAX_SOURCE = 1 << 20  # characters; the longest real templates have 30,000
MAX_TEXT = 16 << 20  # characters of a rendered conversation
MAX_REASON = 300  # characters of an error message, which a template can choose
REFUSES = "refuses this"
MEND = "mend tokenizer.chat_template, for example with gguf-new-metadata"

_lock = threading.Lock()
_child: _Child | None = None
_renders = 0  # the thread that holds _lock


class Template:
    """A chat template, which is compiled when it is first used."""

    def __init__(self, source: str) -> None:
        self.source = source

    def check(self) -> None:
        """Raise GGUFError if the template cannot be compiled."""
        self._ask(None)

    def render(self, **variables: Any) -> str:
        """Render the template with variables such as messages and bos_token.

        The functions raise_exception and strftime_now are always defined.

        Raises:
            GGUFError: the template cannot be compiled, or takes too much time or memory.
            RazorError: the template refuses the messages.
        """
        return self._ask({k: v for k, v in variables.items() if not callable(v)})

    def _ask(self, variables: dict[str, Any] | None) -> str:
        if len(self.source) > MAX_SOURCE:
            raise GGUFError(
                f"the model's chat template has {len(self.source)} characters, expected at most"
                f" {MAX_SOURCE}; {MEND}"
            )
        try:
            request = json.dumps(
                {"source": self.source, "variables": variables, "seconds": MAX_SECONDS}
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise RazorError(
                f"the messages cannot be passed to the chat template: {error}; use text, numbers,"
                " lists and dictionaries"
            ) from None
        answer = _exchange(request.encode() + b"\n")
        if "text" in answer:
            _check_unicode(answer["text"], "surrogateescape")
            return str(answer["text"])
        sentence = f"the model's chat template {answer['what']}: {answer['reason']}"
        if answer["what"] == REFUSES:
            raise RazorError(sentence)
        raise GGUFError(f"{sentence}; {MEND}")


def _check_unicode(text: str, errors: str) -> None:
    try:
        text.encode("utf-8", errors)
    except UnicodeEncodeError as error:
        raise RazorError(
            f"the rendered conversation is not valid Unicode: it holds {text[error.start]!a};"
            " correct the messages or the model's chat template"
        ) from None


def isolate_formatters() -> None:
    """Make llama_cpp.Llama use formatters whose templates are rendered by the child.

    Its original formatters compile every template of a file in this process when it is loaded.
    """
    import llama_cpp
    from llama_cpp import llama_chat_format

    class IsolatedFormatter(llama_chat_format.Jinja2ChatFormatter):
        def __init__(
            self,
            template: str,
            eos_token: str,
            bos_token: str,
            add_generation_prompt: bool = True,
            stop_token_ids: list[int] | None = None,
        ) -> None:
            self.template, self.eos_token, self.bos_token = template, eos_token, bos_token
            self.add_generation_prompt = add_generation_prompt
            self.stop_token_ids = None if stop_token_ids is None else set(stop_token_ids)
            # the base class only calls its render()
            self._environment = Template(template)  # type: ignore[assignment]

        def __call__(self, **variables: Any) -> Any:
            response = super().__call__(**variables)
            _check_unicode(response.prompt, "strict")  # llama_cpp encodes it strictly
            return response

    class Formats:
        """A replacement for the module llama_chat_format in llama_cpp.Llama."""

        Jinja2ChatFormatter = IsolatedFormatter

        def __getattr__(self, name: str) -> Any:
            return getattr(llama_chat_format, name)

    vars(llama_cpp.llama)["llama_chat_format"] = Formats()


class _Child:
    """The process that renders templates."""

    def __init__(self) -> None:
        self.ended = False
        self.parent = os.getpid()  # a forked copy of this process must not use the same pipes
        self.process = subprocess.Popen(
            [sys.executable, TEMPLATES]
            if is_frozen()
            else python_command(
                "sys.path += sys.argv[1:]; from razor_local.prompt.templates import serve; serve()",
                *filter(None, sys.path),  # the package may be in a folder that was added to it
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C must not reach the child
        )

    def read_line(self) -> tuple[bytes, bool]:
        """Return an answer, and whether MAX_WAIT_SECONDS have passed.

        The answer is incomplete if they have, or if the process ended.
        """
        assert self.process.stdout is not None  # a pipe
        fd, ends = self.process.stdout.fileno(), time.monotonic() + MAX_WAIT_SECONDS
        line = bytearray()
        while not line.endswith(b"\n"):
            left = max(ends - time.monotonic(), 0)
            if os.name != "nt" and not select.select([fd], [], [], left)[0]:
                return bytes(line), True
            part = os.read(fd, 1 << 20)
            if not part or len(line) > MAX_TEXT * 12:  # ASCII: 12 bytes for a rare character
                break
            line += part
        return bytes(line), False

    def end(self) -> int | None:
        """Kill the process and return its exit code, None if it is unknown.

        Popen.poll() and wait() hold a lock that an interrupt can leave locked forever.
        os.waitpid() does not use it.
        """
        if self.ended or self.parent != os.getpid():
            return None
        self.ended = True
        with suppress(OSError):
            os.kill(self.process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # the child may not have read the last request
                if pipe is not None:
                    pipe.close()
        if os.name == "nt":
            return self.process.wait()
        code = None
        with suppress(ChildProcessError):  # somebody else has waited for it
            code = os.waitstatus_to_exitcode(os.waitpid(self.process.pid, 0)[1])
        self.process.returncode = 0 if code is None else code
        return code


def _exchange(request: bytes) -> dict[str, Any]:
    """Send a request to the child, started if needed, and return its answer."""
    global _renders
    if _lock.locked() and _renders == threading.get_ident():
        raise RazorError("a signal handler cannot use a chat template while its thread renders one")
    with _lock:
        _renders = threading.get_ident()
        child = _send(request) or _send(request)  # a child may have ended since its last answer
        if child is None:
            raise RazorError("the process for chat templates ends as soon as it is started")
        try:
            line, expired = child.read_line()
        except BaseException:  # such as KeyboardInterrupt: the answer is still to come
            child.end()
            raise
        if line.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = child.end()
    if expired or (code is not None and code == -getattr(signal, "SIGPROF", 0)):
        what = f"takes more than {MAX_SECONDS:g} s"
    else:
        what = f"ended the process that renders it (exit code {code})"
    raise GGUFError(f"the model's chat template {what}; {MEND}")


def _send(request: bytes) -> _Child | None:
    """Write a request to the child, started if needed. Return None if it has ended."""
    global _child
    if _child is None or _child.ended or _child.parent != os.getpid():
        try:
            _child = _Child()
        except TimeoutError:  # raised by a signal handler
            raise
        except OSError as error:
            raise RazorError(
                f"the process for chat templates cannot be started: {error}"
            ) from error
    stdin = _child.process.stdin
    assert stdin is not None  # a pipe
    try:
        stdin.write(request)
        stdin.flush()
    except BrokenPipeError:
        _child.end()
        return None
    except BaseException:
        _child.end()
        raise
    return _child


@atexit.register
def _end_child() -> None:
    if _child is not None:
        _child.end()


# -- the child


def serve(requests: IO[bytes] | None = None, answers: IO[bytes] | None = None) -> None:
    """Answer requests, one line of JSON each, until the input ends."""
    requests, answers = requests or sys.stdin.buffer, answers or sys.stdout.buffer
    _limit_memory()
    for line in requests:
        request = json.loads(line)
        _limit_time(request["seconds"])
        answers.write(json.dumps(_answer(request)).encode() + b"\n")
        _limit_time(0)
        answers.flush()


def _limit_time(seconds: float) -> None:
    """End this process with SIGPROF after this much CPU time, or never if seconds is 0."""
    if hasattr(signal, "setitimer"):  # not on Windows, where the parent's longer time counts
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    what = "is malformed"
    try:
        template = _compile(request["source"])
        if request["variables"] is None:
            return {"text": ""}
        what = "cannot be rendered"
        functions = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        text = template.render(request["variables"] | functions)
        if len(text) <= MAX_TEXT:
            return {"text": text}
        reason = f"its text has more than {MAX_TEXT} characters"
    except RecursionError:
        reason = "it is nested too deeply"
    except MemoryError:  # also raised by Python's parser for deep nesting
        reason = f"it takes more than {MAX_MEMORY >> 20} MiB of memory, or is nested too deeply"
    except SyntaxError as error:  # in the Python code that Jinja generates
        reason = error.msg
    except Exception as error:
        if what != "is malformed":
            what = REFUSES
        reason = str(error) or type(error).__name__
    reason = " ".join(reason.split())[:MAX_REASON]
    return {"what": what, "reason": reason}


@lru_cache(maxsize=16)
def _compile(source: str) -> Any:
    """Return the jinja2.Template, in an environment like that of llama_cpp and Transformers."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class IgnoreGenerationTags(jinja2.ext.Extension):
        """Render the text between generation and endgeneration as usual."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            parser.stream.skip(1)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[IgnoreGenerationTags, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    return environment.from_string(source)


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise ValueError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
