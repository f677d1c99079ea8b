"""Allocations: from one target to the number of removed units of each layer.

"uniform", "erk" and "depth:0.1" are formulas of shapes and names. "global" ranks the scores of all layers together
(masks.py). "owl" and "error" measure each layer on calibration data (pruning/measured_allocation.py).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real

ALLOCATIONS = ("uniform", "global", "erk")

#: The beginning of an allocation by depth; a number follows.
DEPTH = "depth:"

#: Allocations that need calibration data.
MEASURED_ALLOCATIONS = ("owl", "error")

_OWL_SPREAD = 0.08  # no layer's sparsity is further than this from the target: the paper's lambda


def check_sparsity(sparsity: object, what: str = "sparsity") -> float:
    """Return the sparsity as a float; raise ValueError if it is outside [0, 1] or not a number."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real) or not 0 <= float(sparsity) <= 1:
        raise ValueError(f"{what} must be a fraction between 0 and 1, got {sparsity!r}")
    return float(sparsity)


def n_removed(sparsity: float, n_units: int) -> int:
    """Return round(sparsity x n_units), the exact number of units to remove."""
    return round(sparsity * n_units)


def uniform(n_units: Mapping[str, int], sparsity: float) -> dict[str, int]:
    """Remove the same fraction of each layer.

    >>> uniform({"a": 10, "b": 100}, 0.9)
    {'a': 9, 'b': 90}
    """
    return {name: n_removed(sparsity, n) for name, n in n_units.items()}


def erk(n_units: Mapping[str, int], shapes: Mapping[str, tuple[int, int]], sparsity: float) -> dict[str, int]:
    """Keep a density proportional to (in + out) / (in x out): large layers lose more.

    A layer with a density above 1 stays dense, and the others share the rest. The removed units of all layers add up
    to exactly round(sparsity x their number). A higher sparsity never takes less from any layer: one scale of all
    densities, each rounded by itself, falls until the sum is right (Webster's method; largest remainders would move
    units from one layer to another).

    >>> erk({"a": 100, "b": 400}, {"a": (10, 10), "b": (20, 20)}, 0.8)
    {'a': 67, 'b': 333}

    A convolution counts as its matrix, with in_channels / groups x kernel inputs. So a k x k layer keeps more than by
    the paper's rule for kernels, where their sides are added to the channels.

    Evci et al. 2020, arXiv:1911.11134 (the Erdos-Renyi kernel rule for linear layers).
    """
    total = sum(n_units.values())
    n_keep = total - n_removed(sparsity, total)
    share = {name: sum(shapes[name]) * n / math.prod(shapes[name]) if n else 0.0 for name, n in n_units.items()}

    def kept_at(scale: float) -> dict[str, int]:
        return {name: min(n, math.floor(scale * share[name] + 0.5)) for name, n in n_units.items()}

    high = max((2 * n / share[name] for name, n in n_units.items() if n), default=0.0)
    kept = _kept_in_total(kept_at, 0.0, high, n_keep)
    return {name: n - kept[name] for name, n in n_units.items()}


def owl(n_units: Mapping[str, int], outliers: Mapping[str, float], sparsity: float) -> dict[str, int]:
    """Keep more of layers with more outliers among their scores, within 0.08 of the target.

    outliers: for each layer, the fraction of its scores above five times their mean. Densities follow it linearly, over
    a range of 0.16, and are moved together until the removed units of all layers add up to exactly round(sparsity x
    their number).

    >>> owl({"a": 100, "b": 100}, {"a": 0.01, "b": 0.03}, 0.5)
    {'a': 58, 'b': 42}

    Yin et al. 2023, arXiv:2310.05175.
    """
    total = sum(n_units.values())
    least, most = min(outliers.values(), default=0.0), max(outliers.values(), default=0.0)
    share = {name: 2 * _OWL_SPREAD * (x - least) / ((most - least) or 1.0) for name, x in outliers.items()}

    def kept_at(shift: float) -> dict[str, int]:
        return {name: math.floor(n * min(max(share[name] + shift, 0.0), 1.0) + 0.5) for name, n in n_units.items()}

    kept = _kept_in_total(kept_at, -1.0, 1.5, total - n_removed(sparsity, total))
    return {name: n - kept[name] for name, n in n_units.items()}


def depth_spread(allocation: object) -> float | None:
    """Return the number in "depth:0.1"; None for another allocation.

    Raises ValueError unless it lies between -1 and 1 and is not 0.
    """
    if not isinstance(allocation, str) or not allocation.startswith(DEPTH):
        return None
    try:
        spread = float(allocation.removeprefix(DEPTH))
    except ValueError:
        spread = math.nan
    if not 0 < abs(spread) < 1:
        raise ValueError(
            f"allocation {allocation!r} needs a number between -1 and 1 behind {DEPTH!r}, and not 0: by how much the "
            'last block is sparser than the mean, such as "depth:0.1"'
        )
    return spread


def blocks_in_order(names: Iterable[str]) -> dict[str, int]:
    """Number the blocks of layers in order: a block is named by the parts of a name up to the first with a last digit.

    >>> blocks_in_order(["embed", "layers.0.q", "layers.0.k", "layers.1.q"])
    {'embed': 0, 'layers.0.q': 1, 'layers.0.k': 1, 'layers.1.q': 2}
    """
    numbers: dict[str, int] = {}
    found = {}
    for name in names:
        prefix = re.match(r"(?:[^.]*\.)*?[^.]*\d(?=\.|$)", name)
        found[name] = numbers.setdefault(prefix[0] if prefix else name, len(numbers))
    return found


