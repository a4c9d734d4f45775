"""Python functions that native code calls. Their exceptions are raised after the native call.

ctypes only prints an exception of a callback and continues. A signal that arrived during the
computation is handled at the first bytecode of the next Python function, so a try block in a
callback starts too late for KeyboardInterrupt. A generator is resumed inside its try block.
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
                while True:  # inside the try: an exception can also come between two calls
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
    """The callbacks of a model and its contexts, which end a computation when stop() is true.

    An exception must not reach native code. It is kept, and ends the computation too.

    Attributes:
        progress: called with the progress, including that of loading the model.
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
            C.ggml_abort_callback, c_void_p, self.on_operation, on_error=True
        )

    @property
    def stopped(self) -> bool:
        """True once stop() was true or a callback has raised."""
        if not self._stopped:
            asked = self._stop is not None and self._stop()
            self._stopped = asked or any(callback.error for callback, _ in self._callbacks)
        return self._stopped

    def on_operation(self, _data: int | None) -> bool:
        """Return True to stop the computation. Called before each of its operations."""
        return self.stopped

    def check(self) -> None:
        """Raise the exception of a callback, or Stopped if stop() is or was true."""
        for callback, _ in self._callbacks:
            callback.check()
        if self.stopped:
            raise Stopped

    def watch(self, wanted: Callable[[int], bool], computed: Callable[[int], None]) -> Any:
        """Return the eval callback of a context.

        Args:
            wanted: returns whether the data of a tensor (a pointer) are wanted.
            computed: called with each wanted tensor after its computation.
        """
        asked: int | None = None

        def on_eval(pointer: int) -> bool:
            # llama.cpp asks for one tensor after the other until one is wanted. It computes all of
            # them, and the next call passes that tensor. (Callback drops the second argument,
            # which distinguishes the two kinds of calls.)
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
        """Return a native callback of a kind that calls function with its first argument."""
        callback = Callback(function, on_error)
        first = ctypes.CFUNCTYPE(c_bool, argument)(callback.call)
        self._callbacks.append((callback, first))
        return ctypes.cast(first, kind)

    def _on_load(self, part: float) -> bool:
        self.progress(part, 1.0, "loading the model")
        return not self.stopped
