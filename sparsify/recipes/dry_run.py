"""The dry run of a recipe: every layer, its sparsity at each update, and the bytes it will take. Nothing is touched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsify.checkpoint.weight_codec import packed_bytes
from sparsify.conversion.module_surgery import layers_of_type
from sparsify.layers import MaskedLayer
from sparsify.masking.allocation import MEASURED_ALLOCATIONS
from sparsify.masking.masks import Allocation, layer_targets, make_masks, n_removed_units
from sparsify.masking.methods.registry import required_statistics
from sparsify.masking.patterns import parse_pattern
from sparsify.recipes.recipe import HOLD, Group, Recipe, assign_layers

#: Updates that a plan works out; a schedule may have a million, and each one ranks the weights of a whole group.
MAX_UPDATES = 1000


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of a recipe: `targets` are (time, sparsity) in the unit of its schedule, the last being the final one.

    Of more than MAX_UPDATES updates, `targets` has so many, evenly spread from the first to the last.
    `ranked` says that the layers of the group share one target, so that this layer's part, taken from the
    present weights (or, where calibration data decides, the target itself), may still move. `n_bytes` is the weight in
    the file, in its smallest format.
    """

    name: str
    group: int
    shape: tuple[int, int]
    unit: str
    targets: tuple[tuple[float, float], ...]
    ranked: bool
    n_bytes: int
    dense_bytes: int


def plan(recipe: Recipe, model: nn.Module) -> list[PlannedLayer]:
    """Work out what a recipe would do to a model, converted or not, on any device.

    Raises ValueError for whatever would stop the recipe itself.

    >>> recipe = sparsify.Recipe(groups=[{"sparsity": 0.75}])
    >>> [(layer.name, layer.targets) for layer in plan(recipe, nn.Sequential(nn.Linear(8, 4)))]
    [('0', ((0.0, 0.75),))]
    """
    planned = []
    for number, (group, weights) in enumerate(zip(recipe.groups, assign_layers(recipe, model), strict=True)):
        times = _spread(group.schedule.update_times())
        zeros = [_zeros(model, group, weights, time) for time in times]
        for name, weight in weights.items():
            shape, n_weights = (weight.shape[0], weight.shape[1]), weight.numel()
            targets = tuple((time, z[name] / max(n_weights, 1)) for time, z in zip(times, zeros, strict=True))
            itemsize = weight.element_size()
            n_bytes = packed_bytes(shape, n_weights - zeros[-1][name], itemsize)
            ranked = group.allocation == "global" or group.allocation in MEASURED_ALLOCATIONS
            planned.append(
                PlannedLayer(name, number, shape, group.schedule.unit, targets, ranked, n_bytes, n_weights * itemsize)
            )
    return planned


def _spread(times: tuple[float, ...]) -> tuple[float, ...]:
    """Return all times, or MAX_UPDATES of them from the first to the last."""
    if len(times) <= MAX_UPDATES:
        return times
    return tuple(times[i * (len(times) - 1) // (MAX_UPDATES - 1)] for i in range(MAX_UPDATES))


def file_bytes(recipe: Recipe, model: nn.Module) -> int:
    """Return the bytes that a pruned model will have in its file, without the header."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values() if isinstance(tensor, Tensor)}
    masks = sum(layer.mask.nbytes for layer in layers_of_type(model, MaskedLayer).values())
    layers = plan(recipe, model)
    saved = sum(layer.dense_bytes - layer.n_bytes for layer in layers)
    return sum(tensor.nbytes for tensor in tensors.values()) - masks - saved


def _zeros(model: nn.Module, group: Group, weights: dict[str, Tensor], time: float) -> dict[str, int]:
    """Return how many weights each layer of a group lacks after the update at `time`."""
    pattern = parse_pattern(group.pattern)
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
    if group.method == HOLD:
        return {name: int((weight == 0).sum()) for name, weight in weights.items()}
    sparsity: float | None = None
    allocation: Allocation = group.allocation
    if isinstance(allocation, dict):
        finals = layer_targets(allocation, shapes)
        allocation = {name: group.schedule.sparsity_at(time, final) for name, final in finals.items()}
    elif group.sparsity is not None and not pattern.is_nm:
        sparsity = group.schedule.sparsity_at(time, group.sparsity)
    max_sparsity = group.max_sparsity
    if group.needs_data and n_removed_units(shapes, sparsity, pattern, allocation, max_sparsity) is None:
        allocation, max_sparsity = "uniform", None
    if (removed := n_removed_units(shapes, sparsity, pattern, allocation, max_sparsity)) is None:
        layers = layers_of_type(model, MaskedLayer)
        present = {  # all True for a layer that is not converted yet
            name: layers[name].matrix(layers[name].mask)
            if name in layers
            else torch.ones_like(weight, dtype=torch.bool)
            for name, weight in weights.items()
        }
        masks = make_masks(
            weights,
            sparsity,
            masks=present,
            method="magnitude"
            if required_statistics(group.method)
            else group.method,  # what training will show is not known yet
            pattern=group.pattern,
            allocation=allocation,
            max_sparsity=max_sparsity,
            seed=group.seed,
        )
        return {name: int((~mask).sum()) for name, mask in masks.items()}
    if pattern.is_nm:
        return removed
    sizes = {name: pattern.unit_shape(shape) for name, shape in shapes.items()}
    return {name: n * sizes[name][0] * sizes[name][1] for name, n in removed.items()}
