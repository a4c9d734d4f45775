"""Start Python processes that run the package's own code, whatever the current folder holds."""

from __future__ import annotations

import sys


def python_command(code: str, *args: str) -> list[str]:
    """The command that runs code, with args in sys.argv[1:].

    `python -m` and `python -c` look for modules in the current folder first: a json.py there would
    be run instead of the library's.
    """
    return [
        sys.executable,
        "-c",
        f"import sys; sys.path[:] = filter(None, sys.path); {code}",
        *args,
    ]
