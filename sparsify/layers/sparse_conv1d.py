"""SparseConv1D: the linear layer of GPT-2 under a mask; its weight is stored (in, out).

This file imports transformers, so the package imports it late, once transformers is in use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsify.layers.construct import layer_from_parameters
from sparsify.layers.masked import MaskedLayer

_Layer = TypeVar("_Layer", bound=Conv1D)


class SparseConv1D(MaskedLayer, Conv1D):  # type: ignore[misc]
    """A transformers Conv1D (a Linear with a transposed weight) under a mask; see `MaskedLayer`.

    `weight` and `mask` keep the layout (in_features, out_features). isinstance(layer, Conv1D) is true.
    """

    @classmethod
    def from_conv1d(cls, layer: Conv1D, weight: nn.Parameter | None = None) -> Self:
        """Make a layer around the same Parameters, or around `weight` instead of its own; all weights are kept."""
        made = conv1d_from_parameters(cls, layer.weight if weight is None else weight, layer.bias)
        made._keep_all()
        return made.train(layer.training)

    @classmethod
    def from_matrix(
        cls, weight: Tensor, mask: Tensor, bias: nn.Parameter | None, settings: Mapping[str, Any] | None = None
    ) -> Self:
        """Make a layer of a weight and a mask, (out_features, in_features); the bias is shared."""
        made = conv1d_from_parameters(cls, nn.Parameter(weight.t().contiguous()), bias)
        made._keep_all()
        made.set_mask(mask)
        return made

    def to_conv1d(self) -> Conv1D:
        """Make a plain Conv1D around the same Parameters, with the masked weights set to zero."""
        self.clear_masked(self.weight)
        return conv1d_from_parameters(Conv1D, self.weight, self.bias).train(self.training)

    def matrix(self, tensor: Tensor) -> Tensor:
        """View a tensor of the weight's shape as (out_features, in_features)."""
        return tensor.t()

    def as_weight(self, matrix: Tensor) -> Tensor:
        """View a matrix (out_features, in_features) in the weight's layout."""
        return matrix.t()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to (..., in_features); returns (..., out_features)."""
        weight = self.forward_weight(is_factor=True)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), weight).view(*x.shape[:-1], self.nf)

    def __repr__(self) -> str:
        """Print as nn.Module does: Conv1D's own text would hide the type."""
        return nn.Module.__repr__(self)

    def extra_repr(self) -> str:
        """Describe the layer as Conv1D does, with its sparsity."""
        return f"nf={self.nf}, nx={self.nx}" + super().extra_repr()


def conv1d_from_parameters(kind: type[_Layer], weight: Any, bias: Any) -> _Layer:
    """Make a layer around these very Parameters; nothing is allocated or drawn."""
    nx, nf = weight.shape
    return layer_from_parameters(kind, weight, bias, nx=nx, nf=nf)
