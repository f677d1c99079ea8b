"""Convolutions that stay dense: their weights lie in memory as the images they get."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.calibration.batches import read_example
from sparsify.calibration.block_call import first_tensor
from sparsify.calibration.layer_inputs import run_watched
from sparsify.layers.weight_layout import lay_out, may_lay_out


def lay_out_as_inputs(model: nn.Module, example: Any) -> None:
    """Give each plain Conv2d that gets images with channels last alone a weight with channels last, in place.

    torch would copy the weight into that layout at each call. example: a typical input, on which the model runs once.
    Weights that several modules share stay as they are.
    """
    n_uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    found: dict[nn.Module, set[bool]] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.setdefault(module, set()).add(_has_channels_last(first_tensor(args, kwargs)))

    chosen = [m for m in model.modules() if may_lay_out(m) and n_uses[id(m._parameters["weight"])] == 1]
    if not chosen:
        return
    run_watched(model, read_example(model, example), chosen, before)
    for module, layouts in found.items():
        if layouts == {True}:
            lay_out(module)


def _has_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
