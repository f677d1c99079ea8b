"""New masks during a training: weights, gradients and the optimizer's state change with them, or nothing does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsify.conversion.transaction import Transaction
from sparsify.layers import MaskedLayer
from sparsify.layers.fsdp import local, shard_like
from sparsify.training.optimizer_state import forget, remembered


def change_masks(
    layers: Mapping[str, MaskedLayer],
    masks: Mapping[str, Tensor],
    masked_mode: Mapping[str, str],
    optimizer: torch.optim.Optimizer | None,
    undo: Transaction,
) -> None:
    """Set the masks (out, in) of layers; the optimizer forgets weights on their way out or back.

    masked_mode: the mode of masked weights from now on (recipe.Group.masked), by layer
    undo: gets the values that change, before they are overwritten

    In a layer with masked weights at zero until now, weights come back at zero, whatever the optimizer has written to
    them; otherwise they come back with their own values.
    """
    for name, mask in masks.items():
        layer = layers[name]
        new = torch.empty_like(layer.mask).copy_(layer.as_weight(mask))
        at_zero, layer.masked_mode = layer.masked_mode == "zero", masked_mode[name]
        if layer.masked_mode == "zero":
            _keep(undo, layer.weight.detach(), ~(new & layer.mask) if at_zero else ~new, 0.0)
        moved = torch.zeros_like(new) if layer.masked_mode == "trained" else ~new | (layer.mask != new)
        for tensor, beginning in remembered(optimizer, layer.weight):
            _keep(undo, tensor, moved, beginning)
        layer.set_mask(mask, back_at_zero=at_zero)
        forget(optimizer, layer.weight, moved)


def _keep(undo: Transaction, tensor: Tensor, where: Tensor, beginning: float) -> None:
    own = local(tensor)
    undo.keep_where(own, local(shard_like(where, tensor)) & (own != beginning))
