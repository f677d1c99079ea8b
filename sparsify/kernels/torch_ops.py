"""The operators as torch knows them: schema, implementations, shape rule, gradient.

`linear_csr` takes the canonical form and runs anywhere, `linear_packed` a form packed for the native CPU kernels or for
the Triton kernels on GPUs.
Registered with define and impl rather than the custom_op decorator, and with plain arguments rather than lists and
strings: each of these costs a small layer microseconds a call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd

from sparsify.kernels import gpu, reference
from sparsify.kernels.cpu import library as native
from sparsify.kernels.csr import CSR
from sparsify.kernels.forms import is_quantized, unpack, unpack_as, unpack_in_transform, usable_csr, usable_index
from sparsify.kernels.observers import are_plain, check_no_tangent, is_transformed, is_watched
from sparsify.kernels.reference import ACTIVATIONS

__all__ = ["ACTIVATIONS", "linear"]

#: The number by which `linear_packed` knows a form; later ones come last, since exported programs hold numbers.
FORM_IDS = {f: n for n, f in enumerate(("panel", "bitmask", "gather", *gpu.FORMS, native.PAIRMASK, "sell"))}
_FORM_NAMES = tuple(FORM_IDS)
#: Numbered in their order, which is that of `enum sparsify_activation` in csrc/sparsify.h.
_ACTIVATION_IDS = {name: number for number, name in enumerate(ACTIVATIONS)}
_ACTIVATION_NAMES = tuple(ACTIVATIONS)

_CSR = "Tensor crow, Tensor col, Tensor values"
_PACKED = "Tensor index, Tensor values, int form"
_INT8 = "Tensor index, Tensor values, Tensor scale, int form"
#: Which outputs: all that stand from `first` on before `end`; -1 is the last one's end.
_ROWS = "int first=0, int end=-1"
_library = torch.library.Library("sparsify", "DEF")
for _schema in (
    f"linear_csr(Tensor x, {_CSR}, Tensor? bias, int out_features, int in_features, int activation, {_ROWS}) -> Tensor",
    "linear_packed("
    f"Tensor x, {_PACKED}, Tensor? bias, int out_features, int in_features, int activation, {_ROWS}) -> Tensor",
    f"grad_input_csr(Tensor grad, {_CSR}, int out_features, int in_features, {_ROWS}) -> Tensor",
    f"grad_input_packed(Tensor grad, {_PACKED}, int out_features, int in_features, {_ROWS}) -> Tensor",
    "linear_int8("  # implemented in int8_op.py
    f"Tensor x, {_INT8}, Tensor? bias, int out_features, int in_features, int activation, {_ROWS}) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def linear(
    x: Tensor,
    parts: tuple[Tensor, ...],
    form: str,
    shape: tuple[int, int],
    bias: Tensor | None = None,
    activation: str = "none",
    rows: tuple[int, int] = (0, -1),
) -> Tensor:
    """Multiply x (..., in) by a weight (out, in) in one of the FORMS, add the bias, apply one of the ACTIVATIONS.

    x, values and bias have one dtype and device, but for int8 values, which have their scales behind them; the bias
    always has all entries. With `rows`, the outputs are those from the first to before the second. The gradient reaches
    x and bias. Raises RuntimeError for a tensor of another shape, dtype or device.
    """
    if is_transformed():
        return _linear_by_torch(x, parts, form, shape, bias, activation, rows)
    if torch.compiler.is_compiling():
        return _operate(torch.ops.sparsify, x, parts, form, shape, bias, activation, rows)
    if torch.is_grad_enabled():
        return _operate(_eager, x, parts, form, shape, bias, activation, rows)
    if x.is_cpu and are_plain(x, parts, bias) and not is_watched():
        return _operate(_direct, x, parts, form, shape, bias, activation, rows)
    if torch.is_inference_mode_enabled():
        return _operate(_eager, x, parts, form, shape, bias, activation, rows)
    with _AutoDispatchBelowAutograd():  # where torch's Python code for gradients comes to by itself, microseconds later
        return _operate(_eager, x, parts, form, shape, bias, activation, rows)


def _operate(
    ops: Any,
    x: Tensor,
    parts: tuple[Tensor, ...],
    form: str,
    shape: tuple[int, int],
    bias: Tensor | None,
    activation: str,
    rows: tuple[int, int],
) -> Tensor:
    """Call the operator of a form."""
    if is_quantized(form, parts):
        if form != "csr":
            number = native.FORM_NUMBERS[form]
            return ops.linear_int8(x, *parts, number, bias, *shape, _ACTIVATION_IDS[activation], *rows)  # type: ignore[no-any-return]
        parts = unpack_as(x.dtype, form, parts, shape)  # widened for the reference kernel
    if form == "csr":
        return ops.linear_csr(x, *parts, bias, *shape, _ACTIVATION_IDS[activation], *rows)  # type: ignore[no-any-return]
    return ops.linear_packed(x, *parts, FORM_IDS[form], bias, *shape, _ACTIVATION_IDS[activation], *rows)  # type: ignore[no-any-return]


def _linear_by_torch(
    x: Tensor,
    parts: tuple[Tensor, ...],
    form: str,
    shape: tuple[int, int],
    bias: Tensor | None,
    activation: str,
    rows: tuple[int, int],
) -> Tensor:
    end = check_operands(x, x if is_quantized(form, parts) else parts[-1], bias, *shape, *rows)
    check_devices(x, *parts, bias)
    csr = unpack_in_transform(x.dtype, form, parts, shape)
    return reference.linear(x, csr, bias, shape, slice(rows[0], end), activation)


#: True while an ONNX file with operators of ours is written.
_own_onnx: ContextVar[bool] = ContextVar("own_onnx", default=False)


@contextmanager
def in_own_onnx() -> Iterator[None]:
    """Let the exporter of ONNX trace exported layers: whoever calls it has operators for them."""
    token = _own_onnx.set(True)
    try:
        yield
    finally:
        _own_onnx.reset(token)


def check_exporter() -> None:
    """Raise RuntimeError if a layer is traced for plain ONNX: it has no operator for sparse weights."""
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export() and not _own_onnx.get():
        raise RuntimeError(
            "ONNX has no sparse layers; give torch.onnx.export a copy with dense weights and zeros: "
            "sparsify.to_dense(copy.deepcopy(model)), or write operators of ours for ONNX Runtime: sparsify.export_onnx"
        )


def check_operands(x: Tensor, values: Tensor, bias: Tensor | None, out: int, inner: int, first: int, end: int) -> int:
    """Raise RuntimeError, as torch does for a dense layer, unless all of it fits together; return the rows' end."""
    end = out if end == -1 else end
    if not 0 <= first <= end <= out:
        raise RuntimeError(f"the layer has rows 0 to {out}, asked for {first} to {end}")
    if x.dim() == 0 or x.shape[-1] != inner:
        raise RuntimeError(f"the layer takes inputs of shape (..., {inner}), got {tuple(x.shape)}")
    check_values(x, values, bias, out)
    return end


