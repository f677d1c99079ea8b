"""Weights rounded to int8, with a scale for each output: weight[o, k] = values[o, k] * scale[o].

Rounding is symmetric, so that a removed weight stays exactly zero. What a kernel does with its inputs depends on the
form of the weight (`kernels/forms.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsify.kernels.csr import CSR, csr_rows

#: The largest value of a weight; -128 is not used.
LARGEST = 127

#: The smallest scale: below it float32 loses bits, and a processor may take a number for zero.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class Rounded(NamedTuple):
    """A weight rounded to int8: the values of its kept places, in the order of a CSR, and the scale of each output."""

    values: Tensor  # int8 (n_kept)
    scale: Tensor  # float32 (out_features)


def quantize(csr: CSR, out_features: int) -> tuple[CSR, Tensor]:
    """Round the kept weights to int8; returns them in the same places, and the scales, float32 (out_features).

    The scale of an output is its largest weight by size, over 127, and 1 if that weight is 0. Halves are rounded to
    even numbers. Raises ValueError for a kept weight that is NaN or Inf in float32.

    >>> weight = CSR(torch.tensor([0, 2, 2]), torch.tensor([0, 3]), torch.tensor([-63.5, 10.0]))
    >>> quantize(weight, 2)[0].values.tolist(), quantize(weight, 2)[1].tolist()
    ([-127, 20], [0.5, 1.0])
    """
    values, rows = csr.values.detach().float(), csr_rows(csr)
    if not bool(values.isfinite().all()):
        raise ValueError("a kept weight is NaN or Inf, or too large for float32; it has no int8 form")
    largest = values.new_zeros(out_features).scatter_reduce(0, rows, values.abs(), "amax")
    scale = torch.where(largest > 0, (largest / LARGEST).clamp(min=SMALLEST_SCALE), 1.0)
    rounded = (values / scale[rows]).round().clamp(-LARGEST, LARGEST)
    return csr._replace(values=rounded.to(torch.int8)), scale


def dequantize(csr: CSR, scale: Tensor, dtype: torch.dtype) -> CSR:
    """Return the weights that int8 values stand for: the product in float32, then in another dtype.

    >>> weight = CSR(torch.tensor([0, 2, 2]), torch.tensor([0, 3]), torch.tensor([-127, 20], dtype=torch.int8))
    >>> dequantize(weight, torch.tensor([0.5, 1.0]), torch.float32).values
    tensor([-63.5000,  10.0000])
    """
    return csr._replace(values=(csr.values.float() * scale[csr_rows(csr)]).to(dtype))


def check_quantized(values: Tensor, scale: Tensor, out_features: int) -> None:
    """Raise ValueError, with the reason, unless these are int8 values and scales of a weight with so many outputs."""
    if values.dtype != torch.int8:
        raise ValueError(f"a scale belongs to int8 values, and these are {values.dtype}")
    if scale.dtype != torch.float32 or scale.shape != (out_features,):
        raise ValueError(f"scales must be float32 of shape ({out_features},), got {scale.dtype} {tuple(scale.shape)}")
    if scale.is_meta:
        return
    if not bool((scale.isfinite() & (scale >= SMALLEST_SCALE)).all()):
        odd = scale[~(scale.isfinite() & (scale >= SMALLEST_SCALE))][0]
        raise ValueError(f"scales must be finite and greater than 0, got {float(odd)}")
    if bool((values == -LARGEST - 1).any()):
        raise ValueError(f"int8 values must lie in [-{LARGEST}, {LARGEST}], got {-LARGEST - 1}")
