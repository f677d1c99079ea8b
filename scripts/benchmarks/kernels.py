"""Kernels alone: useful multiply-adds against the measured peak, and at one token bytes against the bandwidth."""

from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import peers, record, weights
from benchmarks.cases import Grid, Shape
from sparsify.hardware import roofline as roofs
from sparsify.hardware.timing import Call, measure
from sparsify.kernels.cpu import library as native
from sparsify.kernels.csr import dense_to_csr

#: A candidate of each cell that does nothing but multiply and add, for so long.
PEAK, PEAK_S = "peak", 5e-4


def measure_roofs() -> dict[str, float]:
    """Measure the multiply-add peak and the bandwidth of memory, on torch's threads."""
    n_bytes = weights.TIMES_LLC * record.llc_bytes()
    return {"fma_gflops": round(roofs.fma_gflops(), 1), "read_gbs": round(roofs.read_gbs(n_bytes), 1)}


@torch.inference_mode()
def run(grid: Grid) -> Iterator[dict[str, Any]]:
    """Yield a row for each form, shape, number of tokens and sparsity, into a preallocated output.

    `gflops` counts kept weights only; `peak_gflops` is the peak in the same rounds, since neighbours on a shared
    processor slow all alike. `gbs` counts the bytes of the packed weight; large weights meet one token, in
    rotation: each comes from memory.
    """
    cells: list[tuple[Shape, int, int | None]] = [(shape, tokens, 1) for shape in grid.shapes for tokens in grid.tokens]
    cells += [(shape, 1, None) for shape in grid.large]
    for shape, tokens, copies in tqdm(cells, desc="kernels"):
        for sparsity in grid.sparsities:
            yield from _run_cell(shape, tokens, sparsity, copies, grid.rounds)


def _run_cell(shape: Shape, tokens: int, sparsity: float, copies: int | None, rounds: int) -> Iterator[dict[str, Any]]:
    layer = weights.pruned_layer(shape, sparsity)
    weight, bias = weights.dense_tensors(layer)
    csr = dense_to_csr(weight, layer.mask)
    x = weights.inputs(shape, tokens)
    right = x.double() @ weight.double().t() + bias.double()
    out = torch.empty(tokens, shape[0])

    def call(form: str, index: torch.Tensor, values: torch.Tensor) -> Call:
        return lambda: native.linear(form, x, index, values, bias, shape, 0, out)

    peaks: list[float] = []
    calls: dict[str, list[Call]] = {PEAK: [lambda: peaks.append(roofs.fma_gflops(PEAK_S, n_tries=1))]}
    n_bytes: dict[str, int] = {}
    for form in native.FORMS:
        index, values = native.pack(form, *csr, shape)
        n_bytes[form] = index.numel() + values.numel() * values.element_size()
        n = copies or weights.n_copies(n_bytes[form])
        calls[form] = [call(form, index.clone(), values.clone()) for _ in range(n)]
        out.fill_(torch.nan)
        peers.check(form, calls[form][0](), right)
    nnz = csr.values.numel()
    timings = measure(calls, rounds=rounds)
    del timings[PEAK]
    for form, timing in timings.items():
        yield record.row(
            form,
            timing,
            shape=list(shape),
            tokens=tokens,
            sparsity=sparsity,
            copies=len(calls[form]),
            gflops=round(2e-9 * nnz * tokens / timing.median_s, 1),
            gbs=round(1e-9 * n_bytes[form] / timing.median_s, 1),
            peak_gflops=round(median(peaks), 1),
        )
