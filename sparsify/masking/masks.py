"""From weights and one target to a mask for each: method, pattern and allocation put together.

Everything here is a function of tensors; modules come in prune.py and layers/.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from sparsify.distributed import SINGLE, Ranks
from sparsify.errors import RemovedLayerWarning
from sparsify.layer_names import matching
from sparsify.masking.allocation import (
    ALLOCATIONS,
    MEASURED_ALLOCATIONS,
    capped,
    check_sparsity,
    erk,
    n_removed,
    uniform,
)
from sparsify.masking.methods.registry import Method, required_statistics, resolve_method, score, takes_seed
from sparsify.masking.patterns import (
    Pattern,
    check_fits,
    choose_mask,
    keep_largest,
    parse_pattern,
    prefer_kept,
    unit_any,
    unit_scores,
)
from sparsify.masking.unseen import named

Allocation = str | Mapping[str, float]


def make_masks(
    weights: Mapping[str, Tensor],
    sparsity: float | None,
    *,
    masks: Mapping[str, Tensor],
    method: str | Method = "magnitude",
    pattern: str = "unstructured",
    allocation: Allocation = "uniform",
    max_sparsity: float | None = None,
    seed: int | None = None,
    statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
    ranks: Ranks = SINGLE,
) -> dict[str, Tensor]:
    """Return a new bool mask (True = kept) for each weight (out, in); nothing given is changed.

    The target is absolute: `masks` are the present ones, and what they remove is removed first, so that within one
    pattern a higher target only takes away and a lower one only gives back (of weights that are all zero now, the
    first in order). The removed units number exactly round(sparsity x units), over each layer, or over all layers
    together for the allocations "global" and "erk". `statistics` has, for each layer, what a method asks a training for
    (methods.registry.TRAINING_STATISTICS). Of several `ranks`, each gives and gets its own rows of everything.

    Raises ValueError, naming the layer, for whatever cannot be done exactly.
    """
    parsed = parse_pattern(pattern)
    n_rows = ranks.sum(
        torch.tensor([weight.shape[0] for weight in weights.values()], dtype=torch.int64, device="cpu")
    ).tolist()
    shapes = {name: (n, int(weight.shape[1])) for (name, weight), n in zip(weights.items(), n_rows, strict=True)}
    n_zeros = n_removed_units(shapes, sparsity, parsed, allocation, max_sparsity)
    if n_zeros is None and allocation != "global":
        raise ValueError(f"allocation {allocation!r} needs calibration data: sparsify.prune(model, ..., data=...)")
    if required_statistics(method) and (sparsity == 0 if n_zeros is None else not any(n_zeros.values())):
        return {name: torch.ones_like(mask) for name, mask in masks.items()}  # nothing has been seen yet, nor need be
    shown = statistics or {}
    scores = {}
    for name, weight in weights.items():
        values = weight.detach().masked_fill(~masks[name], 0)
        if ranks.n > 1 and takes_seed(resolve_method(method)):  # the same draws as one process would make
            scores[name] = ranks.rows(score(name, values.new_zeros(()).expand(shapes[name]), method, seed))
        else:
            scores[name] = score(name, values, method, seed, statistics=shown.get(name))
    if n_zeros is None:
        units = {name: parsed.n_units(shape) for name, shape in shapes.items()}
        together = functools.partial(allocate_globally, scores, masks, parsed, ranks=ranks)
        n_zeros = capped(together, units, check_target(sparsity), max_sparsity)
    return {name: choose_mask(scores[name], masks[name], parsed, n_zeros[name], ranks=ranks) for name in weights}


def n_removed_units(
    shapes: Mapping[str, tuple[int, int]],
    sparsity: float | None,
    pattern: Pattern,
    allocation: Allocation,
    max_sparsity: float | None = None,
) -> dict[str, int] | None:
    """Return how many units each layer loses, from shapes (out, in) alone; None for allocations that need more.

    Raises ValueError, naming the layer, where a shape, pattern, allocation and target do not go together.
    """
    for name, shape in shapes.items():
        check_fits(pattern, shape, name)
    n_units = {name: pattern.n_units(shape) for name, shape in shapes.items()}
    if max_sparsity is not None and (pattern.is_nm or allocation == "uniform" or isinstance(allocation, Mapping)):
        what = f"pattern {pattern.text}" if pattern.is_nm else f"allocation {allocation!r}"
        raise ValueError(f"max_sparsity={max_sparsity} has no effect with {what}, which says what each layer loses")
    if pattern.is_nm:
        _check_nm(pattern, sparsity, allocation)
        return {
            name: (out * inner // pattern.group) * (pattern.group - pattern.keep)
            for name, (out, inner) in shapes.items()
        }
    if isinstance(allocation, Mapping):
        if sparsity is not None:
            raise ValueError(f"sparsity={sparsity} has no effect beside an allocation for each layer; leave it out")
        return {name: n_removed(s, n_units[name]) for name, s in layer_targets(allocation, shapes).items()}
    known = (*ALLOCATIONS, *MEASURED_ALLOCATIONS)
    if allocation not in known:
        raise ValueError(f"allocation {allocation!r} is none of: {', '.join(known)}, or a dict of layer patterns")
    target = check_target(sparsity)
    if allocation == "uniform":
        return uniform(n_units, target)
    sizes = {name: math.prod(pattern.unit_shape(shape)) for name, shape in shapes.items()}
    if len(set(sizes.values())) > 1:
        (one, a), (other, b) = sorted(sizes.items(), key=lambda item: item[1])[:: len(sizes) - 1]
        raise ValueError(
            f"allocation {allocation!r} needs units of one size, but with pattern {pattern.text!r} a unit has "
            f"{a} weights in {one} and {b} in {other}; use allocation 'uniform'"
        )
    if allocation != "erk":
        return None
    return capped(lambda units, sparsity: erk(units, shapes, sparsity), n_units, target, max_sparsity)


def layer_targets(allocation: Mapping[str, float], names: Mapping[str, object]) -> dict[str, float]:
    """Return each layer's sparsity: the first pattern that matches it decides; every layer and pattern must match."""
    targets: dict[str, float] = {}
    for pattern, sparsity in allocation.items():
        check_sparsity(sparsity, f"the sparsity of {pattern!r}")
        for name in matching(pattern, list(names)):
            targets.setdefault(name, float(sparsity))
    if missing := [name for name in names if name not in targets]:
        raise ValueError(
            f"the allocation says nothing for {missing[0]!r} ({len(missing)} layers); "
            "add '*' as its last pattern, or exclude them"
        )
    return {name: targets[name] for name in names}


