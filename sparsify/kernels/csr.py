"""CSR and bitmask formats of kept weights, as plain tensors: packing, unpacking, checking, sizes.

A weight is (out_features, in_features). The mask alone decides: a kept weight may be zero, and is stored.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MAX_INT32 = 2**31 - 1

#: The number of set bits of every byte.
_BITS_SET = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


class CSR(NamedTuple):
    """Compressed rows: row i holds values[crow[i]:crow[i+1]], in rising columns col[crow[i]:crow[i+1]]."""

    crow: Tensor  # int32 (out_features + 1)
    col: Tensor  # uint8, uint16 or int32 (n_kept)
    values: Tensor  # (n_kept), floating or int8


class Bitmask(NamedTuple):
    """One bit a weight in row-major order, the first in the lowest bit, the last byte padded with 0.

    Then the kept values.
    """

    bits: Tensor  # uint8 (ceil(out_features * in_features / 8))
    values: Tensor  # (n_kept), floating or int8


def col_dtype(in_features: int) -> torch.dtype:
    """Return the narrowest dtype for column indices.

    >>> col_dtype(256), col_dtype(257), col_dtype(65537)
    (torch.uint8, torch.uint16, torch.int32)
    """
    if in_features <= 1 << 8:
        return torch.uint8
    return torch.uint16 if in_features <= 1 << 16 else torch.int32


def csr_bytes(shape: tuple[int, int], n_kept: int, itemsize: int) -> int:
    """Return the bytes of a weight in CSR format."""
    return 4 * (shape[0] + 1) + n_kept * (col_dtype(shape[1]).itemsize + itemsize)


def bitmask_bytes(shape: tuple[int, int], n_kept: int, itemsize: int) -> int:
    """Return the bytes of a weight in bitmask format."""
    return math.ceil(math.prod(shape) / 8) + n_kept * itemsize


def dense_to_csr(weight: Tensor, mask: Tensor) -> CSR:
    """Pack the weights at True of the bool mask.

    >>> dense_to_csr(torch.tensor([[0.0, 5.0], [7.0, 0.0]]), torch.tensor([[False, True], [True, False]]))[:2]
    (tensor([0, 1, 2], dtype=torch.int32), tensor([1, 0], dtype=torch.uint8))
    """
    return _csr(mask, weight[mask])


def _csr(mask: Tensor, values: Tensor) -> CSR:
    # Nothing here is wider than the kept weights: the sum of a bool mask would be taken over an int64 copy.
    rows, columns = mask.nonzero().unbind(1)
    if rows.numel() > MAX_INT32:
        raise ValueError(f"a CSR weight can keep at most {MAX_INT32} weights, got {rows.numel()}")
    starts = torch.arange(mask.shape[0] + 1, device=mask.device)
    crow = torch.searchsorted(rows.contiguous(), starts, out_int32=True)
    return CSR(crow, columns.to(col_dtype(mask.shape[1])), values)


def csr_to_dense(csr: CSR, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Unpack into (weight, mask), both of the given shape; removed weights are zero."""
    flat = csr_positions(csr, shape[1])
    # index_put, not scatter: on the CPU scatter rewrites the payload of a bfloat16 NaN.
    weight = csr.values.new_zeros(math.prod(shape)).index_put((flat,), csr.values)
    # 1, not True: torch.jit.trace knows no scatter of a bool.
    mask = torch.zeros(math.prod(shape), dtype=torch.bool, device=flat.device).scatter(0, flat, 1)
    return weight.reshape(shape), mask.reshape(shape)


def csr_positions(csr: CSR, in_features: int) -> Tensor:
    """Return the position of each kept value in the row-major dense weight, int64 (n_kept)."""
    return csr_rows(csr) * in_features + csr.col.to(torch.int64)


def csr_rows(csr: CSR) -> Tensor:
    """Return the row of each kept value, int64 (n_kept)."""
    crow = csr.crow.to(torch.int64)
    n_rows = crow.numel() - 1
    return torch.repeat_interleave(
        torch.arange(n_rows, device=crow.device), crow.diff(), output_size=csr.values.numel()
    )


