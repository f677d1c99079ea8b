"""Launches of Triton kernels: options, block sizes, the device, and the sum of split products."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sparsify.kernels.gpu.weight import Weight

#: Products and sums may be fused. Said aloud, because what Triton does unasked changes in its version 3.10.
FUSED: dict[str, Any] = {"enable_fp_fusion": True}

#: Programs of 4 warps that keep one multiprocessor busy, and how many multiprocessors Triton's interpreter plays.
PROGRAMS_PER_PROCESSOR, INTERPRETED_PROCESSORS = 4, 1


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one: Triton launches there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def power_of_2(n: int) -> int:
    """Return the smallest power of 2 from n on.

    >>> [power_of_2(n) for n in (1, 2, 3, 64, 65)]
    [1, 2, 4, 64, 128]
    """
    return 1 << max(n - 1, 0).bit_length()


def programs_wanted(device: torch.device) -> int:
    """Return how many programs of 4 warps fill the device."""
    n_processors = INTERPRETED_PROCESSORS
    if device.type == "cuda":
        n_processors = torch.cuda.get_device_properties(device).multi_processor_count
    return PROGRAMS_PER_PROCESSOR * n_processors


def is_widened(x: Tensor) -> bool:
    """Return whether products must be taken in float32: the interpreter multiplies the bits of bfloat16 as integers."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


def multiply(
    kernel: Any,
    grid: tuple[int, ...],
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    activation: int,
    sizes: tuple[int, ...],
    *,
    into: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Launch a kernel to multiply x (tokens, in) by a weight; return a new y (tokens, rows), or `into`.

    Such kernels have the same parameters up to the number of rows; their own `sizes` follow.
    """
    y = x.new_empty((x.shape[0], weight.n_rows)) if into is None else into
    kernel[grid](
        x, weight.index, weight.values, y if bias is None else bias, y,
        x.shape[0], x.stride(0), weight.rows[0], weight.n_rows, *sizes,
        HAS_BIAS=bias is not None, ACTIVATION=activation, **FUSED, **options,
    )  # fmt: skip
    return y


def finish(partial: Tensor, bias: Tensor | None, activation: int, dtype: torch.dtype) -> Tensor:
    """Add up partial products (splits, tokens, rows) in their order, add the bias, apply the activation."""
    from sparsify.kernels.gpu.triton import epilogue as triton_epilogue

    y, block = torch.empty_like(partial[0], dtype=dtype), 512
    triton_epilogue.finish[(-(-y.numel() // block),)](
        partial, y if bias is None else bias, y, partial.shape[0], y.numel(), y.shape[1],
        BLOCK=block, HAS_BIAS=bias is not None, ACTIVATION=activation, num_warps=4, **FUSED,
    )  # fmt: skip
    return y
