"""Patterns of masks: from scores to a mask of exactly the wanted sparsity.

A *unit* is kept or removed as a whole: one weight, a block, a row or a column. All patterns but N:M rank units and
remove the lowest; N:M ranks inside each group of M consecutive weights of a row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsify.distributed import SINGLE, Ranks

#: The largest group of N:M whose scores are compared with one another, in half the time of a sort for 2:4; a sort is
#: faster from 16 on.
_MOST_COMPARED = 8
KINDS = ("unstructured", "rows", "columns", 'N:M such as "2:4"', 'blocks such as "4x1" (rows x columns)')


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern: blocks of `block` weights (0 = the whole extent), or `keep` of every `group` in a row."""

    text: str
    block: tuple[int, int] = (1, 1)
    keep: int = 0
    group: int = 0

    @property
    def is_nm(self) -> bool:
        """True for an N:M pattern; its sparsity is fixed at 1 - N/M."""
        return self.group > 0

    def unit_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return (rows, columns) of one unit in a weight of the given shape (out_features, in_features)."""
        return self.block[0] or shape[0], self.block[1] or shape[1]

    def n_units(self, shape: Sequence[int]) -> int:
        """Return the number of units in a weight of the given shape."""
        rows, columns = self.unit_shape(shape)
        return (shape[0] // max(rows, 1)) * (shape[1] // max(columns, 1))


def parse_pattern(text: str) -> Pattern:
    """Parse a pattern, in the words of a recipe.

    >>> parse_pattern("4x1").block, parse_pattern("2:4").keep, parse_pattern("rows").block
    ((4, 1), 2, (1, 0))
    """
    named = {"unstructured": (1, 1), "rows": (1, 0), "columns": (0, 1)}
    if text in named:
        return Pattern(text, block=named[text])
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        keep, group = int(match[1]), int(match[2])
        if 0 < keep < group:
            return Pattern(text, keep=keep, group=group)
    if match := re.fullmatch(r"(\d+)x(\d+)", text):
        rows, columns = int(match[1]), int(match[2])
        if rows > 0 and columns > 0:
            return Pattern(text, block=(rows, columns))
    raise ValueError(f"pattern {text!r} is none of: {', '.join(KINDS)} (N < M, block sides at least 1)")


def check_fits(pattern: Pattern, shape: Sequence[int], name: str) -> None:
    """Raise ValueError, naming the layer, if a weight of this shape cannot be cut into the pattern's units."""
    label, way_out = (f"{name}: ", f"; leave it dense with exclude=[{name!r}]") if name else ("", "")
    if pattern.is_nm and shape[1] % pattern.group:
        raise ValueError(
            f"{label}pattern {pattern.text} needs in_features divisible by {pattern.group}, got {shape[1]}{way_out}"
        )
    rows, columns = pattern.unit_shape(shape)
    if shape[0] % max(rows, 1) or shape[1] % max(columns, 1):
        raise ValueError(
            f"{label}pattern {pattern.text} needs (out_features, in_features) divisible by ({rows}, {columns}), "
            f"got {tuple(shape)}{way_out}"
        )


