"""Prune MiniLM-L6 without training, by every method and at every sparsity, and print what each keeps of it.

    python scripts/oneshot.py                                  # the whole table: hours on a small machine
    python scripts/oneshot.py --methods alps --columns 80 90   # some cells; those measured before are kept
    python scripts/oneshot.py --allocations                    # owl and error against uniform, at 70%
    python scripts/oneshot.py --print                          # only print what was measured

All 36 Linears of the encoder get the same sparsity, on 300 background documents of the Lee collection, of 256 tokens at
most, in batches without padding. A cell is the mean cosine between pruned and dense embeddings of the 50 Lee documents
(which are not among the 300), Pearson's r with human ratings, with its bootstrap interval, and the seconds that pruning
took. Cells are kept in .assets/oneshot/cells.json, each with the machine, the thread count and torch's version.
"""

import argparse
import copy
import json
import platform
import time
from pathlib import Path
from typing import Any

import minilm
import torch
from assets import ASSETS
from torch import Tensor

import sparsify
from sparsify.report import table

OUT = ASSETS / "oneshot" / "cells.json"

#: A column of the table: what to ask `prune` for.
COLUMNS: dict[str, dict[str, Any]] = {
    **{f"{n}%": {"sparsity": n / 100} for n in (50, 60, 70, 80, 90)},
    "2:4": {"pattern": "2:4"},
    "1x4, 50%": {"pattern": "1x4", "sparsity": 0.5},
}
#: A line of the table.
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "magnitude + refit": {"method": "magnitude", "refit": True},
    "Wanda": {"method": "wanda"},
    "SparseGPT": {"method": "sparsegpt"},
    "SparseGPT + refit": {"method": "sparsegpt", "refit": True},
    "ALPS": {"method": "alps"},
    "ALPS, correcting": {"method": "alps", "correct": True},
    "ALPS, correcting, then 4 minutes of recover": {"method": "alps", "correct": True, "recover_s": 240},
}
#: Lines of the table of allocations, at 70%.
ALLOCATIONS: dict[str, dict[str, Any]] = {
    f"{label}, {name}": {**METHODS[label], "allocation": name}
    for label in ("SparseGPT", "ALPS")
    for name in ("uniform", "erk", "owl", "error")
}


def main() -> None:
    """Measure the cells that are asked for, one after the other, and print the table of all that were measured."""
    parser = argparse.ArgumentParser(description="Prune MiniLM-L6 without training, and print what each method keeps.")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=", ".join(METHODS)
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        choices=COLUMNS,
        default=list(COLUMNS),
        metavar="COLUMN",
        help=", ".join(COLUMNS).replace("%", "%%"),
    )
    parser.add_argument("--allocations", action="store_true", help="compare allocations at 70%% instead")
    parser.add_argument("--documents", type=int, default=minilm.N_BACKGROUND, help="default: %(default)s")
    parser.add_argument("--again", action="store_true", help="measure cells again that are there")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    options = parser.parse_args()
    lines, columns = (ALLOCATIONS, ["70%"]) if options.allocations else (METHODS, options.columns)
    cells: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    if not options.print:
        dense = minilm.load_dense()
        reference = minilm.embed(minilm.lee_documents(), dense)
        batches = minilm.calibration_batches(options.documents)
        for label in lines if options.allocations else options.methods:
            for column in columns:
                key = f"{label} | {column} | {options.documents} documents"
                if key in cells and not options.again:
                    continue
                cells[key] = measure({**lines[label], **COLUMNS[column]}, batches, reference)
                print(key, json.dumps(cells[key]), flush=True)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(cells, indent=1))
    for what in ("cosine", "lee", "time_s"):
        print(f"\n{what}\n{show(cells, list(lines), columns, options.documents, what)}")


def measure(order: dict[str, Any], batches: list[dict[str, Tensor]], reference: Tensor) -> dict[str, Any]:
    """Prune a fresh model as ordered, and compare its embeddings with the dense model's."""
    model = sparsify.convert(minilm.load_dense(), include=minilm.ENCODER_LAYERS)
    teacher = copy.deepcopy(model)
    recover_s = order.pop("recover_s", None)
    started = time.perf_counter()
    sparsify.prune(model, data=batches, progress=True, **order)
    if recover_s:
        sparsify.recover(model, teacher, batches, seconds=recover_s, progress=True)
    seconds = time.perf_counter() - started
    rows = [row for row in sparsify.report(model) if row.format == "masked"]
    n_weights = [row.shape[0] * row.shape[1] for row in rows]
    embeddings, ratings = minilm.embed(minilm.lee_documents(), model), minilm.lee_ratings()
    return {
        "sparsity": sum(row.sparsity * n for row, n in zip(rows, n_weights, strict=True)) / sum(n_weights),
        "cosine": minilm.mean_cosine(embeddings, reference),
        "lee": [minilm.lee_correlation(embeddings, ratings), *minilm.lee_interval(embeddings, ratings)],
        "time_s": seconds,
        "error": sum(row.error or 0.0 for row in rows) / len(rows),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


def show(cells: dict[str, Any], lines: list[str], columns: list[str], n_documents: int, what: str) -> str:
    """Lay out one figure of all cells; a cell that was not measured is empty."""
    rows = [["", *columns]]
    for label in lines:
        found = [cells.get(f"{label} | {column} | {n_documents} documents") for column in columns]
        rows.append([label, *(_text(cell, what) if cell else "" for cell in found)])
    return table(rows)


def _text(cell: dict[str, Any], what: str) -> str:
    if what == "lee":
        return "{:.3f} [{:.2f}, {:.2f}]".format(*cell["lee"])
    return f"{cell['time_s']:.0f} s" if what == "time_s" else f"{cell[what]:.3f}"


if __name__ == "__main__":
    main()
