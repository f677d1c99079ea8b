"""What a training shows of weights, masked ones included: gathered in its backward passes, or asked of a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sparsify.layers import Masked
from sparsify.layers.hidden import Watch
from sparsify.processes import ALONE, Ranks

Evidence = dict[str, dict[str, Tensor]]


def watch(layer: Masked, *, gradient: bool, movement: bool) -> None:
    """Let the layer's backward passes add up what is asked for, from zero."""

    def zeros(wanted: bool) -> Tensor | None:
        return torch.zeros_like(layer.mask, dtype=layer.weight.dtype) if wanted else None

    layer.watch = Watch(zeros(gradient), zeros(movement)) if gradient or movement else None


def from_loss(
    layers: Mapping[str, Masked], loss: Callable[[], Tensor], *, curvature: bool, ranks: Ranks = ALONE
) -> Evidence:
    """Work out -weight * gradient for each layer from a loss, and the Hessian times the gradient if asked for.

    Of several `ranks` each gives the loss of its own examples, and gets the same result. The gradients that parameters
    hold are left alone. Raises ValueError, naming the layer, if the loss does not depend on its weight.
    """
    weights = {name: layer.weight for name, layer in layers.items()}
    steps = {name: layer.steps for name, layer in layers.items()}
    for layer in layers.values():
        layer.steps = None  # their gradients have no gradients
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(), list(weights.values()), create_graph=curvature, allow_unused=True)
        for name, gradient in zip(weights, gradients, strict=True):
            if gradient is None:
                raise ValueError(f"{name}: the loss given does not depend on its weight; leave the layer out")
        means = {name: ranks.mean(g.detach()) for name, g in zip(weights, gradients, strict=True) if g is not None}
        found = {name: {"movement": -(weight.detach() * means[name])} for name, weight in weights.items()}
        if curvature:
            inner = torch.stack([(g * means[name]).sum() for name, g in zip(weights, gradients, strict=True)]).sum()
            products = torch.autograd.grad(inner, list(weights.values()), allow_unused=True)
            for (name, weight), product in zip(weights.items(), products, strict=True):
                found[name]["curvature"] = ranks.mean(torch.zeros_like(weight) if product is None else product.detach())
    for name, layer in layers.items():
        layer.steps = steps[name]
    return found
