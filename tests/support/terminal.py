"""A chat on a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time
from contextlib import contextmanager

from tests.support.cli import MAIN

ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")


class Terminal:
    """A chat in a child process on a pseudo-terminal of 40 x 240, which folds no message."""

    def __init__(self, *args: str, code: str = MAIN, **env: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            env = {"TERM": "xterm-256color", "LINES": "40", "COLUMNS": "240"} | env
            # the folder of conftest.py, so that no profile is saved to the user's own folder
            if "XDG_DATA_HOME" in os.environ:
                env = {"XDG_CACHE_HOME": os.environ["XDG_DATA_HOME"]} | env
            os.environ.update(env)
            os.execv(sys.executable, [sys.executable, "-c", code, "chat", *args])
        self.raw = ""  # all output
        self.text = ""  # without escape sequences
        self._seen = 0

    def expect(self, text: str, timeout: float = 60) -> str:
        """Return the output from the last expected text to this one."""
        end = time.monotonic() + timeout
        while (at := self.text.find(text, self._seen)) < 0:
            ready = self._read(end - time.monotonic())
            assert ready is not None, f"no {text!r} in {timeout} s, got:\n{self.text[self._seen :]}"
            assert ready, f"the process ended before {text!r}:\n{self.text[self._seen :]}"
        found = self.text[self._seen : at + len(text)]
        self._seen = at + len(text)
        return found

    def _read(self, timeout: float) -> bool | None:
        """Read some output. Return False if the process has ended, None after the timeout."""
        ready, _, _ = select.select([self.fd], [], [], max(0, timeout))
        if not ready:
            return None
        try:
            data = os.read(self.fd, 65536)
        except OSError:
            data = b""
        self.raw += data.decode("utf-8", "replace")
        self.text += ANSI.sub("", data.decode("utf-8", "replace"))
        return bool(data)

    def settle(self, seconds: float) -> bool:
        """Read until there is no output for some seconds. Return False if the process has ended."""
        while read := self._read(seconds):
            pass
        self._seen = len(self.text)
        return read is None

    def send(self, text: str) -> None:
        data = text.encode()
        while data:
            data = data[os.write(self.fd, data) :]

    def wait(self) -> tuple[int, float]:
        """Wait for the child, and return its exit code and CPU seconds."""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            ready, _, _ = select.select([self.fd], [], [], 0.1)
            try:  # the child blocks if its output is not read
                if ready:
                    self.raw += os.read(self.fd, 65536).decode("utf-8", "replace")
            except OSError:
                pass
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        raise AssertionError("the process did not end")

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@contextmanager
def terminal(*args: str, code: str = MAIN, **env: str):
    t = Terminal(*args, code=code, **env)
    try:
        yield t
    finally:
        t.close()


def paste(text: str) -> str:
    return f"\x1b[200~{text}\x1b[201~"


UP = "\x1b[A"

COUNTING = f"""
from razor_local import chat
say = chat.Chat.say
def counting(self, text, *args):
    print(f"<{{len(text)}} {{text[:20]!r}} {{len(text.splitlines())}} lines>")
    yield from say(self, text, *args)
chat.Chat.say = counting
{MAIN}
"""
