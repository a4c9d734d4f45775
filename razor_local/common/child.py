"""Start Python processes that run the package's own code, whatever the current folder holds."""

from __future__ import annotations

import sys


def python_command(code: str, *args: str) -> list[str]:
    """Return the command that runs code with args in sys.argv[1:].

    The current folder is taken off sys.path. Otherwise a json.py there would be imported instead
    of the standard library's.
    """
    return [
        sys.executable,
        "-c",
        f"import sys; sys.path[:] = filter(None, sys.path); {code}",
        *args,
    ]
