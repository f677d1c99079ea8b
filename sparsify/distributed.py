"""Ranks: the processes of one training, their sums, gathers and shards of rows. No weight goes from one to another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """One of `n` processes. Each holds the rows of every matrix as FSDP2 shards them (torch.chunk)."""

    n: int = 1
    rank: int = 0
    group: Any = None

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of all processes' tensors."""
        if self.n == 1:
            return tensor
        nccl = torch.distributed.get_backend(self.group) == "nccl"  # takes no tensor in the CPU's memory
        total = tensor.clone().to(torch.device("cuda", torch.cuda.current_device()) if nccl else tensor.device)
        torch.distributed.all_reduce(total, group=self.group)
        return total.to(tensor.device)

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of all processes' tensors."""
        return self.sum(tensor) / self.n if self.n > 1 else tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Return (n, *shape): the tensor of every process."""
        every = tensor.new_zeros((self.n, *tensor.shape))
        every[self.rank] = tensor
        return self.sum(every)

    def rows(self, whole: Tensor) -> Tensor:
        """Return this process's rows of a tensor known to all."""
        parts = whole.chunk(self.n)
        return parts[self.rank] if self.rank < len(parts) else whole[:0]

    def join(self, rows: Tensor, n_rows: int) -> Tensor:
        """Put the bool rows of all processes together."""
        whole = torch.zeros((n_rows, *rows.shape[1:]), dtype=torch.uint8, device=rows.device)
        self.rows(whole).copy_(rows)
        return self.sum(whole).bool()


SINGLE = Ranks()


def ranks_of(model: nn.Module) -> Ranks:
    """Return the processes of a model's training: those of its DDP wrapper or FSDP2 mesh, else all."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return SINGLE
    group = getattr(model, "process_group", None)
    for parameter in model.parameters():
        mesh: Any = getattr(parameter, "device_mesh", None)
        if mesh is not None and mesh.ndim == 1:
            group = mesh.get_group()
            break
    return Ranks(torch.distributed.get_world_size(group), torch.distributed.get_rank(group), group)
