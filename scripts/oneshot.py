#!/usr/bin/env python
"""Prune pretrained models without training, by every method and at every sparsity, and write the quality of each.

    scripts/oneshot.py                                          MiniLM-L6, the whole table: an hour on a small machine
    scripts/oneshot.py --methods ALPS --columns 80% 90%         some cells; those measured before are kept
    scripts/oneshot.py --model smollm2 --columns 50% 2:4        perplexity of a language model
    scripts/oneshot.py --allocations                            ERK, OWL and others against uniform, at 70%
    scripts/oneshot.py --allocations sensitivity --methods ALPS
    scripts/oneshot.py --report                                 docs/results/oneshot.md from all measured cells

Cells are kept in docs/results/oneshot.jsonl, each with its time, the peak memory of the process, how busy other
processes were, the machine, the thread count and torch's version.
"""

import argparse
import copy
import gc
import json
import resource
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from oneshot_tables.page import key, page, show, table
from oneshot_tables.rows import ALLOCATED_COLUMN, ALLOCATED_METHODS, ALLOCATIONS, COLUMNS, LINES, METHODS, allocated
from oneshot_tables.subjects import SUBJECTS, Subject
from torch import Tensor, nn

import sparsify
from sparsify.hardware.allocator import return_freed_memory
from sparsify.hardware.machine import machine_name
from sparsify.hardware.timing import LoadMeter
from sparsify.pruning.precision import multiplies_bfloat16
from sparsify.pruning.sensitivity import measure_sensitivity

RESULTS_FOLDER = Path(__file__).resolve().parent.parent / "docs" / "results"
OUT = RESULTS_FOLDER / "oneshot.jsonl"
#: Batches that the damage of each layer is measured on: each is run 216 times.
N_SENSITIVITY = 4
_CLEAR = Path("/proc/self/clear_refs")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the named cells, one after the other, and print those of this call; or write the page."""
    options = _parser().parse_args(argv)
    cells = read(options.out)
    if options.report:
        (RESULTS_FOLDER / "oneshot.md").write_text(page(cells))
        return
    name, subject = options.model, SUBJECTS[options.model]
    if options.allocations is not None:
        methods = [method for method in options.methods if method in ALLOCATED_METHODS]
        wanted = [
            (allocated(method, how), ALLOCATED_COLUMN)
            for method in methods
            for how in options.allocations or ALLOCATIONS
        ]
    else:
        wanted = [(method, column) for method in options.methods for column in options.columns]
    wanted = [("dense", "0%"), *wanted]
    todo = [cell for cell in wanted if options.again or key(name, *cell) not in cells]
    if todo:
        judge = subject.judge(subject.load())
        batches = subject.batches(options.samples or subject.n_samples)
    for line, column in todo:
        order = {} if line == "dense" else {**LINES[line], **COLUMNS[column]}
        cell = cells[key(name, line, column)] = measure(subject, order, batches, judge)
        record = json.dumps({"cell": key(name, line, column), **cell})
        print(record, flush=True)
        with options.out.open("a") as file:
            file.write(record + "\n")
    for figure in (*subject.figures, "time_s"):
        print("", figure, *table(cells, name, dict(wanted), partial(show, figure=figure)), sep="\n")


def read(file: Path) -> dict[str, Any]:
    """Read the cells measured so far; of one measured again, the last."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {record.pop("cell"): record for record in map(json.loads, lines)}


def measure(subject: Subject, order: dict[str, Any], batches: list[dict[str, Tensor]], judge: Any) -> dict[str, Any]:
    """Prune a fresh model as ordered, or not at all, and judge it."""
    model = sparsify.convert(subject.load(), include=subject.layers)
    order, watch = dict(order), LoadMeter()
    recover_s, whole_s = order.pop("recover_s", None), order.pop("whole_s", None)
    move = order.get("pattern", "unstructured") if order.pop("move", False) else None
    teacher = copy.deepcopy(model) if recover_s or whole_s else None
    _reset_peak()
    started = time.perf_counter()
    if order.get("allocation") == "sensitivity":
        order["allocation"] = _by_sensitivity(model, order.pop("sparsity"), batches)
    if order:
        sparsify.prune(model, data=batches, cache_bytes=subject.cache_bytes, progress=True, **order)
    if teacher is not None and recover_s:
        sparsify.recover(model, teacher, batches, seconds=recover_s, progress=True)
    if teacher is not None and whole_s:
        more = batches if subject.more is None else subject.more()
        left_s = max(whole_s - (time.perf_counter() - started), 1.0)
        low = multiplies_bfloat16()  # elsewhere float32 takes far more steps
        sparsify.recover(model, teacher, more, seconds=left_s, lr=subject.lr, bfloat16=low, move=move, progress=True)
    seconds, peak_gb = time.perf_counter() - started, _peak_gb()
    rows = [row for row in sparsify.report(model) if row.format == "masked"]
    n_weights = [row.shape[0] * row.shape[1] for row in rows]
    return {
        "sparsity": sum(row.sparsity * n for row, n in zip(rows, n_weights, strict=True)) / sum(n_weights),
        **judge(model),
        "time_s": round(seconds, 1),
        "others_cores": watch.others_cores(),
        "peak_gb": round(peak_gb, 2),
        "cache_bytes": subject.cache_bytes,
        "error": sum(row.error or 0.0 for row in rows) / len(rows),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": machine_name(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _by_sensitivity(model: nn.Module, sparsity: float, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """Give each layer the sparsity it can bear, by SparseGPT of one layer alone."""
    few = batches[:: max(len(batches) // N_SENSITIVITY, 1)][:N_SENSITIVITY]
    return measure_sensitivity(model, few, method="sparsegpt", progress=True).allocate(sparsity)


def _reset_peak() -> None:
    """Let the peak of this process's memory start anew, without the rests of loading, if the system is Linux."""
    gc.collect()
    if _CLEAR.exists():
        return_freed_memory()
        _CLEAR.write_text("5")


def _peak_gb() -> float:
    if _CLEAR.exists():
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SUBJECTS, default="minilm")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS), metavar="COLUMN")
    parser.add_argument(
        "--allocations",
        nargs="*",
        choices=ALLOCATIONS,
        metavar="ALLOCATION",
        help="compare these, or all, at 70%% instead",
    )
    parser.add_argument("--samples", type=int, help="to calibrate on; default: what the table is about")
    parser.add_argument("--again", action="store_true", help="measure cells again that are there")
    parser.add_argument("--report", action="store_true", help="measure nothing; write docs/results/oneshot.md")
    parser.add_argument("--out", type=Path, default=OUT, help="default: docs/results/oneshot.jsonl")
    return parser


if __name__ == "__main__":
    main()
