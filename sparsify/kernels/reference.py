"""The reference, slow and obvious: unpack the weight, then multiply. Every kernel is compared with it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from sparsify.kernels.csr import CSR, csr_to_dense
from sparsify.kernels.geometry import Geometry

#: What may follow the product and the bias, by name.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "relu6": F.relu6,
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


def convolution(
    x: Tensor,
    csr: CSR,
    bias: Tensor | None,
    shape: tuple[int, int],
    geometry: Geometry,
    activation: str = "none",
    scale: Tensor | None = None,
) -> Tensor:
    """Convolve images (n, channels, height, width) with a CSR weight (out, channels * kernel), as nn.Conv2d does.

    scale: float32 (out), multiplies the sums before the bias is added.
    """
    weight = csr_to_dense(csr, shape)[0].view(shape[0], -1, *geometry.kernel)
    with torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(x, weight, bias if scale is None else None, *geometry[1:])
        if scale is not None:
            y = y * scale[:, None, None]
            y = (y if bias is None else y + bias[:, None, None]).to(x.dtype)
        return ACTIVATIONS[activation](y)


def convolution_grad_input(
    grad: Tensor, csr: CSR, shape: tuple[int, int], geometry: Geometry, image: tuple[int, int]
) -> Tensor:
    """Return the gradient of the images (n, channels, *image), given that of a convolution's outputs."""
    weight = csr_to_dense(csr, shape)[0].view(shape[0], -1, *geometry.kernel)
    size = (len(grad), weight.shape[1], *image)
    with torch.autocast(grad.device.type, enabled=False):
        return conv2d_input(size, weight, grad, geometry.stride, geometry.padding, geometry.dilation)  # type: ignore[no-any-return]


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round each row of x (..., in) to 0..255: (q uint8, step float32 (...), zero_point int32 (...)).

    x is about step * (q - zero_point), and 0 is exactly zero_point. In float32, each operation rounded once.
    A row has step 0 if its values are all 0, or so near that 255 divided by their range is infinite; step NaN if it has
    Inf or NaN, or if the range is no float32.

    >>> quantize_rows(torch.tensor([[-1.0, 0.0, 1.55]]))
    (tensor([[  0, 100, 255]], dtype=torch.uint8), tensor([0.0100]), tensor([100], dtype=torch.int32))
    """
    x = x.float()
    zero = x.new_zeros((*x.shape[:-1], 1))
    low, high = (torch.cat([x, zero], -1).aminmax(dim=-1, keepdim=True)) if x.dim() else (x, x)
    span = high - low
    inverse = torch.div(torch.full_like(span, 255.0), span)
    finite = x.isfinite().all(-1, keepdim=True) & span.isfinite()
    usable = finite & inverse.isfinite()
    inverse = torch.where(usable, inverse, 0.0)
    zero_point = torch.where(usable, (-low * inverse).round().clamp(max=255), 0.0)
    q = torch.where(usable, (x * inverse).round() + zero_point, 0.0).clamp(0, 255)
    step = torch.where(usable, span / 255.0, torch.where(finite, 0.0, math.nan))
    return q.to(torch.uint8), step.squeeze(-1), zero_point.squeeze(-1).to(torch.int32)


def linear_int8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str = "none", *, quantize_inputs: bool
) -> Tensor:
    """Multiply x (..., in) by an int8 weight (out, in) whose rows have a scale, float32 (out); returns (..., out).

    Sums are exact: of integers if the inputs are quantised, else in float64. y has the dtype of x.
    """
    if quantize_inputs:
        q, step, zero_point = quantize_rows(x)
        centred = q.to(torch.float64) - zero_point.to(torch.float64).unsqueeze(-1)
        sums = (centred @ weight.to(torch.float64).T).float()  # integers below 2^53
        y = sums * (step.unsqueeze(-1) * scale)
    else:
        y = (x.double() @ weight.double().T).float() * scale
    return ACTIVATIONS[activation](y if bias is None else y + bias.float()).to(x.dtype)
