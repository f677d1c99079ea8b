"""Refit: the kept weights that reproduce a layer's outputs best, for a mask that stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.gram import damped

DAMPING = 0.01
_BATCH_BYTES = 64 * 2**20  # of the systems that are solved at once


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
    solution = torch.zeros_like(target)
    n_chosen = chosen.sum(1)
    rows = n_chosen.argsort(stable=True)
    while len(rows):
        largest = max(int(n_chosen[rows[-1]]), 1)
        n_rows = min(len(rows), max(1, _BATCH_BYTES // (largest * largest * matrix.element_size())))
        rows, part = rows[:-n_rows], rows[-n_rows:]
        # The chosen columns come first, in order; what is left of the width is made the identity.
        order = (~chosen[part]).to(torch.int8).argsort(dim=1, stable=True)[:, :largest]
        real = torch.arange(largest, device=order.device) < n_chosen[part, None]
        system = matrix[order[:, :, None], order[:, None, :]]
        system.masked_fill_(~(real[:, :, None] & real[:, None, :]), 0).diagonal(dim1=1, dim2=2).masked_fill_(~real, 1)
        values = target[part].gather(1, order).masked_fill_(~real, 0)
        solved = torch.cholesky_solve(values[:, :, None], torch.linalg.cholesky(system))[:, :, 0]
        solution[part] = torch.zeros_like(target[part]).scatter_(1, order, solved)
    return solution
