"""The operators of packed int8 weights as torch knows them: implementation, shape rule, gradient.

`linear_int8` multiplies with a form packed for the native CPU kernels. Its gradient is that of the dequantised weight,
which `weight_int8` returns as a dense tensor, float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsify.kernels.cpu import library as native
from sparsify.kernels.csr import csr_to_dense
from sparsify.kernels.forms import unpack_as
from sparsify.kernels.observers import check_no_tangent
from sparsify.kernels.torch_ops import (
    _ACTIVATION_NAMES,
    _activation_grad,
    _direct,
    _library,
    check_devices,
    check_exporter,
    check_operands,
    operands,
)

_library.define(
    "weight_int8(Tensor index, Tensor values, Tensor scale, int form, int out_features, int in_features) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(
    x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, out: int, inner: int, first: int, end: int
) -> int:
    """Raise RuntimeError unless all of it fits together; return the rows' end."""
    if values.dtype != torch.int8:
        raise RuntimeError(f"the layer's values must be int8, got {values.dtype}")
    if scale.dtype != torch.float32 or scale.shape != (out,):
        raise RuntimeError(f"the scale must be float32 of shape ({out},), got {scale.dtype} {tuple(scale.shape)}")
    if not x.is_floating_point():
        raise RuntimeError(f"the layer takes floating-point inputs, got {x.dtype}")
    return check_operands(x, x, bias, out, inner, first, end)  # bias has the dtype of the inputs


def _linear_int8(
    x: Tensor,
    index: Tensor,
    values: Tensor,
    scale: Tensor,
    form: int,
    bias: Tensor | None,
    out: int,
    inner: int,
    activation: int,
    first: int = 0,
    end: int = -1,
) -> Tensor:
    shape, name = (out, inner), native.FORM_NAMES[form]
    rows = first, _check(x, values, scale, bias, out, inner, first, end)
    if not (x.is_cpu and index.is_cpu and values.is_cpu and scale.is_cpu and (bias is None or bias.is_cpu)):
        check_devices(x, index, values, scale, bias)
    if x.dtype not in native.DTYPES:
        raise RuntimeError(f"the form {name!r} takes inputs of {', '.join(map(str, native.DTYPES))}, got {x.dtype}")
    check_no_tangent(x, values, bias)
    index, values, bias = operands(name, index, values, bias, shape)
    return native.linear_int8(name, x, index, values, scale.contiguous(), bias, shape, activation, rows=rows)


def _weight_int8(index: Tensor, values: Tensor, scale: Tensor, form: int, out: int, inner: int) -> Tensor:
    check_devices(index, values, scale)
    csr = unpack_as(torch.float32, native.FORM_NAMES[form], (index, values, scale), (out, inner))
    return csr_to_dense(csr, (out, inner))[0]


_library.impl("linear_int8", _linear_int8, "CPU")
_direct.linear_int8 = staticmethod(_linear_int8)
_library.impl("weight_int8", _weight_int8, "CPU")


def _fake_linear_int8(
    x: Tensor,
    index: Tensor,
    values: Tensor,
    scale: Tensor,
    form: int,
    bias: Tensor | None,
    out: int,
    inner: int,
    activation: int,
    first: int = 0,
    end: int = -1,
) -> Tensor:
    check_exporter()
    check_devices(x, index, values, scale, bias)
    return x.new_empty((*x.shape[:-1], _check(x, values, scale, bias, out, inner, first, end) - first))


def _fake_weight_int8(index: Tensor, values: Tensor, scale: Tensor, form: int, out: int, inner: int) -> Tensor:
    return scale.new_empty((out, inner))


torch.library.register_fake("sparsify::linear_int8", _fake_linear_int8, lib=_library)
torch.library.register_fake("sparsify::weight_int8", _fake_weight_int8, lib=_library)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the weight; with an activation also x and bias, to work out the sum before it again."""
    x, *ctx.weight, bias, ctx.out, ctx.inner, ctx.activation, ctx.first, ctx.end = inputs
    ctx.save_for_backward(*((x, bias) if ctx.activation else ()))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ops: Any = torch.ops.sparsify
    n_rows = grad.shape[-1]
    if ctx.activation:
        x, bias = ctx.saved_tensors
        before = ops.linear_int8(x, *ctx.weight, bias, ctx.out, ctx.inner, 0, ctx.first, ctx.end)
        grad = _activation_grad(before, grad, _ACTIVATION_NAMES[ctx.activation])
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = ops.weight_int8(*ctx.weight, ctx.out, ctx.inner)[ctx.first : ctx.first + n_rows]
        with torch.autocast(grad.device.type, enabled=False):
            grad_x = grad @ weight.to(grad.dtype)
    if ctx.needs_input_grad[5]:
        grad_bias = torch.nn.functional.pad(grad.reshape(-1, n_rows).sum(0), (ctx.first, ctx.out - ctx.first - n_rows))
    return grad_x, None, None, None, None, grad_bias, None, None, None, None, None


torch.library.register_autograd("sparsify::linear_int8", _backward, setup_context=_setup_context, lib=_library)