def by_depth(n_units: Mapping[str, int], numbers: Mapping[str, int], sparsity: float, spread: float) -> dict[str, int]:
    """Let sparsity rise from block to block in equal steps: `spread` below the mean at first, and above it at last.

    numbers: the block of each layer, counted from 0. The removed units of all layers add up to exactly round(sparsity x
    their number): all densities are moved together, within 0 and 1. A higher sparsity never takes less from any layer.

    >>> by_depth({"a": 100, "b": 100, "c": 100}, {"a": 0, "b": 1, "c": 2}, 0.8, 0.1)
    {'a': 70, 'b': 80, 'c': 90}

    Huang et al. 2025, arXiv:2502.14770.
    """
    total, last = sum(n_units.values()), max(numbers.values(), default=0) or 1
    share = {name: spread * (1 - 2 * numbers[name] / last) for name in n_units}

    def kept_at(shift: float) -> dict[str, int]:
        return {name: math.floor(n * min(max(share[name] + shift, 0.0), 1.0) + 0.5) for name, n in n_units.items()}

    kept = _kept_in_total(kept_at, -2.0, 2.5, total - n_removed(sparsity, total))
    return {name: n - kept[name] for name, n in n_units.items()}


def least_error(curves: Mapping[str, Sequence[tuple[int, float]]], n_total: int) -> dict[str, int]:
    """Remove the `n_total` cheapest units, by each layer's measured (removed units, error) points.

    A curve begins with (0, 0.0) and ends with all units of the layer; between its points it is straight. Pieces are
    taken cheapest first, by error per unit, each curve from its beginning: a piece counts as at least as costly as
    those before it.

    >>> least_error({"a": [(0, 0.0), (5, 1.0), (10, 9.0)], "b": [(0, 0.0), (10, 4.0)]}, 12)
    {'a': 5, 'b': 7}
    """
    pieces: list[tuple[float, int, str, int]] = []
    for order, (name, points) in enumerate(curves.items()):
        steepest = 0.0
        for (n, error), (n_next, error_next) in itertools.pairwise(points):
            steepest = max(steepest, (error_next - error) / max(n_next - n, 1))
            pieces.append((steepest, order, name, n_next - n))
    removed = dict.fromkeys(curves, 0)
    for _, _, name, n in sorted(pieces, key=lambda piece: piece[:2]):
        n_here = min(n, n_total)
        removed[name] += n_here
        n_total -= n_here
    return removed


def capped(
    allocate: Callable[[Mapping[str, int], float], Mapping[str, int]],
    n_units: Mapping[str, int],
    sparsity: float,
    max_sparsity: float | None,
) -> dict[str, int]:
    """Share a target between layers; none loses more than `max_sparsity` of its units, rounded down.

    `allocate` shares a sparsity between layers with these units. A layer above its cap is held there, and the others
    share the rest, until no layer is. Raises ValueError if the caps leave no room for the target.

    >>> shapes = {"a": (10, 10), "b": (20, 20)}
    >>> capped(lambda units, sparsity: erk(units, shapes, sparsity), {"a": 100, "b": 400}, 0.8, 0.82)
    {'a': 72, 'b': 328}
    """
    if max_sparsity is None:
        return dict(allocate(n_units, sparsity))
    check_room(n_units, sparsity, max_sparsity)
    caps = _caps(n_units, max_sparsity)
    n_left = n_removed(sparsity, sum(n_units.values()))
    held: dict[str, int] = {}
    while True:
        free = {name: n for name, n in n_units.items() if name not in held}
        shared = allocate(free, n_left / max(sum(free.values()), 1)) if free else {}
        over = {name: caps[name] for name, n in shared.items() if n > caps[name]}
        if not over:
            return {name: held[name] if name in held else shared[name] for name in n_units}
        held |= over
        n_left -= sum(over.values())


def check_room(n_units: Mapping[str, int], sparsity: float, max_sparsity: float | None) -> None:
    """Raise ValueError if layers of so many units, none above `max_sparsity`, cannot reach the sparsity together."""
    if max_sparsity is None:
        return
    caps = _caps(n_units, check_sparsity(max_sparsity, "max_sparsity"))
    if n_removed(sparsity, sum(n_units.values())) > sum(caps.values()):
        raise ValueError(f"max_sparsity={max_sparsity:g} for each layer leaves no room for sparsity {sparsity:g}")


def _caps(n_units: Mapping[str, int], max_sparsity: float) -> dict[str, int]:
    """Return the largest number of units to remove from each layer."""
    return {name: math.floor(max_sparsity * n + 1e-9) for name, n in n_units.items()}


def _kept_in_total(kept_at: Callable[[float], dict[str, int]], low: float, high: float, n_keep: int) -> dict[str, int]:
    """Return the units kept by each layer, `n_keep` in all, at a level between `low` and `high`.

    kept_at never falls as the level rises. If several layers gain a unit at the same level, the first in order get
    theirs.
    """
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if sum(kept_at(middle).values()) >= n_keep else (middle, high)
    kept, above = kept_at(low), kept_at(high)
    missing = n_keep - sum(kept.values())
    for name in kept:
        extra = min(missing, above[name] - kept[name])
        kept[name] += extra
        missing -= extra
    return kept
