"""A weight applied to images with a kernel of several positions: a convolution without groups.

The weight is (out_channels, in_channels * kernel height * kernel width), the kernel of one input channel after that of
another. The form "panel" has a kernel that reads images as they lie. For any other form the inputs of each output
position are copied out as rows, which `linear` multiplies.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from sparsify.kernels import reference
from sparsify.kernels.cpu import convolution as native
from sparsify.kernels.cpu.memory import empty
from sparsify.kernels.forms import is_quantized, unpack, unpack_as, unpack_in_transform
from sparsify.kernels.geometry import Geometry, Norm
from sparsify.kernels.observers import check_no_tangent, is_transformed
from sparsify.kernels.pointwise_op import check_images, pointwise
from sparsify.kernels.reference import ACTIVATIONS
from sparsify.kernels.torch_ops import (
    _ACTIVATION_IDS,
    _ACTIVATION_NAMES,
    _activation_grad,
    _library,
    check_devices,
    check_exporter,
    linear,
    operands,
)


def convolution(
    x: Tensor,
    parts: tuple[Tensor, ...],
    form: str,
    shape: tuple[int, int],
    geometry: Geometry,
    bias: Tensor | None = None,
    activation: str = "none",
    scale: Tensor | None = None,
) -> Tensor:
    """Convolve x (n, channels, height, width) with a weight (out, channels * kernel), add the bias, activate.

    scale: float32 (out), multiplies the sums before the bias is added; without gradient.

    Returns (n, out, output height, output width), channels last if x is, else channels first. The gradient reaches x
    and bias. Raises RuntimeError for a tensor of another shape, dtype or device.
    """
    if geometry.is_pointwise and scale is None:
        return pointwise(x, parts, form, shape, bias, activation)
    quantized = is_quantized(form, parts)
    _check(x, x if quantized else parts[-1], bias, shape, geometry, scale)
    if form == "csr" or is_transformed():
        check_devices(x, *parts, bias)
        csr = (unpack_in_transform if is_transformed() else unpack_as)(x.dtype, form, parts, shape)
        return reference.convolution(x, csr, bias, shape, geometry, activation, scale)
    if form == "panel" and not quantized:
        ops: Any = torch.ops.sparsify
        return ops.convolution_packed(x, *parts, scale, bias, *shape, *_flat(geometry), _ACTIVATION_IDS[activation])  # type: ignore[no-any-return]
    rows = F.unfold(x, geometry.kernel, geometry.dilation, geometry.padding, geometry.stride).transpose(1, 2)
    if scale is None:
        y = linear(rows, parts, form, shape, bias, activation)
    else:
        y = linear(rows, parts, form, shape) * scale
        y = ACTIVATIONS[activation](y if bias is None else y + bias).to(x.dtype)
    images = y.view(len(x), *geometry.output_size(*x.shape[2:]), shape[0]).permute(0, 3, 1, 2)
    return images if native.is_channels_last(x) else images.contiguous()


def fused_convolution(
    x: Tensor,
    parts: tuple[Tensor, ...],
    shape: tuple[int, int],
    geometry: Geometry,
    bias: Tensor | None,
    norm: Norm | None,
    residual: Tensor | None,
    activation: str,
    *,
    channels_last: bool = False,
) -> Tensor | None:
    """Convolve x as `convolution`, apply a BatchNorm, add the residual, activate: one call, without gradients.

    parts: of the form "panel". residual: of the result's shape. channels_last: the layout of the result, instead of
    x's own. Returns None unless all are plain tensors on the CPU,
    of matching shapes and of one dtype, with a norm float32. Nothing is rounded between the steps.
    """
    index, values = parts
    n_channels = shape[1] // (geometry.kernel[0] * geometry.kernel[1])
    if type(x) is not Tensor or x.dim() != 4 or x.shape[1] != n_channels:
        return None
    size = (x.shape[0], shape[0], *geometry.output_size(x.shape[2], x.shape[3]))
    vectors = (bias,) if norm is None else (bias, *norm[:4])
    if not (
        x.dtype == values.dtype
        and x.is_cpu
        and index.is_cpu
        and values.is_cpu
        and min(size[2:]) > 0
        and (norm is None or x.dtype == torch.float32)
        and all(v is None or (v.dtype == x.dtype and v.is_cpu and v.shape == size[1:2]) for v in vectors)
        and (residual is None or (type(residual) is Tensor and residual.shape == size and residual.dtype == x.dtype))
    ):
        return None
    index, values, bias = operands("panel", index, values, bias, shape)
    number = _ACTIVATION_IDS[activation]
    last = channels_last or native.is_channels_last(x)
    y = empty(size, x.dtype, channels_last=last)
    return native.convolution(x, index, values, bias, shape[0], geometry, number, y, norm=norm, residual=residual)


def _check(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int],
    geometry: Geometry,
    scale: Tensor | None,
) -> None:
    """Raise RuntimeError, as torch does for a dense layer, unless all of it fits together."""
    out, channels = shape[0], shape[1] // (geometry.kernel[0] * geometry.kernel[1])
    check_images(x, values, bias, out, channels)
    if min(geometry.output_size(x.shape[2], x.shape[3])) < 1:
        raise RuntimeError(f"an image of {tuple(x.shape[2:])} is smaller than the layer's kernel, {geometry}")
    if scale is not None and (scale.dtype != torch.float32 or scale.shape != (out,)):
        raise RuntimeError(f"the scale must be float32 of shape ({out},), got {scale.dtype} {tuple(scale.shape)}")


def _flat(geometry: Geometry) -> tuple[int, ...]:
    return (*geometry.kernel, *geometry.stride, *geometry.padding, *geometry.dilation)


def _geometry(sizes: tuple[int, ...]) -> Geometry:
    """Return the inverse of `_flat`."""
    return Geometry(sizes[0:2], sizes[2:4], sizes[4:6], sizes[6:8])  # type: ignore[arg-type]


_SIZES = (
    "int kernel_height, int kernel_width, int stride_height, int stride_width, "
    "int padding_height, int padding_width, int dilation_height, int dilation_width"
)
for _schema in (
    "convolution_packed(Tensor x, Tensor index, Tensor values, Tensor? scale, Tensor? bias, "
    f"int out_features, int in_features, {_SIZES}, int activation) -> Tensor",
    "grad_input_convolution(Tensor grad, Tensor index, Tensor values, int out_features, int in_features, "
    f"{_SIZES}, SymInt height, SymInt width) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _convolution_packed(
    x: Tensor,
    index: Tensor,
    values: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    out: int,
    inner: int,
    *settings: int,
) -> Tensor:
    geometry, shape = _geometry(settings), (out, inner)
    check_devices(x, index, values, scale, bias)
    check_no_tangent(x, values, scale, bias)
    _check(x, values, bias, shape, geometry, scale)
    index, values, bias = operands("panel", index, values, bias, shape)
    scale = None if scale is None else scale.contiguous()
    return native.convolution(x, index, values, bias, out, geometry, settings[8], scale=scale)


def _grad_input_convolution(
    grad: Tensor, index: Tensor, values: Tensor, out: int, inner: int, *settings: int
) -> Tensor:
    check_devices(grad, index, values)
    check_no_tangent(grad, values)
    csr = unpack("panel", (index, values), (out, inner))
    return reference.convolution_grad_input(grad, csr, (out, inner), _geometry(settings), settings[8:])  # type: ignore[arg-type]


_library.impl("convolution_packed", _convolution_packed, "CPU")
_library.impl("grad_input_convolution", _grad_input_convolution, "CPU")


def _fake(
    x: Tensor,
    index: Tensor,
    values: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    out: int,
    inner: int,
    *settings: int,
) -> Tensor:
    check_exporter()
    check_devices(x, index, values, scale, bias)
    geometry = _geometry(settings)
    _check(x, values, bias, (out, inner), geometry, scale)
    size = (x.shape[0], out, *geometry.output_size(x.shape[2], x.shape[3]))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=native.format_of(x))


def _fake_grad_input(grad: Tensor, index: Tensor, values: Tensor, out: int, inner: int, *settings: int) -> Tensor:
    check_devices(grad, index, values)
    size = (grad.shape[0], inner // (settings[0] * settings[1]), *settings[8:])
    return torch.empty(size, dtype=grad.dtype, device=grad.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the weight; with an activation also x and bias, to work out the sum before it again."""
    x, ctx.index, ctx.values, ctx.scale, bias, ctx.out, ctx.inner, *sizes, ctx.activation = inputs
    ctx.sizes, ctx.image = tuple(sizes), x.shape[2:]
    ctx.save_for_backward(*((x, bias) if ctx.activation else ()))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    parts, shape = (ctx.index, ctx.values), (ctx.out, ctx.inner)
    if ctx.activation:
        x, bias = ctx.saved_tensors
        before = convolution(x, parts, "panel", shape, _geometry(ctx.sizes), bias, scale=ctx.scale)
        grad = _activation_grad(before, grad, _ACTIVATION_NAMES[ctx.activation])
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        sums = grad if ctx.scale is None else (grad * ctx.scale[:, None, None]).to(grad.dtype)
        grad_x = _grad_input(sums, parts, shape, ctx.sizes, ctx.image)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.sum((0, 2, 3))
    return grad_x, None, None, None, grad_bias, *[None] * 11


