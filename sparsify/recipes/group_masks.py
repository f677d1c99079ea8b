"""The masks of a recipe's group at a time of its schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsify.distributed import SINGLE, Ranks
from sparsify.layers.fsdp import cut_by_rows, own_rows
from sparsify.masking.masks import make_masks
from sparsify.masking.patterns import parse_pattern
from sparsify.recipes.assignment import converted_layers
from sparsify.recipes.schema import HOLD, Group


def group_masks(
    model: nn.Module,
    group: Group,
    names: list[str],
    time: float | None = None,
    statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
    ranks: Ranks = SINGLE,
) -> dict[str, Tensor]:
    """Return the masks (out, in) of a group's layers at a time (None: at the end); no layer is changed.

    `statistics` has the TRAINING_STATISTICS of each layer, for methods with some. Several `ranks` share the
    ranking, each its rows, and get the same masks: no rank holds the whole weight of a layer under FSDP2.
    """
    layers = converted_layers(model, names)
    if not all(cut_by_rows(layer, parse_pattern(group.pattern), ranks) for layer in layers.values()):
        ranks = SINGLE  # every rank ranks all of it
    weights = {name: own_rows(layer, ranks) for name, layer in layers.items()}
    _check_finite(weights, ranks)
    masks = {name: ranks.rows(layer.matrix(layer.mask)) for name, layer in layers.items()}
    sums = {name: {key: ranks.rows(value) for key, value in of.items()} for name, of in (statistics or {}).items()}
    rows = _mask_rows(group, weights, masks, time, sums, ranks)
    return {name: ranks.join(mask, layers[name].shape[0]) for name, mask in rows.items()}


def _check_finite(rows: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Raise ValueError on all ranks if one of them has a weight with NaN or Inf; alone it would leave them waiting."""
    if ranks.n > 1:
        bad = ranks.sum(torch.tensor([int(not own.isfinite().all()) for own in rows.values()], device="cpu"))
        for name, n_bad in zip(rows, bad.tolist(), strict=True):
            if n_bad:
                raise ValueError(
                    f"{name}: the weight holds NaN or Inf on {n_bad} of {ranks.n} ranks; mend it, or leave the layer "
                    f"out with exclude=[{name!r}]"
                )


def _mask_rows(
    group: Group,
    weights: dict[str, Tensor],
    masks: dict[str, Tensor],
    time: float | None,
    statistics: Mapping[str, Mapping[str, Tensor]],
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Return this rank's rows of the masks, from its rows of the weights and present masks."""
    if group.method == HOLD:
        return {name: masks[name] & (weights[name] != 0) for name in weights}
    spec = group.spec(time)
    if group.regrow:  # it begins at random places; later masks of the same sizes keep theirs
        n_masked = ranks.sum(torch.stack([(~mask).sum() for mask in masks.values()]))
        spec = spec if bool(n_masked.any()) else replace(spec, method="random", seed=group.seed)
    if group.masked != "zero":  # masked weights have values, and may come back
        masks = {name: torch.ones_like(mask) for name, mask in masks.items()}
    return make_masks(weights, spec, masks=masks, statistics=statistics, ranks=ranks)
