"""ALPS: search for the mask and the weights together, by splitting the layer's error from the count of its weights."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.masking.gram import add_damping
from sparsify.masking.methods.refit import refit
from sparsify.masking.patterns import Pattern, choose_mask

_FIRST_PENALTY, _ROUND, _MAX_ROUNDS = 0.1, 3, 100
#: How fast the penalty grows, by how much of the mask has changed in a round.
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


def alps(weight: Tensor, mask: Tensor, n_removed: int, pattern: Pattern, *, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the removed weights of a layer (out, in) by ADMM, and refit the others. Arguments as for `sparsegpt`.

    Two copies of the weight are drawn together. A, dense, lowers the error of the layer's outputs. B, with the wanted
    zeros, is the projection of A and the multiplier V. The penalty on the distance of A and B starts low and grows
    faster while the mask still moves (section 3.2 and appendix B); when the mask rests, B has the result. Inputs are
    scaled to the same size first: one penalty fits all columns.

    Meng et al. 2024, arXiv:2406.07831.
    """
    hessian = add_damping(gram)
    scale = hessian.diagonal().sqrt()
    values, vectors = torch.linalg.eigh((hessian / scale / scale[:, None]).float())
    original = (weight.detach().to(hessian) * scale).float()
    target = original @ vectors * values @ vectors.T
    sparse, multiplier, penalty = original.clone(), torch.zeros_like(original), _FIRST_PENALTY
    last = chosen = mask
    for _ in range(_MAX_ROUNDS):
        for _ in range(_ROUND):
            dense = (target - multiplier + penalty * sparse) @ vectors / (values + penalty) @ vectors.T
            summed = dense + multiplier / penalty
            chosen = choose_mask(summed.square(), mask, pattern, n_removed)
            sparse = summed.masked_fill(~chosen, 0)
            multiplier += penalty * (dense - sparse)
        changed = int((chosen != last).sum()) / max(int(chosen.sum()), 1)
        if changed == 0:
            break
        penalty *= next(factor for share, factor in _GROWTH if changed >= share)
        last = chosen
    return refit(weight, chosen, gram=gram), chosen
