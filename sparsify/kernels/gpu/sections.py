"""Sections of the `index` of a form for GPUs: row pointers, then numbers relative to them, then the rest.

An index is one uint8 tensor: `.half()` leaves it alone, and no call is needed to take it apart. Its three sections
start at multiples of 16 bytes:

    row pointers   int32 (out + 1), those of CSR
    starts         uint16 or int32 (out, n_starts): the beginning of each part of a row, in the row
    rest           uint8: the form's own
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 16


class Sections(NamedTuple):
    """Byte offsets of the last two sections, and whether starts are int32."""

    starts_at: int
    rest_at: int
    is_wide: bool


def layout(shape: tuple[int, int], n_starts: int) -> Sections:
    """Lay out the index of a weight (out, in) with `n_starts` starts a row.

    >>> layout((8, 100), 2)
    Sections(starts_at=48, rest_at=80, is_wide=False)
    """
    out, inner = shape
    is_wide = inner > torch.iinfo(torch.uint16).max
    starts_at = _aligned(4 * (out + 1))
    return Sections(starts_at, starts_at + _aligned((4 if is_wide else 2) * out * n_starts), is_wide)


def join(crow: Tensor, starts: Tensor, rest: Tensor, shape: tuple[int, int]) -> Tensor:
    """Make an index of its sections."""
    where = layout(shape, starts.shape[1])
    index = torch.zeros(where.rest_at + rest.numel(), dtype=torch.uint8, device=rest.device)
    narrow = starts.to(torch.int32 if where.is_wide else torch.uint16).contiguous()
    for at, part in ((0, crow.to(torch.int32)), (where.starts_at, narrow.reshape(-1)), (where.rest_at, rest)):
        raw = part.contiguous().view(torch.uint8)
        index[at : at + raw.numel()] = raw
    return index


def split(index: Tensor, shape: tuple[int, int], n_starts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Take an index apart: (crow int32, starts int64 (out, n_starts), rest uint8)."""
    where, out = layout(shape, n_starts), shape[0]
    crow = index[: 4 * (out + 1)].view(torch.int32)
    kind = torch.int32 if where.is_wide else torch.uint16
    starts = index[where.starts_at : where.starts_at + kind.itemsize * out * n_starts].view(kind)
    return crow, starts.to(torch.int64).reshape(out, n_starts), index[where.rest_at :]


def check_rows(crow: Tensor, n_values: int) -> None:
    """Raise ValueError unless row pointers rise from 0 to the number of values."""
    wide = crow.to(torch.int64)
    if int(wide[0]) != 0 or int(wide[-1]) != n_values or bool((wide.diff() < 0).any()):
        raise ValueError(f"row pointers must rise from 0 to the number of values, {n_values}")


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT
