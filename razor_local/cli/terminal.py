"""The terminal side of the commands: message input with pasted text, progress bar and tables.

Messages and bars are written to stderr, answers and tables to stdout. All text goes through
printable(), because names in model files and generated text may hold terminal control codes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import RazorError
from ..printable import printable

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from .history import History

WIDTH = 100  # columns that tables may take at least: a narrow terminal folds lines, and cuts none
BAR_DELAY = 0.5  # seconds, in which most work is done
BLOCK = '"""'  # begins and ends a message of several lines
MAX_LINES = 10  # of a text that is shown when a message is changed; longer ones get a marker


def is_dumb() -> bool:
    """Return True if the terminal does not support escape sequences."""
    return os.environ.get("TERM", "") in ("dumb", "unknown")


def is_ascii() -> bool:
    """Return True if stderr is better given ASCII alone."""
    try:
        "█▒░".encode(sys.stderr.encoding or "ascii")
    except UnicodeEncodeError:
        return True
    return is_dumb()


def echo(text: str = "", *, nl: bool = True, err: bool = False, dim: bool = False) -> None:
    """Print text to stdout or stderr, dimmed if the terminal and NO_COLOR allow it."""
    import click

    text = printable(text)
    if dim and not is_dumb() and not os.environ.get("NO_COLOR"):
        text = click.style(text, dim=True)
    click.echo(text, nl=nl, err=err)


def say(text: str) -> None:
    """Print a message of a chat to stderr, dim."""
    try:
        "·−".encode(sys.stderr.encoding or "ascii")
    except UnicodeEncodeError:
        text = text.replace("·", "|").replace("−", "-")
    echo(fold(text) if sys.stderr.isatty() else text, err=True, dim=True)


def fold(text: str) -> str:
    """Break the lines of a message between words at the width of the terminal, but not before %."""
    columns = max(shutil.get_terminal_size().columns, 20)
    lines = []
    for line in text.replace(" %", "\xa0%").split("\n"):
        lines += textwrap.wrap(
            line, columns, break_long_words=False, break_on_hyphens=False, replace_whitespace=False
        ) or [""]
    return "\n".join(lines).replace("\xa0%", " %")


def sentence(error: RazorError | OSError) -> str:
    """Return the message of an error without its number."""
    if not isinstance(error, OSError):
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    return printable(f"{where}{error.strerror or error}", one_line=True)


def width(char: str) -> int:
    """Return the number of columns that a character takes."""
    if char.isascii():
        return 1
    from prompt_toolkit.utils import get_cwidth

    return get_cwidth(char)


def make_console(**options: Any) -> Console:
    """Return a rich Console that prints text as it is, without markup or control codes."""
    from rich.console import Console

    class PrintableConsole(Console):
        def render_str(self, text: str, **options: Any) -> Any:  # for cells of tables, too
            return super().render_str(printable(text), **options)

    return PrintableConsole(highlight=False, markup=False, **options)


