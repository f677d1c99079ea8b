"""The verb: give the layers of a converted model their masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sparsify.conversion.convert import sparse_layers
from sparsify.conversion.module_surgery import Model
from sparsify.conversion.transaction import Transaction
from sparsify.layer_names import Selector
from sparsify.layers import MaskedLayer
from sparsify.masking.masks import Allocation, is_empty, make_masks, warn_removed_whole
from sparsify.masking.methods.registry import Method, check_memory
from sparsify.pruning.oneshot import PruningSpec, prune_with_specs


def prune(
    model: Model,
    sparsity: float | None = None,
    *,
    method: str | Method = "magnitude",
    pattern: str = "unstructured",
    allocation: Allocation = "uniform",
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
    max_sparsity: float | None = None,
    seed: int | None = None,
    refit: bool = False,
    correct: bool = False,
    data: Iterable[Any] | None = None,
    cache_bytes: int | None = None,
    progress: bool = False,
) -> Model:
    """Mask the layers of a converted model to an absolute sparsity, in place, and return the model.

    sparsity: fraction of zeros, 0 to 1; left out where the pattern ("2:4") or an allocation dict says it.
    method: "magnitude", "random", or a function `(weight) -> scores` (see sparsify.masking.methods.registry);
    seed is for random ones; with data also "wanda", "sparsegpt" and "alps", the best and slowest.
    pattern: "unstructured", "rows", "columns", N:M ("2:4"), blocks rows x columns ("4x1").
    allocation: "uniform", the same for each layer; "global", all layers ranked together; "erk"; or a dict
    {layer pattern: sparsity}, of which the first match counts; with data also "owl" (outliers among the inputs) and
    "error" (measured for each layer). max_sparsity: no layer loses more, where the allocation shares one target.

    data: batches of the model's inputs, a few hundred samples in all: tensors, tuples of positional arguments, or dicts
    of keyword arguments (`sparsify.calibration.batches.read_batches`); read once. The layers are then pruned in
    the order in which they run, each on what those before it have become, and the report tells how far their outputs
    moved.
    refit: change the kept weights to the ones that reproduce the layer's outputs best. correct: let them aim
    at the outputs of the dense model, to make up for what the layers before have lost. cache_bytes: how much of the
    data on its way through the model stays in memory; the rest, and what the layers were before, goes to a temporary
    file. Within that, or 1 GiB if it is None, outputs of finished layers are kept so that they run once. progress: show
    a bar.

    An optimizer that holds momentum of what is masked here may move it in memory, though never in an output; use a
    Pruner while training. Raises ValueError, naming the layer, before any mask is changed.

    >>> model = sparsify.convert(torch.nn.Sequential(torch.nn.Linear(8, 4)))
    >>> prune(model, 0.75)[0].sparsity
    0.75
    >>> prune(model, 0.75, method="sparsegpt", data=[torch.randn(64, 8)])[0].sparsity
    0.75
    """
    layers = sparse_layers(model, include, exclude)
    for name, layer in layers.items():
        check_memory(name, layer.weight)
    if data is not None:
        order = PruningSpec(sparsity, method, pattern, allocation, max_sparsity, refit, correct, seed)
        prune_with_specs(model, [(order, list(layers))], data, cache_bytes=cache_bytes, progress=progress)
        return model
    options = {"refit": refit, "correct": correct, "cache_bytes": cache_bytes, "progress": progress}
    for option, value in options.items():
        if value not in (None, False):
            raise ValueError(f"{option}={value} has no effect without data; give data=...")
    masks = make_masks(
        {name: layer.weight_matrix for name, layer in layers.items()},
        sparsity,
        masks={name: layer.matrix(layer.mask) for name, layer in layers.items()},
        method=method,
        pattern=pattern,
        allocation=allocation,
        max_sparsity=max_sparsity,
        seed=seed,
    )
    warn_removed_whole({name: is_empty(mask) for name, mask in masks.items()}, sparsity, allocation)
    set_masks(model, {layers[name]: mask for name, mask in masks.items()})
    return model


def set_masks(model: nn.Module, masks: Mapping[MaskedLayer, Tensor]) -> None:
    """Let layers of a model use these masks, (out, in); an error leaves all of them as they were."""
    with Transaction(model) as undo:
        for layer, mask in masks.items():
            undo.keep([layer.weight])
            layer.set_mask(mask)
