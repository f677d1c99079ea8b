"""The targets of a recipe's groups, compared with the masks of their layers from any source."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from sparsify.errors import ScheduleWarning
from sparsify.layers import MaskedLayer
from sparsify.masking.allocation import n_removed
from sparsify.masking.patterns import Pattern, parse_pattern, unit_any
from sparsify.masking.spec import layer_specs
from sparsify.masking.unseen import named
from sparsify.recipes.schema import HOLD, Group


@dataclass(frozen=True)
class Count:
    """The units of a layer, or of layers under one target: removed now, to be removed, and in total."""

    names: tuple[str, ...]
    removed: int
    wanted: int
    total: int


def counts(group: Group, layers: Mapping[str, MaskedLayer], time: float | None = None) -> list[Count]:
    """Count the removed units of a group's layers beside its target at a time (None: at the end).

    The units are those of the pattern. Of N:M, weights beyond the M - N to be removed in a group of M do not count.
    """
    if group.method == HOLD:
        return []
    pattern, spec = parse_pattern(group.pattern), group.spec(time)
    shapes = {name: layer.shape for name, layer in layers.items()}
    removed = {name: _n_removed(layer.matrix(layer.mask), pattern) for name, layer in layers.items()}
    total = {name: pattern.n_units(shape) for name, shape in shapes.items()}
    if spec.is_measured:
        n_units = sum(total.values())
        return [Count(tuple(layers), sum(removed.values()), n_removed(spec.target, n_units), n_units)]
    specs = layer_specs(spec, shapes)
    return [Count((name,), removed[name], specs[name].n_removed, total[name]) for name in layers]


def check_beginning(
    number: int, group: Group, layers: Mapping[str, MaskedLayer], group_counts: Sequence[Count]
) -> None:
    """Warn of layers that come to a training with more than their final sparsity; they keep it.

    Raises ValueError if a mask of another pattern cannot become one of the group's without giving weights back.
    """
    for count in group_counts:
        n_masked = sum(int((~layers[name].mask).sum()) for name in count.names)
        n_weights = sum(layers[name].mask.numel() for name in count.names)
        if n_masked * count.total > count.wanted * n_weights > count.removed * n_weights:
            raise ValueError(
                f"{named(count.names)}: {n_masked / n_weights:.4g} of the weights are masked, in another pattern than "
                f"{group.pattern!r}, and its target of {count.wanted / count.total:.4g} would give some back; call "
                f"sparsify.prune(model, ..., pattern={group.pattern!r}) first"
            )
    if beyond := [count for count in group_counts if count.removed > count.wanted]:
        warnings.warn(
            f"groups.{number}: the model is sparser than the recipe's target, {_describe(beyond)}; a Pruner gives no "
            "weights back: these masks stay, unless sparsify.prune lowers them first",
            ScheduleWarning,
            stacklevel=3,
        )


def check_step(number: int, step: int, group_counts: Sequence[Count]) -> None:
    """Warn of masks below the target of the last step, changed by something else than a Pruner."""
    if short := [count for count in group_counts if count.removed < count.wanted]:
        warnings.warn(
            f"groups.{number}: something has changed the masks since the last step, and they miss the target of step "
            f"{step}, {_describe(short)}; if the model went back to a checkpoint, load the Pruner's state of it too",
            ScheduleWarning,
            stacklevel=4,
        )


def check_end(number: int, group_counts: Sequence[Count]) -> None:
    """Raise RuntimeError for masks below the final target; warn of masks above it."""
    if short := [count for count in group_counts if count.removed < count.wanted]:
        raise RuntimeError(
            f"groups.{number}: the masks miss the target, {_describe(short)}: something has changed them after the "
            "schedule's last update, such as an earlier checkpoint; load the last one, or call sparsify.prune"
        )
    if beyond := [count for count in group_counts if count.removed > count.wanted]:
        warnings.warn(
            f"groups.{number}: the masks remove more than the target, {_describe(beyond)}",
            ScheduleWarning,
            stacklevel=3,
        )


def _describe(of: Iterable[Count]) -> str:
    """Return the removed and the wanted fraction of each count, as a phrase."""
    return "; ".join(
        f"{named(name or '(root)' for name in count.names)}: {count.removed / count.total:.4g} instead of "
        f"{count.wanted / count.total:.4g}"
        for count in of
    )


def _n_removed(mask: Tensor, pattern: Pattern) -> int:
    if pattern.is_nm:
        return int((~mask).reshape(-1, pattern.group).sum(1).clamp(max=pattern.group - pattern.keep).sum())
    return int((~unit_any(mask, pattern)).sum())
