"""Refit: least-squares values of the kept weights, to reproduce a layer's outputs under a given mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.kernels.cpu import library as native
from sparsify.kernels.cpu import training
from sparsify.masking.gram import add_damping

_BATCH_BYTES = 32 * 2**20  # of the factors that are kept at once
_LARGEST_NATIVE = 2048  # beyond, a thread's copy of a part takes over 16 MB, and one part keeps all cores busy in torch
_REFINEMENTS, _TOLERANCE = 3, 1e-9


def refit(weight: Tensor, mask: Tensor, *, gram: Tensor) -> Tensor:
    """Return the weight (out, in) under the mask with the outputs nearest to those of `weight`.

    gram is the sum H of x xᵀ over the inputs x, (in, in). Damping draws the result towards `weight` in features with
    little data. Exact least squares for each row by itself, in float64: of
    its kept weights k and the removed ones r,

        w_k + (H_kk)⁻¹ H_kr w_r,   or the same by   w_k - (H⁻¹)_kr ((H⁻¹)_rr)⁻¹ w_r,

    whichever has the smaller matrix to factorise. Rows with about as many kept weights are solved together.
    """
    hessian = add_damping(gram)
    original = weight.detach().to(hessian)
    few_kept = int(mask.sum()) * 2 <= mask.numel()
    chosen = mask if few_kept else ~mask
    if few_kept:
        matrix, target = hessian, original @ hessian
    else:
        matrix, target = torch.cholesky_inverse(torch.linalg.cholesky(hessian)), original
    solution = _solve_rows(matrix, target, chosen)
    if few_kept:
        return solution
    return (original - solution @ matrix).masked_fill_(~mask, 0)


def _solve_rows(matrix: Tensor, target: Tensor, chosen: Tensor) -> Tensor:
    """Solve for the chosen columns of each row, by these rows and columns of a symmetric matrix; 0 elsewhere."""
    n_rows, n_columns = target.shape
    padded = functional.pad(matrix, (0, 1, 0, 1))  # rows with fewer choices point at the last index
    solution = torch.zeros(n_rows, n_columns + 1, dtype=matrix.dtype, device=matrix.device)
    n_chosen = chosen.sum(1)
    rows = n_chosen.argsort(stable=True)
    factors = _Factors(padded, n_rows, int(n_chosen[rows[-1]]) if n_rows else 0)
    while len(rows):
        largest = max(int(n_chosen[rows[-1]]), 1)
        n_together = min(len(rows), max(1, len(factors.memory) // largest**2))
        rows, part = rows[:-n_together], rows[-n_together:]
        real = torch.arange(largest, device=part.device) < n_chosen[part, None]
        order = (~chosen[part]).to(torch.int8).argsort(dim=1, stable=True)[:, :largest].masked_fill(~real, n_columns)
        solution[part] = _solve_together(factors, padded, functional.pad(target[part], (0, 1)), order, real)
    return solution[:, :-1]


class _Factors:
    """Cholesky factors, in float32, of parts of a matrix, in memory used again for each batch of parts.

    Fresh memory costs a page fault for every 4 KB; they take longer than the work in it.
    """

    def __init__(self, padded: Tensor, n_systems: int, largest: int) -> None:
        self.single = padded.float()
        n_entries = max(largest, 1) ** 2
        self.memory = self.single.new_empty(max(1, min(n_systems, _BATCH_BYTES // (4 * n_entries))) * n_entries)

    def of(self, order: Tensor) -> Tensor:
        """Return the lower factor of each part; a row of `order` lists the rows and columns of one."""
        n_systems, size = order.shape
        lower = self.memory[: n_systems * size**2].view(n_systems, size, size)
        if self.single.is_cpu and native.available() and size <= _LARGEST_NATIVE:
            training.factor_parts(self.single, order, lower)
        else:
            for part, rows in zip(lower, order, strict=True):
                part.copy_(torch.linalg.cholesky_ex(_part(self.single, rows))[0])
        return lower


def _part(padded: Tensor, rows: Tensor) -> Tensor:
    """Return these rows and columns of a matrix; its last index stands for rows of the identity."""
    part = padded[rows][:, rows]
    part.diagonal().add_(rows == len(padded) - 1)
    return part


def _solve_together(factors: _Factors, padded: Tensor, target: Tensor, order: Tensor, real: Tensor) -> Tensor:
    """Solve one system for each row of `order`, the list of its columns.

    The systems are factorised in float32, twice as fast. Their solutions are refined by the rest of the target, in
    float64, to the digits of a factor in float64. If that does not converge, or a factor does not exist, all is
    factorised in float64.
    """
    scale = target.abs().amax(1, keepdim=True)
    for single in (True, False):
        if single:
            lower = factors.of(order)
        else:
            lower = torch.stack([torch.linalg.cholesky_ex(_part(padded, rows))[0] for rows in order])
        solution = torch.zeros_like(target)
        rest = target.gather(1, order).masked_fill_(~real, 0)
        for _ in range(_REFINEMENTS):
            step = torch.linalg.solve_triangular(lower, rest[:, :, None].to(lower.dtype), upper=False)
            step = torch.linalg.solve_triangular(lower.mT, step, upper=True)[:, :, 0].to(target.dtype)
            solution.scatter_add_(1, order, step.masked_fill_(~real, 0))
            rest = (target - solution @ padded).gather(1, order).masked_fill_(~real, 0)
            if bool((rest.abs() <= _TOLERANCE * scale).all()):
                return solution
    return solution
