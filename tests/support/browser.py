"""A headless Chromium, driven over WebDriver's HTTP with the standard library."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
WHY_MISSING = None if CHROMIUM and DRIVER else "needs chromium and chromedriver"

OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars",
)  # fmt: skip


class Browser:
    """A window of Chromium with a new profile. A context manager."""

    def __init__(self, width: int = 1100, height: int = 800) -> None:
        self._profile = tempfile.TemporaryDirectory()
        self._driver = subprocess.Popen(
            [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        started = (re.search(r"started successfully on port (\d+)", x) for x in self._driver.stdout)
        self._url = f"http://127.0.0.1:{next(filter(None, started))[1]}/session"
        options = [
            *OPTIONS,
            f"--window-size={width},{height}",
            f"--user-data-dir={self._profile.name}",
        ]
        capabilities = {
            "goog:chromeOptions": {"binary": CHROMIUM, "args": options},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        session = self._call("POST", "", {"capabilities": {"alwaysMatch": capabilities}})
        self._url += f"/{session['sessionId']}"

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._call("DELETE", "")
        self._driver.terminate()
        self._driver.wait()
        self._profile.cleanup()

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self._url + path, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def run(self, script: str, *args: Any) -> Any:
        """Run the body of a JavaScript function, and return what it returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": args})

    def wait(self, script: str, *args: Any, timeout: float = 60) -> Any:
        """Run a script until it returns something true, and return that."""
        end = time.monotonic() + timeout
        while not (result := self.run(script, *args)):
            assert time.monotonic() < end, f"not within {timeout} s: {script}\n{self.text()}"
            time.sleep(0.05)
        return result

    def element(self, selector: str) -> str:
        """Wait for an element that a CSS selector finds, and return its number."""
        self.wait("return document.querySelector(arguments[0])", selector)
        found = self._call("POST", "/element", {"using": "css selector", "value": selector})
        return next(iter(found.values()))

    def click(self, selector: str) -> None:
        self._call("POST", f"/element/{self.element(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        """Type a text into a field. "\\ue007" is the Enter key."""
        self._call("POST", f"/element/{self.element(selector)}/value", {"text": text})

    def text(self) -> str:
        return self.run("return document.body.innerText")

    def errors(self) -> list[str]:
        """Return the errors in the console since the last call."""
        log = self._call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in log if entry["level"] == "SEVERE"]

    def requests(self) -> set[str]:
        """Return the http and https addresses that were asked for since the last call."""
        log = self._call("POST", "/se/log", {"type": "performance"})
        events = [json.loads(entry["message"])["message"] for entry in log]
        sent = [x["params"] for x in events if x["method"] == "Network.requestWillBeSent"]
        urls = {params["request"]["url"] for params in sent}
        return {url for url in urls if url.startswith("http")}

    def screenshot(self) -> bytes:
        """Return the window as PNG."""
        return base64.b64decode(self._call("GET", "/screenshot"))
