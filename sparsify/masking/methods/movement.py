"""Movement: a weight is worth keeping if training moves it away from zero."""

from torch import Tensor


def movement(weight: Tensor, *, movement: Tensor) -> Tensor:
    """Score each weight by its way from zero under the steps of gradient descent so far.

    Sanh et al. 2020, arXiv:2005.07683 (the scores of section 3, as the sum of their updates).
    """
    return movement
