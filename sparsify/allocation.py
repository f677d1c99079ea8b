"""How one target becomes a number of removed units for each layer.

"global" is no formula of the shapes: there the scores of all layers are ranked together (masks.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

ALLOCATIONS = ("uniform", "global", "erk")


def check_sparsity(sparsity: float, what: str = "sparsity") -> float:
    """Return the sparsity as a float; raise ValueError if it is outside [0, 1] or not a number."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity <= 1:
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

    A layer whose share would exceed 1 stays dense and the others are scaled again. The removed units of all layers add
    up to exactly round(sparsity x their number): what rounding leaves over goes to the largest remainders.

    >>> erk({"a": 100, "b": 400}, {"a": (10, 10), "b": (20, 20)}, 0.8)
    {'a': 67, 'b': 333}

    Evci et al. 2020, arXiv:1911.11134 (the Erdos-Renyi kernel rule for linear layers).
    """
    total = sum(n_units.values())
    n_keep = total - n_removed(sparsity, total)
    raw = {name: (sum(shapes[name]) / math.prod(shapes[name]) if n_units[name] else 0.0) for name in n_units}
    dense: set[str] = set()
    while True:
        free = [name for name in n_units if name not in dense and n_units[name]]
        left = n_keep - sum(n_units[name] for name in dense)
        scale = left / sum(raw[name] * n_units[name] for name in free) if free else 0.0
        full = {name for name in free if scale * raw[name] >= 1}
        if not full:
            break
        dense |= full
    share = {name: float(n_units[name]) if name in dense else scale * raw[name] * n_units[name] for name in n_units}
    kept = {name: min(math.floor(x), n_units[name]) for name, x in share.items()}
    by_remainder = sorted(n_units, key=lambda name: kept[name] - share[name])
    room = [name for name in by_remainder if kept[name] < n_units[name]]
    for name in room[: n_keep - sum(kept.values())]:
        kept[name] += 1
    return {name: n_units[name] - kept[name] for name in n_units}
