"""Kernels alone: useful multiply-adds against the measured peak, and at one token bytes against the bandwidth."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import peers, record, weights
from benchmarks.cases import Grid, Shape
from sparsify.hardware import roofline as roofs
from sparsify.hardware.machine import last_level_cache_bytes
from sparsify.hardware.timing import Call, Timing, measure
from sparsify.kernels.cpu import library as native
from sparsify.kernels.csr import dense_to_csr

#: A candidate of each cell that does nothing but multiply and add, for so long.
PEAK, PEAK_S = "peak", 5e-4

#: Cells of many tokens get so many times the rounds of the grid; from the third round on, a form that takes twice as
#: long as another is left out.
MANY, HOPELESS = 6, 2.0


def measure_roofs() -> dict[str, float]:
    """Measure the multiply-add peak and the bandwidth of memory, on torch's threads."""
    n_bytes = weights.TIMES_LLC * last_level_cache_bytes()
    return {"fma_gflops": round(roofs.fma_gflops(), 1), "read_gbs": round(roofs.read_gbs(n_bytes), 1)}


@dataclass
class _Cell:
    """A weight of one sparsity and the forms that multiply it, as calls; `about` is what every row of it says."""

    nnz: int
    about: dict[str, Any]
    calls: dict[str, Call] = field(default_factory=dict)
    n_bytes: dict[str, int] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)


@torch.inference_mode()
def run(grid: Grid) -> Iterator[dict[str, Any]]:
    """Yield a row for each form, shape, number of tokens and sparsity, into a preallocated output.

    `gflops` counts kept weights only. Each of many rounds visits all shapes, tokens and sparsities, and the peak: a
    neighbour on a shared processor slows a kernel that lives in caches by 1.5, the peak by 1.1, for tenths of seconds
    to minutes, so that a cell measured by itself may meet nothing else. `peak_gflops` is the median, as `median_us` is;
    `best_us` and `best_peak_gflops` are of the best sample, which no neighbour slowed.

    `gbs` counts the bytes of the packed weight; large weights meet one token, in rotation: each comes from memory.
    """
    shapes = [(shape, tokens) for shape in grid.shapes for tokens in grid.tokens]
    many = [_cell(*where, s, 1) for where in tqdm(shapes, desc="packing") for s in grid.sparsities]
    yield from _measured(many, MANY * grid.rounds, "kernels")
    for shape in grid.large:
        for sparsity in grid.sparsities:
            yield from _measured([_cell(shape, 1, sparsity, None)], grid.rounds, f"from memory, {sparsity:.0%}")


def _measured(cells: Sequence[_Cell], rounds: int, what: str) -> Iterator[dict[str, Any]]:
    samples: list[dict[str, list[float]]] = [{form: [] for form in cell.calls} for cell in cells]
    peaks: list[list[float]] = [[] for _ in cells]

    def peak(index: int) -> Call:
        return lambda: peaks[index].append(roofs.fma_gflops(PEAK_S, n_tries=1))

    for round_ in tqdm(range(rounds), desc=what):
        for i, (cell, seen) in enumerate(zip(cells, samples, strict=True)):
            enough = HOPELESS * min(map(min, seen.values())) if round_ > 1 else math.inf
            calls = {form: [call] for form, call in cell.calls.items() if min(seen[form], default=0.0) < enough}
            timings = measure(calls | {PEAK: [peak(i)]}, rounds=1)
            for form in calls:
                seen[form].append(timings[form].median_s)
    for cell, seen, found in zip(cells, samples, peaks, strict=True):
        for form, times in seen.items():
            yield _row(cell, form, times, found)


def _row(cell: _Cell, form: str, times_s: Sequence[float], peaks: Sequence[float]) -> dict[str, Any]:
    timing = Timing.of(times_s)
    return record.row(
        form,
        timing,
        **cell.about,
        copies=cell.copies[form],
        gflops=round(2e-9 * cell.nnz * cell.about["tokens"] / timing.median_s, 1),
        gbs=round(1e-9 * cell.n_bytes[form] / timing.median_s, 1),
        best_us=round(1e6 * min(times_s), 1),
        peak_gflops=round(median(peaks), 1),
        best_peak_gflops=round(max(peaks), 1),
    )


def _cell(shape: Shape, tokens: int, sparsity: float, copies: int | None) -> _Cell:
    layer = weights.pruned_layer(shape, sparsity)
    weight, bias = weights.dense_tensors(layer)
    csr = dense_to_csr(weight, layer.mask)
    x = weights.inputs(shape, tokens)
    right = x.double() @ weight.double().t() + bias.double()
    out = torch.empty(tokens, shape[0])

    def call(form: str, index: torch.Tensor, values: torch.Tensor) -> Call:
        return lambda: native.linear(form, x, index, values, bias, shape, 0, out)

    cell = _Cell(csr.values.numel(), {"shape": list(shape), "tokens": tokens, "sparsity": sparsity})
    for form in native.FORMS:
        index, values = native.pack(form, *csr, shape)
        cell.n_bytes[form] = index.numel() + values.numel() * values.element_size()
        cell.copies[form] = copies or weights.n_copies(cell.n_bytes[form])
        rotation = [call(form, index.clone(), values.clone()) for _ in range(cell.copies[form])]
        out.fill_(torch.nan)
        peers.check(form, rotation[0](), right)
        cell.calls[form] = partial(_next, itertools.cycle(rotation))
    return cell


def _next(rotation: Iterator[Call]) -> None:
    next(rotation)()
