"""The slow and obvious answer that every kernel is compared with: unpack the weight, then multiply."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.formats import CSR, csr_to_dense


def linear_csr(x: Tensor, crow: Tensor, col: Tensor, values: Tensor, in_features: int, bias: Tensor | None) -> Tensor:
    """Multiply x (..., in_features) by a CSR weight; returns (..., out_features). Any device, any floating dtype.

    A removed weight takes part as a zero, so Inf or NaN in the input makes NaN of every output, as in a dense layer.
    """
    check_input(x, values, in_features)
    weight, _ = csr_to_dense(CSR(crow, col, values), (crow.numel() - 1, in_features))
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight, bias)


def linear_csr_grad_input(grad: Tensor, crow: Tensor, col: Tensor, values: Tensor, in_features: int) -> Tensor:
    """Multiply grad (..., out_features) by the transposed weight; returns (..., in_features)."""
    weight, _ = csr_to_dense(CSR(crow, col, values), (crow.numel() - 1, in_features))
    with torch.autocast(grad.device.type, enabled=False):
        return grad @ weight


def check_input(x: Tensor, values: Tensor, in_features: int) -> None:
    """Raise RuntimeError, as torch does for a dense layer, if x has another size or dtype than the weight takes."""
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise RuntimeError(f"the layer takes inputs of shape (..., {in_features}), got {tuple(x.shape)}")
    if x.dtype != values.dtype:
        raise RuntimeError(f"the layer's values are {values.dtype}, but the input is {x.dtype}")
