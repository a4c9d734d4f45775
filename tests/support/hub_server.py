"""A local server with the part of Hugging Face's protocol that downloads need."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

CHUNK = 1 << 16
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Small pieces, so that an interrupted download has received a part of a small file.
MAIN = f"""
from razor_local.cli import main
from razor_local.models import hub

def receive(*args, receive=hub._receive):
    import huggingface_hub.constants
    huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = {CHUNK}
    return receive(*args)

hub._receive = receive
main(prog_name="razor-local")
"""


@dataclass
class Repo:
    """A repository, and how the hub misbehaves about it.

    Attributes:
        files: content by path
        status, error_code: the response instead of the files. For the error code see
            huggingface_hub.utils.hf_raise_for_status
        cuts: for each of the next requests for a file, the bytes after which to close the
            connection
        sent: content to send instead of the announced one, by path
        at: called with the bytes sent so far of a file
        elsewhere: the address of another server to which requests for files are redirected
    """

    files: dict[str, bytes]
    license: str = "apache-2.0"
    commit: str = COMMIT
    status: int = 200
    error_code: str = ""
    list_status: int = 200
    cuts: list[int] = field(default_factory=list)
    sent: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    at: Callable[[int], object] | None = None
    elsewhere: str = ""


class Hub:
    """The server.

    Attributes:
        requests: method, path and Range of all requests so far.
        tokens: the access tokens of all requests so far.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.tokens: set[str | None] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self  # type: ignore[attr-defined]
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def downloads(self) -> list[tuple[str, str]]:
        """Return the paths and ranges of the files that were requested."""
        return [
            (path.rsplit("/", 1)[-1], what)
            for method, path, what in self.requests
            if method == "GET" and "/resolve/" in path
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def _answer(self) -> None:
        hub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range", "")))
        hub.tokens.add(self.headers.get("Authorization"))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.*))?", path):
            return self._api(hub.repos.get(match[1]), match[1], match[2] or "")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._file(hub.repos.get(match[1]), match[2])
        self._send(404, {}, b"")

    def _api(self, repo: Repo | None, name: str, rest: str) -> None:
        if repo is None:
            return self._send(401, {"X-Error-Code": "RepoNotFound"}, b"")
        if repo.list_status != 200:
            code = {"X-Error-Code": repo.error_code, "X-Error-Message": repo.error_code}
            return self._send(repo.list_status, code, b"")
        files = [
            {"path": path, "size": len(data), "lfs": hashlib.sha256(data).hexdigest()}
            for path, data in repo.files.items()
        ]
        body: Any = {
            "id": name,
            "sha": repo.commit,
            "cardData": {"license": repo.license},
            "siblings": [
                {
                    "rfilename": file["path"],
                    "size": file["size"],
                    "blobId": "0" * 40,
                    "lfs": {"sha256": file["lfs"], "size": file["size"], "pointerSize": 134},
                }
                for file in files
            ],
        }
        if rest.startswith("tree/"):
            body = [
                {"type": "file", "path": file["path"], "size": file["size"], "oid": "0" * 40}
                for file in files
            ]
        self._send(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def _file(self, repo: Repo | None, path: str) -> None:
        if repo is None or path not in repo.files:
            return self._send(404, {"X-Error-Code": "EntryNotFound"}, b"")
        if repo.status != 200:
            return self._send(repo.status, {"X-Error-Code": repo.error_code}, b"")
        if repo.elsewhere:
            return self._send(302, {"Location": repo.elsewhere + self.path}, b"")
        data = repo.sent.get(path, repo.files[path])
        headers = {
            "ETag": f'"{hashlib.sha256(repo.files[path]).hexdigest()}"',
            "X-Repo-Commit": repo.commit,
            "Accept-Ranges": "bytes",
        }
        begin = 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and repo.ranges:
            begin = int(wanted[1])
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        cut = repo.cuts.pop(0) if repo.cuts and self.command == "GET" else None
        self._send(206 if begin else 200, headers, data[begin:], cut, repo.at)

    def _send(
        self,
        status: int,
        headers: dict[str, str],
        body: bytes,
        cut: int | None = None,
        at: Callable[[int], object] | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            for i in range(0, len(body) if cut is None else cut, CHUNK):
                self.wfile.write(body[i : min(i + CHUNK, len(body) if cut is None else cut)])
                if at is not None:
                    at(i)
        except OSError:  # the client has gone
            self.close_connection = True
        if cut is not None:
            self.close_connection = True


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a command that uses only this hub, with its caches in home."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING", "PIP_", "XDG_")) and "proxy" not in name.lower()
    }
    return env | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hf"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",  # no network in tests
        **more,
    }


def command(*args: object) -> list[str]:
    return [sys.executable, "-c", MAIN, *map(str, args)]


def run(
    hub: Hub, home: Path, *args: object, message: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of razor-local in a separate process."""
    return subprocess.run(
        command(*args),
        env=environment(hub, home, **env),
        input=message,
        capture_output=True,
        text=True,
        timeout=300,
    )


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "the condition did not hold within a minute"
        time.sleep(0.02)
