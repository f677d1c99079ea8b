"""Tied modules: second uses of the weight of a masked layer, under that layer's mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.layers.masked import MaskedLayer
from sparsify.layers.masked_weight import kept
from sparsify.layers.own_forward import check_forward


class Tied(nn.Module):
    """A module with the Parameter `weight` of a masked layer, its owner; only the owner has a mask.

    So the gradient of a masked weight is exactly zero here too, and both use the same weight after an optimizer step.
    """

    weight: Tensor
    #: In a tuple, as nn.Module would take a bare one for a child.
    owner: tuple[MaskedLayer]

    @property
    def mask(self) -> Tensor:
        """The owner's mask, in the layout of the weight."""
        return self.owner[0].mask


class TiedLinear(Tied, nn.Linear):
    """A Linear with the weight of a masked layer, and a bias of its own."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to (..., in_features); returns (..., out_features)."""
        return F.linear(input, kept(self.weight, self.mask), self.bias)


class TiedEmbedding(Tied, nn.Embedding):
    """An Embedding with the weight of a masked layer as its table."""

    def forward(self, input: Tensor) -> Tensor:
        """Look up the rows of `input`; returns (..., embedding_dim)."""
        return torch.where(self.mask[input], super().forward(input), 0.0)


_TIED: dict[type[nn.Module], type[Tied]] = {nn.Linear: TiedLinear, nn.Embedding: TiedEmbedding}


def check_tieable(module: nn.Module) -> None:
    """Raise ValueError, with the reason, if a module cannot use another layer's mask."""
    if type(module) not in _TIED:
        names = " and ".join(f"nn.{kind.__name__}" for kind in _TIED)
        raise ValueError(f"it is a {type(module).__name__}; only {names} can use another layer's mask")
    check_forward(module)
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise ValueError("its max_norm changes the weight as it is used")


def tie(module: nn.Module, owner: MaskedLayer) -> None:
    """Let a module with the owner's weight use the owner's mask, in place."""
    check_tieable(module)
    module.__class__ = _TIED[type(module)]
    module.__dict__.pop("forward", None)  # of the former class: accelerate leaves that there
    assert isinstance(module, Tied)
    module.owner = (owner,)


def untie(module: Tied) -> None:
    """Make a tied module plain again, in place; the Parameter stays shared."""
    plain: Any = next(plain for plain, tied in _TIED.items() if type(module) is tied)
    del module.owner
    module.__class__ = plain
