"""Handle signals while a command runs.

Only the command line handles signals. Libraries take stop=.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..common.progress import Stop
from ..errors import Stopped


@contextmanager
def stop_on_interrupt() -> Iterator[Stop]:
    """Yield stop(), which is true from the first Ctrl-C on; a second Ctrl-C raises as usual.

    An exception in the middle of a native call or its callbacks would be lost or end half-way.
    Stopped leaves the block as KeyboardInterrupt, which click reports.
    """
    pressed = False

    def handle(_signal: int, _frame: Any) -> None:
        nonlocal pressed
        signal.signal(signal.SIGINT, before)
        pressed = True

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, handle) if in_main else None
    try:
        yield lambda: pressed
    except Stopped:
        raise KeyboardInterrupt from None
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)


@contextmanager
def removed_if_terminated(paths: list[Path]) -> Iterator[None]:
    """Within the block SIGTERM removes paths (as they are then) before it ends the process.

    Where the program has a handler of its own, or outside the main thread, it changes nothing.
    """
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(*_: object) -> None:
        for path in paths:
            path.unlink(missing_ok=True)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
