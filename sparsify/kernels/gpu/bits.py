"""A mask as bits, in the `index` of a form for GPUs: in rows, whole bytes, the first column in the lowest bit."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """Pack a mask, a multiple of 8 weights, into uint8.

    >>> pack(torch.tensor([[True, True, False, False], [False, False, False, True]]))
    tensor([131], dtype=torch.uint8)
    """
    return (mask.reshape(-1, 8) << _places(mask)).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor) -> Tensor:
    """Unpack into one row of bool.

    >>> unpack(torch.tensor([131], dtype=torch.uint8)).int().tolist()
    [1, 1, 0, 0, 0, 0, 0, 1]
    """
    return ((bits[:, None] >> _places(bits)) & 1).bool().reshape(-1)


def _places(tensor: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=tensor.device)
