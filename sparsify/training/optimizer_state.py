"""What an optimizer remembers of single weights, and how to make it forget them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsify.layers.fsdp import shard_like

#: State that does not begin at zero, and the optimizer's option that says where it begins.
_BEGINS_AT: dict[str, str] = {"step_size": "lr", "sum": "initial_accumulator_value"}  # Rprop; Adagrad


@torch.no_grad()
def forget(optimizer: torch.optim.Optimizer | None, parameter: Tensor, where: Tensor) -> None:
    """Set gradient and state of a parameter back to their beginning where `where`, a bool of its shape, is True.

    Momentum, Adam's moments and the like: every state tensor of the parameter's shape. What an optimizer keeps in
    other shapes (Adafactor's rows and columns, step counts) belongs to no single weight and stays.
    """
    if parameter.grad is not None and parameter.grad.layout is torch.strided:
        parameter.grad.masked_fill_(shard_like(where, parameter.grad), 0)
    if optimizer is None:
        return
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            option = _BEGINS_AT.get(key)
            value.masked_fill_(
                shard_like(where, value), float(_options(optimizer, parameter).get(option, 0)) if option else 0.0
            )


def learning_rate(optimizer: torch.optim.Optimizer, parameter: Tensor) -> float:
    """Return the present learning rate of a parameter."""
    return float(_options(optimizer, parameter)["lr"])


def _options(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    for group in optimizer.param_groups:
        if any(one is parameter for one in group["params"]):
            return group
    raise ValueError("the optimizer does not hold the weights of the model that is pruned")
