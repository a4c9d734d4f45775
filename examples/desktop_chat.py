"""Chat with a model in a window that streams and cancels answers, and shows the KV cache's memory.

    python examples/desktop_chat.py [MODEL]

MODEL is a GGUF file or a name such as smollm2:135m. The default is the small built-in model. One
worker thread owns the model. The window never waits for it: both sides only put messages into
queues, and the window reads its queue 30 times per second. docs/embedding.md explains the parts.
"""

from __future__ import annotations

import sys
import threading
import tkinter as tk
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from time import monotonic
from tkinter import ttk
from tkinter.scrolledtext import ScrolledText

from razor_local import Chat, Llama, Memory, RazorError, Stopped, Turn
from razor_local.model_setup import DEFAULT_MODEL
from razor_local.models import resolve

N_CTX = 8192
POLL_MS = 33  # how often the window reads its queue
MEMORY_SECONDS = 0.1  # how often the worker reports the memory while it runs

# -- the worker: all that touches the model


@dataclass(frozen=True)
class Busy:
    what: str
    part: float  # 0 to 1


@dataclass(frozen=True)
class Ready:
    """The worker waits for a request. turn describes the answer that has just ended."""

    turn: Turn | None = None


@dataclass(frozen=True)
class Failed:
    reason: str


Event = str | Memory | Busy | Ready | Failed  # str: a piece of the answer


class Worker(threading.Thread):
    """Load models and answer messages, one after another, and put reports into events."""

    def __init__(self) -> None:
        super().__init__(daemon=True)  # the window may be closed while a model loads
        self.events: SimpleQueue[Event] = SimpleQueue()
        self._requests: SimpleQueue[tuple[str, str]] = SimpleQueue()
        self._cancelled = threading.Event()
        self._llama: Llama | None = None
        self._chat: Chat | None = None
        self._reported = 0.0

    # called by the window; these return at once

    def request(self, what: str, text: str) -> None:
        """Ask for "load" with a model, or "say" with a message, after Ready or Failed."""
        self._cancelled.clear()
        self._requests.put((what, text))

    def cancel(self) -> None:
        self._cancelled.set()

    def quit(self) -> None:
        """Cancel the running request, free the model, and end the thread."""
        self._requests.put(("quit", ""))
        self.cancel()

    # called in the thread

    def run(self) -> None:
        while (request := self._requests.get())[0] != "quit":
            try:
                if request[0] == "load":
                    self._load(request[1])
                else:
                    self._say(request[1])
            except Stopped:
                self.events.put(Failed("cancelled"))
            except Exception as error:  # RazorError and OSError are one sentence each
                self.events.put(Failed(str(error)))
        self._close()

    def _load(self, model: str) -> None:
        self.events.put(Busy("Looking for the model", 0))
        path = resolve(model, progress=self._downloading)
        self._close()  # first, so that two models never share the memory
        self._llama = Llama(path, n_ctx=N_CTX, razor="auto", progress=self._loaded)
        self._chat = Chat(self._llama, drop_oldest=True)
        self._report_memory()
        self.events.put(Ready())

    def _say(self, text: str) -> None:
        if self._chat is None:
            raise RazorError("no model is loaded; enter one above")
        for piece in self._chat.say(text, self._progress, self._cancelled.is_set):
            self.events.put(piece)
            self._report_memory(MEMORY_SECONDS)
        self._report_memory()
        self.events.put(Ready(self._chat.last))

    def _loaded(self, part: float) -> bool:
        self.events.put(Busy("Loading the model", part))
        return not self._cancelled.is_set()

    def _downloading(self, done: float, total: float, label: str) -> None:
        self._progress(done, total, label)
        if self._cancelled.is_set():
            raise Stopped

    def _progress(self, done: float, total: float, label: str) -> None:
        self.events.put(Busy(label.capitalize(), done / total if total else 0))
        self._report_memory(MEMORY_SECONDS)

    def _report_memory(self, wait: float = 0) -> None:
        if self._llama is not None and monotonic() - self._reported >= wait:
            self.events.put(self._llama.memory())
            self._reported = monotonic()

    def _close(self) -> None:
        if self._llama is not None:
            self._llama.close()
        self._llama = self._chat = None


# -- the window


