"""Masks that move in a training: masked weights are trained too, and the largest weights are the kept ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsify.layer_names import matching
from sparsify.layers import MaskedLayer
from sparsify.layers.masked_weight import kept
from sparsify.masking.patterns import (
    Pattern,
    check_fits,
    choose_mask,
    expand_units,
    nm_mask,
    parse_pattern,
    unit_any,
)

#: Steps between two choices of the masks: one takes as long as half a step.
INTERVAL = 10
#: The fraction of a training after which masks stay.
UNTIL = 0.9


class MovingMasks:
    """The masks of layers in a training: at any time each has as many kept units of its pattern as before.

    The gradient of weight * mask reaches masked weights too (straight-through), so that they can grow, and every
    INTERVAL steps the mask becomes that of the largest weights. Masked weights decay, so fast that one which Adam moves
    the same way at each step ends at the root mean square of the kept ones.

    Zhou et al. 2021, arXiv:2102.04010 (SR-STE: the decay of masked weights alone).
    """

    def __init__(self, layers: Mapping[str, MaskedLayer], patterns: str | Mapping[str, str] | None) -> None:
        """Prepare; patterns: one for all layers, or by name; a layer without one keeps its mask.

        Raises ValueError, naming the layer, for a mask that is not of its pattern.
        """
        by_name = {"*": patterns} if isinstance(patterns, str) else patterns or {}
        found: dict[str, Pattern] = {}
        for names, text in by_name.items():
            pattern = parse_pattern(text)
            for name in [names] if names in layers else matching(names, list(layers)):
                found.setdefault(name, pattern)
        for name, pattern in found.items():
            _check_mask(name, layers[name], pattern)
        self._moving = [
            _Moving(layers[name], pattern, _n_gone(layers[name], pattern), _size(layers[name]))
            for name, pattern in found.items()
            if 0 < layers[name].sparsity < 1
        ]

    def start(self) -> None:
        """Let gradients reach masked weights."""
        for moving in self._moving:
            moving.layer.masked_mode = "trained"

    def after_step(self, number: int, spent: float, optimizer: torch.optim.Optimizer) -> None:
        """Choose the masks anew, if it is time: step `number` from 1 is done, and this fraction of the budget spent."""
        if not self._moving or (number % INTERVAL and spent < UNTIL):
            return
        for moving in self._moving:
            moving.choose(optimizer.param_groups[0]["lr"])
            if spent >= UNTIL:
                _clear_momentum(moving.layer, optimizer)
        if spent >= UNTIL:
            self.stop()

    def stop(self) -> None:
        """Let no mask move any more, and make masked weights zero."""
        for moving in self._moving:
            moving.layer.masked_mode = "zero"
            moving.layer.zero_masked()
        self._moving = []


@dataclass(frozen=True)
class _Moving:
    """A layer whose mask moves within a pattern.

    n_gone: the number of its masked units. size: the root mean square of its kept weights at first.
    """

    layer: MaskedLayer
    pattern: Pattern
    n_gone: int
    size: float

    @torch.no_grad()
    def choose(self, lr: float) -> None:
        """Shrink masked weights as for INTERVAL steps, and keep the largest units, as many as now."""
        layer = self.layer
        decay = max(1 - lr / self.size, 0.0) ** INTERVAL
        of_kept = kept(layer.weight, layer.mask)
        layer.weight.sub_(of_kept).mul_(decay).add_(of_kept)  # a kept weight less itself is 0
        everything = torch.ones_like(layer.matrix(layer.mask))
        best = choose_mask(layer.weight_matrix.abs(), everything, self.pattern, self.n_gone)
        layer.set_mask(best, back_at_zero=False)


def _n_gone(layer: MaskedLayer, pattern: Pattern) -> int:
    return int((~unit_any(layer.matrix(layer.mask), pattern)).sum())


def _size(layer: MaskedLayer) -> float:
    """Return the root mean square of a layer's kept weights; 1 if all are zero."""
    n_kept = max(int(layer.mask.sum()), 1)
    return float(layer.masked_weight().detach().double().square().sum() / n_kept) ** 0.5 or 1.0


def _clear_momentum(layer: MaskedLayer, optimizer: torch.optim.Optimizer) -> None:
    """Clear what Adam would move masked weights by."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    for value in optimizer.state.get(weight, {}).values():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            layer.clear_masked(value)


def _check_mask(name: str, layer: MaskedLayer, pattern: Pattern) -> None:
    """Raise ValueError unless a layer's mask consists of whole units, or has N of each group of M."""
    mask = layer.matrix(layer.mask)
    check_fits(pattern, mask.shape, name)
    if pattern.is_nm:
        right = torch.equal(mask, nm_mask(mask.float(), pattern.keep, pattern.group))
    else:
        right = torch.equal(mask, expand_units(unit_any(mask, pattern), pattern, mask.shape))
    if not right:
        raise ValueError(
            f"{name or '(root)'}: its mask is not of the pattern {pattern.text!r}; give move= the pattern that the "
            "layer was pruned with, or a mapping from names to patterns without the layer"
        )
