"""Masks for the weights of several layers, from one specification; functions of tensors, without modules."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from sparsify.distributed import SINGLE, Ranks
from sparsify.errors import RemovedLayerWarning
from sparsify.masking.allocation import MEASURED_ALLOCATIONS, n_removed
from sparsify.masking.methods.registry import required_statistics, takes_seed
from sparsify.masking.methods.scoring import score
from sparsify.masking.patterns import Pattern, choose_mask, keep_largest, prefer_kept, unit_any, unit_scores
from sparsify.masking.spec import PruningSpec, check_spec, layer_specs, layer_targets
from sparsify.masking.unseen import named


def make_masks(
    weights: Mapping[str, Tensor],
    spec: PruningSpec,
    *,
    masks: Mapping[str, Tensor],
    statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
    ranks: Ranks = SINGLE,
) -> dict[str, Tensor]:
    """Return a new bool mask (True = kept) for each weight (out, in); no argument is changed.

    The target is absolute. `masks` are the present ones; their removed weights are removed first. So, within one
    pattern, a higher target only takes away and a lower one only gives back (of removed weights, the first in order).
    The removed units number exactly round(sparsity x units), over each layer, or over all layers together for the
    allocations "global" and "erk". `statistics` has the method's TRAINING_STATISTICS of each layer. Of several
    `ranks`, each gives and gets its own rows of everything.

    Raises ValueError, naming the layer, for a specification that cannot be met exactly.
    """
    n_rows = torch.tensor([weight.shape[0] for weight in weights.values()], dtype=torch.int64, device="cpu")
    columns = {name: int(weight.shape[1]) for name, weight in weights.items()}
    shapes = {name: (n, columns[name]) for name, n in zip(weights, ranks.sum(n_rows).tolist(), strict=True)}
    check_spec(spec, shapes)
    if spec.allocation in MEASURED_ALLOCATIONS:
        raise ValueError(f"allocation {spec.allocation!r} needs calibration data: sparsify.prune(model, ..., data=...)")
    pattern, statistical = spec.parsed_pattern, bool(required_statistics(spec.method))

    @functools.cache
    def scores(name: str) -> Tensor:
        values = weights[name].detach().masked_fill(~masks[name], 0)
        if ranks.n > 1 and takes_seed(spec.method):  # the same draws as one process would make
            return ranks.rows(score(name, values.new_zeros(()).expand(shapes[name]), spec.method, spec.seed))
        return score(name, values, spec.method, spec.seed, statistics=(statistics or {}).get(name))

    def allocate(n_units: Mapping[str, int], sparsity: float) -> dict[str, int]:
        of_layers = {name: scores(name) for name in n_units}
        return allocate_globally(of_layers, masks, pattern, n_units, sparsity, ranks=ranks)

    n_zeros = {name: layer.n_removed for name, layer in layer_specs(spec, shapes, allocate).items()}
    return {
        name: torch.ones_like(mask)
        if statistical and not n_zeros[name]  # at first there are no statistics, and no need of them
        else choose_mask(scores(name), mask, pattern, n_zeros[name], ranks=ranks)
        for name, mask in masks.items()
    }


def warn_removed_whole(whole: Mapping[str, bool], spec: PruningSpec) -> None:
    """Warn, naming them, if layers lose all their weights though the sparsity asked of them is not 1.

    whole: True for each layer without a kept weight, False for the other layers under the same target.
    """
    if isinstance(spec.allocation, Mapping):
        asked = {name for name, target in layer_targets(spec.allocation, whole).items() if target == 1}
    else:
        asked = set(whole) if spec.sparsity == 1 else set()
    lost = [name for name, gone in whole.items() if gone and name not in asked]
    if not lost:
        return
    shared = isinstance(spec.allocation, str) and spec.allocation != "uniform"
    cap = "max_sparsity" if shared else "allocation='erk' or 'global' and max_sparsity"
    warnings.warn(
        f"{named(name or '(root)' for name in lost)}: all weights are removed, so that nothing of the input comes "
        f"through; keep some with {cap} below 1, or leave such layers dense with exclude=[{named(map(repr, lost))}]",
        RemovedLayerWarning,
        stacklevel=3,
    )


def is_empty(mask: Tensor) -> bool:
    """Return whether a mask of at least one weight keeps none."""
    return mask.numel() > 0 and not bool(mask.any())


def allocate_globally(
    scores: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    pattern: Pattern,
    n_units: Mapping[str, int],
    sparsity: float,
    *,
    ranks: Ranks = SINGLE,
) -> dict[str, int]:
    """Rank the units of all layers in `n_units` against each other, and return the removed units of each layer."""
    units = {name: (unit_scores(scores[name], pattern), unit_any(masks[name], pattern)) for name in n_units}
    total = sum(n_units.values())
    n_keep = total - n_removed(sparsity, total)
    n_kept = int(ranks.sum(torch.tensor([int(kept.sum()) for _, kept in units.values()], device="cpu").sum()))
    chosen = keep_largest([prefer_kept(s, kept, n_keep, n_kept) for s, kept in units.values()], n_keep, ranks)
    n_gone = ranks.sum(torch.tensor([int((~kept).sum()) for kept in chosen], device="cpu")).tolist()
    return dict(zip(units, n_gone, strict=True))