def check_values(x: Tensor, values: Tensor, bias: Tensor | None, out: int) -> None:
    """Raise RuntimeError unless the input, the values and the bias have one dtype, and the bias is of shape (out,)."""
    if x.dtype != values.dtype:
        raise RuntimeError(f"the layer's values are {values.dtype}, but the input is {x.dtype}")
    if bias is not None and (bias.dtype != values.dtype or bias.shape != (out,)):
        raise RuntimeError(f"the bias must be {values.dtype} of shape ({out},), got {bias.dtype} {tuple(bias.shape)}")


def check_devices(x: Tensor, *of_layer: Tensor | None) -> None:
    """Raise RuntimeError, as torch does for a dense layer, unless all tensors are on one device."""
    device = x.device
    if not all(tensor is None or tensor.device == device for tensor in of_layer):
        others = ", ".join(str(tensor.device) for tensor in of_layer if tensor is not None)
        raise RuntimeError(
            f"the input is on {device}, and the tensors of the exported layer are on {others}; move all to one device, "
            "and load what is on the meta device (load_state_dict, sparsify.load)"
        )


def _linear_csr(
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    bias: Tensor | None,
    out: int,
    inner: int,
    activation: int,
    first: int = 0,
    end: int = -1,
) -> Tensor:
    rows = slice(first, check_operands(x, values, bias, out, inner, first, end))
    check_devices(x, crow, col, values, bias)
    check_no_tangent(x, values, bias)
    csr = usable_csr(CSR(crow, col, values), (out, inner))
    return reference.linear(x, csr, bias, (out, inner), rows, _ACTIVATION_NAMES[activation])


