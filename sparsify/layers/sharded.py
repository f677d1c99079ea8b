"""Weights that FSDP2 (fully_shard) has split over ranks, beside masks that every rank holds whole."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all of its parts, gathered from every rank; one that is not sharded as it is."""
    sharded: Any = tensor
    return sharded.full_tensor() if _is_sharded(tensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return the part of a whole tensor that belongs beside this rank's part of `other`; no rank talks to another."""
    if not _is_sharded(other) or _is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = other
    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements, src_data_rank=None)


def _is_sharded(tensor: Tensor) -> bool:
    """Know a DTensor by its name: importing torch.distributed.tensor is slow."""
    return type(tensor).__name__ == "DTensor"
