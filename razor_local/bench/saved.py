"""Read runs of a benchmark that were saved as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..common.inputs import open_input
from ..errors import RazorError
from .compare import compare_rows, differences
from .figures import VERSION, Report
from .report import FORMATS, format_report

MAX_REPORT_BYTES = 64 << 20


def load_report(path: str | os.PathLike[str]) -> Report:
    """Load a run that was saved as JSON. Raises RazorError for any other file, OSError."""
    path = Path(path)
    with open_input(path, "a saved run of bench") as file:
        raw = file.read(MAX_REPORT_BYTES + 1)
    try:
        if len(raw) > MAX_REPORT_BYTES:
            raise ValueError
        found = json.loads(raw)
        if found["format"] != "razor-local bench" or not isinstance(found["records"], list):
            raise ValueError
        version = found["head"]["version"]
        report = Report(found["head"], found["records"])
        if version == VERSION:  # formatting fails if a field is missing or makes no sense
            for kind in FORMATS:
                format_report(report, kind)
            compare_rows(report, report)
            differences(report, report)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, ArithmeticError):
        raise RazorError(
            f"{path} is not a report of a benchmark; make one with 'razor-local bench -o"
            f" {path.name}'"
        ) from None
    if version != VERSION:
        raise RazorError(
            f"{path} is a report of version {version}, but this razor-local reads version"
            f" {VERSION}; run the benchmark again"
        )
    return report
