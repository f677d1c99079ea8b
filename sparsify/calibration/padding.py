"""Padding among the rows of a layer's input: its mask, and the layout of the mask's tokens among the rows.

Neither follows from sizes: they may agree by chance. So the padding of one sequence is changed in a run of the model,
and the rows with a change show the layout.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor, nn

from sparsify.calibration.batches import Batch
from sparsify.calibration.padding_probes import Call, Place, Probes, can_be_turned, part_padding
from sparsify.errors import PaddingWarning
from sparsify.masking.unseen import named


@dataclass(frozen=True)
class Layout:
    """The layout of a mask's tokens, (batch, length), in the leading dimensions of a tensor.

    batch, length: the dimensions of sequences and of tokens; the same number for tokens in one dimension
    transposed: in one dimension, tokens of the same index lie together, not those of the same sequence
    """

    mask: str
    batch: int
    length: int
    transposed: bool = False

    def spread(self, tokens: Tensor, lead: Sequence[int]) -> Tensor | None:
        """Return the value of each row's token, for a tensor with these leading dimensions.

        None if the sizes do not allow this layout.

        >>> Layout("attention_mask", 1, 0).spread(torch.tensor([[1, 1, 0], [1, 0, 0]]), (3, 2)).tolist()
        [[1, 1], [1, 0], [0, 0]]
        """
        n_batch, n_length = tokens.shape
        if self.batch == self.length:
            sizes = {self.batch: n_batch * n_length}
            tokens = (tokens.T if self.transposed else tokens).reshape(-1)
        else:
            sizes = {self.batch: n_batch, self.length: n_length}
            tokens = tokens if self.batch < self.length else tokens.T
        if any(dim >= len(lead) or lead[dim] != size for dim, size in sizes.items()):
            return None
        return tokens.reshape([sizes.get(dim, 1) for dim in range(len(lead))]).expand(*lead)


@dataclass(frozen=True)
class Padding:
    """The layouts of padding at each place: for each call in a run of the model, those of all masks."""

    layouts: Mapping[Place, Sequence[tuple[Layout, ...]]]

    def counts(self, place: Place, n_before: int, lead: Sequence[int], batch: Batch) -> Tensor | None:
        """Return a bool for each row at a place, True = no padding, in the call after `n_before` others; None for all.

        Raises ValueError for a batch with another layout than the probed batches.
        """
        calls = self.layouts.get(place, [])
        counted: Tensor | None = None
        for layout in calls[min(n_before, len(calls) - 1)] if calls else ():
            if layout.mask not in batch.masks:
                continue
            rows = layout.spread(batch.masks[layout.mask], lead)
            if rows is None:
                raise ValueError(
                    f"{place[1] or '(root)'}: an {place[0]} of shape {(*lead, '...')} does not have the tokens of "
                    f"{layout.mask!r} where other batches have them; give batches without padding"
                )
            counted = rows if counted is None else counted & rows
        return counted

    def nothing_else(self, batches: Collection[Batch]) -> list[str]:
        """Return the layers with nothing but padding as input, in all batches."""

        def is_all(layouts: tuple[Layout, ...], batch: Batch) -> bool:
            return any(layout.mask in batch.masks and not bool(batch.masks[layout.mask].any()) for layout in layouts)

        return [
            name
            for (kind, name), calls in self.layouts.items()
            if kind == "input" and calls and all(is_all(layouts, batch) for layouts in calls for batch in batches)
        ]


def see_padding(model: nn.Module, batches: Sequence[Batch], places: Iterable[Place]) -> Padding:
    """Find the layouts of padding at these places, in a few runs of the model, in eval mode, for each mask.

    A PaddingWarning names layers with padding among their rows that cannot be told from tokens: all rows count there.
    """
    layouts: dict[Place, list[tuple[Layout, ...]]] = {}
    unsure: dict[str, None] = {}
    for mask in dict.fromkeys(mask for batch in batches for mask in batch.masks):
        left = list(places)
        with_mask = [(number, batch) for number, batch in enumerate(batches) if mask in batch.masks]
        for number, batch in sorted(with_mask, key=lambda pair: _probe_rank(pair[1].masks[mask])):
            for place, calls in _layouts(model, number, batch, mask, left).items():
                left.remove(place)
                unsure.update({place[1]: None} if None in calls else {})
                before = layouts.setdefault(place, [])
                before += [()] * (len(calls) - len(before))
                before[: len(calls)] = [old + (new or ()) for old, new in zip(before, calls, strict=False)]
            if not left:
                break
    if unsure:
        warnings.warn(
            f"{named(name or '(root)' for name in unsure)}: there is padding among the rows that cannot be told from "
            "tokens, so that all of them count; give batches without padding, of sequences of one length each",
            PaddingWarning,
            stacklevel=2,
        )
    return Padding(layouts)


def _probe_rank(mask: Tensor) -> tuple[int, bool, int]:
    """Return a sort key; masks that show a layout best come first: unequal sizes, padding behind tokens, much of it."""
    partial, n_padding = part_padding(mask)
    n_alike = (mask.shape[0] == mask.shape[1]) * (1 if can_be_turned(mask) else 2)
    return n_alike, not bool(partial.any()), -int(n_padding.max())


def _layouts(
    model: nn.Module, number: int, batch: Batch, name: str, places: Collection[Place]
) -> dict[Place, list[tuple[Layout, ...] | None]]:
    """Return the layouts of one mask in a batch, for each call at each place with one; None for an unknown layout."""
    probes, mask = Probes(model, number, batch, name, places), batch.masks[name]
    if not probes.tokens:
        twins = any(torch.equal(other, mask) for key, other in batch.masks.items() if key != name)
        unknown = None if not twins else ()
        return {
            place: [unknown if _possible(name, mask, call.lead) else () for call in calls]
            for place, calls in probes.seen.items()
        }
    return {
        place: [_layout_of_call(name, mask, call, probes, place, n_before) for n_before, call in enumerate(calls)]
        for place, calls in probes.seen.items()
    }


def _layout_of_call(
    name: str, mask: Tensor, call: Call, probes: Probes, place: Place, n_before: int
) -> tuple[Layout, ...] | None:
    """Return the layout with the changed rows as the padding of one sequence.

    () for rows without padding, None for an unknown layout. A model may set padding to zero, so that its rows depend on
    no token: they change only with the mask.
    """
    possible = _possible(name, mask, call.lead)
    if not possible:
        moved = probes.moved("everywhere", place, n_before)
        one_each = len(call.values) == len(mask)  # one row a sequence: no tokens
        return () if one_each or (moved is not None and not bool(moved.any())) else None
    moved, hidden = probes.moved("padding", place, n_before), False
    if moved is not None and not bool(moved.any()):
        moved, hidden = probes.moved("unmasked", place, n_before), True
    if moved is None or not bool(moved.any()):
        return None if moved is None else ()
    exact, closest = _closest(possible, mask, probes.sequence, call, moved)
    if hidden or not exact:
        others = probes.moved("others", place, n_before)
        if others is None or bool(others.any()):  # rows of another input may depend on this one
            return () if hidden else None
    return tuple(closest) if len(closest) == 1 else None


def _closest(
    possible: list[Layout], mask: Tensor, sequence: int, call: Call, moved: Tensor
) -> tuple[bool, list[Layout]]:
    """Return the distinct layouts with all padding of the sequence moved, and the fewest other rows.

    The first value is True for exact layouts: no other row has moved.
    """
    unknown = call.values.isnan()
    of_sequence = torch.zeros_like(mask)
    of_sequence[sequence] = True
    fits: list[tuple[int, Layout]] = []
    for layout in possible:
        padding, rows = (_spread(layout, tokens, call.lead) for tokens in (of_sequence & ~mask, of_sequence))
        if not bool((padding & ~unknown & ~moved).any()):
            rank = 0 if not bool((moved & ~padding).any()) else 1 if not bool((moved & ~rows).any()) else 2
            fits.append((rank, layout))
    closest = min((rank for rank, _ in fits), default=2)
    distinct: list[Layout] = []
    for rank, layout in fits:
        rows = _spread(layout, mask, call.lead)
        if rank == closest and not any(torch.equal(rows, _spread(other, mask, call.lead)) for other in distinct):
            distinct.append(layout)
    return closest == 0, distinct


def _spread(layout: Layout, tokens: Tensor, lead: Sequence[int]) -> Tensor:
    rows = layout.spread(tokens, lead)
    assert rows is not None
    return rows.reshape(-1)


def _possible(name: str, mask: Tensor, lead: Sequence[int]) -> list[Layout]:
    """Return every layout allowed by the sizes."""
    split = [Layout(name, p, q) for p, q in permutations(range(len(lead)), 2)]
    flat = [Layout(name, p, p, transposed) for p in range(len(lead)) for transposed in (False, True)]
    return [layout for layout in (*split, *flat) if layout.spread(mask, lead) is not None]
