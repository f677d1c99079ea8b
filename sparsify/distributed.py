"""The processes that train one model together, and what they tell each other: sums, never weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """One of `n` processes. Each holds the same rows of every matrix that FSDP2 would give it (torch.chunk)."""

    n: int = 1
    rank: int = 0
    group: Any = None

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of all processes' tensors."""
        if self.n == 1:
            return tensor
        nccl = torch.distributed.get_backend(self.group) == "nccl"  # which knows nothing of the CPU's memory
        total = tensor.clone().to(torch.device("cuda", torch.cuda.current_device()) if nccl else tensor.device)
        torch.distributed.all_reduce(total, group=self.group)
        return total.to(tensor.device)

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of all processes' tensors."""
        return self.sum(tensor) / self.n if self.n > 1 else tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Return (n, *shape): every process's tensor."""
        every = tensor.new_zeros((self.n, *tensor.shape))
        every[self.rank] = tensor
        return self.sum(every)

    def rows(self, whole: Tensor) -> Tensor:
        """Return this process's rows of a tensor that every process has."""
        parts = whole.chunk(self.n)
        return parts[self.rank] if self.rank < len(parts) else whole[:0]

    def join(self, rows: Tensor, n_rows: int) -> Tensor:
        """Put the bool rows of all processes together."""
        whole = torch.zeros((n_rows, *rows.shape[1:]), dtype=torch.uint8, device=rows.device)
        self.rows(whole).copy_(rows)
        return self.sum(whole).bool()


SINGLE = Ranks()


def ranks_of(model: nn.Module) -> Ranks:
    """Return the processes that train a model: those of its DDP wrapper or FSDP2 mesh, else all that there are."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return SINGLE
    group = getattr(model, "process_group", None)
    for parameter in model.parameters():
        mesh: Any = getattr(parameter, "device_mesh", None)
        if mesh is not None and mesh.ndim == 1:
            group = mesh.get_group()
            break
    return Ranks(torch.distributed.get_world_size(group), torch.distributed.get_rank(group), group)
