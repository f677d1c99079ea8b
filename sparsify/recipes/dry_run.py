"""The dry run of a recipe: every layer, its sparsity at each update, and its bytes in the file. Nothing is changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsify.checkpoint.weight_codec import packed_bytes
from sparsify.conversion.module_surgery import layers_of_type
from sparsify.layers import MaskedLayer
from sparsify.masking.masks import make_masks
from sparsify.masking.methods.registry import required_statistics
from sparsify.masking.spec import layer_specs
from sparsify.recipes.assignment import assign_layers
from sparsify.recipes.schema import HOLD, Group, Recipe
from sparsify.tables import Listed, Listing, Table

#: Updates that a plan works out; a schedule may have a million, and each one ranks the weights of a whole group.
MAX_UPDATES = 1000

#: Updates that a printed plan shows of each layer, one more with the last.
_SHOWN = 6


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of a recipe.

    targets: (time, sparsity) in the unit of the group's schedule, the last being the final one; of more than
    MAX_UPDATES updates so many, evenly spread from the first to the last
    ranked: the layers of the group share one target, and this layer's part may still move: it comes from the present
    weights, or, before calibration data decides, from the target
    n_bytes: of the weight in the file, in its smallest format
    """

    name: str
    group: int
    shape: tuple[int, int]
    unit: str
    targets: tuple[tuple[float, float], ...]
    ranked: bool
    n_bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class DryRun(Listed, Sequence[PlannedLayer]):
    """The layers of a recipe; `str()` of it is a table for people."""

    layers: tuple[PlannedLayer, ...]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[PlannedLayer]:
        return iter(self.layers)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.layers[index]

    @property
    def n_bytes(self) -> int:
        """The bytes of all weights in the file."""
        return sum(layer.n_bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """The bytes of the same weights before."""
        return sum(layer.dense_bytes for layer in self.layers)

    def listing(self) -> Listing:
        """Return the size of all layers, and a table for each group."""
        share = self.n_bytes / max(self.dense_bytes, 1)
        size = f"{self.n_bytes:,} bytes in the file, {share:.3f} of dense {self.dense_bytes:,}"
        summary = [f"{len(self.layers)} layers: {size}"]
        if any(layer.ranked for layer in self.layers):
            summary.append("~ ranked together: a layer's part is taken from the present weights, and may still move")
        groups: dict[int, list[PlannedLayer]] = {}
        for layer in self.layers:
            groups.setdefault(layer.group, []).append(layer)
        return Listing(summary, [(f"groups.{number}", _table(layers)) for number, layers in groups.items()])


def plan(recipe: Recipe, model: nn.Module) -> DryRun:
    """Plan each layer of a model under a recipe, without a change; the model is converted or not, on any device.

    Raises ValueError for every fault in the way of the recipe itself.

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
            itemsize, n_kept = weight.element_size(), n_weights - zeros[-1][name]
            n_bytes = packed_bytes(shape, n_kept, itemsize)
            if recipe.quantize is not None:
                n_bytes = packed_bytes(shape, n_kept, 1) + 4 * shape[0]  # and the scales
            ranked = group.method != HOLD and group.spec().is_measured
            planned.append(
                PlannedLayer(name, number, shape, group.schedule.unit, targets, ranked, n_bytes, n_weights * itemsize)
            )
    return DryRun(tuple(planned))


def _table(layers: Sequence[PlannedLayer]) -> Table:
    """Return the table of a group: of many updates the first, some between, and the last."""
    n = len(layers[0].targets)
    columns = sorted({*range(0, n, -(-n // _SHOWN)), n - 1})
    updates = [f"{layers[0].unit} {layers[0].targets[i][0]:g}" for i in columns] if n > 1 else ["sparsity"]
    rows = []
    for x in layers:
        targets = [f"{'~' if x.ranked else ''}{x.targets[i][1]:.4f}" for i in columns]
        share = f"{x.n_bytes / max(x.dense_bytes, 1):.3f}"
        rows.append((x.name or "(root)", f"{x.shape[0]}x{x.shape[1]}", *targets, f"{x.n_bytes:,}", share))
    head = ("layer", "shape", *updates, "bytes", "of dense")
    return Table(head, rows, spare=("of dense", "shape", *updates[1:-1]))


def _spread(times: tuple[float, ...]) -> tuple[float, ...]:
    """Return all times, or MAX_UPDATES of them from the first to the last."""
    if len(times) <= MAX_UPDATES:
        return times
    return tuple(times[i * (len(times) - 1) // (MAX_UPDATES - 1)] for i in range(MAX_UPDATES))


def file_bytes(recipe: Recipe, model: nn.Module) -> int:
    """Return the bytes of a model in its file once the recipe is followed, without the header."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values() if isinstance(tensor, Tensor)}
    masks = sum(layer.mask.nbytes for layer in layers_of_type(model, MaskedLayer).values())
    layers = plan(recipe, model)
    saved = sum(layer.dense_bytes - layer.n_bytes for layer in layers)
    return sum(tensor.nbytes for tensor in tensors.values()) - masks - saved


def _zeros(model: nn.Module, group: Group, weights: dict[str, Tensor], time: float) -> dict[str, int]:
    """Return the number of removed weights of each layer of a group after the update at `time`."""
    if group.method == HOLD:
        return {name: int((weight == 0).sum()) for name, weight in weights.items()}
    spec = group.spec(time)
    if spec.is_measured and group.needs_data:  # the target stands for the parts that data will give
        spec = replace(spec, allocation="uniform", max_sparsity=None)
    if spec.is_measured:
        if required_statistics(group.method):  # magnitudes stand for statistics of a training to come
            spec = replace(spec, method="magnitude")
        masks = make_masks(weights, spec, masks=_present_masks(model, weights))
        return {name: int((~mask).sum()) for name, mask in masks.items()}
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
    return {name: layer.n_zeros(shapes[name]) for name, layer in layer_specs(spec, shapes).items()}


def _present_masks(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks (out, in) of layers by name; all True for a layer not converted yet."""
    layers = layers_of_type(model, MaskedLayer)
    return {
        name: layers[name].matrix(layers[name].mask) if name in layers else torch.ones_like(weight, dtype=torch.bool)
        for name, weight in weights.items()
    }
