"""New masks for layers that train: weights, gradients and the optimizer's state change with them, or nothing does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsify.conversion.transaction import Transaction
from sparsify.layers import Masked
from sparsify.layers.fsdp import local, shard_like
from sparsify.training.optimizer_state import forget, remembered


def change_masks(
    layers: Mapping[str, Masked],
    masks: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
    undo: Transaction,
) -> None:
    """Give layers their masks (out, in); what the optimizer knows of weights that go or come back is forgotten.

    The transaction gets what is about to be overwritten: only the values that change.
    """
    for name, mask in masks.items():
        layer, new = layers[name], torch.empty_like(layers[name].mask)
        layer.matrix(new).copy_(mask)
        if layer.masked_are == "zero":
            _keep(undo, layer.weight.detach(), ~new, 0.0)
        moved = torch.zeros_like(new) if layer.masked_are == "trained" else ~new | (layer.mask != new)
        for tensor, beginning in remembered(optimizer, layer.weight):
            _keep(undo, tensor, moved, beginning)
        layer.set_mask(mask, back_at_zero=False)  # what a schedule kept aside comes back as it was
        forget(optimizer, layer.weight, moved)


def _keep(undo: Transaction, tensor: Tensor, where: Tensor, beginning: float) -> None:
    own = local(tensor)
    undo.keep_where(own, local(shard_like(where, tensor)) & (own != beginning))
