"""Render chat templates in the process that razor_local.prompt.templates starts for this.

The executable of this process is the application itself, whose own code must not run again.
"""

from __future__ import annotations

import sys

from razor_local.common.child import TEMPLATES

if sys.argv[1:] == [TEMPLATES]:
    from razor_local.prompt.templates import serve

    serve()
    sys.exit()
