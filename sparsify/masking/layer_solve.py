"""One layer on its calibration data: what it is to become, the new weight and mask, and how far its outputs moved."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.masking.gram import Gram, add_damping
from sparsify.masking.methods.registry import BY_ROW, SOLVERS, Method, check_finite, refit, score
from sparsify.masking.patterns import Pattern, choose_mask

DAMPING = 0.01
_BLOCK = 256  # columns of one product, so that half of a symmetric matrix is left out


@dataclass(frozen=True)
class LayerSpec:
    """What a layer is to become: `n_removed` of its units removed by `method`, and the kept weights refitted or not.

    With `correct` the layer aims at the outputs of the dense model, and makes up for what those before it have lost.
    """

    method: str | Method
    pattern: Pattern
    n_removed: int
    refit: bool = False
    correct: bool = False
    seed: int | None = None

    def chooses(self, shape: tuple[int, int]) -> bool:
        """Return whether there is something to choose in a layer of this shape, which neither loses all nor nothing."""
        return self.pattern.is_nm or 0 < self.n_removed < self.pattern.n_units(shape)


def prune_layer(name: str, weight: Tensor, mask: Tensor, task: LayerSpec, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return a layer's new weight and mask, from the present ones (out, in) and its inputs' Gram matrix (in, in)."""
    check_finite(name, weight)
    weight = weight.detach().masked_fill(~mask, 0)
    if task.method in SOLVERS:
        assert isinstance(task.method, str)
        new, mask = SOLVERS[task.method](weight, mask, task.n_removed, task.pattern, gram=gram)
    else:
        scores = score(name, weight, task.method, task.seed, gram)
        mask = choose_mask(scores, mask, task.pattern, task.n_removed, by_row=task.method in BY_ROW)
        new = weight.masked_fill(~mask, 0)
    return (refit(weight, mask, gram=gram) if task.refit else new), mask


def weight_for_dense_outputs(weight: Tensor, gram: Gram) -> Tensor:
    """Return the weight that reproduces, on the inputs as they are now, what `weight` makes of the dense model's.

    Least squares, damped as in refit: W (C + aI) (G + aI)⁻¹ for the sums G of x xᵀ and C of d xᵀ over the present
    inputs x and the dense ones d. A layer whose dense inputs were not kept, outside of a chain, aims at its weight.

    Li et al. 2025, arXiv:2504.02692 (asymmetric calibration), here in closed form.
    """
    if gram.cross is None:
        return weight
    matrix = gram.matrix
    hessian = add_damping(matrix, DAMPING)
    wanted = weight.detach().to(hessian) @ (gram.cross + hessian - matrix)
    aimed: Tensor = torch.cholesky_solve(wanted.T, torch.linalg.cholesky(hessian)).T
    return aimed


def output_error(weight: Tensor, new: Tensor, gram: Tensor) -> float:
    """Return the norm of the change of a layer's outputs over all data, relative to the norm of the outputs.

    0 where nothing changed, and where there was no output but zeros.

    >>> output_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]]), torch.eye(2))
    0.8
    """
    change, total = (_energy(matrix.to(gram), gram) for matrix in (weight.detach().to(gram) - new.to(gram), weight))
    return math.sqrt(max(change, 0.0) / total) if total > 0 else 0.0


def _energy(weight: Tensor, gram: Tensor) -> float:
    """Return the sum of w G w over the rows w; of the symmetric G, what lies above the diagonal counts twice."""
    weight, total = weight.detach(), torch.zeros((), dtype=gram.dtype, device=gram.device)
    for start in range(0, len(gram), _BLOCK):
        part, rest = weight[:, start : start + _BLOCK], weight[:, start:]
        products = part @ gram[start : start + _BLOCK, start:]
        total += 2 * (products * rest).sum() - (products[:, : part.shape[1]] * part).sum()
    return float(total)
