"""Python functions that native code calls: what they raise is raised after the native call.

ctypes prints an exception of a callback and goes on. A signal that arrived during the computation
is handled at the first bytecode of the next Python function, so a try block in a callback comes too
late for KeyboardInterrupt. A generator is resumed inside its try block.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any


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
