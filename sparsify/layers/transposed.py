"""A weight stored (in_features, out_features) and multiplied from the right, as in `x @ weight`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsify.layers.masked import MaskedLayer


class Transposed(nn.Module):
    """A linear map x @ weight, with a weight (in_features, out_features) and no bias."""

    weight: Tensor

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.register_parameter("weight", weight)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to (..., in_features); returns (..., out_features)."""
        return torch.matmul(input, self.weight)

    def extra_repr(self) -> str:
        """Describe the layer as torch does a Linear."""
        in_features, out_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}"


class SparseTransposed(MaskedLayer, Transposed):
    """A Transposed layer under a mask; see `MaskedLayer`."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__(weight)
        self._keep_all()

    @classmethod
    def from_matrix(
        cls, weight: Tensor, mask: Tensor, bias: nn.Parameter | None, settings: Mapping[str, Any] | None = None
    ) -> Self:
        """Make a layer of a weight and a mask, (out_features, in_features); there is never a bias."""
        assert bias is None
        made = cls(nn.Parameter(weight.t().contiguous()))
        made.set_mask(mask)
        return made

    def to_transposed(self) -> Transposed:
        """Make a plain layer around the same Parameter, with the masked weights set to zero."""
        self.clear_masked(self.weight)
        return Transposed(self._parameters["weight"]).train(self.training)  # type: ignore[arg-type]

    def matrix(self, tensor: Tensor) -> Tensor:
        """View a tensor of the weight's shape as (out_features, in_features)."""
        return tensor.t()

    def as_weight(self, matrix: Tensor) -> Tensor:
        """View a matrix (out_features, in_features) in the weight's layout."""
        return matrix.t()

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to (..., in_features); returns (..., out_features)."""
        return torch.matmul(input, self.forward_weight(is_factor=True))
