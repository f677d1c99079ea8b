"""Whether masks meet the targets of a recipe's groups: counted on the masks, whatever has made them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from sparsify.errors import ScheduleWarning
from sparsify.layers import MaskedLayer
from sparsify.masking.allocation import n_removed
from sparsify.masking.masks import layer_targets, n_removed_units
from sparsify.masking.patterns import Pattern, parse_pattern, unit_any
from sparsify.masking.unseen import named
from sparsify.recipes.recipe import HOLD, Group


@dataclass(frozen=True)
class Count:
    """How many units are removed from a layer, or from layers that share one target, and how many are to be."""

    names: tuple[str, ...]
    found: int
    wanted: int
    total: int


def counts(group: Group, layers: Mapping[str, MaskedLayer], time: float | None = None) -> list[Count]:
    """Count what the masks of a group's layers remove, beside its target at a time (None: at the end).

    In the units of the pattern: of N:M, a weight beyond the M - N that its group of M has to lose does not count.
    """
    if group.method == HOLD:
        return []
    pattern = parse_pattern(group.pattern)
    shapes = {name: layer.shape for name, layer in layers.items()}
    found = {name: _n_removed(layer.matrix(layer.mask), pattern) for name, layer in layers.items()}
    total = {name: shape[0] * shape[1] if pattern.is_nm else pattern.n_units(shape) for name, shape in shapes.items()}

    def target(final: float) -> float:
        return final if time is None else group.schedule.sparsity_at(time, final)

    def of_each(wanted: Mapping[str, int]) -> list[Count]:
        return [Count((name,), found[name], n, total[name]) for name, n in wanted.items()]

    if isinstance(group.allocation, dict):
        finals = layer_targets(group.allocation, layers)
        return of_each({name: n_removed(target(final), total[name]) for name, final in finals.items()})
    if pattern.is_nm:
        per_unit = n_removed_units(shapes, None, pattern, "uniform") if target(1.0) else dict.fromkeys(shapes, 0)
        return of_each(per_unit or {})
    assert group.sparsity is not None
    wanted = n_removed_units(shapes, target(group.sparsity), pattern, group.allocation, group.max_sparsity)
    if wanted is not None:
        return of_each(wanted)
    together = sum(total.values())
    return [Count(tuple(layers), sum(found.values()), n_removed(target(group.sparsity), together), together)]


def check_beginning(number: int, group: Group, layers: Mapping[str, MaskedLayer], found: Sequence[Count]) -> None:
    """Warn of layers that come to a training with more than their final sparsity, which they keep.

    Raises ValueError where a mask of another pattern cannot become one of the group's without giving weights back.
    """
    for one in found:
        n_masked = sum(int((~layers[name].mask).sum()) for name in one.names)
        n_weights = sum(layers[name].mask.numel() for name in one.names)
        if n_masked * one.total > one.wanted * n_weights > one.found * n_weights:
            raise ValueError(
                f"{named(one.names)}: {n_masked / n_weights:.4g} of the weights are masked, in another pattern than "
                f"{group.pattern!r}, and its target of {one.wanted / one.total:.4g} would give some back; call "
                f"sparsify.prune(model, ..., pattern={group.pattern!r}) first"
            )
    if beyond := [one for one in found if one.found > one.wanted]:
        warnings.warn(
            f"groups.{number}: the model is sparser than the recipe's target, {_describe(beyond)}; a Pruner gives no "
            "weights back: these masks stay, unless sparsify.prune lowers them first",
            ScheduleWarning,
            stacklevel=3,
        )


def check_step(number: int, step: int, found: Sequence[Count]) -> None:
    """Warn of masks that something else than a Pruner has changed, and that now miss the target of its last step."""
    if short := [one for one in found if one.found < one.wanted]:
        warnings.warn(
            f"groups.{number}: something has changed the masks since the last step, and they miss the target of step "
            f"{step}, {_describe(short)}; if the model went back to a checkpoint, load the Pruner's state of it too",
            ScheduleWarning,
            stacklevel=4,
        )


def check_end(number: int, found: Sequence[Count]) -> None:
    """Raise RuntimeError for masks that miss the final target; warn of those that remove more."""
    if short := [one for one in found if one.found < one.wanted]:
        raise RuntimeError(
            f"groups.{number}: the masks miss the target, {_describe(short)}: something has changed them after the "
            "schedule's last update, such as an earlier checkpoint; load the last one, or call sparsify.prune"
        )
    if beyond := [one for one in found if one.found > one.wanted]:
        warnings.warn(
            f"groups.{number}: the masks remove more than the target, {_describe(beyond)}",
            ScheduleWarning,
            stacklevel=3,
        )


def _describe(of: Iterable[Count]) -> str:
    """Say of each count which fraction is removed, and which is to be."""
    return "; ".join(
        f"{named(name or '(root)' for name in one.names)}: {one.found / one.total:.4g} instead of "
        f"{one.wanted / one.total:.4g}"
        for one in of
    )


def _n_removed(mask: Tensor, pattern: Pattern) -> int:
    if pattern.is_nm:
        return int((~mask).reshape(-1, pattern.group).sum(1).clamp(max=pattern.group - pattern.keep).sum())
    return int((~unit_any(mask, pattern)).sum())
