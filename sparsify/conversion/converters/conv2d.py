"""Converter of a pointwise nn.Conv2d to SparseConv2d, if chosen by `types`."""

from __future__ import annotations

from torch import Tensor, nn

from sparsify.conversion.converters.base import OF_LAYERS, Converter
from sparsify.conversion.foreign_masks import (
    check_names,
    check_plain,
    check_plain_parameter,
    check_shapes,
    parameter_and_mask,
    remove_prune_hook,
)
from sparsify.layers import CSRConv2d, SparseConv2d
from sparsify.layers.sparse_conv2d import conv2d_from_parameters, odd_setting


def _check(conv: nn.Conv2d) -> None:
    check_plain(conv, nn.Conv2d, "nn.Conv2d")
    if odd := odd_setting(conv):
        raise ValueError(f"it has {odd}; only 1x1 convolutions of stride 1 without groups and padding convert")
    check_names(conv, nn.Conv2d, SparseConv2d, CSRConv2d, needs=OF_LAYERS)
    weight, _ = parameter_and_mask(conv)
    check_plain_parameter(weight)
    check_shapes(weight, conv.bias, 4, weight.shape[0])


def _matrices(conv: nn.Conv2d) -> dict[str, Tensor]:
    return {"": conv.weight[:, :, 0, 0]} if not odd_setting(conv) else {}


def _to_sparse(conv: nn.Conv2d) -> SparseConv2d:
    weight, mask = parameter_and_mask(conv)
    remove_prune_hook(conv)
    plain = conv2d_from_parameters(nn.Conv2d, weight, conv.bias).train(conv.training)
    return SparseConv2d.from_conv2d(plain, None if mask is None else mask[:, :, 0, 0])


CONV2D = Converter(
    nn.Conv2d, SparseConv2d, _check, _matrices, _to_sparse, SparseConv2d.to_conv2d, packed=CSRConv2d, by_default=False
)
