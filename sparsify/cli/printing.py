"""Results on standard output."""

from __future__ import annotations

import json
import shutil
import sys
from typing import Any

from sparsify.reporting.report import Report
from sparsify.tables import Listing

#: Of the parts of a listing, where rich prints it.
_STYLES = {"summary": "bold", "head": "bold", "rule": "dim", "note": "dim"}


def rows(report: Report) -> list[dict[str, Any]]:
    """Return the rows of a report, and its total, as JSON takes them."""
    return [vars(row) for row in (*report, report.total)]


def print_json(value: Any) -> None:
    """Print a value as JSON for people and programs."""
    print(json.dumps(value, indent=2))


def show(listing: Listing, *first: str) -> None:
    """Print a result, after sentences of the command's own.

    On a terminal its lines fit the width, with a bold head where rich is installed; elsewhere they are whole and plain.
    """
    whole = Listing([*first, *listing.summary], listing.tables)
    width = terminal_width()
    console = None if width is None else _console()
    if console is None:
        print(whole.text(width))
        return
    for part, text in whole.lines(width):
        console.print(text, style=_STYLES.get(part))


def _console() -> Any:
    """Return a console of rich, None where rich is missing."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=sys.stdout, markup=False, highlight=False, emoji=False, soft_wrap=True)


def terminal_width() -> int | None:
    """Return the letters of a line on a terminal; None where standard output is a file or a pipe, for whole tables."""
    return shutil.get_terminal_size().columns if sys.stdout is not None and sys.stdout.isatty() else None


def note(text: str) -> None:
    """Print a remark on standard error, where it is in no one's way."""
    if sys.stderr is not None:
        print(f"sparsify: note: {text}", file=sys.stderr)
