"""The native convolution behind tensors: images times a weight of the form "panel"."""

import ctypes
import struct
from typing import Any

import torch
from torch import Tensor

from sparsify.kernels.cpu import library
from sparsify.kernels.geometry import Geometry

_CONVOLUTION_CALL = struct.Struct("=28q")  # struct sparsify_convolution_call

_convolution: Any = None
_pack_call = _CONVOLUTION_CALL.pack
if library.available():
    _convolution = library.function("sparsify_convolution", (ctypes.c_int, [ctypes.c_int, ctypes.c_char_p]))


def convolution(
    x: Tensor,
    index: Tensor,
    values: Tensor,
    bias: Tensor | None,
    n_out: int,
    geometry: Geometry,
    activation: int = 0,
    out: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Convolve images x (n, channels, height, width): (n, n_out, output height, output width).

    The result is channels last if x is, else channels first; `out` is a tensor for it, without gaps, in either layout.
    index, values: of a weight (n_out, channels * kernel height * kernel width) in the form "panel", of x's dtype.
    activation is a value of ACTIVATIONS in library.py. scale, float32 (n_out), multiplies sums before the bias.
    Trusts index and values.
    """
    n, channels, height, width = x.shape
    (kernel_height, kernel_width), (row_stride, column_stride), (top, left), (row_step, column_step) = geometry
    out_height, out_width = geometry.output_size(height, width)
    last = is_channels_last(x)
    out = empty_output(x, n_out, geometry) if out is None else out
    if x.stride(1 if last else 3) != 1 and x.shape[1 if last else 3] > 1:
        x = x.contiguous()
    strides = list(x.stride())
    strides[1 if last else 3] = 1  # of one element torch's stride may be any
    status = _convolution(
        library.DTYPES[values.dtype],
        _pack_call(
            index.data_ptr(),
            values.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            0 if bias is None else bias.data_ptr(),
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


def empty_output(x: Tensor, n_out: int, geometry: Geometry) -> Tensor:
    """Return memory for the result of a convolution of images x."""
    size = x.shape[0], n_out, *geometry.output_size(x.shape[2], x.shape[3])
    memory_format = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format)


def is_channels_last(x: Tensor) -> bool:
    """Return whether the channels of images are neighbours, and images are not laid out with channels first as well."""
    return x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()
