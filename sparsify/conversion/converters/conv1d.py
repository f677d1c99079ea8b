"""transformers' Conv1D becomes SparseConv1D. Imported late, as transformers is."""

from __future__ import annotations

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from sparsify.conversion.converters.base import Kind
from sparsify.conversion.foreign_masks import check_weight
from sparsify.layers.sparse_conv1d import SparseConv1D


def _check(layer: Conv1D) -> None:
    if type(layer) is not Conv1D:
        raise ValueError(f"it is a {type(layer).__name__}, a subclass of Conv1D that may compute something else")
    if "forward" in layer.__dict__:
        raise ValueError("its forward was replaced on the instance")
    if "weight" not in layer._parameters:
        raise ValueError("its weight is computed by a hook; remove that first")
    check_weight(layer.weight)


def _matrices(layer: Conv1D) -> dict[str, Tensor]:
    return {"": layer.weight.t()}


CONV1D = Kind(Conv1D, SparseConv1D, _check, _matrices, SparseConv1D.from_conv1d, SparseConv1D.to_conv1d)
