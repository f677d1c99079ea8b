"""How layers share one target where that takes a look at calibration data: walks that change nothing.

Each function here looks once and returns an `allocate(n_units, sparsity)`: how many units the layers in n_units lose.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsify.calibration.batches import Batch
from sparsify.calibration.sequential import calibrate_groups
from sparsify.layers import MaskedLayer
from sparsify.masking.allocation import least_error, n_removed, owl
from sparsify.masking.layer_solve import LayerSpec, output_error, prune_layer
from sparsify.masking.masks import allocate_globally
from sparsify.masking.methods.registry import SOLVERS, score

Allocate = Callable[[Mapping[str, int], float], dict[str, int]]
#: Sees one layer: its name, weight, mask, Gram matrix of its inputs, and the block it is in.
Look = Callable[[str, Tensor, Tensor, Tensor, str | None], None]
#: Shows every layer to a look.
Show = Callable[[Look], None]

_OUTLIER = 5  # times the mean of a layer's scores: the paper's M for language models
_STEPS = (-0.2, -0.1, 0.0, 0.1, 0.2)  # sparsities around the target at which a layer's error is measured


def allocate_global(layers: Mapping[str, MaskedLayer], sparsity: float, task: LayerSpec, show: Show) -> Allocate:
    """Rank the scores of all layers together. Raises ValueError for a solver, which has none that compare."""
    if task.method in SOLVERS:
        raise ValueError(
            f"allocation 'global' ranks scores, and method {task.method!r} has none that compare between layers; "
            "use allocation 'error', 'owl' or 'erk'"
        )
    scores: dict[str, Tensor] = {}

    def look(name: str, weight: Tensor, mask: Tensor, gram: Tensor, block: str | None) -> None:
        scores[name] = score(name, weight, task.method, task.seed, gram).float()

    show(look)
    masks = {name: layer.matrix(layer.mask) for name, layer in layers.items()}
    return functools.partial(allocate_globally, scores, masks, task.pattern)


def allocate_owl(layers: Mapping[str, MaskedLayer], sparsity: float, task: LayerSpec, show: Show) -> Allocate:
    """Let layers of blocks with more outliers among their Wanda scores keep more; see `owl`.

    As in the paper, the layers of a block have one share of outliers; a layer outside of a chain has its own.
    """
    counts: dict[str, list[tuple[int, int]]] = {}
    place: dict[str, str] = {}

    def look(name: str, weight: Tensor, mask: Tensor, gram: Tensor, block: str | None) -> None:
        scores = score(name, weight, "wanda", None, gram)
        place[name] = name if block is None else block
        counts.setdefault(place[name], []).append((int((scores > _OUTLIER * scores.mean()).sum()), scores.numel()))

    show(look)
    share = {where: sum(n for n, _ in found) / sum(n for _, n in found) for where, found in counts.items()}
    return lambda n_units, sparsity: owl(n_units, {name: share[place[name]] for name in n_units}, sparsity)


def allocate_by_error(layers: Mapping[str, MaskedLayer], sparsity: float, task: LayerSpec, show: Show) -> Allocate:
    """Measure each layer's squared relative output error at several sparsities, and remove where it costs least."""
    curves: dict[str, list[tuple[int, float]]] = {}

    def look(name: str, weight: Tensor, mask: Tensor, gram: Tensor, block: str | None) -> None:
        n_units = task.pattern.n_units((weight.shape[0], weight.shape[1]))
        counts = {n_removed(min(max(sparsity + step, 0.0), 1.0), n_units) for step in _STEPS} - {0, n_units}
        points = [(0, 0.0)]
        for n in sorted(counts):
            new, _ = prune_layer(name, weight, mask, replace(task, n_removed=n), gram)
            points.append((n, output_error(weight, new, gram) ** 2))
        curves[name] = [*points, (n_units, 1.0)]

    show(look)

    def allocate(n_units: Mapping[str, int], sparsity: float) -> dict[str, int]:
        return least_error({name: curves[name] for name in n_units}, n_removed(sparsity, sum(n_units.values())))

    return allocate


#: By the name of the allocation.
MEASURED = {"global": allocate_global, "owl": allocate_owl, "error": allocate_by_error}


def show_layers(
    model: nn.Module, layers: Mapping[str, MaskedLayer], batches: list[Batch], cache_bytes: int | None, look: Look
) -> None:
    """Show each layer's weight, mask, inputs and block, with all layers as they are now."""
    for stop in calibrate_groups(model, list(layers), batches, cache_bytes=cache_bytes):
        gram = stop.gram.matrix
        for name in stop.names:
            layer = layers[name]
            with torch.no_grad():
                look(name, layer.matrix(layer.masked_weight()), layer.matrix(layer.mask), gram, stop.block)
