"""The operators as torch knows them: schema, default, shape rule, gradient.

Registered with define and impl rather than the custom_op decorator, whose call costs microseconds more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsify.kernels import reference

_library = torch.library.Library("sparsify", "DEF")
_WEIGHT = "Tensor crow, Tensor col, Tensor values, int in_features"
for _name, _schema in {
    "linear_csr": f"(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor",
    "linear_csr_grad_input": f"(Tensor grad, {_WEIGHT}) -> Tensor",
}.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


def linear_csr(
    x: Tensor, crow: Tensor, col: Tensor, values: Tensor, in_features: int, bias: Tensor | None = None
) -> Tensor:
    """Multiply x (..., in_features) by a CSR weight (out_features, in_features) and add the bias.

    x, values and bias have one dtype. The gradient reaches x and bias. Raises RuntimeError for another dtype or size
    of x.
    """
    result: Tensor = torch.ops.sparsify.linear_csr(x, crow, col, values, in_features, bias)
    return result


@torch.library.register_fake("sparsify::linear_csr", lib=_library)
def _fake(x: Tensor, crow: Tensor, col: Tensor, values: Tensor, in_features: int, bias: Tensor | None) -> Tensor:
    reference.check_input(x, values, in_features)
    return x.new_empty((*x.shape[:-1], crow.shape[0] - 1))


@torch.library.register_fake("sparsify::linear_csr_grad_input", lib=_library)
def _fake_grad_input(grad: Tensor, crow: Tensor, col: Tensor, values: Tensor, in_features: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, crow, col, values, ctx.in_features, _ = inputs
    ctx.save_for_backward(crow, col, values)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.sparsify.linear_csr_grad_input(grad, *ctx.saved_tensors, ctx.in_features)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, None, grad_bias


torch.library.register_autograd("sparsify::linear_csr", _backward, setup_context=_setup_context, lib=_library)
