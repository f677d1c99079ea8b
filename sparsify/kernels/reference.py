"""The reference, slow and obvious: unpack the weight, then multiply. Every kernel is compared with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.kernels.csr import CSR, csr_to_dense

#: What may follow the product and the bias, by name.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def linear(
    x: Tensor, csr: CSR, bias: Tensor | None, shape: tuple[int, int], rows: slice, activation: str = "none"
) -> Tensor:
    """Multiply x (..., in_features) by some rows of a CSR weight; returns (..., rows). Any device, any floating dtype.

    A removed weight takes part as a zero, so Inf or NaN in the input makes NaN of every output, as in a dense layer.
    """
    weight, _ = csr_to_dense(csr, shape)
    with torch.autocast(x.device.type, enabled=False):
        return ACTIVATIONS[activation](F.linear(x, weight[rows], None if bias is None else bias[rows]))


def linear_grad_input(grad: Tensor, csr: CSR, shape: tuple[int, int], rows: slice) -> Tensor:
    """Multiply grad (..., rows) by the same rows of the transposed weight; returns (..., in_features)."""
    weight = csr_to_dense(csr, shape)[0][rows]
    with torch.autocast(grad.device.type, enabled=False):
        return grad @ weight


def pointwise(x: Tensor, csr: CSR, bias: Tensor | None, shape: tuple[int, int], activation: str = "none") -> Tensor:
    """Convolve images (n, in_features, height, width) with a CSR weight of 1 x 1 positions, as nn.Conv2d does."""
    weight, _ = csr_to_dense(csr, shape)
    with torch.autocast(x.device.type, enabled=False):
        return ACTIVATIONS[activation](F.conv2d(x, weight[:, :, None, None], bias))
