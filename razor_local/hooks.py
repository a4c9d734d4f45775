"""What a low part of the package calls in a higher one, which it cannot import.

The package fills these in when it is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# auto_profile.auto_profile, which Llama(razor="auto") calls: it measures a model with the help of
# Llama itself
auto_profile: Callable[..., Any]
