"""Python functions that native code calls: their exceptions are raised after the native call.

ctypes prints an exception of a callback and continues. A signal that arrived during the computation
is handled at the first bytecode of the next Python function, so a try block in a callback comes too
late for KeyboardInterrupt. A generator is resumed inside its try block.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator
from ctypes import c_bool, c_float, c_void_p
from typing import Any

from ..common.progress import Progress, Stop, silent
from ..errors import Stopped


class Callback:
    """Make a function callable by native code, and keep what it raises.

    Args:
        function: called with all arguments of the native callback in a tuple.
        on_error: the result that makes native code stop.
    """

    def __init__(self, function: Callable[[Any], Any], on_error: Any) -> None:
        self._function, self._on_error = function, on_error
        self.error: BaseException | None = None
        loop = self._loop()
        next(loop)
        self.call: Callable[[Any], Any] = loop.send  # of one argument

    def _loop(self) -> Generator[Any, Any, None]:
        result = None
        while True:
            try:
                while True:  # inside the try: an exception can come between two calls, too
                    argument = yield result
                    result = self._on_error if self.error else self._function(argument)
            except GeneratorExit:
                return
            except BaseException as error:
                self.error, result = error, self._on_error

    def check(self) -> None:
        """Raise what the function raised, once."""
        error, self.error = self.error, None
        if error is not None:
            raise error


class Control:
    """The callbacks of a model and its contexts, which end what it does if stop() is true.

    Nothing may be raised into native code: what a callback raises ends it too, and is kept.

    Attributes:
        progress: reports the loading of the model, too.
        load_callback, abort_callback: for the parameters of the model and of its contexts.
    """

    def __init__(self, C: Any, progress: Progress | None, stop: Stop | None) -> None:
        self.C, self.progress, self._stop = C, progress or silent, stop
        self._stopped = False
        self._callbacks: list[tuple[Callback, Any]] = []  # and what native code calls
        self.load_callback = self._make(
            C.llama_progress_callback, c_float, self._on_load, on_error=False
        )
        self.abort_callback = self._make(
            C.ggml_abort_callback, c_void_p, lambda _data: self.stopped, on_error=True
        )

    @property
    def stopped(self) -> bool:
        """True once stop() was true or a callback has raised."""
        if not self._stopped:
            asked = self._stop is not None and self._stop()
            self._stopped = asked or any(callback.error for callback, _ in self._callbacks)
        return self._stopped

    def check(self) -> None:
        """Raise what a callback has raised, Stopped if stop() is or was true."""
        for callback, _ in self._callbacks:
            callback.check()
        if self.stopped:
            raise Stopped

    def watch(self, wanted: Callable[[int], bool], computed: Callable[[int], None]) -> Any:
        """Return the eval callback of a context.

        Args:
            wanted: whether the data of a tensor (a pointer) are.
            computed: takes a tensor that was wanted.
        """
        asked: int | None = None

        def on_eval(pointer: int) -> bool:
            # llama.cpp asks for one tensor after the other until one is wanted. It computes them,
            # and the next call is that tensor's: the second argument would say so, but see Callback
            nonlocal asked
            if self.stopped:
                return False
            if pointer == asked:
                asked = None
                computed(pointer)
                return True
            is_wanted = wanted(pointer)
            asked = pointer if is_wanted else None
            return is_wanted

        return self._make(
            self.C.ggml_backend_sched_eval_callback, c_void_p, on_eval, on_error=False
        )

    def _make(
        self, kind: Any, argument: Any, function: Callable[[Any], bool], on_error: bool
    ) -> Any:
        """A native callback of a kind, which calls function with its first argument."""
        callback = Callback(function, on_error)
        first = ctypes.CFUNCTYPE(c_bool, argument)(callback.call)
        self._callbacks.append((callback, first))
        return ctypes.cast(first, kind)

    def _on_load(self, part: float) -> bool:
        self.progress(part, 1.0, "loading the model")
        return not self.stopped
