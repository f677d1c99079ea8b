"""Results on standard output."""

from __future__ import annotations

import json
import shutil
import sys
from typing import Any

from sparsify.reporting.report import Report


def rows(report: Report) -> list[dict[str, Any]]:
    """Return the rows of a report, and its total, as JSON takes them."""
    return [vars(row) for row in (*report, report.total)]


def print_json(value: Any) -> None:
    """Print a value as JSON for people and programs."""
    print(json.dumps(value, indent=2))


def terminal_width() -> int | None:
    """Return the letters of a line on a terminal; None where standard output is a file or a pipe, for whole tables."""
    return shutil.get_terminal_size().columns if sys.stdout is not None and sys.stdout.isatty() else None


def note(text: str) -> None:
    """Print a remark on standard error, where it is in no one's way."""
    if sys.stderr is not None:
        print(f"sparsify: note: {text}", file=sys.stderr)
