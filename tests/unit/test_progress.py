"""The bar of the commands, and the way from Ctrl-C to the stop() of the libraries."""

from __future__ import annotations

import os
import pty
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from razor_local import Stopped
from razor_local.cli import terminal
from razor_local.cli.interrupt import stop_on_interrupt
from razor_local.cli.terminal import ProgressBar
from razor_local.common.progress import Clock, check_stop


@contextmanager
def on_a_terminal(monkeypatch, delay: float, term: str = "xterm") -> Iterator[Callable[[], str]]:
    """stderr is a terminal; a function returns what it has shown since the last time."""
    ours, theirs = pty.openpty()
    monkeypatch.setattr(terminal, "BAR_DELAY", delay)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "100")
    os.set_blocking(ours, False)

    def shown() -> str:
        try:
            text = os.read(ours, 1 << 16).decode()
        except BlockingIOError:
            return ""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)

    with open(theirs, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        yield shown
    os.close(ours)


def wait_for(shown: Callable[[], str], text: str) -> str:
    seen, end = "", time.monotonic() + 20
    while text not in seen:
        assert time.monotonic() < end, seen
        time.sleep(0.01)
        seen += shown()
    return seen


def test_a_bar_appears_without_another_call(monkeypatch) -> None:
    """The computation after the first call may take minutes."""
    with on_a_terminal(monkeypatch, 0.1) as shown, ProgressBar() as bar:
        bar(1, 4, "reading [x]\x1b[2J")
        assert shown() == ""
        assert " 25%" in wait_for(shown, r"reading [x]\x1b[2J")
        bar(3, 4, "reading")
        assert " 75%" in wait_for(shown, "reading")


def test_quick_work_shows_no_bar(monkeypatch) -> None:
    before = threading.active_count()
    with on_a_terminal(monkeypatch, 0.3) as shown:
        with ProgressBar() as bar:
            bar(0, 1, "reading")
            bar(1, 1, "reading")
        time.sleep(0.5)
        assert shown() == "" and threading.active_count() == before
        with ProgressBar() as bar:
            bar(1, 1, "reading")  # and the answer begins
            time.sleep(0.5)
            assert shown() == ""


def test_the_time_left_is_that_of_a_part_of_the_work(monkeypatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    with on_a_terminal(monkeypatch, 0) as shown, ProgressBar() as bar:
        for total in (1.0, 8.0, 8.0):
            bar(0.0, total, "a part")
            clock[0] += 30
            bar(total / 4, total, "a part")
            time.sleep(0.1)
            assert re.search(r" 25% +1:30 left a part", shown())


@pytest.mark.parametrize("term", ["dumb", "a pipe"])
def test_elsewhere_a_line_is_printed_every_minute(monkeypatch, capsys, term) -> None:
    clock = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    if term == "dumb":
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        monkeypatch.setenv("TERM", "dumb")
    with ProgressBar() as bar:
        for done in range(0, 100, 4):
            bar(done, 100, "working")
            clock[0] += 10
    assert capsys.readouterr().err == (
        "24%, 3:10 left: working\n48%, 2:10 left: working\n72%, 1:10 left: working\n"
        "96%, 0:10 left: working\n"
    )


def test_a_clock_adds_up_the_cost() -> None:
    seen = []
    clock = Clock(lambda *call: seen.append(call), 10)
    clock.show("a")
    clock.done(4)
    clock.done(1)
    clock.show("b")
    assert seen == [(0, 10, "a"), (5, 10, "b")]
    Clock(None, 10).show("nobody listens")


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell may ignore it
    yield lambda: signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_ctrl_c_stops_and_is_reported_as_such(ctrl_c) -> None:
    with stop_on_interrupt() as stop:
        assert not stop()
    with pytest.raises(KeyboardInterrupt), stop_on_interrupt() as stop:
        ctrl_c()
        assert stop()
        check_stop(stop)
    with stop_on_interrupt() as stop:  # what returns in good order is no error
        ctrl_c()


def test_a_second_ctrl_c_does_not_wait(ctrl_c) -> None:
    with stop_on_interrupt():
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()


def test_another_thread_can_only_be_stopped_otherwise(ctrl_c) -> None:
    def work() -> None:
        with stop_on_interrupt() as stop:
            done.append(stop())

    done: list[bool] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [False]


def test_stopped_is_no_error_of_an_operation() -> None:
    check_stop(None)
    check_stop(lambda: False)
    with pytest.raises(Stopped):
        check_stop(lambda: True)
