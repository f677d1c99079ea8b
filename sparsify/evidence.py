"""What a training shows of weights, masked ones included: gathered in its backward passes, or asked of a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sparsify.layers import Masked
from sparsify.layers.hidden import Watch

Evidence = dict[str, dict[str, Tensor]]


def watch(layer: Masked, *, gradient: bool, movement: bool) -> None:
    """Let the layer's backward passes add up what is asked for, from zero."""

    def zeros(wanted: bool) -> Tensor | None:
        return torch.zeros_like(layer.mask, dtype=layer.weight.dtype) if wanted else None

    layer.watch = Watch(zeros(gradient), zeros(movement)) if gradient or movement else None


def from_loss(layers: Mapping[str, Masked], loss: Callable[[], Tensor], curvature: bool) -> Evidence:
    """Work out -weight * gradient for each layer from a loss, and the Hessian times the gradient if asked for.

    The gradients that parameters hold are left alone. Raises ValueError, naming the layer, if the loss does not depend
    on its weight.
    """
    weights = {name: layer.weight for name, layer in layers.items()}
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(), list(weights.values()), create_graph=curvature, allow_unused=True)
        for name, gradient in zip(weights, gradients, strict=True):
            if gradient is None:
                raise ValueError(f"{name}: the loss given does not depend on its weight; leave the layer out")
        found = {
            name: {"movement": -(weight * gradient).detach()}
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }
        if curvature:
            inner = torch.stack([(gradient * gradient.detach()).sum() for gradient in gradients]).sum()
            products = torch.autograd.grad(inner, list(weights.values()), allow_unused=True)
            for (name, weight), product in zip(weights.items(), products, strict=True):
                found[name]["curvature"] = torch.zeros_like(weight) if product is None else product.detach()
    return found
