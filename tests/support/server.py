"""A running server of `razor-local serve`, and requests to it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from tests.support.cli import MAIN


class Server:
    """The server of a command line. A context manager.

    Attributes:
        process: its process.
        address: host and port.
        line: the line that it prints when it is ready.
    """

    def __init__(self, *args: object, env: dict[str, str] | None = None) -> None:
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8")
        command = [sys.executable, "-c", MAIN, "serve", "--port", "0", *map(str, args)]
        self.process = subprocess.Popen(
            command, stderr=self._stderr, stdout=subprocess.DEVNULL, env=os.environ | (env or {})
        )
        while (ready := re.search(r"listening on http://(\S+): .*\n", self.stderr())) is None:
            try:
                self.process.wait(0.1)
                raise AssertionError(self.stderr())
            except subprocess.TimeoutExpired:
                pass
        self.address, self.line = ready[1], ready[0].strip()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.end(signal.SIGTERM) == 0, self.stderr()

    def end(self, signal_number: int) -> int:
        """Send a signal, and return the exit code."""
        self.process.send_signal(signal_number)
        return self.process.wait(20)

    def stderr(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read()

    def connect(self, timeout: float = 60) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.address, timeout=timeout)

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Return the status and the JSON, or the text, of a response."""
        connection = self.connect()
        data = body if isinstance(body, (bytes, str, type(None))) else json.dumps(body)
        connection.request(method, path, data, headers or {})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        is_json = "json" in response.headers.get("Content-Type", "")
        return response.status, json.loads(text) if is_json else text

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        return self.request("POST", path, body, headers)

    def chat(self, *texts: str, **options: Any) -> dict[str, Any]:
        """Return the greedy answer to messages of the user and the assistant in turn."""
        status, answer = self.post("/v1/chat/completions", chat_request(*texts, **options))
        assert status == 200, answer
        return answer

    def say(self, *texts: str, **options: Any) -> str:
        return self.chat(*texts, **options)["choices"][0]["message"]["content"]

    def stream(self, *texts: str, **options: Any) -> Iterator[dict[str, Any]]:
        """Yield the events of a streamed answer. Closing the generator ends the connection."""
        connection = self.connect()
        body = json.dumps(chat_request(*texts, stream=True, **options))
        connection.request("POST", "/v1/chat/completions", body)
        try:
            for line in connection.getresponse():
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])
        finally:
            connection.close()

    def n_busy(self) -> int:
        """Return the number of slots that compute."""
        return sum(slot["is_processing"] for slot in self.get("/slots")[1])


def chat_request(*texts: str, **options: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": messages, "temperature": 0, "max_tokens": 24} | options
