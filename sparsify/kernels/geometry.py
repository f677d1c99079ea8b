"""The settings of a convolution beside its weight, and of a BatchNorm after it, for kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Geometry(NamedTuple):
    """The settings of a convolution of images without groups, each for (height, width); padding is of zeros.

    >>> Geometry((3, 3), stride=(2, 2), padding=(1, 1)).output_size(56, 55)
    (28, 28)
    """

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def is_pointwise(self) -> bool:
        """True if each output position is a product with one input position, all of them in order."""
        return self.kernel == self.stride == (1, 1) and self.padding == (0, 0)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) of the output for that of the input, not above 0 where torch raises."""
        (rows, columns), (row_stride, column_stride), (top, left), (row_step, column_step) = self
        return (  # written out: a loop takes microseconds of each call
            (height + 2 * top - row_step * (rows - 1) - 1) // row_stride + 1,
            (width + 2 * left - column_step * (columns - 1) - 1) // column_stride + 1,
        )


class Norm(NamedTuple):
    """The numbers of a BatchNorm in eval mode, each (channels): (x - mean) / sqrt(variance + eps) * weight + bias."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
