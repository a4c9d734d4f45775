"""Progress reports and cancellation of long operations."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import Stopped

# progress(done, total, label) is called often while an operation runs, in the thread that runs it.
#   done, total: work in any unit that is about proportional to time, such as tokens or bytes.
#     If total changes or done decreases, another part of the work has begun.
#   label: the current work, a few words in lower case
# Its result is ignored. An exception ends the operation, which raises it.
Progress = Callable[[float, float, str], object]

# stop() is called often, also during a computation. Once it returns True, the operation ends at the
# next safe point and raises Stopped unless documented otherwise. Saved results are kept.
Stop = Callable[[], bool]


def silent(done: float, total: float, label: str) -> None:
    """Report nothing."""


def check_stop(stop: Stop | None) -> None:
    """Raise Stopped if stop() is true."""
    if stop is not None and stop():
        raise Stopped


class Clock:
    """Report the progress of a run of many steps.

    Args:
        total: the cost of the whole run, in any unit that is about proportional to time.
    """

    def __init__(self, progress: Progress | None, total: float) -> None:
        self._progress, self._total, self._done = progress or silent, total, 0.0

    def show(self, label: str) -> None:
        """Report the current work."""
        self._progress(self._done, self._total, label)

    def done(self, cost: float) -> None:
        """Add the cost of a step."""
        self._done += cost