def warn_removed_whole(whole: Mapping[str, bool], sparsity: float | None, allocation: Allocation) -> None:
    """Warn, naming them, if layers lose all their weights though the sparsity asked of them is not 1.

    whole: for every layer that shares this target, whether it keeps no weight at all.
    """
    asked = {name for name, target in _asked(whole, sparsity, allocation).items() if target == 1}
    lost = [name for name, gone in whole.items() if gone and name not in asked]
    if not lost:
        return
    shared = isinstance(allocation, str) and allocation != "uniform"
    cap = "max_sparsity" if shared else "allocation='erk' or 'global' and max_sparsity"
    warnings.warn(
        f"{named(name or '(root)' for name in lost)}: all weights are removed, so that nothing of the input comes "
        f"through; keep some with {cap} below 1, or leave such layers dense with exclude=[{named(map(repr, lost))}]",
        RemovedLayerWarning,
        stacklevel=3,
    )


def is_empty(mask: Tensor) -> bool:
    """Say whether a mask removes all of some weights."""
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
    """Rank the units of the layers in `n_units` against each other, and return how many each of them loses."""
    units = {name: (unit_scores(scores[name], pattern), unit_any(masks[name], pattern)) for name in n_units}
    total = sum(n_units.values())
    n_keep = total - n_removed(sparsity, total)
    n_kept = int(ranks.sum(torch.tensor([int(kept.sum()) for _, kept in units.values()], device="cpu").sum()))
    chosen = keep_largest([prefer_kept(s, kept, n_keep, n_kept) for s, kept in units.values()], n_keep, ranks)
    n_gone = ranks.sum(torch.tensor([int((~kept).sum()) for kept in chosen], device="cpu")).tolist()
    return dict(zip(units, n_gone, strict=True))


def _asked(layers: Mapping[str, object], sparsity: float | None, allocation: Allocation) -> dict[str, float | None]:
    if isinstance(allocation, Mapping):
        return {**layer_targets(allocation, layers)}
    return dict.fromkeys(layers, sparsity)


def _check_nm(pattern: Pattern, sparsity: float | None, allocation: Allocation) -> None:
    if allocation != "uniform":
        raise ValueError(
            f"allocation {allocation!r} has no effect with pattern {pattern.text}, which fixes every layer's sparsity"
        )
    fixed = 1 - pattern.keep / pattern.group
    if sparsity is not None and not math.isclose(check_sparsity(sparsity), fixed, abs_tol=1e-9):
        raise ValueError(f"pattern {pattern.text} means sparsity {fixed:g}, got {sparsity:g}; leave the sparsity out")


def check_target(sparsity: float | None) -> float:
    """Return the target; raise ValueError if it is missing or no fraction."""
    if sparsity is None:
        raise ValueError("a sparsity is needed (a fraction between 0 and 1)")
    return check_sparsity(sparsity)
