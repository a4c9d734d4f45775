"""Start Python processes that run the package's own code, whatever the current folder holds."""

from __future__ import annotations

import sys

from ..errors import RazorError

# with this argument, an application made by PyInstaller renders chat templates, see
# pyinstaller/rthooks
TEMPLATES = "--razor-local-templates"


def is_frozen() -> bool:
    """Return True in an application made by PyInstaller, which cannot run code with -c."""
    return bool(getattr(sys, "frozen", False))


def python_command(code: str, *args: str) -> list[str]:
    """Return the command that runs code with args in sys.argv[1:]. Raises RazorError if frozen.

    The current folder is taken off sys.path. Otherwise a json.py there would be imported instead
    of the standard library's.
    """
    if is_frozen():
        raise RazorError(
            f"{sys.executable} is a frozen application and cannot run Python code; use the"
            " razor-local command for this"
        )
    return [
        sys.executable,
        "-c",
        f"import sys; sys.path[:] = filter(None, sys.path); {code}",
        *args,
    ]
