"""Functions of higher parts of the package that lower parts call but cannot import.

The package sets them when it is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# auto_profile.auto_profile: Llama(razor="auto") calls it, and it uses Llama to measure a model
auto_profile: Callable[..., Any]
