"""The native convolutions behind tensors: with a weight of the form "panel", and depthwise with a dense one."""

import ctypes
import struct
from typing import Any

import torch
from torch import Tensor

from sparsify.kernels.cpu import library
from sparsify.kernels.cpu.memory import empty
from sparsify.kernels.geometry import Geometry, Norm

_CONVOLUTION_CALL = struct.Struct("=9qd24q")  # struct sparsify_convolution_call

_NO_NORM = (0, 0, 0, 0, 0.0)

_convolution: Any = None
_depthwise: Any = None
_pack_call = _CONVOLUTION_CALL.pack
if library.available():
    _convolution = library.function("sparsify_convolution", (ctypes.c_int, [ctypes.c_int, ctypes.c_char_p]))
    _depthwise = library.function("sparsify_depthwise", (ctypes.c_int, [ctypes.c_int, ctypes.c_char_p]))


def convolution(
    x: Tensor,
    index: Tensor | None,
    values: Tensor,
    bias: Tensor | None,
    n_out: int,
    geometry: Geometry,
    activation: int = 0,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolve images x (n, channels, height, width): (n, n_out, output height, output width).

    The result is channels last if x is, else channels first; `out` is a tensor for it, without gaps, in either layout.
    index, values: of a weight (n_out, channels * kernel height * kernel width) in the form "panel", of x's dtype. A
    depthwise convolution has no index; its values (n_out, 1, kernel height, kernel width) have no gaps, n_out is
    channels, and scale and residual are None.
    activation is a value of ACTIVATIONS in library.py. scale, float32 (n_out), multiplies sums before the bias,
    or norm, for float32, is applied after the bias; then residual, of the result's shape and dtype, is added. Trusts
    index and values.
    """
    n, channels, height, width = x.shape
    (kernel_height, kernel_width), (row_stride, column_stride), (top, left), (row_step, column_step) = geometry
    last = is_channels_last(x)
    if out is None:
        out = empty((n, n_out, *geometry.output_size(height, width)), x.dtype, channels_last=last)
    out_height, out_width = out.shape[2:]
    if x.stride(1 if last else 3) != 1 and x.shape[1 if last else 3] > 1:
        x = x.contiguous()
    if residual is not None and residual.stride() != out.stride():
        residual = residual.contiguous(memory_format=format_of(out))
    if norm is not None and any(t is not None and not t.is_contiguous() for t in norm[:4]):
        norm = Norm(*(t if t is None else t.contiguous() for t in norm[:4]), eps=norm.eps)  # type: ignore[arg-type, misc]
    strides = list(x.stride())
    strides[1 if last else 3] = 1  # of one element torch's stride may be any
    function = _depthwise if index is None else _convolution
    status = function(
        library.DTYPES[values.dtype],
        _pack_call(
            0 if index is None else index.data_ptr(),
            values.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            *(_NO_NORM if norm is None else _pointers(norm)),
            x.data_ptr(),
            *strides,
            out.data_ptr(),
            not out.is_contiguous(),
            *(n, channels, height, width),
            *(n_out, out_height, out_width),
            *(kernel_height, kernel_width, row_stride, column_stride),
            *(top, left, row_step, column_step),
            activation,
            torch.get_num_threads(),
        ),
    )
    if status:
        library.checked(status)
    return out


def _pointers(norm: Norm) -> tuple[float, ...]:
    """Return the fields of a BatchNorm in the call of the library."""
    mean, variance, weight, bias, eps = norm
    weight_pointer, bias_pointer = 0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr()
    return mean.data_ptr(), variance.data_ptr(), weight_pointer, bias_pointer, eps


def format_of(x: Tensor) -> torch.memory_format:
    """Return the layout of images."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def is_channels_last(x: Tensor) -> bool:
    """Return whether the channels of images are neighbours, and images are not laid out with channels first as well."""
    return x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()
