"""The exchange of kept and masked weights at an update of a training (SET, RigL), by chance or by gradient."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor

from sparsify.distributed import SINGLE, Ranks
from sparsify.errors import ScheduleWarning
from sparsify.layers import MaskedLayer
from sparsify.layers.fsdp import cut_by_rows, own_rows
from sparsify.masking.methods.scoring import mix_seed, score
from sparsify.masking.patterns import parse_pattern
from sparsify.masking.regrowth import drop_and_grow, random_growth_scores, regrow_fraction
from sparsify.masking.unseen import named
from sparsify.recipes.schema import Group


def exchanged_masks(
    group: Group,
    layers: Mapping[str, MaskedLayer],
    masks: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    *,
    step: int,
    progress: float,
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Return the masks after an exchange: the weakest weights of each layer have given their places to others.

    gradients: sums by layer; a layer without one (AMP skipped the steps) keeps its mask, and so does a layer with a
    gradient of zeros, named in a ScheduleWarning
    progress: of the schedule, 0 to 1
    """
    assert group.regrow is not None
    growth = {}
    for name, mask in masks.items():
        if group.regrow.by == "random":
            growth[name] = random_growth_scores(mask, mix_seed(group.seed or 0, f"{name} at {step}"))
        elif name in gradients:
            growth[name] = layers[name].matrix(gradients[name]).abs()
    if blind := [name for name, values in growth.items() if values.numel() and not bool(values.any())]:
        warnings.warn(
            f"{named(blind)}: no gradient has reached these layers, and nothing says where weights should grow; "
            "their masks stay: train them, or leave them out of the group with 'exclude'",
            ScheduleWarning,
            stacklevel=2,
        )
    fraction = regrow_fraction(group.regrow.fraction, progress)
    return {
        name: mask
        if name not in growth or name in blind
        else _exchanged(name, layers[name], mask, growth[name], fraction, group, ranks)
        for name, mask in masks.items()
    }


def _exchanged(
    name: str, layer: MaskedLayer, mask: Tensor, growth: Tensor, fraction: float, group: Group, ranks: Ranks
) -> Tensor:
    pattern = parse_pattern(group.pattern)
    ranks = ranks if cut_by_rows(layer, pattern, ranks) else SINGLE
    scores = score(name, own_rows(layer, ranks), group.method)
    rows = drop_and_grow(ranks.rows(mask), scores, ranks.rows(growth), fraction, pattern, ranks)
    return ranks.join(rows, mask.shape[0])
