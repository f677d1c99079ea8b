"""Kernels alone: useful multiply-adds against the measured peak, and at one token bytes against the bandwidth."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import peers, record, weights
from benchmarks.cases import Grid, Shape
from sparsify.hardware import roofline as roofs
from sparsify.hardware.machine import last_level_cache_bytes
from sparsify.hardware.timing import Call, measure
from sparsify.kernels.cpu import library as native
from sparsify.kernels.csr import dense_to_csr

#: A candidate of each cell that does nothing but multiply and add, for so long.
PEAK, PEAK_S = "peak", 5e-4


def measure_roofs() -> dict[str, float]:
    """Measure the multiply-add peak and the bandwidth of memory, on torch's threads."""
    n_bytes = weights.TIMES_LLC * last_level_cache_bytes()
    return {"fma_gflops": round(roofs.fma_gflops(), 1), "read_gbs": round(roofs.read_gbs(n_bytes), 1)}


@dataclass
class _Cell:
    """A weight of one sparsity and the forms that multiply it, as calls; `about` is what every row of it says."""

    nnz: int
    n_bytes: dict[str, int]
    calls: dict[str, list[Call]]
    about: dict[str, Any]


@torch.inference_mode()
def run(grid: Grid) -> Iterator[dict[str, Any]]:
    """Yield a row for each form, shape, number of tokens and sparsity, into a preallocated output.

    `gflops` counts kept weights only. Each round visits all cells of a shape and a number of tokens, and each cell's
    own peak with it: a neighbour on a shared processor slows a kernel that lives in caches more than it slows the peak,
    for tenths of seconds at a time, so that a cell measured by itself may meet nothing else. `peak_gflops` and
    `peak_high_gflops` are the median and the upper quartile, as the row's `median_us` and `low_us` are of the kernel.

    `gbs` counts the bytes of the packed weight; large weights meet one token, in rotation: each comes from memory.
    """
    many = [(shape, tokens) for shape in grid.shapes for tokens in grid.tokens]
    for shape, tokens in tqdm(many, desc="kernels"):
        yield from _measured([_cell(shape, tokens, sparsity, 1) for sparsity in grid.sparsities], 3 * grid.rounds)
    for shape in tqdm(grid.large, desc="weights from memory"):
        for sparsity in grid.sparsities:
            yield from _measured([_cell(shape, 1, sparsity, None)], grid.rounds)


def _measured(cells: Sequence[_Cell], rounds: int) -> Iterator[dict[str, Any]]:
    peaks: list[list[float]] = [[] for _ in cells]

    def peak(index: int) -> Call:
        return lambda: peaks[index].append(roofs.fma_gflops(PEAK_S, n_tries=1))

    calls = {(i, form): calls for i, cell in enumerate(cells) for form, calls in cell.calls.items()}
    calls |= {(i, PEAK): [peak(i)] for i in range(len(cells))}
    for (i, form), timing in measure(calls, rounds=rounds).items():
        if form == PEAK:
            continue
        cell = cells[i]
        _, middle, high = quantiles(peaks[i], n=4, method="inclusive")
        yield record.row(
            form,
            timing,
            **cell.about,
            copies=len(cell.calls[form]),
            gflops=round(2e-9 * cell.nnz * cell.about["tokens"] / timing.median_s, 1),
            gbs=round(1e-9 * cell.n_bytes[form] / timing.median_s, 1),
            peak_gflops=round(middle, 1),
            peak_high_gflops=round(high, 1),
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

    cell = _Cell(csr.values.numel(), {}, {}, {"shape": list(shape), "tokens": tokens, "sparsity": sparsity})
    for form in native.FORMS:
        index, values = native.pack(form, *csr, shape)
        cell.n_bytes[form] = index.numel() + values.numel() * values.element_size()
        n = copies or weights.n_copies(cell.n_bytes[form])
        cell.calls[form] = [call(form, index.clone(), values.clone()) for _ in range(n)]
        out.fill_(torch.nan)
        peers.check(form, cell.calls[form][0](), right)
    return cell
