"""Regrowth (dynamic sparse training): the weakest kept weights give their places to as many masked ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsify.distributed import SINGLE, Ranks
from sparsify.masking.patterns import Pattern, expand_units, keep_largest, unit_any, unit_scores


def regrow_fraction(fraction: float, progress: float) -> float:
    """Return the fraction of kept weights to exchange, from `fraction` at progress 0 down to 0 at 1.

    >>> [round(regrow_fraction(0.3, progress), 3) for progress in (0, 0.5, 1)]
    [0.3, 0.15, 0.0]

    Evci et al. 2020, arXiv:1911.11134 (the cosine).
    """
    return fraction / 2 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def drop_and_grow(
    mask: Tensor, scores: Tensor, growth: Tensor, fraction: float, pattern: Pattern, ranks: Ranks = SINGLE
) -> Tensor:
    """Drop round(fraction x kept units) of the lowest scores, and grow as many of the highest growth elsewhere.

    mask, scores and growth are (out, in); returns a new mask with as many units. Dropped units may grow back at once.
    Of several `ranks` each has its own rows.

    >>> mask = torch.tensor([[True, True, False, False]])
    >>> drop_and_grow(mask, torch.tensor([[3.0, 1.0, 9.0, 9.0]]), torch.tensor([[0.0, 1.0, 2.0, 5.0]]), 0.5,
    ...          Pattern("unstructured")).tolist()
    [[True, False, False, True]]

    Mocanu et al. 2018, arXiv:1707.04780 (growth at random: SET); Evci et al. 2020, arXiv:1911.11134 (growth by
    gradient: RigL).
    """
    kept = unit_any(mask, pattern)
    n_kept = int(ranks.sum(kept.sum()))
    n_moved = round(fraction * n_kept)
    strength = unit_scores(scores, pattern).masked_fill(~kept, -math.inf)
    survivors = keep_largest([strength], n_kept - n_moved, ranks)[0]
    growing = unit_scores(growth, pattern).masked_fill(survivors, -math.inf)
    grown = keep_largest([growing], n_moved, ranks)[0]
    return expand_units(survivors | grown, pattern, mask.shape)


def random_growth_scores(mask: Tensor, seed: int) -> Tensor:
    """Draw a growth score for each weight, on the CPU: one seed gives one mask on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(mask.shape, generator=generator, device="cpu", dtype=torch.float32).to(mask.device)