def check_csr(csr: CSR, shape: tuple[int, int]) -> None:
    """Raise ValueError, with the reason, unless this is a well-formed CSR weight of the given shape.

    Values are floating or int8; `int8.check_quantized` checks the latter.
    """
    crow, col, values = csr
    out, inner = shape
    if out < 0 or inner < 0 or inner > MAX_INT32:
        raise ValueError(f"the shape {shape} is impossible")
    if crow.dtype != torch.int32 or crow.shape != (out + 1,):
        raise ValueError(f"row pointers must be int32 of shape ({out + 1},), got {crow.dtype} {tuple(crow.shape)}")
    if col.dtype != col_dtype(inner):
        raise ValueError(f"column indices for {inner} columns must be {col_dtype(inner)}, got {col.dtype}")
    if not _is_storable(values) or values.dim() != 1 or values.shape != col.shape:
        raise ValueError(
            "values and column indices must be one list each, of one length, "
            f"got {values.dtype} {tuple(values.shape)} and {tuple(col.shape)}"
        )
    if crow.is_meta:
        return
    wide = crow.to(torch.int64)
    if int(wide[0]) != 0 or int(wide[-1]) != values.numel() or bool((wide.diff() < 0).any()):
        raise ValueError(f"row pointers must rise from 0 to the number of values, {values.numel()}")
    if values.numel() == 0:
        return
    columns = col.to(torch.int64)
    if int(columns.min()) < 0 or int(columns.max()) >= inner:
        raise ValueError(f"column indices must lie in [0, {inner}), got {int(columns.min())} to {int(columns.max())}")
    if bool((csr_positions(csr, inner).diff() <= 0).any()):
        raise ValueError("column indices must be strictly increasing in each row")


def _is_storable(values: Tensor) -> bool:
    return values.is_floating_point() or values.dtype == torch.int8


def pack_bitmask(weight: Tensor, mask: Tensor) -> Bitmask:
    """Pack the weights at True of the bool mask. The result is on the weight's device.

    >>> pack_bitmask(torch.tensor([[0.0, 5.0, 7.0]]), torch.tensor([[False, True, True]]))
    Bitmask(bits=tensor([6], dtype=torch.uint8), values=tensor([5., 7.]))
    """
    bits = np.packbits(mask.cpu().numpy().reshape(-1), bitorder="little")
    return Bitmask(torch.from_numpy(bits).to(weight.device), weight[mask])


def unpack_bitmask(packed: Bitmask, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Unpack into (weight, mask), both of the given shape. Raises ValueError if bits and values do not fit it."""
    check_bitmask(packed, shape)
    mask = _bitmask_mask(packed, shape)
    weight = packed.values.new_zeros(shape)
    weight[mask] = packed.values
    return weight, mask


def bitmask_to_csr(packed: Bitmask, shape: tuple[int, int]) -> CSR:
    """Pack in another way, without the dense weight in between. Raises ValueError if bits and values do not fit."""
    check_bitmask(packed, shape)
    return _csr(_bitmask_mask(packed, shape), packed.values)


def check_bitmask(packed: Bitmask, shape: tuple[int, int]) -> None:
    """Raise ValueError, with the reason, unless this is a well-formed bitmask weight of the given shape.

    The mask, eight times as large as its bits, is not unpacked.
    """
    bits, values = packed
    n = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != ((n + 7) // 8,):
        raise ValueError(
            f"a bitmask for {shape} must be uint8 of shape ({(n + 7) // 8},), got {bits.dtype} {tuple(bits.shape)}"
        )
    as_bytes = bits.cpu().numpy()
    if n % 8 and as_bytes[-1] >> n % 8:
        raise ValueError("the padding bits of a bitmask must be 0")
    n_kept = int(_BITS_SET[as_bytes].sum(dtype=np.int64))
    if not _is_storable(values) or values.shape != (n_kept,):
        raise ValueError(
            f"the bitmask keeps {n_kept} weights, but there are {values.dtype} {tuple(values.shape)} values"
        )


def _bitmask_mask(packed: Bitmask, shape: tuple[int, int]) -> Tensor:
    mask = np.unpackbits(packed.bits.cpu().numpy(), count=math.prod(shape), bitorder="little")
    return torch.from_numpy(mask.view(np.bool_)).reshape(shape).to(packed.values.device)
