"""GraSP: a weight without which gradients would shrink is worth keeping."""

from torch import Tensor


def grasp(weight: Tensor, *, curvature: Tensor) -> Tensor:
    """Score each weight by how much of the gradients' norm would go with it, to first order: weight * H gradient.

    Wang et al. 2020, arXiv:2002.07376 (equation 8, where what scores highest is removed; here the sign is turned).
    """
    return weight * curvature
