"""Wanda: a weight is worth its size times the size of its input."""

from torch import Tensor


def wanda(weight: Tensor, *, gram: Tensor) -> Tensor:
    """Score each weight by |w| times the norm of its input feature; rows are ranked by themselves (see `BY_ROW`).

    gram is the sum of x xᵀ over the inputs x, (in, in).

    Sun et al. 2023, arXiv:2306.11695.
    """
    return weight.abs().double() * gram.diagonal().double().sqrt()
