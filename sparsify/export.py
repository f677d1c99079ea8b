"""From masks to layers that hold only what is kept."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from sparsify.convert import Model, copy_with, layers_of_type
from sparsify.formats import csr_bytes
from sparsify.layers import CSRLinear, SparseLinear

Format = Literal["auto", "csr", "dense"]


def export(model: Model, *, format: Format = "auto") -> Model:
    """Return a copy for inference in which each SparseLinear is a CSRLinear, or a plain nn.Linear.

    The model itself stays as it was, and the copy shares every tensor that does not change. format: "csr" packs every
    layer, "dense" none (zeros in the weights), "auto" those that take less memory packed than dense.
    Outputs equal the masked model's. Raises ValueError if there is nothing to export or the model cannot be copied.

    >>> model = sparsify.convert(torch.nn.Sequential(torch.nn.Linear(8, 4)))
    >>> export(sparsify.prune(model, 0.75))[0]
    CSRLinear(in_features=8, out_features=4, bias=True, sparsity=0.75)
    """
    if format not in get_args(Format):
        raise ValueError(f"format {format!r} is none of: {', '.join(get_args(Format))}")
    layers = layers_of_type(model, SparseLinear)
    if not layers:
        raise ValueError("the model has no SparseLinear to export; call sparsify.convert(model) and prune it first")
    replacements: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        if layer.weight.is_meta:
            raise ValueError(
                f"{name}: the weight is on the meta device and has no data; load the model's weights first"
            )
        packed = format == "csr" or (format == "auto" and _saves_memory(layer))
        replacements[layer] = CSRLinear.from_sparse(layer) if packed else layer.to_linear()
    return copy_with(model, replacements)


def _saves_memory(layer: SparseLinear) -> bool:
    shape = (layer.out_features, layer.in_features)
    itemsize = layer.weight.element_size()
    return csr_bytes(shape, int(layer.mask.sum()), itemsize) < layer.weight.numel() * itemsize