def table_console() -> Console:
    """Return a console on stdout that does not cut the columns of a table."""
    width = max(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    return make_console(soft_wrap=True, width=width)


Complete = Callable[[str], tuple[int, list[str]]]


class MessageReader:
    """Read lines from a terminal, which message() turns into messages.

    In the line, a short marker represents a pasted text of several lines, so that a question can be
    typed after it. Terminals without bracketed paste use blocks between two lines of three double
    quotes. Alt-Enter starts a new line. A terminal without escape sequences (TERM=dumb) is read
    line by line.

    Inside its with block, the terminal marks pasted text, also during an answer.

    Args:
        complete: takes the text that is typed, without markers before it. Returns how many
            characters the Tab key replaces, and the texts to replace them by.
        history: the history of earlier chats, which stores messages as they are sent
    """

    def __init__(self, complete: Complete | None = None, history: History | None = None) -> None:
        self._complete = complete
        self._kept = history
        # texts by their markers, of all messages: the history names them again
        self._pastes: dict[str, str] = {}
        self._note = ""  # shown when the line has been read
        self._lines: dict[str, str] = {}  # of messages that were entered with markers
        self._session: Any = None
        if not is_dumb():
            self._start_session()

    def _start_session(self) -> None:
        from prompt_toolkit import PromptSession, history
        from prompt_toolkit.completion import Completer, Completion
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.keys import Keys
        from prompt_toolkit.output import create_output
        from prompt_toolkit.output.vt100 import Vt100_Output
        from prompt_toolkit.shortcuts import CompleteStyle

        class TabCompleter(Completer):
            def get_completions(_self, document: Any, _event: Any) -> Any:
                typed = self.split(document.text_before_cursor)[1]
                n, texts = self._complete(typed) if self._complete else (0, [])
                for text in texts:
                    name = re.split(r"/(?=.)", text)[-1] if "/" in text[1:] else text
                    yield Completion(text, start_position=-n, display=name)

        class KeptHistory(history.History):
            def load_history_strings(_self) -> Any:
                return reversed(self._kept.texts if self._kept is not None else [])

            def store_string(_self, line: str) -> None:
                self._keep(line)

        keys = KeyBindings()

        @keys.add(Keys.BracketedPaste)
        def _paste(event: Any) -> None:
            event.current_buffer.insert_text(self.add_paste(event.data))

        @keys.add("escape", "enter")
        def _newline(event: Any) -> None:
            event.current_buffer.insert_text("\n")

        output = create_output(stdout=sys.stderr)
        if isinstance(output, Vt100_Output):
            output.enable_cpr = False  # a prompt of one line need not ask where it stands
        # prompt_toolkit asks for marks around pasted text at each prompt, and no more behind it
        self._unmark_pastes = output.disable_bracketed_paste
        output.disable_bracketed_paste = lambda: None  # type: ignore[method-assign]
        self._session = PromptSession(
            key_bindings=keys,
            output=output,
            completer=TabCompleter(),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            history=KeptHistory(),
            reserve_space_for_menu=0,
        )

    def _keep(self, line: str) -> None:
        """Add a line to the history; after an error do without."""
        if self._kept is not None:
            try:
                self._kept.add(self.expand(line))
            except (RazorError, OSError) as error:
                path, self._kept = self._kept.path, None
                self._note = f"note: the history in {path} is not kept any more: {sentence(error)}"

    def __enter__(self) -> MessageReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._session is not None:
            self._unmark_pastes()
            self._session.output.flush()

    @contextlib.contextmanager
    def hold_input(self) -> Iterator[None]:
        """Keep text that is typed or pasted inside the block for the next message, as entered.

        A terminal that edits lines itself would end a message at each line break, show the marks
        of a paste, and lose what is longer than its buffer.
        """
        try:
            import termios

            before = termios.tcgetattr(sys.stdin) if self._session is not None else None
        except (ImportError, termios.error):
            before = None
        if before is None:
            yield
            return
        during = [*before]
        during[3] &= ~(termios.ICANON | termios.ECHO)  # Ctrl-C still interrupts
        termios.tcsetattr(sys.stdin, termios.TCSANOW, during)
        try:
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)

    @property
    def can_edit(self) -> bool:
        """Return True if a line can start with text that the user can edit."""
        return self._session is not None

    def _read_line(self, prompt: str, begin: str = "") -> str:
        if self._session is not None:
            return str(self._session.prompt(prompt, default=begin))
        print(prompt + printable(begin), end="", flush=True, file=sys.stderr)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return begin + line.removesuffix("\n")

    def read(self, begin: str = "") -> str | None:
        """Return the next line, None at the end of input. Raises KeyboardInterrupt for Ctrl-C.

        begin: text that the line starts with; it cannot be edited if can_edit is False.
        """
        try:
            line = self._read_line(">>> ", begin)
            markers, typed = self.split(line)
            if typed.lstrip().startswith(BLOCK):
                line = markers + self._read_block(typed.lstrip()[len(BLOCK) :])
        except EOFError:
            return None
        if self._note:
            say(self._note)
            self._note = ""
        return line

    def message(self, line: str) -> str:
        """Return the message that a line means. line_of() finds the line again."""
        text = self.expand(line).strip("\n")
        if text != line:
            self._lines[text] = line
        return text

    def split(self, line: str) -> tuple[str, str]:
        """Return the markers at the beginning of a line, and the rest."""
        typed = line
        while marker := next((m for m in self._pastes if typed.startswith(m)), None):
            typed = typed[len(marker) :]
        return line[: len(line) - len(typed)], typed

    def line_of(self, text: str) -> str:
        """Return the line in which a message was entered, with its markers, for editing."""
        if text in self._lines:
            return self._lines[text]
        first, _, last = text.rpartition("\n\n")
        if first.count("\n") < MAX_LINES:
            return text
        return self.add_paste(first) + last

    def _read_block(self, line: str) -> str:
        lines = [line]
        while not lines[-1].rstrip().endswith(BLOCK):
            lines.append(self._read_line("... "))
        lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
        return "\n".join(lines)

    def add_paste(self, text: str) -> str:
        """Return the marker of a pasted text, or a text of one line itself."""
        text = text.replace("\r\n", "\n").replace("\r", "\n").strip("\n")
        if "\n" not in text:
            return text
        marker = f"[pasted text {len(self._pastes) + 1}: {text.count(chr(10)) + 1} lines]"
        self._pastes[marker] = text
        return marker

    def add_file(self, name: str, text: str, n_tokens: int) -> str:
        """Return the marker that represents a file in the line."""
        name = printable(name, one_line=True)
        marker = f"[file {len(self._pastes) + 1}: {name}, {n_tokens} tokens]"
        self._pastes[marker] = text.strip("\n")
        return marker

    def expand(self, line: str) -> str:
        """Return the line with the pasted texts in it, each separated by an empty line."""
        if not any(marker in line for marker in self._pastes):
            return line
        parts = re.split("(" + "|".join(map(re.escape, self._pastes)) + ")", line)
        texts = [self._pastes.get(part, part.strip(" ")) for part in parts]
        return "\n\n".join(text for text in texts if text)


