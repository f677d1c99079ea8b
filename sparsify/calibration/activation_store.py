"""A row of tensors, of which those that do not fit a budget of memory lie in a file."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor


class MemoryBudget:
    """How many bytes of memory are left to the shelves that share it."""

    def __init__(self, n_bytes: int) -> None:
        if n_bytes < 0:
            raise ValueError(f"a budget is a number of bytes, got {n_bytes}")
        self.left = n_bytes

    def take(self, n_bytes: int) -> bool:
        """Take this much if there is room for it, and say whether there was."""
        fits = n_bytes <= self.left
        self.left -= n_bytes if fits else 0
        return fits

    def give_back(self, n_bytes: int) -> None:
        """Return what was taken."""
        self.left += n_bytes


@dataclass(frozen=True)
class _OnDisk:
    """A tensor in the file: where its bytes begin, in row-major order."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class SpillingTensorList:
    """A list of `n` tensors that keeps in memory what its budget has room for, and the others in a temporary file.

    None as budget keeps all of them. The file has no name, so that the system takes it back when the shelf is closed or
    collected, or the process killed. Reading gives a tensor back bit for bit, on its device; what is done to a tensor
    that was read changes nothing here.

    >>> with Shelf(2, Budget(8)) as shelf:
    ...     shelf[0], shelf[1] = torch.ones(2), torch.zeros(2)
    ...     print(shelf.n_on_disk, shelf[1].tolist())
    1 [0.0, 0.0]
    """

    def __init__(self, n: int, budget: MemoryBudget | None = None) -> None:
        self.budget = budget
        self._places: list[Tensor | _OnDisk | None] = [None] * n
        self._file = None if budget is None else tempfile.TemporaryFile(prefix="sparsify-")  # noqa: SIM115
        self._extents: dict[int, tuple[int, int]] = {}  # by index, first byte and size of what it has in the file
        self._n_filed = 0

    @property
    def n_on_disk(self) -> int:
        """How many of the tensors lie in the file."""
        return sum(isinstance(place, _OnDisk) for place in self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Tensor:
        place = self._places[index]
        if place is None:
            raise IndexError(f"nothing was put at {index} yet")
        return self._read(place) if isinstance(place, _OnDisk) else place

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        self._forget(index)
        fits = self.budget is None or self.budget.take(tensor.nbytes)
        self._places[index] = tensor if fits else self._write(index, tensor)

    def close(self) -> None:
        """Delete the file, and give the memory back."""
        for index in range(len(self._places)):
            self._forget(index)
        if self._file is not None:
            self._file.close()

    def _forget(self, index: int) -> None:
        old, self._places[index] = self._places[index], None
        if isinstance(old, Tensor) and self.budget is not None:
            self.budget.give_back(old.nbytes)

    def _write(self, index: int, tensor: Tensor) -> _OnDisk:
        assert self._file is not None
        start, size = self._extents.get(index, (0, -1))
        if tensor.nbytes > size:
            start = self._n_filed
            self._extents[index] = start, tensor.nbytes
            self._n_filed += tensor.nbytes
        self._file.seek(start)
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return _OnDisk(start, tensor.shape, tensor.dtype, tensor.device)

    def _read(self, place: _OnDisk) -> Tensor:
        assert self._file is not None
        tensor = torch.empty(place.shape, dtype=place.dtype, device="cpu")
        self._file.seek(place.start)
        n_read = self._file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data)
        if n_read != tensor.nbytes:
            raise OSError(f"a temporary file holds {n_read} bytes of a tensor of {tensor.nbytes}")
        return tensor.to(place.device)

    def __enter__(self) -> SpillingTensorList:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
