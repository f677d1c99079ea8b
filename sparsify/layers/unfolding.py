"""Inputs of a convolution as windows: one for each output position, so that a convolution is a product of matrices."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def unfold(input: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """View a padded input (n, channels, *sizes) as (n, channels, *positions, *kernel_size).

    >>> unfold(torch.arange(5.0).reshape(1, 1, 5), (2,), (2,), (1,)).tolist()
    [[[[0.0, 1.0], [2.0, 3.0]]]]
    """
    for number, (k, step, d) in enumerate(zip(kernel_size, stride, dilation, strict=True)):
        input = input.unfold(2 + number, d * (k - 1) + 1, step)[..., ::d]
    return input


def spread_out(input: Tensor, stride: Sequence[int]) -> Tensor:
    """Put zeros between the positions of an input (n, channels, *sizes): stride - 1 in each dimension.

    >>> spread_out(torch.ones(1, 1, 3), (2,)).tolist()
    [[[1.0, 0.0, 1.0, 0.0, 1.0]]]
    """
    if all(step == 1 for step in stride):
        return input
    sizes = [(size - 1) * step + 1 for size, step in zip(input.shape[2:], stride, strict=True)]
    spread = input.new_zeros(*input.shape[:2], *sizes)
    places = spread
    for number, step in enumerate(stride):
        places = places[(slice(None),) * (2 + number) + (slice(None, None, step),)]
    places.copy_(input)
    return spread
