"""Depthwise convolutions: each channel of images with a dense kernel of its own, for inference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify.kernels.cpu import convolution as native
from sparsify.kernels.cpu import library
from sparsify.kernels.cpu.memory import empty
from sparsify.kernels.geometry import Geometry, Norm
from sparsify.kernels.torch_ops import _ACTIVATION_IDS


def depthwise(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    activation: str = "none",
    *,
    channels_last: bool = False,
) -> Tensor | None:
    """Convolve each channel of x (n, channels, height, width), add the bias, apply a BatchNorm, activate.

    weight: (channels, 1, kernel height, kernel width). norm: for float32. channels_last: the layout of the result,
    instead of x's own. Nothing is rounded between the steps. Returns (n, channels, output height, output width) without
    gradient; None unless all are plain tensors on the CPU, of matching shapes and of one of the dtypes of the kernels,
    and the native library is there, and for images with channels last where torch is faster.
    """
    plain = all(t is None or type(t) in (Tensor, nn.Parameter) for t in (x, weight, bias, *(norm or ())[:4]))
    if not plain or x.dim() != 4 or weight.shape != (x.shape[1], 1, *geometry.kernel):
        return None
    size = (*x.shape[:2], *geometry.output_size(x.shape[2], x.shape[3]))
    vectors = (bias,) if norm is None else (bias, *norm[:4])
    if not (
        library.available()
        and x.dtype == weight.dtype
        and x.dtype in library.DTYPES
        and x.is_cpu
        and weight.is_cpu
        and min(size) > 0
        and (norm is None or x.dtype == torch.float32)
        and all(v is None or (v.dtype == x.dtype and v.is_cpu and v.shape == size[1:2]) for v in vectors)
    ):
        return None
    last = native.is_channels_last(x)
    if last and not _is_faster(geometry):
        return None
    out = empty(size, x.dtype, channels_last=last or channels_last)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    return native.convolution(x, None, weight, bias, size[1], geometry, _ACTIVATION_IDS[activation], out, norm=norm)


def _is_faster(geometry: Geometry) -> bool:
    """Return whether torch takes longer for images with channels last: with channels first it always does.

    Measured with 64 channels of 56 x 56: 31 x 31 .7x as fast, 3 x 3 with a dilation of 6 .4 to 1.0x, 7 x 7 with a
    stride of 2 .7 to .9x; what is named here 1.2 to 2.2x.
    """
    side = max(geometry.kernel)
    return geometry.dilation == (1, 1) and (side <= 5 or (side <= 7 and geometry.stride == (1, 1)))
