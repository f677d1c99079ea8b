"""SparseGPT: remove weights column by column, and let the columns still to come make up for each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsify.masking.gram import add_damping
from sparsify.masking.patterns import Pattern, choose_mask, unit_any

BLOCK = 128  # columns with masks chosen at once; one product carries their errors to the columns behind


def sparsegpt(weight: Tensor, mask: Tensor, n_removed: int, pattern: Pattern, *, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the removed weights of a layer (out, in), and change the others to keep its outputs.

    mask: the present one; its removed weights stay removed, and its units count among the n_removed
    gram: the sum of x xᵀ over the inputs x, (in, in); damping is added to its diagonal

    Returns the new weight, float64, and mask.

    With H = R Rᵀ, R upper triangular, and U = R⁻¹, the inverse of H without its first j rows and columns is the same
    part of UᵀU: one factor serves all columns. Removing w in column j costs w² / U_jj²; the columns behind get
    w / U_jj times row j of U subtracted (sections 3.2 to 3.4). The removed units are spread over the blocks of columns
    in proportion to the kept units of each; N:M is chosen group by group.

    Frantar and Alistarh 2023, arXiv:2301.00774.
    """
    upper = inverse_factor(add_damping(gram))
    columns = weight.to(upper).T.contiguous()  # a column of the weight is a row here, and lies together in memory
    kept = mask.T.clone()
    for start, stop, n_here in _blocks(mask, n_removed, pattern):
        block, factor = columns[start:stop], upper[start:stop, start:stop]
        errors = torch.empty_like(block)
        width = pattern.group or stop - start
        for j in range(stop - start):
            if j % width == 0:
                here = slice(j, j + width)
                scores = (block[here] / factor.diagonal()[here, None]).square().T
                before = mask[:, start:stop][:, here]
                kept[start:stop][here] = choose_mask(scores, before, pattern, n_here).T
            errors[j] = block[j].masked_fill(kept[start + j], 0) / factor[j, j]
            block[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return columns.masked_fill_(~kept, 0).T.contiguous(), kept.T.contiguous()


def inverse_factor(matrix: Tensor) -> Tensor:
    """Return the upper triangular U with Uᵀ U = the inverse of a positive definite matrix."""
    return _inverse_lower(torch.linalg.cholesky(matrix.flip(0, 1))).flip(0, 1)


def _inverse_lower(lower: Tensor) -> Tensor:
    """Return the inverse of a lower triangular matrix, by halves: two thirds of the time of solving for all of it."""
    half = len(lower) // 2
    if half < BLOCK:
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        small: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
        return small
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = _inverse_lower(lower[:half, :half])
    inverse[half:, half:] = _inverse_lower(lower[half:, half:])
    inverse[half:, :half] -= inverse[half:, half:] @ lower[half:, :half] @ inverse[:half, :half]
    return inverse


def _blocks(mask: Tensor, n_removed: int, pattern: Pattern) -> Iterator[tuple[int, int, int]]:
    """Yield the blocks of columns: the first column, the end, and the number of removed units in between."""
    n_columns = mask.shape[1]
    width = pattern.group or pattern.unit_shape(mask.shape)[1]
    step = max(width, BLOCK // width * width)
    before = unit_any(mask, pattern) if not pattern.is_nm else mask
    n_more = n_removed - int((~before).sum())
    movable = (before if n_more >= 0 else ~before).sum(0).cumsum(0).tolist()
    unit = 1 if pattern.is_nm else width
    done = 0
    for start in range(0, n_columns, step):
        stop = min(start + step, n_columns)
        share = n_more * movable[stop // unit - 1] // max(movable[-1], 1)
        yield start, stop, int((~before[:, start // unit : stop // unit]).sum()) + share - done
        done = share
