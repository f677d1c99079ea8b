"""Refit: the kept weights that reproduce a layer's outputs best, for a mask that stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.gram import damped

DAMPING = 0.01
_BATCH_BYTES = 64 * 2**20  # of the systems that are solved at once
_REFINEMENTS, _TOLERANCE = 3, 1e-9


def refit(weight: Tensor, mask: Tensor, *, gram: Tensor) -> Tensor:
    """Return the weight (out, in), zero where the mask is, whose outputs are nearest to those of `weight`.

    gram is the sum H of x xᵀ over the inputs x, (in, in); 1% of its mean diagonal is added to the diagonal, which draws
    the result towards `weight` where the data says little. Exact least squares for each row by itself, in float64: of
    its kept weights k and the removed ones r,

        w_k + (H_kk)⁻¹ H_kr w_r,   or the same by   w_k - (H⁻¹)_kr ((H⁻¹)_rr)⁻¹ w_r,

    whichever has the smaller matrix to factorise. Rows with about as many kept weights are solved together.
    """
    hessian = damped(gram, DAMPING)
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
    """For each row, solve with the rows and columns of a symmetric matrix that are chosen there; elsewhere return 0."""
    n_rows, n_columns = target.shape
    padded = functional.pad(matrix, (0, 1, 0, 1))  # what rows with fewer choices point at
    solution = torch.zeros(n_rows, n_columns + 1, dtype=matrix.dtype, device=matrix.device)
    n_chosen = chosen.sum(1)
    rows = n_chosen.argsort(stable=True)
    while len(rows):
        largest = max(int(n_chosen[rows[-1]]), 1)
        n_together = min(len(rows), max(1, _BATCH_BYTES // (largest * largest * matrix.element_size())))
        rows, part = rows[:-n_together], rows[-n_together:]
        real = torch.arange(largest, device=part.device) < n_chosen[part, None]
        order = (~chosen[part]).to(torch.int8).argsort(dim=1, stable=True)[:, :largest].masked_fill(~real, n_columns)
        solution[part] = _solve_together(padded, functional.pad(target[part], (0, 1)), order, real)
    return solution[:, :-1]


def _solve_together(padded: Tensor, target: Tensor, order: Tensor, real: Tensor) -> Tensor:
    """Solve one system for each row of `order`, the columns that it is about.

    The systems are factorised in float32, twice as fast, and their solutions refined by what is left of the target,
    taken in float64, to the digits that a factor in float64 gives; where that does not converge, in float64.
    """
    for dtype in (torch.float32, torch.float64):
        system = padded.to(dtype)[order[:, :, None], order[:, None, :]]
        system.diagonal(dim1=1, dim2=2).add_(~real)
        lower, failed = torch.linalg.cholesky_ex(system)
        solution = torch.zeros_like(target)
        for _ in range(_REFINEMENTS):
            rest = (target - solution @ padded).gather(1, order).masked_fill(~real, 0)
            step = torch.cholesky_solve(rest[:, :, None].to(dtype), lower)[:, :, 0].to(target.dtype)
            solution.scatter_add_(1, order, step.masked_fill_(~real, 0))
        scale = target.abs().amax(1, keepdim=True)
        rest = (target - solution @ padded).gather(1, order).masked_fill(~real, 0)
        if not failed.any() and bool((rest.abs() <= _TOLERANCE * scale).all()):
            break
    return solution
