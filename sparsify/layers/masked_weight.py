"""How masked weights take part in training: not at all, unless a Pruner asks for more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class GradientAccumulator:
    """What a layer's backward adds up for a Pruner, masked weights included: tensors of the weight's shape, or None.

    gradient: the sum of the gradients of the weight as it is used. movement: the sum of -weight * gradient. uses: the
    weights themselves as forwards use them, for who wants to differentiate by them; FSDP's are whole there.
    """

    gradient: Tensor | None = None
    movement: Tensor | None = None
    uses: list[Tensor] | None = None

    def see(self, weight: Tensor, gradient: Tensor) -> None:
        """Add what one backward brought; weight is the one it was taken at."""
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "a Pruner that looks at gradients ('movement', or 'regrow' by gradient) sees those of loss.backward(), "
                "not those of torch.func; use torch.autograd here, or give snip and grasp a loss"
            )
        if self.gradient is not None:
            self.gradient.add_(gradient)
        if self.movement is not None:
            self.movement.sub_(gradient * weight)


def masked_weight(
    weight: Tensor, mask: Tensor, *, straight_through: bool, accumulator: GradientAccumulator | None
) -> Tensor:
    """Return weight * mask.

    Unlike a product, NaN and Inf in a masked weight come to nothing, and so do their gradients. `straight_through` lets
    the gradient of the result through to masked weights too (the straight-through estimator, Bengio et al. 2013,
    arXiv:1308.3432). `accumulator` sees the gradient of the result.
    """
    used: Tensor = _StraightThrough.apply(weight, mask) if straight_through else torch.where(mask, weight, 0.0)
    if accumulator is not None and accumulator.uses is not None:
        accumulator.uses.append(used)
    elif accumulator is not None and used.requires_grad:
        held = weight.detach()
        used.register_hook(lambda gradient: accumulator.see(held, gradient.detach()))
    return used


class _StraightThrough(torch.autograd.Function):
    """where(mask, weight, 0) whose gradient is that of the identity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        """Take the kept weights."""
        return torch.where(mask, weight, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Need nothing for the way back."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Hand the gradient to all weights."""
        return gradient, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        """Hand the tangent of all weights on: the transpose of `backward`."""
        return tangent
