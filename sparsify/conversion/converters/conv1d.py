"""Converter of transformers' Conv1D to SparseConv1D. Imported late, as transformers is."""

from __future__ import annotations

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from sparsify.conversion.converters.base import OF_LAYERS, Converter
from sparsify.conversion.foreign_masks import (
    check_names,
    check_plain,
    check_plain_parameter,
    check_shapes,
    parameter_and_mask,
    remove_prune_hook,
)
from sparsify.layers import CSRLinear
from sparsify.layers.sparse_conv1d import SparseConv1D


def _check(layer: Conv1D) -> None:
    check_plain(layer, Conv1D, "Conv1D")
    check_names(layer, Conv1D, SparseConv1D, CSRLinear, needs=OF_LAYERS)
    weight, _ = parameter_and_mask(layer)
    check_plain_parameter(weight)
    check_shapes(weight, layer.bias, 2, weight.shape[1])


def _matrices(layer: Conv1D) -> dict[str, Tensor]:
    return {"": layer.weight.t()}


def _to_sparse(layer: Conv1D) -> SparseConv1D:
    weight, mask = parameter_and_mask(layer)
    remove_prune_hook(layer)
    made = SparseConv1D.from_conv1d(layer, weight)
    if mask is not None:
        made.set_mask(mask.t())
    return made


CONV1D = Converter(Conv1D, SparseConv1D, _check, _matrices, _to_sparse, SparseConv1D.to_conv1d)
