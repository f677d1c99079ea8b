"""GraSP: a weight is worth keeping if gradients would shrink without it."""

from torch import Tensor


def grasp(weight: Tensor, *, curvature: Tensor) -> Tensor:
    """Score each weight by its part of the gradients' norm, to first order: weight * H gradient.

    Wang et al. 2020, arXiv:2002.07376 (equation 8; the paper removes the highest scores, so the sign is turned here).
    """
    return weight * curvature
