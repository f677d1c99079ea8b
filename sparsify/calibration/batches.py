"""Calibration data as batches: the arguments of one run of the model each, and which rows of an input count."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class Batch:
    """The arguments of one run of the model; `counts` says which of the rows (batch, length) are no padding."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    counts: Tensor | None


def read_batches(model: nn.Module, data: Iterable[Any]) -> list[Batch]:
    """Read all calibration data, once, onto the model's device.

    A batch is a tensor; a tuple or list of positional arguments, of which as many are used as the model's forward takes
    (labels at the end do no harm); or a mapping of keyword arguments. What a 2-D "attention_mask" among these marks
    with 0 is padding and does not count. A `Batch`, read before, is taken as it is. Raises ValueError if there is no
    batch, or one of another kind.

    >>> len(read_batches(nn.Linear(2, 1), [torch.ones(3, 2), (torch.ones(3, 2), "label")]))
    2
    """
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    batches = [_read_batch(model, number, batch, device) for number, batch in enumerate(data)]
    if not batches:
        raise ValueError("the calibration data is empty; a generator that was read before is empty too")
    return batches


def _read_batch(model: nn.Module, number: int, batch: Any, device: torch.device) -> Batch:
    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.clone().to(device) if value.is_inference() else value.to(device)

    if isinstance(batch, Batch):
        return batch
    if isinstance(batch, Mapping):
        kwargs = {key: tree_map(move, value) for key, value in batch.items()}
        mask = kwargs.get("attention_mask")
        padded = isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all())
        return Batch((), kwargs, mask.bool() if padded and isinstance(mask, Tensor) else None)
    if isinstance(batch, Tensor):
        return Batch((move(batch),), {}, None)
    if isinstance(batch, (tuple, list)):
        parameters = inspect.signature(model.forward).parameters.values()
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        n_taken = len(batch) if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(positional)
        return Batch(tuple(tree_map(move, value) for value in batch[:n_taken]), {}, None)
    raise ValueError(
        f"batch {number} of the calibration data is a {type(batch).__name__}; "
        "give tensors, tuples of positional arguments, or dicts of keyword arguments"
    )


def input_rows(tensor: Tensor, counts: Tensor | None) -> Tensor:
    """Return the rows (rows, in_features) of a Linear's input, without padding where it has the batch's shape."""
    if counts is not None and tensor.shape[:-1] == counts.shape:
        return tensor[counts]
    if counts is not None and tensor.shape[:-1] == (counts.numel(),):
        return tensor[counts.flatten()]
    return tensor.reshape(-1, tensor.shape[-1])
