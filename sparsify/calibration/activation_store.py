"""The activation store: a list of tensors with a memory budget; the tensors beyond it lie in a temporary file."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor


class MemoryBudget:
    """A number of bytes of memory, shared by the lists and caches that take from it."""

    def __init__(self, n_bytes: int) -> None:
        if n_bytes < 0:
            raise ValueError(f"a budget is a number of bytes, got {n_bytes}")
        self.left = n_bytes

    def take(self, n_bytes: int) -> bool:
        """Take this many bytes if that many are left; return whether they were."""
        fits = n_bytes <= self.left
        self.left -= n_bytes if fits else 0
        return fits

    def give_back(self, n_bytes: int) -> None:
        """Return bytes taken before."""
        self.left += n_bytes


@dataclass(frozen=True)
class _OnDisk:
    """A tensor in the file: the position of its first byte (row-major order), shape, dtype and device."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class SpillingTensorList:
    """A list of `n` tensors: in memory while the budget has room (None: always), the others in a temporary file.

    The file has no name: the system deletes it when the list is closed or collected, or the process killed. Reading
    returns a tensor bit for bit, on its device. A change of a tensor read from the file does not change the list.

    >>> with SpillingTensorList(2, MemoryBudget(8)) as tensors:
    ...     tensors[0], tensors[1] = torch.ones(2), torch.zeros(2)
    ...     print(tensors.n_on_disk, tensors[1].tolist())
    1 [0.0, 0.0]
    """

    def __init__(self, n: int, budget: MemoryBudget | None = None) -> None:
        self.budget = budget
        self._items: list[Tensor | _OnDisk | None] = [None] * n
        self._file = None if budget is None else tempfile.TemporaryFile(prefix="sparsify-")  # noqa: SIM115
        self._extents: dict[int, tuple[int, int]] = {}  # by index, first byte and size of its room in the file
        self._n_filed = 0

    @property
    def n_on_disk(self) -> int:
        """The number of tensors in the file."""
        return sum(isinstance(item, _OnDisk) for item in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Tensor:
        item = self._items[index]
        if item is None:
            raise IndexError(f"nothing was put at {index} yet")
        return self._read(item) if isinstance(item, _OnDisk) else item

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        self._forget(index)
        fits = self.budget is None or self.budget.take(tensor.nbytes)
        self._items[index] = tensor if fits else self._write(index, tensor)

    def close(self) -> None:
        """Delete the file, and give the memory back."""
        for index in range(len(self._items)):
            self._forget(index)
        if self._file is not None:
            self._file.close()

    def _forget(self, index: int) -> None:
        old, self._items[index] = self._items[index], None
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

    def _read(self, item: _OnDisk) -> Tensor:
        assert self._file is not None
        tensor = torch.empty(item.shape, dtype=item.dtype, device="cpu")
        self._file.seek(item.start)
        n_read = self._file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data)
        if n_read != tensor.nbytes:
            raise OSError(f"a temporary file holds {n_read} bytes of a tensor of {tensor.nbytes}")
        return tensor.to(item.device)

    def __enter__(self) -> SpillingTensorList:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
