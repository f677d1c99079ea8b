"""Statistics of weights, masked ones included: summed over backward passes, or derived from a loss."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.distributed import SINGLE, Ranks
from sparsify.layers import MaskedLayer
from sparsify.layers.fsdp import is_sharded
from sparsify.layers.masked_weight import GradientAccumulator
from sparsify.masking.methods.registry import required_statistics
from sparsify.masking.unseen import refuse_unseen
from sparsify.recipes.schema import HOLD, Group
from sparsify.training.targets import counts

#: For each layer, its statistics by name, of the weight's shape each.
Statistics = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class GradientSums:
    """Sums over the steps of a training for each layer: -weight * gradient, and the gradients before an exchange."""

    movement: dict[str, Tensor]
    gradient: dict[str, Tensor]

    def add_step(self, layers: Mapping[str, MaskedLayer], scale: float, ranks: Ranks) -> GradientSums:
        """Return the sums with one more step: the mean over ranks of the layers' accumulators, divided by `scale`."""
        movement, gradient = dict(self.movement), dict(self.gradient)
        for name, layer in layers.items():
            if layer.accumulator is not None:
                _add(movement, name, layer.accumulator.movement, scale, ranks)
                _add(gradient, name, layer.accumulator.gradient, scale, ranks)
        return GradientSums(movement, gradient)

    def without_gradients(self, names: Collection[str]) -> GradientSums:
        """Return the sums without the gradients of these layers: the next exchange sums from zero."""
        kept = {name: gradient for name, gradient in self.gradient.items() if name not in names}
        return GradientSums(self.movement, kept)


def _add(sums: dict[str, Tensor], name: str, step: Tensor | None, scale: float, ranks: Ranks) -> None:
    """Add the mean over ranks of one step; nothing after an overflow, as AMP has skipped the step."""
    step = None if step is None else ranks.mean(step)
    if step is not None and bool(torch.isfinite(step).all()):
        sums[name] = (sums[name].to(step.device) if name in sums else 0) + step / scale


def request_statistics(
    group: Group, layers: Mapping[str, MaskedLayer], updates: Collection[int], n_steps: int, *, from_loss: bool
) -> None:
    """Let the backward passes of a group's next step accumulate the statistics of later updates.

    updates: the steps of the group's updates; n_steps: steps done; from_loss: movement comes from a loss instead
    """
    next_steps = range(n_steps + 1, n_steps + 1 + (group.regrow.steps if group.regrow else 0))
    gradient = group.regrow is not None and group.regrow.by == "gradient" and any(s in updates for s in next_steps)
    takes_movement = group.method != HOLD and "movement" in required_statistics(group.method)
    movement = takes_movement and not from_loss and n_steps < max(updates)
    for layer in layers.values():
        accumulate_gradients(layer, gradient=gradient, movement=movement)


def accumulate_gradients(layer: MaskedLayer, *, gradient: bool, movement: bool) -> None:
    """Let the layer's backward passes accumulate these sums, from zero."""

    def zeros(wanted: bool) -> Tensor | None:
        return torch.zeros_like(layer.mask, dtype=layer.weight.dtype) if wanted else None

    layer.accumulator = GradientAccumulator(zeros(gradient), zeros(movement)) if gradient or movement else None


def group_statistics(
    group: Group,
    layers: Mapping[str, MaskedLayer],
    time: float,
    sums: GradientSums,
    loss: Callable[[], Tensor] | None,
    ranks: Ranks,
) -> Statistics:
    """Return the statistics for the group's method, as far as known, as matrices (out, in).

    Raises ValueError, naming them, for layers with statistics of zeros that lose weights at this time.
    """
    required = required_statistics(group.method) if group.method != HOLD else set()
    if not required:
        return {}
    if loss is not None:
        statistics = from_loss(layers, loss, curvature="curvature" in required, ranks=ranks)
    else:
        statistics = {name: {"movement": sums.movement[name]} for name in layers if name in sums.movement}
    losing = {name for count in counts(group, layers, time) if count.wanted for name in count.names}
    zeros = {
        name: "no gradient has reached its weight"
        for name, values in statistics.items()
        if name in losing and not all(bool(value.any()) for value in values.values())
    }
    refuse_unseen(zeros, "train them, frozen ones and those of unused branches too")
    return {
        name: {key: layers[name].matrix(value) for key, value in values.items()} for name, values in statistics.items()
    }


def from_loss(
    layers: Mapping[str, MaskedLayer], loss: Callable[[], Tensor], *, curvature: bool, ranks: Ranks = SINGLE
) -> Statistics:
    """Return -weight * gradient of a loss for each layer as "movement", and the Hessian times the gradient on request.

    Of several `ranks` each gives the loss of its own examples, and gets the same result. The gradients of the model's
    parameters are left alone. Raises ValueError, naming the layer, if the loss does not depend on its weight.
    """
    before = {name: layer.accumulator for name, layer in layers.items()}
    uses: dict[str, list[Tensor]] = {}
    for name, layer in layers.items():
        sharded = is_sharded(layer.weight)  # then a forward has the weight whole, and may have it more than once
        uses[name] = [] if sharded else [layer.weight]
        # an accumulator in any case: sparse training kernels, without a Hessian, stay out of its way
        layer.accumulator = GradientAccumulator(uses=uses[name] if sharded else None)
    try:
        with torch.enable_grad():
            value = loss()
            gradients = _gradients(value, uses, create_graph=curvature)
            missing = {name: "the loss given does not depend on its weight" for name in uses if not gradients[name]}
            refuse_unseen(missing, "give a loss that does")
            means = {name: ranks.mean(_total(gradient).detach()) for name, gradient in gradients.items()}
            statistics = {name: {"movement": -(uses[name][0].detach() * means[name])} for name in layers}
            if curvature:
                inner = torch.stack([(g * means[name]).sum() for name in layers for g in gradients[name]]).sum()
                for name, products in _gradients(inner, uses).items():
                    product = _total(products) if products else torch.zeros_like(means[name])
                    statistics[name]["curvature"] = ranks.mean(product.detach())
    finally:
        for name, layer in layers.items():
            layer.accumulator = before[name]
    return statistics


def _gradients(value: Tensor, uses: dict[str, list[Tensor]], *, create_graph: bool = False) -> dict[str, list[Tensor]]:
    """Differentiate by every use of every weight; uses without effect on the value are left out."""
    every = [(name, used) for name, tensors in uses.items() for used in tensors if used.requires_grad]
    of_layers: dict[str, list[Tensor]] = {name: [] for name in uses}
    if not every:
        return of_layers
    gradients = torch.autograd.grad(value, [used for _, used in every], create_graph=create_graph, allow_unused=True)
    for (name, _), gradient in zip(every, gradients, strict=True):
        if gradient is not None:
            of_layers[name].append(gradient)
    return of_layers


def _total(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(0) if len(tensors) > 1 else tensors[0]
