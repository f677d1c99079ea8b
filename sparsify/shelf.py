"""A row of tensors, of which those that do not fit a budget of memory lie in files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor


class Budget:
    """How many bytes of memory are left to the shelves that share it."""

    def __init__(self, n_bytes: int) -> None:
        if n_bytes < 0:
            raise ValueError(f"a budget is a number of bytes, got {n_bytes}")
        self.left = n_bytes


class Shelf:
    """A list of `n` tensors that keeps in memory what its budget has room for, and the others in a temporary folder.

    None as budget keeps all of them. The files are gone when the shelf is closed or collected. Reading gives a tensor
    back bit for bit, on its device; what is done to a tensor that was read changes nothing here.

    >>> with Shelf(2, Budget(8)) as shelf:
    ...     shelf[0], shelf[1] = torch.ones(2), torch.zeros(2)
    ...     print(shelf.n_on_disk, shelf[1].tolist())
    1 [0.0, 0.0]
    """

    def __init__(self, n: int, budget: Budget | None = None, folder: str | os.PathLike[str] | None = None) -> None:
        self.budget = budget
        self._places: list[Tensor | _File | None] = [None] * n
        self._folder = None if budget is None else tempfile.TemporaryDirectory(prefix="sparsify-", dir=folder)

    @property
    def n_on_disk(self) -> int:
        """How many of the tensors lie in files."""
        return sum(isinstance(place, _File) for place in self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Tensor:
        place = self._places[index]
        if place is None:
            raise IndexError(f"nothing was put at {index} yet")
        return place.read() if isinstance(place, _File) else place

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        self._forget(index)
        if self._folder is None or self.budget is None:
            self._places[index] = tensor
        elif tensor.nbytes <= self.budget.left:
            self._places[index] = tensor
            self.budget.left -= tensor.nbytes
        else:
            self._places[index] = _File(Path(self._folder.name) / str(index), tensor)

    def close(self) -> None:
        """Delete the files, and give the memory back."""
        for index in range(len(self._places)):
            self._forget(index)
        if self._folder is not None:
            self._folder.cleanup()

    def _forget(self, index: int) -> None:
        old, self._places[index] = self._places[index], None
        if isinstance(old, Tensor) and self.budget is not None:
            self.budget.left += old.nbytes

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _File:
    """A tensor in a file: its bytes in row-major order."""

    def __init__(self, path: Path, tensor: Tensor) -> None:
        self.path, self.shape, self.dtype, self.device = path, tensor.shape, tensor.dtype, tensor.device
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        flat.numpy().tofile(path)

    def read(self) -> Tensor:
        flat = torch.from_numpy(np.fromfile(self.path, dtype=np.uint8))
        return flat.view(self.dtype).reshape(self.shape).to(self.device)
