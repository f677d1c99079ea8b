"""Transaction: a change of a model, undone as a whole if it fails."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_PART_BYTES = 2**24  # exchanged at a time
_CONTAINERS = (dict, OrderedDict, list, set)  # of exactly these types: a subclass may do more


class Copies(Protocol):
    """A store of numbered tensors, such as a dict."""

    def __getitem__(self, number: int, /) -> Tensor: ...
    def __setitem__(self, number: int, tensor: Tensor, /) -> None: ...


class Transaction:
    """Put a model back when the block raises: structure, attributes, hooks, and the contents of chosen tensors.

    Restored are each module's class and attributes, and the same Parameters and buffers with their memory, gradients
    and requires_grad. Contents are copied only for tensors given to `keep`, before the first write to them. Containers
    in an attribute (dict, list, set) are restored at their first level. A model means all its modules at the begin of
    the block.

    >>> model = nn.Linear(2, 2)
    >>> with Transaction(model) as undo:  # doctest: +IGNORE_EXCEPTION_DETAIL
    ...     undo.keep([model.weight])
    ...     with torch.no_grad():
    ...         model.weight.zero_()
    ...     model.bias = None
    ...     raise KeyError("half-way")
    Traceback (most recent call last):
    KeyError: 'half-way'
    >>> bool(model.weight.any()), model.bias is None
    (True, False)
    """

    def __init__(self, *models: nn.Module, copies: Copies | None = None) -> None:
        """Prepare; copies go to `copies`, numbered from 0, or to memory."""
        self._models, self._copies = models, {} if copies is None else copies

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Copy the contents of tensors before a write to them; each tensor is copied once."""
        for tensor in tensors:
            if id(tensor) not in self._contents and _has_contents(tensor):
                number = len(self._contents)
                self._copies[number] = tensor.detach().clone()
                self._contents[id(tensor)] = tensor, number

    def keep_where(self, tensor: Tensor, where: Tensor) -> None:
        """Copy a part of a tensor before a write to it: the elements with True in `where`, a bool of its shape."""
        self._places.append((tensor, where, tensor.detach()[where]))

    @torch.no_grad()
    def exchange(self, tensor: Tensor, new: Tensor) -> None:
        """Write `new` into a tensor, and keep its old contents in the memory of `new`, without more memory."""
        n_parts = 1 if tensor.dim() == 0 else -(-tensor.nbytes // _PART_BYTES)
        for part, its_new in zip(_rows(tensor.detach(), n_parts), _rows(new, n_parts), strict=True):
            old = part.clone()
            self._exchanged.append((part, old))  # at every moment something holds the old contents
            part.copy_(its_new)
            its_new.copy_(old)
            self._exchanged[-1] = part, its_new

    def __enter__(self) -> Transaction:
        modules = {id(module): module for model in self._models for module in model.modules()}
        self._modules = [(module, type(module), _copied(module.__dict__)) for module in modules.values()]
        tensors = {
            id(tensor): tensor
            for module in modules.values()
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        }
        self._tensors = [_Tensor(tensor) for tensor in tensors.values()]
        self._contents: dict[int, tuple[Tensor, int]] = {}
        self._exchanged: list[tuple[Tensor, Tensor]] = []
        self._places: list[tuple[Tensor, Tensor, Tensor]] = []
        return self

    def roll_back(self) -> None:
        """Undo all changes so far; an error in the block does so by itself."""
        for module, its_class, attributes in self._modules:
            object.__setattr__(module, "__class__", its_class)
            module.__dict__.clear()
            module.__dict__.update({key: _restored(value, items) for key, (value, items) in attributes.items()})
        for noted in self._tensors:
            noted.restore()
        for tensor, contents in reversed(self._exchanged):  # two tensors may share memory
            _write(tensor, contents)
        for tensor, number in self._contents.values():
            _write(tensor, self._copies[number])
        with torch.no_grad():
            for tensor, where, values in reversed(self._places):
                tensor[where] = values

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            self.roll_back()
        self._modules, self._tensors, self._contents, self._exchanged, self._places = [], [], {}, [], []


class _Tensor:
    """A tensor of a model as it is: its memory, gradient and requires_grad."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.needs_grad = tensor, tensor.requires_grad
        self.data = tensor.data if _is_plain(tensor) else None
        self.grad = tensor.grad if tensor.is_leaf else None

    def restore(self) -> None:
        """Restore memory, gradient and requires_grad; an unchanged tensor is not touched."""
        if self.data is not None and not _same_memory(self.tensor, self.data):
            self.tensor.data = self.data
        if self.tensor.is_leaf:
            if self.tensor.requires_grad != self.needs_grad:
                self.tensor.requires_grad_(self.needs_grad)
            if self.tensor.grad is not self.grad:
                self.tensor.grad = self.grad


def _copied(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return each attribute, with a copy of its items if it is a container."""
    return {key: (value, value.copy() if type(value) in _CONTAINERS else None) for key, value in attributes.items()}


def _restored(value: Any, items: Any) -> Any:
    """Return the same container with its former items."""
    if items is not None:
        value.clear()
        value.extend(items) if isinstance(value, list) else value.update(items)
    return value


def _rows(tensor: Tensor, n_parts: int) -> Sequence[Tensor]:
    """Return views of a tensor's rows, in this number of parts or fewer."""
    return tensor.chunk(n_parts) if n_parts > 1 else [tensor]


def _has_contents(tensor: Tensor) -> bool:
    """Return whether a tensor has writable contents: memory behind its shape, and no element seen twice."""
    if tensor.is_meta or is_lazy(tensor):
        return False
    if tensor.layout is not torch.strided:
        return True
    return all(stride > 0 or size <= 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor has memory of its own, in rows: not a sharded, quantized, sparse or lazy one."""
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout is torch.strided


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.device, one.shape, one.stride()) == (
        other.dtype,
        other.device,
        other.shape,
        other.stride(),
    ) and (one.is_meta or one.data_ptr() == other.data_ptr())


def _write(tensor: Tensor, contents: Tensor) -> None:
    """Write contents back; an inference tensor takes writes only in inference mode."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(contents)
