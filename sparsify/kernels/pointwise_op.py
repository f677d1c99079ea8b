"""A weight applied at each position of images: a 1x1 convolution.

Images with channels last are rows of tokens, and so are those of one position: `linear` multiplies them. For channels
first there is `pointwise_packed`: its kernel, of the form "panel", reads and writes each channel in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsify.kernels import reference
from sparsify.kernels.cpu import library as native
from sparsify.kernels.forms import is_quantized, unpack_as, unpack_in_transform
from sparsify.kernels.observers import check_no_tangent, is_transformed
from sparsify.kernels.torch_ops import (
    _ACTIVATION_IDS,
    _ACTIVATION_NAMES,
    _activation_grad,
    _library,
    check_devices,
    check_exporter,
    check_values,
    grad_input,
    linear,
    operands,
)

_PANEL = native.FORMS.index("panel")


def pointwise(
    x: Tensor,
    parts: tuple[Tensor, ...],
    form: str,
    shape: tuple[int, int],
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Multiply each position of x (n, in, height, width) by a weight (out, in), add the bias, apply an activation.

    Returns (n, out, height, width), channels last if x is, else channels first. The gradient reaches x and bias. Raises
    RuntimeError for a tensor of another shape, dtype or device.
    """
    quantized = is_quantized(form, parts)
    check_images(x, x if quantized else parts[-1], bias, *shape)
    if form == "csr" or is_transformed():
        check_devices(x, *parts, bias)
        csr = (unpack_in_transform if is_transformed() else unpack_as)(x.dtype, form, parts, shape)
        return reference.pointwise(x, csr, bias, shape, activation)
    rows = x.permute(0, 2, 3, 1)
    if rows.is_contiguous() and (x.shape[2] * x.shape[3] == 1 or not x.is_contiguous()):
        return linear(rows, parts, form, shape, bias, activation).permute(0, 3, 1, 2)
    if form == "panel" and not quantized:
        ops: Any = torch.ops.sparsify
        return ops.pointwise_packed(x, *parts, bias, *shape, _ACTIVATION_IDS[activation])  # type: ignore[no-any-return]
    return linear(rows, parts, form, shape, bias, activation).permute(0, 3, 1, 2).contiguous()


def check_images(x: Tensor, values: Tensor, bias: Tensor | None, out: int, channels: int) -> None:
    """Raise RuntimeError, as torch does for a dense layer, unless all of it fits together."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise RuntimeError(f"the layer takes images of shape (n, {channels}, height, width), got {tuple(x.shape)}")
    check_values(x, values, bias, out)


_library.define(
    "pointwise_packed(Tensor x, Tensor index, Tensor values, Tensor? bias, int out_features, int in_features, "
    "int activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _pointwise_packed(
    x: Tensor, index: Tensor, values: Tensor, bias: Tensor | None, out: int, inner: int, activation: int
) -> Tensor:
    check_devices(x, index, values, bias)
    check_no_tangent(x, values, bias)
    check_images(x, values, bias, out, inner)
    index, values, bias = operands("panel", index, values, bias, (out, inner))
    return native.pointwise(x, index, values, bias, (out, inner), activation)


_library.impl("pointwise_packed", _pointwise_packed, "CPU")


@torch.library.register_fake("sparsify::pointwise_packed", lib=_library)
def _fake(
    x: Tensor, index: Tensor, values: Tensor, bias: Tensor | None, out: int, inner: int, activation: int
) -> Tensor:
    check_exporter()
    check_devices(x, index, values, bias)
    return x.new_empty((x.shape[0], out, x.shape[2], x.shape[3]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the weight; with an activation also x and bias, to work out the sum before it again."""
    x, *ctx.weight, bias, ctx.out, ctx.inner, ctx.activation = inputs
    ctx.save_for_backward(*((x, bias) if ctx.activation else ()))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.activation:
        x, bias = ctx.saved_tensors
        before = pointwise(x, tuple(ctx.weight), "panel", (ctx.out, ctx.inner), bias)
        grad = _activation_grad(before, grad, _ACTIVATION_NAMES[ctx.activation])
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        rows = grad_input(grad.permute(0, 2, 3, 1), (*ctx.weight, _PANEL), (ctx.out, ctx.inner))
        grad_x = rows.permute(0, 3, 1, 2)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.sum((0, 2, 3))
    return grad_x, None, None, grad_bias, None, None, None


torch.library.register_autograd("sparsify::pointwise_packed", _backward, setup_context=_setup_context, lib=_library)
