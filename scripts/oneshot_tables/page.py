"""docs/results/oneshot.md, from the measured cells."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from prose import filled

from oneshot_tables.rows import ALLOCATED_COLUMN, ALLOCATED_METHODS, ALLOCATIONS, COLUMNS, METHODS, allocated
from oneshot_tables.subjects import SUBJECTS
from sparsify.hardware.timing import QUIET_CORES

Cells = dict[str, Any]
#: Lines that end by the clock: a faster processor gets further.
BY_THE_CLOCK = [line for line, order in METHODS.items() if {"recover_s", "whole_s"} & order.keys()]

_INTRO = f"""# One-shot results

Written by `scripts/oneshot.py --report` from docs/results/oneshot.jsonl; nothing here is typed in by hand. All layers
get the same sparsity; no labels and no training, except where a line says recover. Times are those of pruning (and of
recovering) on 2 threads while other processes kept at most {QUIET_CORES} cores busy; a cell measured beside others has
none. Peak memory is that of the whole process.
"""


def key(subject: str, line: str, column: str) -> str:
    """Name a cell."""
    return f"{subject} | {line} | {column}"


def page(cells: Cells) -> str:
    """Lay out all measured cells."""
    text = [_INTRO]
    for name, subject in SUBJECTS.items():
        mine = {k: cell for k, cell in cells.items() if k.startswith(f"{name} | ")}
        if not mine:
            continue
        text += [f"## {subject.title}", f"    scripts/oneshot.py --model {name}\n"]
        text += [filled(f"Calibrated on {subject.calibrated_on}."), "", _dense(cells, name), ""]
        for figure, meaning in subject.figures.items():
            text += [filled(f"{meaning}.") + "\n", *table(mine, name, METHODS, partial(show, figure=figure)), ""]
        if any(_time(cell) for cell in mine.values()):
            text += ["Seconds.\n", *table(mine, name, METHODS, _time), ""]
        timed = {k: cell for k, cell in mine.items() if k.split(" | ")[1] in BY_THE_CLOCK}
        if timed:
            text += ["Processor of what ends by the clock.\n", *table(timed, name, BY_THE_CLOCK, _processor), ""]
        # Cells measured under another budget do not belong into one table.
        peaks = {k: cell for k, cell in mine.items() if cell.get("cache_bytes") == subject.cache_bytes}
        text += ["Peak memory, GB.\n", *table(peaks, name, METHODS, partial(show, figure="peak_gb")), ""]
        text += _allocations(mine, name)
    machines = sorted({f"{cell['machine']}, torch {cell['torch']}" for cell in cells.values()})
    return "\n".join([*text, filled("Machine: " + "; ".join(machines) + "."), ""])


def table(
    cells: Cells,
    subject: str,
    lines: Iterable[str],
    text: Callable[[Any], str],
    columns: Iterable[str] = COLUMNS,
) -> list[str]:
    """Lay out one figure of all cells; a line or column without any is left out."""
    columns = [column for column in columns if any(k.endswith(f" | {column}") for k in cells)]
    rows = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for line in lines:
        found = [cells.get(key(subject, line, column)) for column in columns]
        if any(found):
            rows.append(f"| {line} | " + " | ".join(text(cell) if cell else "" for cell in found) + " |")
    return rows


def show(cell: dict[str, Any], figure: str) -> str:
    """Write one figure of a cell."""
    value = cell.get(figure)
    if value is None:
        return ""
    if isinstance(value, list):
        return "{:.3f} [{:.2f}, {:.2f}]".format(*value)
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _time(cell: dict[str, Any]) -> str:
    quiet = cell["others_cores"] <= QUIET_CORES and cell["threads"] == 2
    return f"{cell['time_s']:.0f}" if quiet else ""


def _processor(cell: dict[str, Any]) -> str:
    """Return the kind of a cell's processor and its instruction set.

    >>> _processor({"machine": "AMD EPYC (x86_64 25/1), avx2, 2 threads"})
    'x86_64 25/1, avx2'
    """
    kind: str = cell["machine"]
    return kind.rpartition("(")[2].replace(")", "").rpartition(",")[0]


def _dense(cells: Cells, subject: str) -> str:
    cell = cells.get(key(subject, "dense", "0%"))
    if cell is None:
        return ""
    figures = [figure for figure in SUBJECTS[subject].figures if figure in cell]
    return "Dense: " + ", ".join(f"{figure} {show(cell, figure)}" for figure in figures) + "."


def _allocations(cells: Cells, subject: str) -> list[str]:
    lines = [allocated(method, name) for method in ALLOCATED_METHODS for name in ALLOCATIONS]
    if not any(key(subject, line, ALLOCATED_COLUMN) in cells for line in lines if line not in METHODS):
        return []
    figure = next(iter(SUBJECTS[subject].figures))
    head = (
        f"Allocations at a mean of {ALLOCATED_COLUMN} over all layers (`scripts/oneshot.py --allocations`): {figure}.\n"
    )
    worse: list[str] = []
    rows = [head, "| | " + " | ".join(ALLOCATIONS) + " |", "|---|" + "---:|" * len(ALLOCATIONS)]
    for method in ALLOCATED_METHODS:
        found = [cells.get(key(subject, allocated(method, name), ALLOCATED_COLUMN)) for name in ALLOCATIONS]
        if any(found):
            rows.append(f"| {method} | " + " | ".join(show(cell, figure) if cell else "" for cell in found) + " |")
            uniform = cells.get(key(subject, method, ALLOCATED_COLUMN))
            worse += [
                f"{name} with {method}"
                for name, cell in zip(ALLOCATIONS, found, strict=True)
                if cell and uniform and _is_worse(cell[figure], uniform[figure], figure)
            ]
    return [*rows, "", *([f"Worse than uniform here: {', '.join(worse)}.", ""] if worse else [])]


def _is_worse(value: float, other: float, figure: str) -> bool:
    return value > other if figure == "perplexity" else value < other
