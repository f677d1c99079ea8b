"""The verb: give the layers of a converted model their masks."""

from __future__ import annotations

from collections.abc import Sequence

from sparsify.convert import sparse_layers
from sparsify.edit import Model
from sparsify.masks import Allocation, make_masks
from sparsify.match import Selector
from sparsify.methods import Method


def prune(
    model: Model,
    sparsity: float | None = None,
    *,
    method: str | Method = "magnitude",
    pattern: str = "unstructured",
    allocation: Allocation = "uniform",
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
    seed: int | None = None,
) -> Model:
    """Mask the layers of a converted model to an absolute sparsity, in place, and return the model.

    sparsity: fraction of zeros, 0 to 1; left out where the pattern ("2:4") or an allocation dict says it.
    method: "magnitude", "random", or a function `(weight) -> scores` (see sparsify.methods); seed is for random ones.
    pattern: "unstructured", "rows", "columns", N:M ("2:4"), blocks rows x columns ("4x1").
    allocation: "uniform", the same for each layer; "global", all layers ranked together; "erk"; or a dict
    {layer pattern: sparsity}, of which the first match counts.

    An optimizer that holds momentum of what is masked here may move it in memory, though never in an output; use a
    Pruner while training. Raises ValueError, naming the layer, before any mask is changed.

    >>> model = sparsify.convert(torch.nn.Sequential(torch.nn.Linear(8, 4)))
    >>> prune(model, 0.75)[0].sparsity
    0.75
    """
    layers = sparse_layers(model, include, exclude)
    masks = make_masks(
        {name: layer.matrix(layer.weight) for name, layer in layers.items()},
        sparsity,
        masks={name: layer.matrix(layer.mask) for name, layer in layers.items()},
        method=method,
        pattern=pattern,
        allocation=allocation,
        seed=seed,
    )
    for name, mask in masks.items():
        layers[name].set_mask(mask)
    return model
