"""What a training shows of weights, masked ones included: gathered in its backward passes, or asked of a loss."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from sparsify.distributed import SINGLE, Ranks
from sparsify.layers import MaskedLayer
from sparsify.layers.fsdp import is_sharded
from sparsify.layers.masked_weight import GradientAccumulator
from sparsify.masking.unseen import refuse_unseen

Evidence = dict[str, dict[str, Tensor]]


def accumulate_gradients(layer: MaskedLayer, *, gradient: bool, movement: bool) -> None:
    """Let the layer's backward passes add up what is asked for, from zero."""

    def zeros(wanted: bool) -> Tensor | None:
        return torch.zeros_like(layer.mask, dtype=layer.weight.dtype) if wanted else None

    layer.accumulator = GradientAccumulator(zeros(gradient), zeros(movement)) if gradient or movement else None


def from_loss(
    layers: Mapping[str, MaskedLayer], loss: Callable[[], Tensor], *, curvature: bool, ranks: Ranks = SINGLE
) -> Evidence:
    """Work out -weight * gradient for each layer from a loss, and the Hessian times the gradient if asked for.

    Of several `ranks` each gives the loss of its own examples, and gets the same result. The gradients that parameters
    hold are left alone. Raises ValueError, naming the layer, if the loss does not depend on its weight.
    """
    before = {name: layer.accumulator for name, layer in layers.items()}
    uses: dict[str, list[Tensor]] = {}
    for name, layer in layers.items():
        sharded = is_sharded(layer.weight)  # then a forward has the weight whole, and may have it more than once
        uses[name] = [] if sharded else [layer.weight]
        layer.accumulator = GradientAccumulator(
            uses=uses[name] if sharded else None
        )  # not None: no sparse step, which has no Hessian
    try:
        with torch.enable_grad():
            value = loss()
            gradients = _gradients(value, uses, create_graph=curvature)
            missing = {name: "the loss given does not depend on its weight" for name in uses if not gradients[name]}
            refuse_unseen(missing, "give a loss that does")
            means = {name: ranks.mean(_total(gradient).detach()) for name, gradient in gradients.items()}
            found = {name: {"movement": -(uses[name][0].detach() * means[name])} for name in layers}
            if curvature:
                inner = torch.stack([(g * means[name]).sum() for name in layers for g in gradients[name]]).sum()
                for name, products in _gradients(inner, uses).items():
                    product = _total(products) if products else torch.zeros_like(means[name])
                    found[name]["curvature"] = ranks.mean(product.detach())
    finally:
        for name, layer in layers.items():
            layer.accumulator = before[name]
    return found


def refuse_unknown(statistics: Evidence, names: Collection[str]) -> None:
    """Raise ValueError, naming them, for layers that are to lose weights though all that is known of them is zero."""
    blind = {
        name: "no gradient has reached its weight"
        for name, of in statistics.items()
        if name in names and not all(bool(value.any()) for value in of.values())
    }
    refuse_unseen(blind, "train them, frozen ones and those of unused branches too")


def _gradients(value: Tensor, uses: dict[str, list[Tensor]], *, create_graph: bool = False) -> dict[str, list[Tensor]]:
    """Differentiate by every use of every weight; a use that the value does not depend on is left out."""
    every = [(name, used) for name, of in uses.items() for used in of if used.requires_grad]
    found: dict[str, list[Tensor]] = {name: [] for name in uses}
    if not every:
        return found
    gradients = torch.autograd.grad(value, [used for _, used in every], create_graph=create_graph, allow_unused=True)
    for (name, _), gradient in zip(every, gradients, strict=True):
        if gradient is not None:
            found[name].append(gradient)
    return found


def _total(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(0) if len(tensors) > 1 else tensors[0]
