"""How one target becomes a number of removed units for each layer.

"global" is no formula of the shapes: there the scores of all layers are ranked together (masks.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real

ALLOCATIONS = ("uniform", "global", "erk")


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
    """Keep a density proportional to (in + out) / (in x out), so that large layers lose more.

    A layer whose share would exceed 1 stays dense and the others share the rest. The removed units of all layers add up
    to exactly round(sparsity x their number). A higher sparsity never takes less from any layer: the one scale of all
    shares, each rounded by itself, falls until the sum is right (Webster's method; giving what rounding leaves over to
    the largest remainders can move a unit from one layer to another).

    >>> erk({"a": 100, "b": 400}, {"a": (10, 10), "b": (20, 20)}, 0.8)
    {'a': 67, 'b': 333}

    Evci et al. 2020, arXiv:1911.11134 (the Erdos-Renyi kernel rule for linear layers).
    """
    total = sum(n_units.values())
    n_keep = total - n_removed(sparsity, total)
    share = {name: sum(shapes[name]) * n / math.prod(shapes[name]) if n else 0.0 for name, n in n_units.items()}

    def kept_at(scale: float) -> dict[str, int]:
        return {name: min(n, math.floor(scale * share[name] + 0.5)) for name, n in n_units.items()}

    low, high = 0.0, max((2 * n / share[name] for name, n in n_units.items() if n), default=0.0)
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if sum(kept_at(middle).values()) >= n_keep else (middle, high)
    kept, above = kept_at(low), kept_at(high)
    missing = n_keep - sum(kept.values())
    for name in n_units:  # where layers cross a half at the same scale, the first in order get the unit
        extra = min(missing, above[name] - kept[name])
        kept[name] += extra
        missing -= extra
    return {name: n - kept[name] for name, n in n_units.items()}
