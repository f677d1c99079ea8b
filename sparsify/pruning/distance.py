"""The distance of a block's outputs from the wanted ones, as a loss that no few rows decide."""

from __future__ import annotations

import torch
from torch import Tensor

#: How many times a typical row a row counts at most.
_MOST = 10.0


def relative_distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the squared distance of two sets of rows, (rows, features), relative to the variance of the wanted ones.

    A language model gives its first token activations a thousand times those of the others, though the layers behind
    divide each row by its own size. So a row that deviates from the mean of usual rows by more than _MOST times the
    median (of the rows that deviate at all) is scaled down to that. Usual rows have a square of at most _MOST medians.

    >>> wanted = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [2.0, 0.0], [-2.0, 0.0]])
    >>> round(float(relative_distance(1.1 * wanted, wanted)), 6)
    0.01

    Sun et al. 2024, arXiv:2402.17762 (massive activations).
    """
    square = wanted.square().sum(1)
    mean = wanted[square <= _limit(square)].mean(0)
    size = (wanted - mean).square().sum(1)
    counted = size.clamp(max=_limit(size))
    weight = torch.where(counted < size, counted / size, 1.0)
    distance = ((found - wanted).square().sum(1) * weight).sum()
    return distance / (counted.sum() + torch.finfo(torch.float32).tiny)


def _limit(sizes: Tensor) -> Tensor:
    """Return _MOST times the median of the sizes above zero; 0 if there are none."""
    some = sizes[sizes > 0]
    return _MOST * (some if len(some) else sizes).median()
