"""Movement: a weight that training moves away from zero is worth keeping."""

from torch import Tensor


def movement(weight: Tensor, *, movement: Tensor) -> Tensor:
    """Score each weight by how far the steps of gradient descent so far would have moved it away from zero.

    Sanh et al. 2020, arXiv:2005.07683 (the scores of section 3, as the sum that their updates come to).
    """
    return movement
