"""SparseLinear: a Linear under a mask, for pruning and training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.kernels.cpu import sparse_step as training
from sparsify.layers.construct import linear_from_parameters
from sparsify.layers.masked import MaskedLayer
from sparsify.masking.methods.registry import Method


class SparseLinear(MaskedLayer, nn.Linear):
    """A Linear under a mask; see `MaskedLayer`.

    `weight` is a dense Parameter (out_features, in_features), `mask` a bool buffer of the same shape, True = kept.
    isinstance(layer, nn.Linear) is true.

    sparsity: the fraction of zeros at the start.
    method, pattern: the choice of those zeros, as in `prune`.
    seed: for a method with random numbers, such as the default one.

    >>> layer = SparseLinear(8, 4, 0.75, seed=1)
    >>> layer.sparsity, layer(torch.ones(2, 8)).shape
    (0.75, torch.Size([2, 4]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sparsity: float,
        bias: bool = True,
        *,
        method: str | Method = "random",
        pattern: str = "unstructured",
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._begin(sparsity, method, pattern, seed)

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Tensor | None = None) -> Self:
        """Make a layer around the Linear's Parameters, under `mask`.

        mask: by default that of a SparseLinear, all True for any other Linear. Removed weights are set to zero in the
            shared Parameter.
        Raises ValueError if the weight is no Parameter.
        """
        if "weight" not in linear._parameters:
            raise ValueError("its weight is computed, not a Parameter; sparsify.convert takes over what can be")
        if mask is None and isinstance(linear, SparseLinear):
            mask = linear.mask
        layer = linear_from_parameters(cls, linear.weight, linear.bias)
        layer._keep_all()
        if mask is not None:
            layer.set_mask(mask)
        return layer.train(linear.training)

    @classmethod
    def from_matrix(
        cls, weight: Tensor, mask: Tensor, bias: nn.Parameter | None, settings: Mapping[str, Any] | None = None
    ) -> Self:
        """Make a layer of a weight and a mask, (out_features, in_features); the bias is shared."""
        return cls.from_linear(linear_from_parameters(nn.Linear, nn.Parameter(weight), bias), mask)

    def to_linear(self) -> nn.Linear:
        """Make a plain nn.Linear around the same Parameters, with the masked weights set to zero."""
        self.clear_masked(self.weight)
        return linear_from_parameters(nn.Linear, self.weight, self.bias).train(self.training)

    def matrix(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as it is."""
        return tensor

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix as it is."""
        return matrix

    def forward(self, input: Tensor, rows: tuple[int, int] | None = None) -> Tensor:
        """Apply the layer to (..., in_features); returns (..., out_features), or the outputs rows[0] to rows[1] - 1."""
        if rows is None:
            if (
                self.training_kernels is not None
                and (index := self.training_kernels.index_for(self, input)) is not None
            ):
                return training.linear(input, self.weight, self.bias, index)
            return F.linear(input, self.forward_weight(is_factor=True), self.bias)
        part, weight = slice(*rows), self.forward_weight(is_factor=True)
        return F.linear(input, weight[part], None if self.bias is None else self.bias[part])

    def reset_parameters(self) -> None:
        """Initialise weight and bias afresh, as nn.Linear does; the mask stays."""
        super().reset_parameters()
        if "mask" in self._buffers:
            self.zero_masked()
