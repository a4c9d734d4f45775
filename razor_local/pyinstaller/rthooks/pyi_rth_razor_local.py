"""Render chat templates in the process that razor_local.prompt.templates starts for this.

Its executable is the application, which must not start again.
"""

from __future__ import annotations

import sys

from razor_local.common.child import TEMPLATES

if sys.argv[1:] == [TEMPLATES]:
    from razor_local.prompt.templates import serve

    serve()
    sys.exit()