def _linear_packed(
    x: Tensor,
    index: Tensor,
    values: Tensor,
    form: int,
    bias: Tensor | None,
    out: int,
    inner: int,
    activation: int,
    first: int = 0,
    end: int = -1,
) -> Tensor:
    rows, shape, name = (
        (first, check_operands(x, values, bias, out, inner, first, end)),
        (out, inner),
        _FORM_NAMES[form],
    )
    if not (x.is_cpu and index.is_cpu and values.is_cpu and (bias is None or bias.is_cpu)):
        check_devices(x, index, values, bias)
    check_no_tangent(x, values, bias)
    index, values, bias = operands(name, index, values, bias, shape)
    if name in gpu.FORMS:
        return gpu.linear(name, x, index, values, bias, shape, activation, rows)
    if not index.is_cpu:
        raise RuntimeError(f"the form {name!r} is packed for the CPU, but is on {index.device}")
    return native.linear(name, x, index, values, bias, shape, activation, rows=rows)


def operands(
    form: str, index: Tensor, values: Tensor, bias: Tensor | None, shape: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return index, values and bias as a kernel reads them: from their first byte on, without gaps."""
    values = values if values.is_contiguous() else values.contiguous()
    bias = bias if bias is None or bias.is_contiguous() else bias.contiguous()
    return usable_index(form, index, values, shape), values, bias


def _grad_input_csr(
    grad: Tensor, crow: Tensor, col: Tensor, values: Tensor, out: int, inner: int, first: int = 0, end: int = -1
) -> Tensor:
    rows = slice(first, out if end == -1 else end)
    check_devices(grad, crow, col, values)
    check_no_tangent(grad, values)
    return reference.linear_grad_input(grad, usable_csr(CSR(crow, col, values), (out, inner)), (out, inner), rows)


def _grad_input_packed(
    grad: Tensor, index: Tensor, values: Tensor, form: int, out: int, inner: int, first: int = 0, end: int = -1
) -> Tensor:
    name, shape = _FORM_NAMES[form], (out, inner)
    check_devices(grad, index, values)
    check_no_tangent(grad, values)
    if name in gpu.FORMS:
        index = usable_index(name, index, values, shape)
        with torch.autocast(grad.device.type, enabled=False):
            return grad @ gpu.dense(name, index, values, shape, (first, out if end == -1 else end))
    return _grad_input_csr(grad, *unpack(name, (index, values), shape), out, inner, first, end)


_library.impl("linear_csr", _linear_csr, "CompositeExplicitAutograd")
_library.impl("linear_packed", _linear_packed, "CPU")
_library.impl("linear_packed", _linear_packed, "CUDA")
_library.impl("grad_input_csr", _grad_input_csr, "CompositeExplicitAutograd")
_library.impl("grad_input_packed", _grad_input_packed, "CPU")
_library.impl("grad_input_packed", _grad_input_packed, "CUDA")


def _fake_linear(
    x: Tensor,
    first_part: Tensor,
    second_part: Tensor,
    third_part: Tensor | int,
    bias: Tensor | None,
    out: int,
    inner: int,
    activation: int,
    first: int = 0,
    end: int = -1,
) -> Tensor:
    check_exporter()
    parts = [part for part in (first_part, second_part, third_part) if isinstance(part, Tensor)]
    values = parts[-1]
    check_devices(x, *parts, bias)
    return x.new_empty((*x.shape[:-1], check_operands(x, values, bias, out, inner, first, end) - first))


def _fake_grad_input(
    grad: Tensor,
    first_part: Tensor,
    second_part: Tensor,
    third_part: Tensor | int,
    out: int,
    inner: int,
    first: int = 0,
    end: int = -1,
) -> Tensor:
    check_devices(grad, *(part for part in (first_part, second_part, third_part) if isinstance(part, Tensor)))
    return grad.new_empty((*grad.shape[:-1], inner))


for _kind in ("csr", "packed"):
    torch.library.register_fake(f"sparsify::linear_{_kind}", _fake_linear, lib=_library)
    torch.library.register_fake(f"sparsify::grad_input_{_kind}", _fake_grad_input, lib=_library)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the weight; with an activation also x and bias, to work out the sum before it again."""
    x, *ctx.weight, bias, ctx.out, ctx.inner, ctx.activation, ctx.first, ctx.end = inputs
    ctx.save_for_backward(*((x, bias) if ctx.activation else ()))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    shape, rows = (ctx.out, ctx.inner), (ctx.first, ctx.end)
    if ctx.activation:
        x, bias = ctx.saved_tensors
        before = _multiply(x, ctx.weight, bias, shape, rows)
        grad = _activation_grad(before, grad, _ACTIVATION_NAMES[ctx.activation])
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad_input(grad, ctx.weight, shape, rows)
    if ctx.needs_input_grad[4]:
        n_rows = grad.shape[-1]
        grad_bias = torch.nn.functional.pad(grad.reshape(-1, n_rows).sum(0), (ctx.first, ctx.out - ctx.first - n_rows))
    return grad_x, None, None, None, grad_bias, None, None, None, None, None


def _multiply(
    x: Tensor, weight: Sequence[Any], bias: Tensor | None, shape: tuple[int, int], rows: tuple[int, int]
) -> Tensor:
    """Multiply x by a weight as the operators take it: the parts of CSR, or index, values and the form's number."""
    if is_transformed():
        return _linear_by_torch(x, *_parts(weight), shape, bias, "none", rows)
    multiply = torch.ops.sparsify.linear_csr if isinstance(weight[2], Tensor) else torch.ops.sparsify.linear_packed
    return multiply(x, *weight, bias, *shape, 0, *rows)  # type: ignore[no-any-return]


def grad_input(grad: Tensor, weight: Sequence[Any], shape: tuple[int, int], rows: tuple[int, int] = (0, -1)) -> Tensor:
    """Multiply the gradient of the outputs by the transpose of such a weight."""
    if is_transformed():
        parts, form = _parts(weight)
        part = slice(rows[0], shape[0] if rows[1] == -1 else rows[1])
        return reference.linear_grad_input(grad, unpack_in_transform(grad.dtype, form, parts, shape), shape, part)
    ops = torch.ops.sparsify
    multiply = ops.grad_input_csr if isinstance(weight[2], Tensor) else ops.grad_input_packed
    return multiply(grad, *weight, *shape, *rows)  # type: ignore[no-any-return]


def _parts(weight: Sequence[Any]) -> tuple[tuple[Tensor, ...], str]:
    """Return the parts and the form of a weight as the operators take it."""
    if isinstance(weight[2], Tensor):
        return tuple(weight), "csr"
    return tuple(weight[:2]), _FORM_NAMES[weight[2]]


def _activation_grad(before: Tensor, grad: Tensor, activation: str) -> Tensor:
    aten: Any = torch.ops.aten
    if activation == "relu":
        return aten.threshold_backward(grad, before, 0)  # type: ignore[no-any-return]
    if activation == "silu" and torch.is_grad_enabled():  # torch has no derivative of silu_backward
        gate = before.sigmoid()
        return grad * gate * (1 + before * (1 - gate))
    if activation == "silu":
        return aten.silu_backward(grad, before)  # type: ignore[no-any-return]
    if activation == "hardswish":
        return aten.hardswish_backward(grad, before)  # type: ignore[no-any-return]
    if activation == "relu6":
        return aten.hardtanh_backward(grad, before, 0, 6)  # type: ignore[no-any-return]
    kind = "tanh" if activation == "gelu_tanh" else "none"
    return aten.gelu_backward(grad, before, approximate=kind)  # type: ignore[no-any-return]


def _setup_context_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.weight, ctx.out, ctx.inner, ctx.first, ctx.end = inputs


def _backward_grad_input(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """grad_input is linear in its first argument: the second derivative is the product itself, without bias."""
    grad_grad = _multiply(grad, ctx.weight, None, (ctx.out, ctx.inner), (ctx.first, ctx.end))
    return grad_grad, None, None, None, None, None, None, None


for _kind in ("csr", "packed"):
    torch.library.register_autograd(f"sparsify::linear_{_kind}", _backward, setup_context=_setup_context, lib=_library)
    torch.library.register_autograd(
        f"sparsify::grad_input_{_kind}", _backward_grad_input, setup_context=_setup_context_grad_input, lib=_library
    )


class _direct:
    """The operators' implementations for a CPU: torch's way to them takes 4 us of a call."""

    linear_csr = staticmethod(_linear_csr)
    linear_packed = staticmethod(_linear_packed)
    linear_int8: Any  # set by int8_op.py


class _eager:
    """The same operators without the Python wrapper around them: it takes half of a call (2.3 against 5.2 us)."""

    linear_csr = torch.ops.sparsify.linear_csr.default._op
    linear_packed = torch.ops.sparsify.linear_packed.default._op
    linear_int8 = torch.ops.sparsify.linear_int8.default._op
