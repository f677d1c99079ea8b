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
from sparsify.masking.masks import is_empty, make_masks, warn_removed_whole
from sparsify.masking.methods.registry import Method
from sparsify.masking.methods.scoring import check_memory
from sparsify.masking.spec import Allocation, PruningSpec
from sparsify.pruning.oneshot import prune_with_specs
from sparsify.pruning.reconstruct import Reconstruction


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
    swap: bool = False,
    reconstruct: int | Reconstruction | None = None,
    data: Iterable[Any] | None = None,
    cache_bytes: int | None = None,
    progress: bool = False,
) -> Model:
    """Mask the layers of a converted model to an absolute sparsity, in place, and return the model.

    sparsity: fraction of zeros, 0 to 1; left out if the pattern ("2:4") or an allocation dict gives it
    method: "magnitude", "random", or a function `(weight) -> scores` (see sparsify.masking.methods.registry); with data
        also "wanda", "sparsegpt" and "alps", the best and slowest
    pattern: "unstructured", "rows", "columns", N:M ("2:4"), blocks rows x columns ("4x1")
    allocation: "uniform", the same for each layer; "global", all layers ranked together; "erk";
        "depth:0.1", rising in equal steps from 0.1 below the mean in the first block to 0.1 above it in the last; or a
        dict {layer pattern: sparsity}, the first match counting; with data also "owl" (outliers among the inputs) and
        "error" (measured for each layer)
    include, exclude: layers by pattern or type, as for `convert`
    max_sparsity: no layer loses more; for allocations with one target for all layers
    seed: for methods with random numbers

    data: batches of the model's inputs, a few hundred samples in all: tensors, tuples of positional arguments, or dicts
        of keyword arguments (`sparsify.calibration.batches.read_batches`); read once
    refit: change the kept weights to those with the smallest change of the layer's outputs
    correct: aim at the outputs of the dense model instead, to make up for the losses of earlier layers
    swap: let kept and removed weights of a row change places where that lowers the error of the layer's outputs
    reconstruct: then tune the kept weights and biases of each block by gradient, so many times over the data, until its
        outputs are those of the dense model's block; a `Reconstruction` has more to say
    cache_bytes: memory for intermediates on their way through the model; the rest, and the former state of the layers,
        goes to a temporary file. Within cache_bytes, or 1 GiB if it is None, outputs of finished layers are kept:
        such layers run once
    progress: show a bar

    With data, layers are pruned in execution order, each on the inputs from pruned layers before it; the report has the
    change of each layer's outputs. An optimizer with momentum of weights masked here may move them in memory, though
    never in an output; use a Pruner while training. Raises ValueError, naming the layer, before any mask is changed.

    >>> model = sparsify.convert(torch.nn.Sequential(torch.nn.Linear(8, 4)))
    >>> prune(model, 0.75)[0].sparsity
    0.75
    >>> prune(model, 0.75, method="sparsegpt", data=[torch.randn(64, 8)])[0].sparsity
    0.75
    """
    layers = sparse_layers(model, include, exclude)
    for name, layer in layers.items():
        check_memory(name, layer.weight)
    spec = PruningSpec(sparsity, method, pattern, allocation, max_sparsity, refit, correct, seed, swap)
    if data is not None:
        tuning = Reconstruction(reconstruct) if isinstance(reconstruct, int) else reconstruct
        options: dict[str, Any] = {"cache_bytes": cache_bytes, "reconstruct": tuning, "progress": progress}
        prune_with_specs(model, [(spec, list(layers))], data, **options)
        return model
    needing_data: dict[str, Any] = {"refit": refit or None, "correct": correct or None, "swap": swap or None}
    needing_data |= {"reconstruct": reconstruct}
    for option, value in (needing_data | {"cache_bytes": cache_bytes, "progress": progress or None}).items():
        if value is not None:
            raise ValueError(f"{option}={value} has no effect without data; give data=...")
    weights = {name: layer.weight_matrix for name, layer in layers.items()}
    present = {name: layer.matrix(layer.mask) for name, layer in layers.items()}
    masks = make_masks(weights, spec, masks=present)
    warn_removed_whole({name: is_empty(mask) for name, mask in masks.items()}, spec)
    set_masks(model, {layers[name]: mask for name, mask in masks.items()})
    return model


def set_masks(model: nn.Module, masks: Mapping[MaskedLayer, Tensor]) -> None:
    """Set the masks (out, in) of layers of a model; an error leaves all of them as they were."""
    with Transaction(model) as undo:
        for layer, mask in masks.items():
            undo.keep([layer.weight])
            layer.set_mask(mask)
