"""docs/results/models.md: the outcomes as a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from prose import filled

from zoo_models.checks import CHECKS
from zoo_models.share import Share

FAILED = "FAILED"


@dataclass(frozen=True)
class Row:
    """One model: its share by the arguments of convert, and the outcome of each check."""

    shares: Mapping[str, Share]
    outcomes: Mapping[str, str]


def page(rows: Mapping[str, Row]) -> str:
    """Write the page."""
    said = {name: " ".join((check.__doc__ or "").split()) for name, check in CHECKS.items()}
    means = "\n".join(filled(f"- *{name}*: {text}") for name, text in said.items())
    versions = ", ".join(
        f"{package} {version(package)}" for package in ("torch", "torchvision", "transformers", "ultralytics")
    )
    return f"""# Models

What sparsify does with {len(rows)} models, each as it comes: nothing in the library knows their names.
Written by `scripts/zoo.py` with {versions};
`tests/scripts/test_zoo.py` goes through the same list.

## Sparse share

Each model in its usual size (transformers: the default of its configuration), for one image of 224 pixels or 128
tokens. *layers*: how many are swapped. *of parameters*, *of work*: their share of all parameters, and of the
multiply-adds in matrix products and convolutions; *before*: of the Linears, attention and 1x1 convolutions among them,
once the only ones. A model made of convolutions has all of them swapped, but for depthwise ones; `types=` takes those
too, and LSTMs and Embeddings, `functional=True` the experts. A head that is tied to its embedding stays dense with it
by `tied="skip"`, or has one mask with it by `"share"`.

{table(rows)}

## Checks

A small model of the same structure, with random weights, converted as in the last line above. MiniLM-L6 and
SmolLM2-135M are whole, with their own weights.

{means}

{outcomes(rows)}

{notes(rows)}"""


def call(arguments: Mapping[str, Any]) -> str:
    """Write the arguments of convert as they stand in code.

    >>> call({"types": [nn.Linear], "tied": "skip"})
    'types=[Linear], tied="skip"'
    """
    texts = {
        key: f"[{', '.join(kind.__name__ for kind in value)}]" if key == "types" else repr(value).replace("'", '"')
        for key, value in arguments.items()
    }
    return ", ".join(f"{key}={text}" for key, text in texts.items())


def table(rows: Mapping[str, Row]) -> str:
    """Lay out the shares."""
    columns = [
        "model",
        "parameters",
        "convert with",
        "layers",
        "of parameters, before",
        "now",
        "of work, before",
        "now",
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, row in rows.items():
        for number, (arguments, share) in enumerate(row.shares.items()):
            first = f"{name} | {share.n_parameters / 1e6:,.1f} M" if number == 0 else " | "
            lines.append(f"| {first} | {f'`{arguments}`' if arguments else ''} | {share} |")
    return "\n".join(lines)


def outcomes(rows: Mapping[str, Row]) -> str:
    """Lay out the outcomes; one of more than a few words becomes a note."""
    lines = ["| model | " + " | ".join(CHECKS) + " |", "|" + "---|" * (1 + len(CHECKS))]
    for name, row in rows.items():
        cells = [_cell(row.outcomes.get(check, "not reached")) for check in CHECKS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def notes(rows: Mapping[str, Row]) -> str:
    """Write the outcomes too long for the table as notes."""
    found = [(name, check, text) for name, row in rows.items() for check, text in row.outcomes.items()]
    return "".join(filled(f"- {name}, {check}: {text}") + "\n" for name, check, text in found if _cell(text) != text)


def _cell(outcome: str) -> str:
    return outcome.split(":")[0]