def unit_scores(scores: Tensor, pattern: Pattern) -> Tensor:
    """Sum the scores (out, in) over each unit; returns (out / rows, in / columns).

    Blocks are summed in float64: the ranking does not depend on the order of the additions.
    """
    rows, columns = pattern.unit_shape(scores.shape)
    if (rows, columns) == (1, 1) or scores.numel() == 0:
        return scores
    out, inner = scores.shape
    return scores.double().reshape(out // rows, rows, inner // columns, columns).sum(dim=(1, 3))


def unit_any(mask: Tensor, pattern: Pattern) -> Tensor:
    """Return a bool for each unit, True if `mask` is True for any of its weights."""
    return unit_scores(mask.to(torch.uint8), pattern) > 0


def expand_units(kept: Tensor, pattern: Pattern, shape: Sequence[int]) -> Tensor:
    """Turn one bool per unit into one per weight: the inverse of `unit_any`."""
    rows, columns = pattern.unit_shape(shape)
    return kept.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def choose_mask(
    scores: Tensor, mask: Tensor, pattern: Pattern, n_removed: int, *, by_row: bool = False, ranks: Ranks = SINGLE
) -> Tensor:
    """Keep all but the `n_removed` lowest units of a layer, or of each group the N best.

    scores (out, in) rank the weights. Units that `mask` removes now rank below its kept ones: within one pattern, masks
    nest. With `by_row` a unit competes with those of its row only: each row loses as many, and if that does not come
    out even, the last rows lose one more. Of several `ranks` each has its own rows.

    >>> scores, mask = torch.tensor([[1.0, 2.0], [8.0, 9.0]]), torch.ones(2, 2, dtype=torch.bool)
    >>> choose_mask(scores, mask, parse_pattern("unstructured"), 2).int().tolist()
    [[0, 0], [1, 1]]
    >>> choose_mask(scores, mask, parse_pattern("unstructured"), 2, by_row=True).int().tolist()
    [[0, 1], [0, 1]]
    """
    units, kept = unit_scores(scores, pattern), unit_any(mask, pattern)
    if pattern.is_nm:
        return nm_mask(prefer_kept(units, kept, n_keep=0), pattern.keep, pattern.group)
    n_units, n_kept = ranks.sum(torch.tensor([kept.numel(), int(kept.sum())], device="cpu")).tolist()
    n_keep = n_units - n_removed
    if by_row:
        units = _rank_in_row(units.masked_fill(~kept, -math.inf))
    return expand_units(
        keep_largest([prefer_kept(units, kept, n_keep, n_kept)], n_keep, ranks)[0], pattern, scores.shape
    )


def prefer_kept(scores: Tensor, kept: Tensor, n_keep: int, n_kept: int | None = None) -> Tensor:
    """Rank units that are kept now above the others; the scores decide among those on the side of the cut."""
    if n_kept is None:
        n_kept = int(kept.sum())
    if n_keep <= n_kept == kept.numel():
        return scores
    return scores.masked_fill(~kept, -math.inf) if n_keep <= n_kept else scores.masked_fill(kept, math.inf)


def _rank_in_row(scores: Tensor) -> Tensor:
    """Return the number of smaller scores in the row of each one; of equal ones the first counts as larger."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    ranks = torch.arange(scores.shape[1] - 1, -1, -1, dtype=torch.float64, device=scores.device)
    return torch.empty_like(scores, dtype=torch.float64).scatter_(1, order, ranks.expand_as(order))


def nm_mask(scores: Tensor, keep: int, group: int) -> Tensor:
    """Keep the `keep` largest of every `group` consecutive scores in a row.

    scores is (out, in), larger is more worth keeping; of equal scores the leftmost stays.
    Returns a bool mask of the same shape, exactly `keep` True per group.
    Raises ValueError if `in` is not a multiple of `group`.

    >>> nm_mask(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), keep=2, group=4).int().tolist()
    [[0, 1, 1, 0]]

    Mishra et al. 2021, arXiv:2104.08378.
    """
    if scores.shape[1] % group:
        raise ValueError(f"N:M needs in_features divisible by {group}, got {scores.shape[1]}")
    groups = scores.reshape(-1, group)
    if group <= _MOST_COMPARED:
        return _is_among_best(groups.T.contiguous(), keep).T.reshape(scores.shape)
    best = groups.sort(dim=1, descending=True, stable=True).indices[:, :keep]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True).reshape(scores.shape)


def _is_among_best(places: Tensor, keep: int) -> Tensor:
    """Mark in each column of scores (group, n), free of NaN, the `keep` largest, of equal ones the first, by comparing.

    A sort looks at each group by itself.
    """
    best = torch.empty_like(places, dtype=torch.bool)
    for i, score in enumerate(places):
        better = torch.zeros_like(score, dtype=torch.int8)
        for j, other in enumerate(places):
            if j != i:
                better += (other >= score if j < i else other > score).view(torch.int8)
        torch.lt(better, keep, out=best[i])
    return best


def keep_largest(scores: Sequence[Tensor], n_keep: int, ranks: Ranks = SINGLE) -> list[Tensor]:
    """Keep exactly the `n_keep` largest of all scores together; of equal ones the first in order stays.

    scores are floating tensors of any shapes and devices, free of NaN; returns a bool mask for each.
    Works on the bits, of one tensor by a partition, of several by radix selection, one tensor at a time: nothing is
    concatenated or sorted. Of several `ranks`, each has its own rows of every tensor, and only counts travel between
    them.

    >>> [m.int().tolist() for m in keep_largest([torch.tensor([1.0, 5.0, 2.0]), torch.tensor([2.0, 2.0])], 3)]
    [[0, 1, 1], [1, 0]]
    """
    total = int(ranks.sum(torch.tensor(sum(s.numel() for s in scores), device="cpu")))
    if not 0 <= n_keep <= total:
        raise ValueError(f"cannot keep {n_keep} of {total} scores")
    if n_keep in (0, total):
        return [torch.full_like(s, n_keep > 0, dtype=torch.bool) for s in scores]
    wide = any(s.dtype == torch.float64 for s in scores)
    keys = [_ordered_bits(s.double() if wide else s.float()) for s in scores]
    if ranks.n == 1 and len(keys) == 1 and keys[0].is_cpu:
        threshold, n_ties = _partition_select(keys[0], n_keep)
    else:
        threshold, n_ties = _radix_select(keys, n_keep, 64 if wide else 32, ranks)
    # Ties in order: all of the first tensor's, whichever rank has them, before any of the second's.
    ties = ranks.gather(torch.tensor([int((key == threshold).sum()) for key in keys], device="cpu")).T.flatten()
    before = (ties.cumsum(0) - ties).reshape(len(keys), ranks.n)[:, ranks.rank].tolist()
    own = ties.reshape(len(keys), ranks.n)[:, ranks.rank].tolist()
    return [
        _above(key, threshold, min(max(n_ties - n_before, 0), n_tied), n_tied)
        for key, n_before, n_tied in zip(keys, before, own, strict=True)
    ]


def _above(keys: Tensor, threshold: int, n_ties: int, n_tied: int) -> Tensor:
    """Return the mask of the keys above a threshold, and of the first `n_ties` of the `n_tied` that equal it."""
    if n_ties in (0, n_tied):
        return keys > threshold if n_ties == 0 else keys >= threshold
    tied = (keys == threshold).flatten()
    first = tied & (tied.cumsum(0) <= n_ties)
    return (keys > threshold) | first.reshape(keys.shape)


def _ordered_bits(values: Tensor) -> Tensor:
    """Map floats to integers of the same order (-0.0 and 0.0 to the same one)."""
    integer, top = (torch.int64, 63) if values.dtype == torch.float64 else (torch.int32, 31)
    bits = (values + 0.0).view(integer)
    of_negative: Tensor = bits >> top & (2**top - 1)  # all but the sign
    return bits ^ of_negative


def _partition_select(keys: Tensor, n_keep: int) -> tuple[int, int]:
    """Return what `_radix_select` does of one tensor on the CPU, several times as fast."""
    at = keys.numel() - n_keep
    threshold = int(np.partition(keys.flatten().numpy(), at)[at])
    return threshold, n_keep - int((keys > threshold).sum())


def _radix_select(keys: Sequence[Tensor], n_keep: int, bits: int, ranks: Ranks) -> tuple[int, int]:
    """Return the n_keep-th largest key, found by 16 bits at a time, and the number of keys equal to it to be kept."""
    digit_range = 1 << 16
    prefix = 0
    for shift in range(bits - 16, -1, -16):
        counts = torch.zeros(digit_range, dtype=torch.int64, device="cpu")
        for key in keys:
            # The top digit is signed: moving it by half the range makes all digits count from 0.
            high, offset = key >> shift, digit_range // 2 if shift == bits - 16 else 0
            if not offset:
                high = high[(high >> 16) == prefix]
            digit = high + offset if offset else high & (digit_range - 1)
            counts += torch.bincount(digit.flatten(), minlength=digit_range).cpu()
        counts = ranks.sum(counts)
        from_top = counts.flip(0).cumsum(0)
        position = int((from_top >= n_keep).int().argmax())
        digit_found = digit_range - 1 - position
        n_keep -= int(from_top[position] - counts[digit_found])
        prefix = digit_found - digit_range // 2 if shift == bits - 16 else (prefix << 16) + digit_found
    return prefix, n_keep
