"""Refit: the kept weights that reproduce a layer's outputs best, for a mask that stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.gram import damped

DAMPING = 0.01
_BATCH_BYTES = 32 * 2**20  # of the factors that are kept at once
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
    factors = _Factors(padded, n_rows, int(n_chosen.max()))
    while len(rows):
        largest = max(int(n_chosen[rows[-1]]), 1)
        n_together = min(len(rows), max(1, len(factors.memory) // largest**2))
        rows, part = rows[:-n_together], rows[-n_together:]
        real = torch.arange(largest, device=part.device) < n_chosen[part, None]
        order = (~chosen[part]).to(torch.int8).argsort(dim=1, stable=True)[:, :largest].masked_fill(~real, n_columns)
        solution[part] = _solve_together(factors, padded, functional.pad(target[part], (0, 1)), order, real)
    return solution[:, :-1]


class _Factors:
    """Cholesky's factors, in float32, of parts of a matrix, in memory that is used again and again.

    Fresh memory costs a page fault for every 4 KB, which takes longer than what is then done with it.
    """

    def __init__(self, padded: Tensor, n_systems: int, largest: int) -> None:
        self.single = padded.float()
        n_together = max(1, min(n_systems, _BATCH_BYTES // (4 * max(largest, 1) ** 2)))
        self.memory = self.single.new_empty(n_together * max(largest, 1) ** 2)
        self._rows = self.single.new_empty(max(largest, 1) * len(padded))
        self._system = self.single.new_empty(max(largest, 1) ** 2)
        self._failed = torch.empty((), dtype=torch.int32, device=padded.device)

    def of(self, order: Tensor, real: Tensor) -> Tensor:
        """Return the lower factor of each part, of the rows and columns that a row of `order` lists."""
        n_systems, size = order.shape
        lower = self.memory[: n_systems * size**2].view(n_systems, size, size)
        rows, system = self._rows[: size * len(self.single)].view(size, -1), self._system[: size**2].view(size, size)
        for number in range(n_systems):
            torch.index_select(self.single, 0, order[number], out=rows)
            torch.index_select(rows, 1, order[number], out=system)
            system.diagonal().add_(~real[number])
            # Symmetric, so that its transpose is the same in the layout that LAPACK wants.
            torch.linalg.cholesky_ex(system.mT, out=(lower[number].mT, self._failed))
        return lower.mT


def _solve_together(factors: _Factors, padded: Tensor, target: Tensor, order: Tensor, real: Tensor) -> Tensor:
    """Solve one system for each row of `order`, the columns that it is about.

    The systems are factorised in float32, twice as fast, and their solutions refined by what is left of the target,
    taken in float64, to the digits that a factor in float64 gives; where that does not converge, as where a factor is
    none, in float64.
    """
    scale = target.abs().amax(1, keepdim=True)
    for single in (True, False):
        if single:
            lower = factors.of(order, real)
        else:
            system = padded[order[:, :, None], order[:, None, :]]
            system.diagonal(dim1=1, dim2=2).add_(~real)
            lower = torch.linalg.cholesky_ex(system)[0]
        solution, rest = torch.zeros_like(target), target
        for _ in range(_REFINEMENTS):
            step = rest.gather(1, order).masked_fill(~real, 0).to(lower.dtype)[:, :, None]
            step = torch.linalg.solve_triangular(lower, step, upper=False)
            step = torch.linalg.solve_triangular(lower.mT, step, upper=True)[:, :, 0].to(target.dtype)
            solution.scatter_add_(1, order, step.masked_fill_(~real, 0))
            rest = target - solution @ padded
            if bool((rest.gather(1, order).masked_fill(~real, 0).abs() <= _TOLERANCE * scale).all()):
                return solution
    return solution
