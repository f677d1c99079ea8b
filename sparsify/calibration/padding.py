"""Padding among the rows of a layer's input: the mask that speaks of them, and how its tokens lie among them.

Neither follows from sizes, which happen to agree. So the padding of one sequence is changed, and the rows that change
with it are seen: they lie among the others as the padding lies in its mask.
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
    """How the tokens of a mask, (batch, length), lie among the leading dimensions of a tensor.

    `batch` and `length` are the dimensions they have there. Where these are one, tokens lie one behind the other, those
    of a sequence together unless `transposed`.
    """

    mask: str
    batch: int
    length: int
    transposed: bool = False

    def spread(self, tokens: Tensor, lead: Sequence[int]) -> Tensor | None:
        """Return for each row of a tensor with these leading dimensions the value of its token.

        None if the tokens do not lie like this there.

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
    """The layouts of padding at each place, one tuple a call in a run of the model."""

    layouts: Mapping[Place, Sequence[tuple[Layout, ...]]]

    def counts(self, place: Place, n_before: int, lead: Sequence[int], batch: Batch) -> Tensor | None:
        """Return which rows count at a place, in its call after `n_before` others; None if all do.

        Raises ValueError for a batch in which padding lies otherwise than in those that were looked at.
        """
        calls = self.layouts.get(place, [])
        found: Tensor | None = None
        for layout in calls[min(n_before, len(calls) - 1)] if calls else ():
            if layout.mask not in batch.masks:
                continue
            rows = layout.spread(batch.masks[layout.mask], lead)
            if rows is None:
                raise ValueError(
                    f"{place[1] or '(root)'}: an {place[0]} of shape {(*lead, '...')} does not have the tokens of "
                    f"{layout.mask!r} where other batches have them; give batches without padding"
                )
            found = rows if found is None else found & rows
        return found

    def nothing_else(self, batches: Collection[Batch]) -> list[str]:
        """Return the layers whose inputs are padding only, in all batches."""

        def is_all(layouts: tuple[Layout, ...], batch: Batch) -> bool:
            return any(one.mask in batch.masks and not bool(batch.masks[one.mask].any()) for one in layouts)

        return [
            name
            for (kind, name), calls in self.layouts.items()
            if kind == "input" and calls and all(is_all(layouts, batch) for layouts in calls for batch in batches)
        ]


def see_padding(model: nn.Module, batches: Sequence[Batch], places: Iterable[Place]) -> Padding:
    """See how padding lies at these places, in a few runs of the model for each mask; it has to be in eval mode.

    A PaddingWarning names layers among whose rows padding cannot be told from tokens, so that all of them count.
    """
    found: dict[Place, list[tuple[Layout, ...]]] = {}
    unsure: dict[str, None] = {}
    for mask in dict.fromkeys(mask for batch in batches for mask in batch.masks):
        left = list(places)
        having = [(number, batch) for number, batch in enumerate(batches) if mask in batch.masks]
        for number, batch in sorted(having, key=lambda one: _worth(one[1].masks[mask])):
            for place, calls in _look(model, number, batch, mask, left).items():
                left.remove(place)
                unsure.update({place[1]: None} if None in calls else {})
                before = found.setdefault(place, [])
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
    return Padding(found)


def _worth(mask: Tensor) -> tuple[int, bool, int]:
    """Sort masks by what they tell of a layout: with sizes that differ, with padding behind tokens, with much of it."""
    partial, n_padding = part_padding(mask)
    n_alike = (mask.shape[0] == mask.shape[1]) * (1 if can_be_turned(mask) else 2)
    return n_alike, not bool(partial.any()), -int(n_padding.max())


def _look(
    model: nn.Module, number: int, batch: Batch, name: str, places: Collection[Place]
) -> dict[Place, list[tuple[Layout, ...] | None]]:
    """Look at the layouts of one mask in a batch, at the places that run; None stands for what cannot be told."""
    probes, mask = Probes(model, number, batch, name, places), batch.masks[name]
    if not probes.tokens:
        twins = any(torch.equal(other, mask) for key, other in batch.masks.items() if key != name)
        unknown = None if not twins else ()
        return {
            place: [unknown if _possible(name, mask, call.lead) else () for call in calls]
            for place, calls in probes.seen.items()
        }
    return {
        place: [_fit(name, mask, call, probes, place, n_before) for n_before, call in enumerate(calls)]
        for place, calls in probes.seen.items()
    }


def _fit(name: str, mask: Tensor, call: Call, probes: Probes, place: Place, n_before: int) -> tuple[Layout, ...] | None:
    """Return the layout in which the rows that change are those of the padding of one sequence.

    () if there is no padding among the rows, and None if it cannot be told where. Rows that stand for padding may
    depend on none of it, as where a model sets it to zero: they change when it is no padding any more.
    """
    possible = _possible(name, mask, call.lead)
    if not possible:
        moved = probes.moved("everywhere", place, n_before)
        one_each = len(call.values) == len(mask)  # a row for each sequence is no token
        return () if one_each or (moved is not None and not bool(moved.any())) else None
    moved, hidden = probes.moved("padding", place, n_before), False
    if moved is not None and not bool(moved.any()):
        moved, hidden = probes.moved("unmasked", place, n_before), True
    if moved is None or not bool(moved.any()):
        return None if moved is None else ()
    exact, fits = _closest(possible, mask, probes.sequence, call, moved)
    if hidden or not exact:
        others = probes.moved("others", place, n_before)
        if others is None or bool(others.any()):  # they may be rows of another input, which looks at this one
            return () if hidden else None
    return tuple(fits) if len(fits) == 1 else None


def _closest(
    possible: list[Layout], mask: Tensor, sequence: int, call: Call, moved: Tensor
) -> tuple[bool, list[Layout]]:
    """Return the different layouts in which all padding of the sequence has moved, and the fewest other rows.

    Whether it is exact comes first: then no others have.
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
    found: list[Layout] = []
    for rank, layout in fits:
        rows = _spread(layout, mask, call.lead)
        if rank == closest and not any(torch.equal(rows, _spread(other, mask, call.lead)) for other in found):
            found.append(layout)
    return closest == 0, found


def _spread(layout: Layout, tokens: Tensor, lead: Sequence[int]) -> Tensor:
    rows = layout.spread(tokens, lead)
    assert rows is not None
    return rows.reshape(-1)


def _possible(name: str, mask: Tensor, lead: Sequence[int]) -> list[Layout]:
    """Return every layout that the sizes allow."""
    split = [Layout(name, p, q) for p, q in permutations(range(len(lead)), 2)]
    flat = [Layout(name, p, p, transposed) for p in range(len(lead)) for transposed in (False, True)]
    return [layout for layout in (*split, *flat) if layout.spread(mask, lead) is not None]
