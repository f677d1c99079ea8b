"""Magnitude: a large weight is worth keeping."""

from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """Score each weight by its absolute value.

    Han et al. 2015, arXiv:1506.02626.
    """
    return weight.abs()
