"""Geometry: the settings of a convolution beside its weight, for kernels."""

from __future__ import annotations

from typing import NamedTuple


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
        out_height, out_width = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip((height, width), *self, strict=True)
        )
        return out_height, out_width
