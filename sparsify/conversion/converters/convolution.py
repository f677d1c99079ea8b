"""Converters of torch's convolutions to masked ones, one for each type of nn.Conv."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparsify.conversion.converters.torch_layer import torch_converter
from sparsify.conversion.foreign_masks import check_shapes
from sparsify.layers import CSRConv1d, CSRConv2d
from sparsify.layers.sparse_convolution import (
    SparseConv1d,
    SparseConv2d,
    SparseConv3d,
    SparseConvTranspose1d,
    SparseConvTranspose2d,
    SparseConvTranspose3d,
)


def _check(convolution: _ConvNd, weight: Tensor) -> None:
    kernel = convolution.kernel_size
    n_outputs = weight.shape[1] * convolution.groups if convolution.transposed else weight.shape[0]
    check_shapes(weight, convolution.bias, 2 + len(kernel), n_outputs)
    if weight.shape[2:] != tuple(kernel):
        raise ValueError(f"its weight has the shape {tuple(weight.shape)}, where a kernel of {tuple(kernel)} is needed")


def is_depthwise(module: nn.Module) -> bool:
    """Return whether a module is a convolution of each channel by itself: few weights, and each of them is needed."""
    return isinstance(module, _ConvNd) and module.groups == module.in_channels > 1


#: All of them are in use without `types` for a model made of convolutions.
CONVOLUTIONS = (
    torch_converter(SparseConv1d, _check, CSRConv1d),
    torch_converter(SparseConv2d, _check, CSRConv2d),
    torch_converter(SparseConv3d, _check),
    torch_converter(SparseConvTranspose1d, _check),
    torch_converter(SparseConvTranspose2d, _check),
    torch_converter(SparseConvTranspose3d, _check),
)