def _grad_input(
    grad: Tensor, parts: tuple[Tensor, ...], shape: tuple[int, int], sizes: tuple[int, ...], image: tuple[int, int]
) -> Tensor:
    if is_transformed():
        csr = unpack_in_transform(grad.dtype, "panel", parts, shape)
        return reference.convolution_grad_input(grad, csr, shape, _geometry(sizes), image)
    return torch.ops.sparsify.grad_input_convolution(grad, *parts, *shape, *sizes, *image)  # type: ignore[no-any-return]


def _setup_context_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.parts, ctx.out, ctx.inner = inputs[:5]
    ctx.sizes = inputs[5:13]


def _backward_grad_input(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """grad_input is linear in its first argument: the second derivative is the convolution itself, without bias."""
    grad_grad = convolution(grad, tuple(ctx.parts), "panel", (ctx.out, ctx.inner), _geometry(ctx.sizes))
    return grad_grad, *[None] * 14


for _name, _shapes, _derivative, _setup in (
    ("convolution_packed", _fake, _backward, _setup_context),
    ("grad_input_convolution", _fake_grad_input, _backward_grad_input, _setup_context_grad_input),
):
    library.register_fake(f"sparsify::{_name}", _shapes, lib=_library)
    library.register_autograd(f"sparsify::{_name}", _derivative, setup_context=_setup, lib=_library)
