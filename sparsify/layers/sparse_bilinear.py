"""SparseBilinear: nn.Bilinear under a mask, for pruning and training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.layers.torch_layer import TorchLayer


class SparseBilinear(TorchLayer, nn.Bilinear):
    """nn.Bilinear under a mask; see `MaskedLayer`. The matrix is (out_features, in1_features x in2_features)."""

    dense_type = nn.Bilinear
    setting_names = ("in1_features", "in2_features", "out_features")
    multiplies_rows = False

    @classmethod
    def matrix_of(cls, weight: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """Return the weight (out_features, in1_features, in2_features) with both inputs in one dimension."""
        return weight.reshape(weight.shape[0], math.prod(weight.shape[1:]))

    @classmethod
    def weight_of(cls, matrix: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """Return such a matrix as the weight."""
        return matrix.reshape(matrix.shape[0], settings["in1_features"], settings["in2_features"])

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """Apply the layer to (..., in1_features) and (..., in2_features); returns (..., out_features)."""
        return F.bilinear(input1, input2, self.forward_weight(), self.bias)
