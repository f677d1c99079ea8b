"""A SparseLinear of a given mask, and inputs for it."""

import torch
from cases import weight
from torch import Tensor, nn

from sparsify import SparseLinear


def layer_with(mask: Tensor, dtype: torch.dtype = torch.float32, bias: bool = True) -> SparseLinear:
    out, inner = mask.shape
    linear = nn.Linear(inner, out, bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(weight((out, inner), dtype))
    return SparseLinear.from_linear(linear, mask)


def inputs(layer: SparseLinear, n: int = 3) -> Tensor:
    return (weight((n, layer.in_features), torch.float64, seed=5) / layer.in_features**0.5).to(layer.weight.dtype)
