"""Allocations measured on calibration data: global, owl, error. The model is not changed.

Each function here reads the calibrated layers once and returns an `allocate(n_units, sparsity)`, the number of removed
units for each layer in n_units.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from sparsify.calibration.batches import Batch
from sparsify.calibration.sequential import calibrate_groups
from sparsify.layers import MaskedLayer
from sparsify.masking.allocation import least_error, n_removed, owl
from sparsify.masking.layer_solve import layer_scores, output_error, prune_layer
from sparsify.masking.masks import allocate_globally
from sparsify.masking.methods.registry import SOLVERS
from sparsify.masking.spec import Allocate, PruningSpec

_OUTLIER = 5  # times the mean of a layer's scores: the paper's M for language models
_STEPS = (-0.2, -0.1, 0.0, 0.1, 0.2)  # from the target, to the sparsities of a layer's measured errors


@dataclass(frozen=True)
class CalibratedLayer:
    """A layer before pruning: weight and mask (out, in), the Gram matrix (in, in) of its inputs, its block if any."""

    name: str
    weight: Tensor
    mask: Tensor
    gram: Tensor
    block: str | None


def calibrated_layers(
    model: nn.Module,
    layers: Mapping[str, MaskedLayer],
    batches: list[Batch],
    cache_bytes: int | None,
    *,
    sampled: bool = False,
) -> Iterator[CalibratedLayer]:
    """Yield each layer with its inputs, in execution order, all layers as they are now; each expert is one of its own.

    sampled: the diagonals of the Gram matrices are enough.
    """
    names = list(layers)
    for group in calibrate_groups(model, names, batches, cache_bytes=cache_bytes, sampled=names if sampled else ()):
        gram = group.gram.matrix
        for name in group.names:
            layer = layers[name]
            weight = layer.matrix(layer.masked_weight().detach())
            parts = matrix_names(name, layer)
            if not parts:
                yield CalibratedLayer(name, weight, layer.matrix(layer.mask), gram, group.block)
            masks = layer.matrix(layer.mask).chunk(max(len(parts), 1))
            for part in zip(parts, weight.chunk(max(len(parts), 1)), masks, gram, strict=True) if parts else ():
                yield CalibratedLayer(*part, group.block)


def matrix_names(name: str, layer: MaskedLayer) -> tuple[str, ...]:
    """Return a name for each matrix of a layer of several, such as experts; empty for any other layer."""
    several = layer.several_calls and layer.input_groups > 1
    return tuple(f"{name}.{number}" for number in range(layer.input_groups)) if several else ()


def allocate_global(layers: Iterable[CalibratedLayer], spec: PruningSpec) -> Allocate:
    """Rank the scores of all layers together. Raises ValueError for a solver, without scores that compare."""
    if spec.method in SOLVERS:
        raise ValueError(
            f"allocation 'global' ranks scores, and method {spec.method!r} has none that compare between layers; "
            "use allocation 'error', 'owl' or 'erk'"
        )
    scores: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for layer in layers:
        scores[layer.name] = layer_scores(layer.name, layer.weight, spec.method, spec.seed, layer.gram).float()
        masks[layer.name] = layer.mask
    return functools.partial(allocate_globally, scores, masks, spec.parsed_pattern)


def allocate_owl(layers: Iterable[CalibratedLayer], spec: PruningSpec) -> Allocate:
    """Let layers of blocks with more outliers among their Wanda scores keep more; see `owl`.

    As in the paper, the layers of a block have one ratio of outliers; a layer outside of a chain has its own.
    """
    counts: dict[str, list[tuple[int, int]]] = {}
    blocks: dict[str, str] = {}
    for layer in layers:
        scores = layer_scores(layer.name, layer.weight, "wanda", None, layer.gram)
        blocks[layer.name] = layer.name if layer.block is None else layer.block
        n_outliers = int((scores > _OUTLIER * scores.mean()).sum())
        counts.setdefault(blocks[layer.name], []).append((n_outliers, scores.numel()))
    ratios = {block: sum(n for n, _ in pairs) / sum(n for _, n in pairs) for block, pairs in counts.items()}
    return lambda n_units, sparsity: owl(n_units, {name: ratios[blocks[name]] for name in n_units}, sparsity)


def allocate_by_error(layers: Iterable[CalibratedLayer], spec: PruningSpec) -> Allocate:
    """Measure each layer's squared relative output error at several sparsities, and remove the cheapest units."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for layer in layers:
        n_units = spec.parsed_pattern.n_units(layer.weight.shape)
        counts = {n_removed(min(max(spec.target + step, 0.0), 1.0), n_units) for step in _STEPS} - {0, n_units}
        points = [(0, 0.0)]
        for n in sorted(counts):
            weight, _ = prune_layer(layer.name, layer.weight, layer.mask, spec.for_layer(n), layer.gram)
            points.append((n, output_error(layer.weight, weight, layer.gram) ** 2))
        curves[layer.name] = [*points, (n_units, 1.0)]

    def allocate(n_units: Mapping[str, int], sparsity: float) -> dict[str, int]:
        return least_error({name: curves[name] for name in n_units}, n_removed(sparsity, sum(n_units.values())))

    return allocate


#: By the name of the allocation.
MEASURED = {"global": allocate_global, "owl": allocate_owl, "error": allocate_by_error}
