"""Layers on a GPU: each form for it against cuBLAS in the same dtype, by CUDA graph replays over cold weights."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks import peers, record, weights
from benchmarks.cases import Grid, Shape
from sparsify.hardware import gpu_timing
from sparsify.hardware.timing import Call
from sparsify.kernels import FORMS, fits, linear, pack, supports
from sparsify.kernels.csr import CSR, dense_to_csr

DENSE = "cuBLAS"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

#: Largest error against float64 that an answer may have, as a share of the largest output.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}

#: The patterns measured: unstructured at each sparsity of the grid, and those that have a form of their own at theirs.
PATTERNS = ("unstructured", "2:4", "16x16", "64x64")


def measure_roofs(device: torch.device) -> dict[str, float]:
    """Measure the bandwidth of the GPU's memory by a large copy."""
    return {"copy_gbs": round(gpu_timing.copy_gbs(device), 1)}


@torch.inference_mode()
def run(grid: Grid, dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield a row for cuBLAS and each form, at each shape, number of tokens, pattern and sparsity.

    `gbs` counts the bytes of the weight alone; `bytes_of_dense` is their fraction of the dense weight's. Raises
    RuntimeError for a wrong answer.
    """
    for shape in tqdm(grid.shapes, desc="gpu"):
        for pattern in PATTERNS:
            for sparsity in grid.sparsities if pattern != "2:4" else (0.5,):
                yield from _run_weight(shape, pattern, sparsity, grid, dtype, device)


def _run_weight(
    shape: Shape, pattern: str, sparsity: float, grid: Grid, dtype: torch.dtype, device: torch.device
) -> Iterator[dict[str, Any]]:
    layer = weights.pruned_layer(shape, sparsity, pattern).to(device, dtype)
    weight, bias = weights.dense_tensors(layer)
    csr = CSR(*dense_to_csr(weight, layer.mask))
    here = [form for form in FORMS if form != "csr" and supports(form, device, dtype) and fits(form, csr, shape)]
    packed = {form: pack(form, csr, shape) for form in here}
    for tokens in grid.tokens:
        x = weights.inputs(shape, tokens).to(device, dtype)
        right = (x.double() @ weight.double().t() + bias.double()).cpu()
        calls: dict[str, list[Call]] = {DENSE: [_dense(x, one, bias) for (one,) in _copies((weight,))]}
        for form, parts in packed.items():
            calls[form] = [_sparse(x, one, form, shape, bias) for one in _copies(parts)]
        for name, own in calls.items():
            found = peers.error(own[0]().cpu(), right)  # type: ignore[attr-defined]
            if not found <= TOLERANCE[dtype]:
                raise RuntimeError(f"{name}: off by {found:.2g} of the largest output; {TOLERANCE[dtype]:g} is allowed")
        for name, timing in gpu_timing.measure_replays(calls, device, rounds=grid.rounds).items():
            n_bytes = sum(part.nbytes for part in packed.get(name, (weight,)))
            yield record.row(
                name,
                timing,
                shape=list(shape),
                tokens=tokens,
                pattern=pattern,
                sparsity=sparsity,
                dtype=str(dtype).removeprefix("torch."),
                copies=len(calls[name]),
                gbs=round(1e-9 * n_bytes / timing.median_s, 1),
                bytes_of_dense=round(n_bytes / weight.nbytes, 4),
            )


def _copies(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    n = gpu_timing.n_copies(sum(tensor.nbytes for tensor in tensors), tensors[0].device)
    return [tensors, *(tuple(tensor.clone() for tensor in tensors) for _ in range(n - 1))]


def _dense(x: Tensor, weight: Tensor, bias: Tensor) -> Call:
    return lambda: F.linear(x, weight, bias)


def _sparse(x: Tensor, parts: tuple[Tensor, ...], form: str, shape: Shape, bias: Tensor) -> Call:
    return lambda: linear(x, parts, form, shape, bias)
