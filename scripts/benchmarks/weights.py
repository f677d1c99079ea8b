"""The weights and inputs of the benchmarks of layers and kernels, and copies beyond any cache."""

import math

import torch
from torch import Tensor, nn

import sparsify
from benchmarks.cases import Shape
from sparsify.hardware.machine import last_level_cache_bytes

#: Layers called in rotation hold this many times the last-level cache together: each finds it without its weights.
TIMES_LLC = 4
#: But no more than this: all candidates of a cell are in memory at once, some 35 of them.
MOST_COLD_BYTES = 512 << 20


def pruned_layer(shape: Shape, sparsity: float, pattern: str = "unstructured") -> sparsify.SparseLinear:
    """Make a layer with random weights, always the same; exactly `sparsity` of them is zero, or half by 2:4."""
    torch.manual_seed(0)
    out, in_ = shape
    layer = sparsify.convert(nn.Linear(in_, out).eval())
    assert isinstance(layer, sparsify.SparseLinear)
    share = None if ":" in pattern else sparsity
    return sparsify.prune(layer, share, method="random", seed=0, pattern=pattern)


def dense_tensors(layer: sparsify.SparseLinear) -> tuple[Tensor, Tensor]:
    """Return weight (with its zeros) and bias."""
    assert layer.bias is not None
    return layer.masked_weight().detach(), layer.bias.detach()


def inputs(shape: Shape, tokens: int) -> Tensor:
    """Make the same random input (tokens, in) every time."""
    return torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(1))


def n_copies(weight_bytes: int) -> int:
    """Return the number of layers of this size to call in rotation for a cold cache."""
    return math.ceil(min(TIMES_LLC * last_level_cache_bytes(), MOST_COLD_BYTES) / max(weight_bytes, 1))
