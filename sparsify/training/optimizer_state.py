"""What an optimizer remembers of single weights, and how to make it forget them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsify.layers.fsdp import shard_like

#: State that does not begin at zero, and the optimizer's option that says where it begins.
_BEGINS_AT: dict[str, str] = {"step_size": "lr", "sum": "initial_accumulator_value"}  # Rprop; Adagrad


def remembered(optimizer: torch.optim.Optimizer | None, parameter: Tensor) -> list[tuple[Tensor, float]]:
    """Return what belongs to the single weights of a parameter, its gradient too, and where each of them begins.

    Momentum, Adam's moments and the like: every floating state tensor of the parameter's shape. What an optimizer keeps
    in other shapes (Adafactor's rows and columns, step counts) or as codes (8-bit moments) belongs to no single weight.
    """
    found: list[tuple[Tensor, float]] = []
    if parameter.grad is not None and parameter.grad.layout is torch.strided:
        found.append((parameter.grad, 0.0))
    for key, value in (optimizer.state.get(parameter, {}) if optimizer is not None else {}).items():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
            assert optimizer is not None
            option = _BEGINS_AT.get(key)
            found.append((value, float(_options(optimizer, parameter).get(option, 0)) if option else 0.0))
    return found


@torch.no_grad()
def forget(optimizer: torch.optim.Optimizer | None, parameter: Tensor, where: Tensor) -> None:
    """Set gradient and state of a parameter back to their beginning where `where`, a bool of its shape, is True."""
    for value, beginning in remembered(optimizer, parameter):
        value.masked_fill_(shard_like(where, value), beginning)


def learning_rate(optimizer: torch.optim.Optimizer, parameter: Tensor) -> float:
    """Return the present learning rate of a parameter."""
    return float(_options(optimizer, parameter)["lr"])


def _options(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    for group in optimizer.param_groups:
        if any(one is parameter for one in group["params"]):
            return group
    raise ValueError("the optimizer does not hold the weights of the model that is pruned")