@contextlib.contextmanager
def progress_of_run(journal: Path | None) -> Iterator[ProgressBar]:
    """Show the progress of a run. If it is interrupted, say how to continue it with --resume."""
    with ProgressBar() as bar:
        try:
            yield bar
        except KeyboardInterrupt:
            bar.close()
            echo(
                "Interrupted; no results were kept (use --resume FILE to keep them)."
                if journal is None
                else f"Interrupted; run the same command again to continue from {journal}.",
                err=True,
            )
            raise


class ProgressBar:
    """The progress of a command: one line on stderr that vanishes when the work is done.

    Call it as a common.progress.Progress. It appears after half a second. Where stderr is not a
    terminal, or one that cannot move its cursor, a line is printed every minute instead.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._done = self._total = 0.0
        self._label = ""
        self._began = 0.0, 0.0  # when this part of the work began, and what was done then
        self._shown = time.monotonic()
        self._bar: Any = None
        # the next call may come after a long computation, so it is not left to that to show the bar
        self._delay: threading.Timer | None = None
        if _can_show_bars():
            self._delay = threading.Timer(BAR_DELAY, self._appear)
            self._delay.daemon = True
            self._delay.start()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, done: float, total: float, label: str) -> None:
        with self._lock:
            now, label = time.monotonic(), printable(label, one_line=True)
            if total != self._total or done < self._done:
                self._began = now, done
            is_new = label != self._label or done >= total
            self._done, self._total, self._label = done, total, label
            if not _can_show_bars():
                if now - self._shown >= 60:
                    self._shown = now
                    parts = [f"{self._part():.0%}", self._left()]
                    echo(f"{', '.join(filter(None, parts))}: {label}", err=True)
            elif self._delay is None and (is_new or now - self._shown >= 0.1):
                self._draw()

    def close(self) -> None:
        with self._lock:
            if self._delay is not None:
                self._delay.cancel()
                self._delay = None
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def _appear(self) -> None:
        with self._lock:
            if self._delay is not None:  # not closed meanwhile
                self._delay = None
                self._draw()

    def _draw(self) -> None:
        if self._bar is None:
            if self._done >= self._total:
                return
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            self._bar = Progress(
                BarColumn(20),
                TaskProgressColumn(),
                TextColumn("{task.fields[left]}"),
                TextColumn("{task.description}", markup=False),
                console=make_console(stderr=True, force_terminal=True),
                transient=True,
                auto_refresh=False,  # no thread beside the computation
                redirect_stdout=False,  # it may be another file than stderr
            )
            self._task = self._bar.add_task("", total=1.0, left="")
            self._bar.start()
        self._shown = time.monotonic()
        self._bar.update(
            self._task,
            description=self._label,
            completed=self._part(),
            left=self._left(),
            refresh=True,
        )

    def _part(self) -> float:
        """Return the part that is done, from 0 to 1."""
        return min(self._done / self._total, 1.0) if self._total else 0.0

    def _left(self) -> str:
        """Return an estimate of the time left, "" as long as it is unreliable."""
        seconds, done = time.monotonic() - self._began[0], self._done - self._began[1]
        if seconds < 1 or done <= 0:
            return ""
        return f"{_minutes(seconds / done * (self._total - self._done))} left"


def _can_show_bars() -> bool:
    """Return True if stderr is a terminal whose cursor can be moved."""
    return sys.stderr is not None and sys.stderr.isatty() and not is_dumb()


def _minutes(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
