"""Allow one request to a Llama at a time.

A request is a call, or a generator from its first value until it ends or is closed. A request that
an interrupt leaves at any bytecode must not block the next one, and Python code in __exit__ or
finally can be interrupted before it does anything. Therefore nothing has to be released here: a
request holds a lock in a with statement, which C code releases, and ends with the lock.
"""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from types import GeneratorType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from . import native
from .errors import RazorError

if TYPE_CHECKING:
    from .llama import Llama

P = ParamSpec("P")
T = TypeVar("T")

_POLL_SECONDS = 0.005  # how often a waiting request looks whether it is next


class _Request:
    """held: locked while the request lasts. generator: a weak reference, None for a call."""

    __slots__ = ("__weakref__", "generator", "held", "thread")

    def __init__(self) -> None:
        self.held = threading.Lock()
        self.thread = threading.get_ident()
        self.generator: Callable[[], Generator[Any, Any, Any] | None] | None = None

    @property
    def is_over(self) -> bool:
        return not self.held.locked() or (self.generator is not None and self.generator() is None)

    @property
    def is_suspended(self) -> bool:
        """True for a generator that waits for its next value to be asked for."""
        generator = self.generator() if self.generator is not None else None
        return isinstance(generator, GeneratorType) and not generator.gi_running


class Requests:
    """Queue the requests of one object. The first live request owns the object.

    Args:
        what: the object in an error message, such as "this Llama".
        wait: True: a request waits for those before it. False: it is refused.
    """

    def __init__(self, what: str, wait: bool = False) -> None:
        self._what, self._wait = what, wait
        self._queue: deque[_Request] = deque()

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return function(*args, **kwargs), called as a request.

        Raises:
            RazorError: another request is not over, or this process was forked.
        """
        request = _Request()
        with request.held:
            self._enter(request)
            return function(*args, **kwargs)

    def generate(self, make: Callable[[], Iterator[T]]) -> Generator[T, Any, Any]:
        """Return a generator that begins a request, and then yields from make()."""
        request = _Request()
        generator = self._generate(request, make)
        request.generator = weakref.ref(generator)
        return generator

    def is_running(self) -> bool:
        """Return True while a request computes; an open generator between two values does not."""
        owner = self._owner()
        return owner is not None and not owner.is_suspended

    def _generate(
        self, request: _Request, make: Callable[[], Iterator[T]]
    ) -> Generator[T, Any, Any]:
        request.thread = threading.get_ident()
        with request.held:
            self._enter(request)
            return (yield from make())

    def _enter(self, request: _Request) -> None:
        native.refuse_after_fork()
        self._queue.append(request)
        while (owner := self._owner()) is not request:
            if owner is None:  # a signal handler's request has tidied up meanwhile
                self._queue.append(request)
            elif not self._wait or owner.thread == request.thread:
                raise RazorError(self._refusal(owner, request))
            else:
                time.sleep(_POLL_SECONDS)

    def _owner(self) -> _Request | None:
        """The first request that is not over. Forget those before it."""
        for request in self._queue.copy():
            if not request.is_over:
                return request
            try:
                self._queue.remove(request)
            except ValueError:  # another thread was faster
                pass
        return None

    def _refusal(self, owner: _Request, request: _Request) -> str:
        if owner.is_suspended:
            return (
                f"{self._what} is still answering an earlier request; exhaust or close() its"
                " generator first, or make another one for this request"
            )
        if owner.thread == request.thread:
            return (
                f"{self._what} is computing and cannot be used from a callback or signal handler"
                " that runs meanwhile; use it after the call has returned"
            )
        return (
            f"another thread is using {self._what}; pass wait=True to wait for it, or make one for"
            " each thread"
        )


class Closed:
    """Stands for what close() has freed."""

    def __getattr__(self, name: str) -> Any:
        raise RazorError("this Llama is closed; make a new one")


class Inside:
    """A Llama as the request that owns it sees it: what it asks for belongs to that request.

    Args:
        llama: its _UNGUARDED has the functions that take the place of its methods.
        instead: attributes that differ from those of the Llama.
    """

    def __init__(self, llama: Llama, **instead: Any) -> None:
        vars(self).update(_llama=llama, **instead)

    def __getattr__(self, name: str) -> Any:
        unguarded = self._llama._UNGUARDED.get(name)
        if unguarded is not None:
            return functools.partial(unguarded, self._llama)
        return getattr(self._llama, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._llama, name, value)
