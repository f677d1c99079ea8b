"""SNIP: a weight is worth keeping if its removal would change the loss, one way or the other."""

from torch import Tensor


def snip(weight: Tensor, *, movement: Tensor) -> Tensor:
    """Score each weight by |weight * gradient|, the change of the loss if it went, to first order.

    Lee et al. 2019, arXiv:1810.02340 (connection sensitivity; without its normalisation, of no effect on ranks).
    """
    return movement.abs()
