"""Running servers of `razor-local rpc-server`."""

from __future__ import annotations

import re
import subprocess
import sys

from razor_local import Llama
from tests.support.cli import MAIN
from tests.support.texts import FACT, QUESTION, text_with

MESSAGES = [{"role": "user", "content": f"{text_with(FACT)}\n\n{QUESTION}"}]


class RpcServer:
    """The server of a command line on this machine. A context manager.

    Attributes:
        process: its process.
        address: host and port.
    """

    def __init__(self, port: int = 0) -> None:
        command = [sys.executable, "-c", MAIN, "rpc-server", "--port", str(port), "-t", "1"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        match = re.match(r"listening on (\S+): ", self.line)
        assert match, self.line
        self.address = match[1]

    def __enter__(self) -> RpcServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def answer(llama: Llama) -> str:
    """Return the greedy answer to a question about a text of several folds."""
    response = llama.create_chat_completion(MESSAGES, temperature=0, max_tokens=20)
    return response["choices"][0]["message"]["content"]
