"""Rewinding: a model goes back to an earlier moment of its training, under its present masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def copy_state(model: nn.Module) -> dict[str, Tensor]:
    """Copy every parameter and every buffer but the bool ones, the masks."""
    state = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in state if tensor.dtype != torch.bool}


@torch.no_grad()
def restore_state(model: nn.Module, state: dict[str, Tensor], optimizer: torch.optim.Optimizer | None) -> None:
    """Set parameters and buffers to a copied state, and let the optimizer begin anew.

    Frankle and Carbin 2019, arXiv:1803.03635 (back to initialisation); Frankle et al. 2020, arXiv:1912.05671 (back to
    an early step). The learning rate belongs to the training loop: set it back there, if wanted.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in state:
            tensor.copy_(state[name])
    if optimizer is not None:
        optimizer.state.clear()
