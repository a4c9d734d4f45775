"""Use examples/desktop_chat.py on a virtual screen as a person would, and measure its event loop.

`python -m tests.support.desktop [PICTURE]`, which desktop_session() runs, prints what it saw.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from razor_local import Sampling
from razor_local.evals.haystack import MadeText
from tests.support.native_build import ROOT
from tests.support.texts import FACT, QUESTION

SIZE = "760x520"  # of the window, and of the screen
WHY_MISSING = None
if shutil.which("Xvfb") is None:
    WHY_MISSING = "needs Xvfb (Debian: apt install xvfb)"
elif find_spec("_tkinter") is None:
    WHY_MISSING = "needs Tk (Debian: apt install python3-tk)"


@contextmanager
def virtual_screen() -> Generator[str, None, None]:
    """Start an X server without a monitor, and yield the name of its display."""
    read, write = os.pipe()
    command = ["Xvfb", "-displayfd", str(write), "-screen", "0", f"{SIZE}x24"]
    server = subprocess.Popen(command, pass_fds=[write], stderr=subprocess.DEVNULL)
    os.close(write)
    try:
        with open(read, encoding="ascii") as answer:
            yield f":{answer.readline().strip()}"
    finally:
        server.terminate()
        server.wait()


def desktop_session(picture: Path | None = None) -> dict[str, Any]:
    """Run the session below in a separate process, and return what it saw."""
    with virtual_screen() as display:
        command = [sys.executable, "-m", "tests.support.desktop", *filter(None, [picture])]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"DISPLAY": display}, capture_output=True,
            text=True, timeout=200,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


class Session:
    """A person at the window: each step waits until the window is as the person expects."""

    def __init__(self, window: Any, picture: str | None) -> None:
        self.window, self.picture = window, picture
        self.seen: dict[str, Any] = {}
        self._steps = self._run()
        self._gaps: list[float] = []
        self._last = time.monotonic()
        self._tick()
        self._next()

    def _tick(self) -> None:
        now = time.monotonic()
        self._gaps.append(now - self._last)
        self._last = now
        self.window.after(1, self._tick)

    def _next(self) -> None:
        """Go on with the next step once its condition holds."""
        is_ready = next(self._steps, None)
        if is_ready is not None:
            self._wait(is_ready)

    def _wait(self, is_ready: Callable[[], bool]) -> None:
        self.window.after(10, self._next if is_ready() else lambda: self._wait(is_ready))

    def _ask(self, text: str) -> Callable[[], bool]:
        self.window.entry.insert(0, text)
        self.window.submit()
        return lambda: not self.window.busy

    def _run(self) -> Generator[Callable[[], bool], None, None]:
        window, seen = self.window, self.seen
        yield lambda: not window.busy
        seen["loaded"] = window.memory["text"]
        sentences = MadeText().pieces(Random(1))
        text = "".join(next(sentences) for _ in range(200)).replace("\n\n", " ")
        self._gaps.clear()
        yield self._ask(f"{text}{FACT} {QUESTION}")
        for question in (QUESTION, "Who has the secret code?"):
            yield self._ask(question)
        seen["worst_gap"], seen["n_ticks"] = max(self._gaps), len(self._gaps)
        seen["answered"] = window.memory["text"]
        seen["text"] = window.text.get("1.0", "end")[len(text) :]
        if self.picture:
            from PIL import ImageGrab

            until = time.monotonic() + 0.3
            yield lambda: time.monotonic() > until
            image = ImageGrab.grab().convert("RGB").quantize(64)
            image.save(self.picture, optimize=True)
        # another text, cancelled while it is read
        ended = self._ask(text[5000:] + QUESTION)
        yield lambda: "%" in window.status["text"]
        seen["button"] = window.button["text"]
        window.submit()
        yield ended
        seen["cancelled"] = window.text.get("1.0", "end")[-20:]
        window.model.delete(0, "end")
        window.model.insert(0, "no-such-file.gguf")
        window._load()
        yield lambda: not window.busy
        seen["refused"] = window.text.get("1.0", "end").strip().splitlines()[-1]
        window.close()


def main() -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    import desktop_chat

    greedy = partial(desktop_chat.Chat, sampling=Sampling(temp=0))
    vars(desktop_chat)["Chat"] = greedy  # as `razor-local chat` does for the built-in model
    os.chdir(desktop_chat.DEFAULT_MODEL.parent)  # for a short name in the picture
    worker = desktop_chat.Worker()
    worker.start()
    window = desktop_chat.Window(worker, desktop_chat.DEFAULT_MODEL.name)
    window.geometry(f"{SIZE}+0+0")
    session = Session(window, sys.argv[1] if len(sys.argv) > 1 else None)
    window.mainloop()
    worker.join(10)
    print(json.dumps(session.seen | {"alive": worker.is_alive()}))


if __name__ == "__main__":
    main()
