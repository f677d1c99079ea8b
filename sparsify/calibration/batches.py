"""Calibration data as batches: arguments of one run of the model each, with the padding masks among them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

#: Endings of the names of masks, and the value with which they mark a token that is padding.
_MASKS = {"attention_mask": 0, "key_padding_mask": 1}


@dataclass(frozen=True)
class Batch:
    """The arguments of one run of the model, and the masks of its padding.

    args, kwargs: the arguments
    named: the same by name, as far as forward names them
    masks: padding masks (batch, length), False = padding, by the names of their arguments
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: dict[str, Any]
    masks: dict[str, Tensor]

    def replaced(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments, with the values of some names replaced."""
        names = [*self.named][: len(self.args)]
        args = [values.get(name, value) for name, value in zip(names, self.args, strict=False)]
        kwargs = {name: values.get(name, value) for name, value in self.kwargs.items()}
        return (*args, *self.args[len(args) :]), kwargs


def read_batches(model: nn.Module, data: Iterable[Any]) -> list[Batch]:
    """Read all calibration data, once, onto the model's device.

    A batch is a tensor; a tuple or list of positional arguments; a mapping of keyword arguments; or a `Batch`. Of a
    tuple, as many elements are used as forward needs, and elements without a parameter (labels at the end) are left
    out. An element for a parameter with a default may be an argument or a label, and is an error. A 2-D argument
    "attention_mask" (or with a name that ends so) marks padding with 0, a "key_padding_mask" with 1.

    Raises ValueError if there is no batch, or one of another kind.

    >>> len(read_batches(nn.Linear(2, 1), [torch.ones(3, 2), (torch.ones(3, 2), "label")]))
    2
    """
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):  # data may be made while it is read
        batches = [_read(model, batch, f"batch {number} of the calibration data") for number, batch in enumerate(data)]
    if not batches:
        raise ValueError("the calibration data is empty; a generator that was read before is empty too")
    return batches


def read_example(model: nn.Module, example: Any) -> Batch:
    """Read one example of a model's arguments, of any kind accepted by `read_batches`."""
    return _read(model, example, "the example")


def _read(model: nn.Module, batch: Any, what: str) -> Batch:
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with torch.inference_mode(False):  # outside of it a copy is a plain tensor
            return (value.clone() if value.is_inference() else value).to(device)

    if isinstance(batch, Batch):
        return batch
    parameters = _parameters(model)
    if isinstance(batch, Mapping):
        kwargs = {key: tree_map(move, value) for key, value in batch.items()}
        order = [p.name for p in parameters if p.name in kwargs]
        named = {key: kwargs[key] for key in dict.fromkeys([*order, *kwargs])}
        return Batch((), kwargs, named, _masks(named, what))
    if isinstance(batch, Tensor):
        batch = (batch,)
    if isinstance(batch, (tuple, list)):
        args = tuple(tree_map(move, value) for value in batch[: _n_taken(batch, parameters, what)])
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        named = {p.name: value for p, value in zip(positional, args, strict=False)}
        return Batch(args, {}, named, _masks(named, what))
    raise ValueError(
        f"{what} is a {type(batch).__name__}; "
        "give tensors, tuples of positional arguments, or dicts of keyword arguments"
    )


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    """Return forward's parameters; for a wrapper around one child, those of the child."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    children = list(model.children())
    if len(children) == 1 and all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return _parameters(children[0])
    return parameters


def _n_taken(batch: tuple[Any, ...] | list[Any], parameters: list[inspect.Parameter], what: str) -> int:
    """Return the number of arguments among the elements of a tuple. Raises ValueError if it is not certain."""
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return len(batch)
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    n_needed = max(sum(p.default is p.empty for p in parameters if p.name in names), 1)
    given = names[: len(batch)]
    unsure = [name for name, value in zip(given, batch, strict=False) if value is not None][n_needed:]
    if unsure:
        by_name = ", ".join(f"{name!r}: ..." for name in given)
        raise ValueError(
            f"{what} is a tuple of {len(batch)}, of which forward needs {n_needed}: the positional element "
            f"{given.index(unsure[0]) + 1} would become {unsure[0]!r}, and may be a label. If it is an argument, give "
            f"a dict, {{{by_name}}}; if it is a label, give batches without it"
        )
    return min(len(batch), len(names))


def _masks(named: Mapping[str, Any], what: str) -> dict[str, Tensor]:
    """Return the padding masks, by name."""
    masks = {}
    for name, value in named.items():
        padding = next((padding for end, padding in _MASKS.items() if name.endswith(end)), None)
        if padding is None or not isinstance(value, Tensor) or value.dim() != 2:
            continue
        if bool((value < 0).any()):
            raise ValueError(
                f"{what}: {name!r} must mark padding with {padding} and tokens with {1 - padding}, and has values from "
                f"{value.min().item():g} to {value.max().item():g}"
            )
        if not bool((value != padding).all()):
            masks[name] = value != padding
    return masks


def is_mask(name: str) -> bool:
    """Return whether an argument has the name of a padding mask."""
    return name.endswith(tuple(_MASKS))


@contextlib.contextmanager
def naming_batch(number: int) -> Iterator[None]:
    """Let an error in a model's run name the batch of calibration data."""
    try:
        yield
    except Exception as error:  # whatever the model's own code raises
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise ValueError(f"the model does not run on batch {number} of the calibration data: {reason}") from error


def input_rows(tensor: Tensor, counts: Tensor | None, n_last: int = 1) -> Tensor:
    """Return the rows (rows, features) of a tensor (..., features): those with a True in `counts`, or all (None).

    n_last: the number of dimensions of a row.
    """
    return tensor.reshape(-1, *tensor.shape[-n_last:]) if counts is None else tensor[counts]
