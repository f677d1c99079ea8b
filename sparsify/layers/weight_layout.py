"""Weights of plain convolutions with channels last in memory, and back: the same weights for everything but torch."""

from __future__ import annotations

import torch
from torch import nn

from sparsify.layers.inference_mode import making_tensors

#: The attribute of a module whose weight got its layout here.
_MARK = "_weight_laid_out"


def may_lay_out(module: nn.Module) -> bool:
    """Return whether a module is a plain Conv2d on the CPU whose weight would lie elsewhere with channels last."""
    weight = module._parameters.get("weight")
    if type(module) is not nn.Conv2d or type(weight) is not nn.Parameter or not weight.is_cpu:
        return False
    return weight.is_contiguous() and not weight.is_contiguous(memory_format=torch.channels_last)


def lay_out(module: nn.Module) -> None:
    """Give a Conv2d a weight with channels last, a Parameter of its own."""
    _set_layout(module, torch.channels_last)
    module.__dict__[_MARK] = True


def undo_layouts(model: nn.Module) -> None:
    """Undo every `lay_out` in a model."""
    for module in model.modules():
        if module.__dict__.pop(_MARK, False):
            _set_layout(module, torch.contiguous_format)


def _set_layout(module: nn.Module, layout: torch.memory_format) -> None:
    weight = module._parameters["weight"]
    assert weight is not None
    with making_tensors():
        laid_out = weight.detach().contiguous(memory_format=layout)
        module._parameters["weight"] = nn.Parameter(laid_out, requires_grad=weight.requires_grad)
