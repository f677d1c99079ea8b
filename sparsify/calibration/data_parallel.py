"""Calibration under torchrun: each process runs its part of the batches, and all get the sum."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sparsify.masking.gram import Gram

T = TypeVar("T")


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the process group of torchrun inside the block; without torchrun, do nothing.

    Processes wait for each other without a limit, say, while the first evaluates a model. If one dies, torchrun ends
    all.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or _in_group():
        yield
        return
    # Functions of torch.distributed.nn hold the group there is when they are imported, as an optimizer's first step
    # does: the threads of a group held so outlive its end, and may abort the process at exit.
    importlib.import_module("torch.distributed.nn")
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_rank_zero() -> bool:
    """Return whether this is the process to write and print."""
    return not _in_group() or dist.get_rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    if _in_group():
        dist.barrier()


def all_ranks_equal(number: int) -> bool:
    """Return whether all processes give the same number."""
    if not _in_group():
        return True
    numbers = torch.tensor([number, -number], device="cpu")
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return numbers.tolist() == [number, -number]


def local_batches(batches: Sequence[T]) -> list[T]:
    """Return every n-th batch from this process's rank on; outside of a process group, all batches.

    Raises ValueError, in every process, if there are fewer batches than processes.
    """
    if not _in_group():
        return list(batches)
    if len(batches) < dist.get_world_size():
        raise ValueError(f"{len(batches)} batches cannot be split over {dist.get_world_size()} processes")
    return list(batches[dist.get_rank() :: dist.get_world_size()])


def all_reduce_gram(gram: Gram | None, error: ValueError | None = None) -> Gram:
    """Return the sum of all processes' Gram matrices, the same bits in each; outside of a process group, `gram`.

    A process without any input gives None. One that failed gives its error: then every process raises.
    """
    if error is not None and not _in_group():
        raise error
    if not _in_group():
        assert gram is not None
        return gram
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    has_cross = gram is not None and gram.cross is not None
    sizes = (0, 1) if gram is None else (gram.sum.shape[-1], gram.n_groups)
    state = torch.tensor([*sizes, int(error is not None), int(has_cross)], device=device)
    dist.all_reduce(state, op=dist.ReduceOp.MAX)
    n_features, n_groups, failed, crosses = state.tolist()
    if failed:
        raise error or ValueError("another process found its calibration data wrong; its message says how")
    total = gram or Gram(n_features, device, n_groups)
    matrix, n_rows = total.sum.to(device), torch.tensor(total.n_rows, device=device)
    dist.all_reduce(matrix)
    if crosses:
        cross = (torch.zeros_like(matrix) if total.cross is None else total.cross.to(device)).contiguous()
        dist.all_reduce(cross)
        total.cross = cross.to(total.sum.device)
    dist.all_reduce(n_rows)
    total.sum, total.n_rows = matrix.to(total.sum.device), int(n_rows)
    return total


def average(tensors: Sequence[Tensor]) -> None:
    """Give each tensor the mean of all processes' ones, the same bits in each; outside of a process group, do nothing.

    All processes give as many tensors, of the same shapes.
    """
    if not _in_group():
        return
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    for tensor in tensors:
        total = tensor.to(device, copy=True).contiguous()
        dist.all_reduce(total)
        tensor.copy_(total / dist.get_world_size())


def most_of_all(number: int) -> int:
    """Return the largest of all processes' numbers."""
    if not _in_group():
        return number
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    most = torch.tensor(number, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
