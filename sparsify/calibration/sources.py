"""Calibration data of several sources, sampled evenly."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


def mix_data(sources: Mapping[str, Iterable[Any]], samples: int | None = None) -> list[Any]:
    """Return batches of several sources, in turns, with about the same number of samples of each.

    sources: by name, batches as for `prune`; each is read once
    samples: of all sources together; by default as many as the smallest source allows

    Whole batches are taken, evenly spread over their source: a source is half a batch off at most. One that has less
    than its share gives all it has, and a warning names it. Raises ValueError for no source, and an empty one.

    >>> import torch
    >>> batches = mix_data({"news": [torch.zeros(2, 3)] * 4, "letters": [torch.ones(2, 3)] * 2})
    >>> [int(batch[0, 0]) for batch in batches]
    [0, 1, 0, 1]
    """
    read = {name: [(batch, n_samples(batch)) for batch in batches] for name, batches in sources.items()}
    totals = {name: sum(n for _, n in batches) for name, batches in read.items()}
    if empty := [name for name, total in totals.items() if not total]:
        raise ValueError(f"source {empty[0]!r} is empty; a generator that was read before is empty too")
    if not totals:
        raise ValueError("no source of calibration data; give a mapping from names to batches")
    if samples is not None and samples < len(totals):
        raise ValueError(f"samples={samples} is less than one of each of {len(totals)} sources")
    share = min(totals.values()) if samples is None else samples / len(totals)
    placed: list[tuple[float, Any]] = []
    for name, batches in read.items():
        if totals[name] < round(share):
            warnings.warn(f"source {name!r} has {totals[name]} samples, less than its share of {share:g}", stacklevel=2)
        chosen = _spread(batches, min(share / totals[name], 1.0))
        placed += [((i + 0.5) / len(chosen), batch) for i, batch in enumerate(chosen)]
    return [batch for _, batch in sorted(placed, key=lambda pair: pair[0])]


def n_samples(batch: Any) -> int:
    """Return the number of samples in a batch: the first size of its first tensor."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    return next((value.shape[0] for value in values if isinstance(value, Tensor) and value.ndim), 1)


def _spread(batches: list[tuple[Any, int]], fraction: float) -> list[Any]:
    """Return about this fraction of the samples, in whole batches evenly spread; at least one batch."""
    chosen, n_seen, n_chosen = [], 0, 0
    for batch, n in batches:
        n_seen += n
        if n_chosen + n / 2 <= n_seen * fraction:
            chosen.append(batch)
            n_chosen += n
    return chosen or [batches[len(batches) // 2][0]]
