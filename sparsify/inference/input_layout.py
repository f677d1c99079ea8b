"""Convolutions that stay dense: their weights lie in memory as the images they get."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.calibration.batches import read_example
from sparsify.calibration.eval_mode import eval_without_cache
from sparsify.layers.weight_layout import lay_out, may_lay_out


def lay_out_as_inputs(model: nn.Module, example: Any) -> None:
    """Give each plain Conv2d that gets images with channels last alone a weight with channels last, in place.

    torch would copy the weight into that layout at each call. example: a typical input, on which the model runs once.
    Weights that several modules share stay as they are.
    """
    n_uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    found: dict[nn.Module, set[bool]] = {}

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.setdefault(module, set()).add(len(args) == 1 and _has_channels_last(args[0]))

    chosen = [m for m in model.modules() if may_lay_out(m) and n_uses[id(m._parameters["weight"])] == 1]
    if not chosen:
        return
    batch = read_example(model, example)
    handles = [module.register_forward_pre_hook(before) for module in chosen]
    try:
        with eval_without_cache(model), torch.no_grad():
            model(*batch.args, **batch.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for module, layouts in found.items():
        if layouts == {True}:
            lay_out(module)


def _has_channels_last(x: Any) -> bool:
    is_image = isinstance(x, Tensor) and x.dim() == 4
    return is_image and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