class Window(tk.Tk):
    """The window. It knows the worker's methods and events, and nothing about models."""

    def __init__(self, worker: Worker, model: str) -> None:
        super().__init__()
        self.title("razor_local")
        ttk.Style(self).theme_use("clam")  # the same on all systems
        self.geometry("760x520")
        self.protocol("WM_DELETE_WINDOW", self.close)
        self.worker = worker

        top = ttk.Frame(self, padding=6)
        top.pack(fill="x")
        ttk.Label(top, text="Model").pack(side="left")
        self.model = ttk.Entry(top)
        self.model.insert(0, model)
        self.model.pack(side="left", fill="x", expand=True, padx=6)
        self.model.bind("<Return>", lambda _: self._load())
        ttk.Button(top, text="Load", command=self._load).pack(side="left")

        self.text = ScrolledText(self, wrap="word", state="disabled", height=1, padx=8, pady=8)
        self.text.tag_configure("user", foreground="#1d4ed8", spacing1=8)
        self.text.tag_configure("note", foreground="#6b7280")
        self.text.pack(fill="both", expand=True, padx=6)

        self.bar = tk.Canvas(self, height=14, background="#e5e7eb", highlightthickness=0)
        self.bar.pack(fill="x", padx=6, pady=(6, 0))
        self.memory = ttk.Label(self, text="KV cache: no model is loaded")
        self.memory.pack(fill="x", padx=6)

        bottom = ttk.Frame(self, padding=6)
        bottom.pack(fill="x")
        self.entry = ttk.Entry(bottom)
        self.entry.pack(side="left", fill="x", expand=True)
        self.entry.bind("<Return>", lambda _: self.submit())
        self.button = ttk.Button(bottom, text="Send", command=self.submit)
        self.button.pack(side="left", padx=(6, 0))
        self.status = ttk.Label(self, text="", padding=(6, 0, 6, 6))
        self.status.pack(fill="x")

        self.busy = False
        self._load()
        self._poll()

    def _load(self) -> None:
        if not self.busy:
            self._set_busy(True)
            self.worker.request("load", self.model.get())

    def submit(self) -> None:
        """Send the message in the entry, or cancel the running answer."""
        text = self.entry.get().strip()
        if self.busy:
            self.worker.cancel()
        elif text:
            self.entry.delete(0, "end")
            self._write(f"{text}\n", "user")
            self._set_busy(True)
            self.worker.request("say", text)

    def close(self) -> None:
        """Close the window. The worker frees the model; waiting for it would freeze the screen."""
        self.worker.quit()
        self.destroy()

    def _poll(self) -> None:
        pieces: list[str] = []
        while True:
            try:
                event = self.worker.events.get_nowait()
            except Empty:
                break
            if isinstance(event, str):
                pieces.append(event)
            else:
                self._write("".join(pieces))  # one change of the text for many pieces
                pieces.clear()
                self._show(event)
        self._write("".join(pieces))
        self.after(POLL_MS, self._poll)

    def _show(self, event: Memory | Busy | Ready | Failed) -> None:
        if isinstance(event, Memory):
            self._show_memory(event)
        elif isinstance(event, Busy):
            self.status["text"] = f"{event.what} {event.part:.0%}"
        elif isinstance(event, Failed):
            self._write(f"{event.reason}\n", "note")
            self._set_busy(False)
        else:
            turn = event.turn
            if turn is not None:
                self._write("\n" if turn.ended == "end" else f" [{turn.ended}]\n", "note")
            self._set_busy(False)
            self.status["text"] = f"{turn.answer_per_second:.0f} tokens per second" if turn else ""

    def _show_memory(self, memory: Memory) -> None:
        """Draw the allocated part of a full cache, and within it the part that holds tokens."""
        width, height = self.bar.winfo_width(), self.bar.winfo_height()
        allocated = width * memory.share
        self.bar.delete("all")
        self.bar.create_rectangle(0, 0, allocated, height, fill="#93c5fd", width=0)
        used = allocated * memory.n_tokens / memory.n_ctx
        self.bar.create_rectangle(0, 0, used, height, fill="#1d4ed8", width=0)
        self.memory["text"] = (
            f"KV cache {memory.kv_bytes / 2**20:.1f} MiB instead of"
            f" {memory.kv_bytes_full / 2**20:.1f} MiB;"
            f" {memory.n_tokens:,} of {memory.n_ctx:,} tokens"
        )

    def _write(self, text: str, tag: str = "") -> None:
        if text:
            self.text["state"] = "normal"
            self.text.insert("end", text, tag)
            self.text["state"] = "disabled"
            self.text.see("end")

    def _set_busy(self, busy: bool) -> None:
        self.busy = busy
        self.button["text"] = "Cancel" if busy else "Send"


def main() -> None:
    worker = Worker()
    worker.start()
    Window(worker, sys.argv[1] if len(sys.argv) > 1 else str(DEFAULT_MODEL)).mainloop()
    worker.join()


if __name__ == "__main__":
    main()
