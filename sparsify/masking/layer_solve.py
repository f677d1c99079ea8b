"""One layer on its calibration data: the new weight and mask, and the change of its outputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsify.masking.gram import Gram, add_damping
from sparsify.masking.methods.refit import refit
from sparsify.masking.methods.registry import BY_ROW, SOLVERS
from sparsify.masking.methods.scoring import check_finite, score
from sparsify.masking.patterns import choose_mask
from sparsify.masking.spec import LayerSpec

_BLOCK = 256  # columns of one product, so that half of a symmetric matrix is left out


def prune_layer(name: str, weight: Tensor, mask: Tensor, spec: LayerSpec, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return a layer's new weight and mask, from the present ones (out, in) and its inputs' Gram matrix (in, in)."""
    check_finite(name, weight)
    weight = weight.detach().masked_fill(~mask, 0)
    if spec.method in SOLVERS:
        assert isinstance(spec.method, str)
        new, mask = SOLVERS[spec.method](weight, mask, spec.n_removed, spec.pattern, gram=gram)
    else:
        scores = score(name, weight, spec.method, spec.seed, gram)
        mask = choose_mask(scores, mask, spec.pattern, spec.n_removed, by_row=spec.method in BY_ROW)
        new = weight.masked_fill(~mask, 0)
    return (refit(weight, mask, gram=gram) if spec.refit else new), mask


def weight_for_dense_outputs(weight: Tensor, gram: Gram) -> Tensor:
    """Return the W' least in ||W' x - W d||: the outputs on present inputs x match those on the dense model's inputs d.

    Least squares, damped as in refit: W' = W (C + aI) (G + aI)⁻¹ for the sums G of x xᵀ and C of d xᵀ. A layer outside
    of a chain, without dense inputs, aims at its weight.

    Li et al. 2025, arXiv:2504.02692 (asymmetric calibration), here in closed form.
    """
    if gram.cross is None:
        return weight
    matrix = gram.matrix
    hessian = add_damping(matrix)
    wanted = weight.detach().to(hessian) @ (gram.cross + hessian - matrix)
    aimed: Tensor = torch.cholesky_solve(wanted.T, torch.linalg.cholesky(hessian)).T
    return aimed


def output_error(weight: Tensor, new: Tensor, gram: Tensor) -> float:
    """Return the norm of the change of a layer's outputs over all data, relative to the norm of the outputs.

    0 without a change, and for outputs of zeros.

    >>> output_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]]), torch.eye(2))
    0.8
    """
    change, total = (_energy(matrix.to(gram), gram) for matrix in (weight.detach().to(gram) - new.to(gram), weight))
    return math.sqrt(max(change, 0.0) / total) if total > 0 else 0.0


def _energy(weight: Tensor, gram: Tensor) -> float:
    """Return the sum of w G w over the rows w; entries above the diagonal of the symmetric G count twice."""
    weight, total = weight.detach(), torch.zeros((), dtype=gram.dtype, device=gram.device)
    for start in range(0, len(gram), _BLOCK):
        part, rest = weight[:, start : start + _BLOCK], weight[:, start:]
        products = part @ gram[start : start + _BLOCK, start:]
        total += 2 * (products * rest).sum() - (products[:, : part.shape[1]] * part).sum()
    return float(total)
