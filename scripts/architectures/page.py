"""docs/models.md: what came out, as a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version

from architectures import FILES
from architectures.checks import CHECKS
from architectures.share import Share

FAILED = "FAILED"


@dataclass(frozen=True)
class Row:
    """One model: its share, the outcome of each check, and what stays dense."""

    share: Share
    outcomes: Mapping[str, str]
    left: str


def page(rows: Mapping[str, Row]) -> str:
    """Write the page."""
    means = "\n".join(f"- *{name}*: {' '.join((check.__doc__ or '').split())}" for name, check in CHECKS.items())
    versions = ", ".join(f"{package} {version(package)}" for package in FILES)
    return f"""# Models

What sparsify does with {len(rows)} architectures, each as it comes: nothing in the library knows their names.
Written by `scripts/zoo.py` with {versions}; `tests/test_zoo.py` goes through the same list.

How much: the model in its usual size (transformers: the default of its configuration), for one image of 224 pixels or
128 tokens. *layers*: how many are swapped. *of parameters*, *of work*: their share of all parameters and of the
multiply-adds in matrix products and convolutions.

Whether it is right: a small model of the same structure, random weights.

{means}

{table(rows)}

{notes(rows)}"""


def table(rows: Mapping[str, Row]) -> str:
    """Lay out the rows; what takes more than a few words becomes a note."""
    names = [*CHECKS]
    lines = ["| model | parameters | layers | of parameters | of work | " + " | ".join(names) + " |"]
    lines.append("|" + "---|" * (5 + len(names)))
    for name, row in rows.items():
        work = "depends" if row.share.of_work is None else f"{row.share.of_work:.0%}"
        cells = [_cell(row.outcomes.get(check, "not reached")) for check in names]
        lines.append(
            f"| {name} | {row.share.n_parameters / 1e6:,.1f} M | {row.share.n_layers} | {row.share.of_parameters:.0%} "
            f"| {work} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def notes(rows: Mapping[str, Row]) -> str:
    """Say at length what the table has no room for."""
    found = []
    for name, row in rows.items():
        found += [f"- {name}, {check}: {text}" for check, text in row.outcomes.items() if _cell(text) != text]
        found += [f"- {name}, the small one: {row.left}"] if row.left else []
    return "\n".join(found) + "\n"


def _cell(outcome: str) -> str:
    return outcome.split(":")[0]
