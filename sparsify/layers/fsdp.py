"""Weights sharded over ranks by FSDP2 (fully_shard), beside masks held whole by every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsify.distributed import Ranks
from sparsify.masking.patterns import Pattern


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor gathered from every rank, and any other tensor as it is."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def check_whole(name: str, value: Any) -> None:
    """Raise ValueError, with the way out, for a sharded Parameter of this name."""
    if is_sharded(value):
        raise ValueError(
            f"{name}: it is sharded, a DTensor; gather the model's state_dict (with "
            "torch.distributed.checkpoint.state_dict), load it into a converted model that is not sharded"
        )


def data_or_shape(tensor: Tensor) -> Tensor:
    """Return a tensor as it is; a sharded one as a meta tensor of its shape, without communication."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") if is_sharded(tensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return the part of a whole tensor beside this rank's part of `other`, without communication."""
    if not is_sharded(other) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = other
    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, over the same memory, and any other tensor as it is."""
    sharded: Any = tensor
    return sharded.to_local() if is_sharded(tensor) else tensor


def refuse_flattened(name: str, layer: nn.Module) -> None:
    """Raise ValueError if FSDP1 (FullyShardedDataParallel) has cut the weight of a layer into flat pieces."""
    if not isinstance(layer, (nn.Linear, nn.MultiheadAttention)) and "mask" not in layer._buffers:
        return
    key = "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"
    weight = layer._parameters.get(key, vars(layer).get(key))  # read past a property, which may compute it
    if not isinstance(weight, Tensor) or nn.parameter.is_lazy(weight):
        return
    freed = key not in layer._parameters and type(weight) is Tensor and weight.untyped_storage().size() == 0
    if weight.dim() == 1 or (freed and weight.numel() and not weight.is_meta):
        raise ValueError(
            f"{name or '(root)'}: FSDP1 (FullyShardedDataParallel) has cut its weight into flat pieces, which no mask "
            "fits; train with FSDP2 (sparsify.convert, then torch.distributed.fsdp.fully_shard), or do this inside "
            "FullyShardedDataParallel.summon_full_params(model)"
        )


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor, known by name: importing torch.distributed.tensor is slow."""
    return type(tensor).__name__ == "DTensor"


def cut_by_rows(layer: Any, pattern: Pattern, ranks: Ranks) -> bool:
    """Return whether each rank's part of a layer is the rows of its matrix given by `ranks`, in whole units."""
    weight: Any = layer.weight
    n_unit_rows = pattern.block[0]
    if ranks.n == 1 or n_unit_rows == 0 or -(-layer.shape[0] // ranks.n) % n_unit_rows:
        return False
    placements = weight.placements if is_sharded(weight) else None
    whole_weight = torch.empty(layer.mask.shape, device="meta")
    as_matrix = layer.matrix(whole_weight)
    in_place = as_matrix.untyped_storage()._cdata == whole_weight.untyped_storage()._cdata
    by_row = in_place and as_matrix.is_contiguous() and len(as_matrix) == len(whole_weight)
    return by_row and (placements is None or (len(placements) == 1 and placements[0].is_shard(0)))


def own_rows(layer: Any, ranks: Ranks) -> Tensor:
    """Return this rank's rows of a layer's weight as a matrix; without communication if `cut_by_rows`."""
    weight: Any = layer.weight.detach()
    if ranks.n > 1 and is_sharded(weight):
        local: Tensor = weight.to_local()
        return local.reshape(local.shape[0], layer.shape[1])
    rows: Tensor = ranks.rows(layer.weight_matrix)
    return rows
