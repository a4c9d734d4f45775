"""How far a long run is, and how long it still takes."""

from __future__ import annotations

import time
from collections.abc import Callable

Progress = Callable[[str, float, "float | None"], object]  # what, part done, seconds left


class Clock:
    """Tells the progress, and the time left by what was done so far.

    total: the cost of the whole run, in any unit that is about proportional to time.
    """

    def __init__(self, progress: Progress, total: float) -> None:
        self._progress, self._total, self._done = progress, max(total, 1e-9), 0.0
        self._started = time.monotonic()

    def show(self, what: str) -> None:
        part, left = self._done / self._total, None
        if self._done:
            left = (time.monotonic() - self._started) / part * (1 - part)
        self._progress(what, part, left)

    def done(self, cost: float) -> None:
        self._done += cost
