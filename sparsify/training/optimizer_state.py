"""The optimizer's state of single weights: listed, and set back to its beginning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsify.layers.fsdp import shard_like

#: State that does not begin at zero, and the optimizer's option with its first value.
_BEGINS_AT: dict[str, str] = {"step_size": "lr", "sum": "initial_accumulator_value"}  # Rprop; Adagrad


def remembered(optimizer: torch.optim.Optimizer | None, parameter: Tensor) -> list[tuple[Tensor, float]]:
    """Return the tensors with a value for each weight of a parameter, its gradient too, and the first value of each.

    Momentum, Adam's moments and the like: every floating state tensor of the parameter's shape. State in other shapes
    (Adafactor's rows and columns, step counts) or in codes (8-bit moments) belongs to no single weight.
    """
    tensors: list[tuple[Tensor, float]] = []
    if parameter.grad is not None and parameter.grad.layout is torch.strided:
        tensors.append((parameter.grad, 0.0))
    for key, value in (optimizer.state.get(parameter, {}) if optimizer is not None else {}).items():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
            assert optimizer is not None
            option = _BEGINS_AT.get(key)
            tensors.append((value, float(_options(optimizer, parameter).get(option, 0)) if option else 0.0))
    return tensors


@torch.no_grad()
def forget(optimizer: torch.optim.Optimizer | None, parameter: Tensor, places: Tensor) -> None:
    """Set gradient and state of a parameter back to their beginning at the True places of a bool of its shape."""
    for value, beginning in remembered(optimizer, parameter):
        value.masked_fill_(shard_like(places, value), beginning)


def learning_rate(optimizer: torch.optim.Optimizer, parameter: Tensor) -> float:
    """Return the present learning rate of a parameter."""
    return float(_options(optimizer, parameter)["lr"])


def _options(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    for group in optimizer.param_groups:
        if any(member is parameter for member in group["params"]):
            return group
    raise ValueError("the optimizer does not hold the weights of the model that is pruned")
