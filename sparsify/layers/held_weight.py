"""A weight that the code of the module around it reads, such as the matrices of an LSTM; dense, and under a mask."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparsify.layers.torch_layer import TorchLayer


class HeldWeight(nn.Module):
    """A weight without a product of its own: (out_features, in_features), or (n, out_features, in_features).

    transposed: True for a weight stored (..., in_features, out_features).
    """

    weight: Tensor

    def __init__(self, weight: nn.Parameter, *, transposed: bool = False) -> None:
        super().__init__()
        self.register_parameter("weight", weight)
        self.stack, self.transposed = tuple(weight.shape[:-2]), transposed

    def extra_repr(self) -> str:
        """Tell the shape of the weight."""
        return "x".join(map(str, self.weight.shape))


class SparseHeldWeight(TorchLayer, HeldWeight):
    """A HeldWeight under a mask; see `MaskedLayer`. The rows of the matrix are those of one matrix after another."""

    dense_type = HeldWeight
    setting_names = ("stack", "transposed")
    has_bias = False
    multiplies_rows = False

    @classmethod
    def matrix_of(cls, weight: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """Return all matrices of a weight as one, (n x out_features, in_features)."""
        rows = weight.mT if settings["transposed"] else weight
        return rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])

    @classmethod
    def weight_of(cls, matrix: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """Return such a matrix as the weight."""
        n_rows = matrix.shape[0] // max(math.prod(settings["stack"]), 1)
        weight = matrix.reshape(*settings["stack"], n_rows, matrix.shape[1])
        return weight.mT if settings["transposed"] else weight
