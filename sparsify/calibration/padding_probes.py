"""Probes for padding: runs of a model on a changed batch, and the rows that change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.calibration.batches import Batch, is_mask, naming_batch
from sparsify.calibration.block_call import first_tensor, split_hidden
from sparsify.layers import MaskedLayer

#: ("input" of a layer or "output" of a module, its name).
Place = tuple[str, str]

_CHUNK = 2**22  # values that are made float64 at once
_TOLERANCE = 1e-6  # change of a row, relative to its size, from another order of sums
_NO_TOKENS = ("token_type_ids", "position_ids")  # of a mask's shape, but without tokens of their own


@dataclass(frozen=True)
class Call:
    """A tensor seen in a run: its leading dimensions, and for each row a checksum and the size of its sum."""

    lead: tuple[int, ...]
    values: Tensor
    sizes: Tensor


class Probes:
    """Changed runs of a model on one batch, for the padding of one of its masks; each run is made when asked for.

    seen: the calls at each place, with the batch as it is
    tokens: the name of the argument with the mask's tokens, "" without one
    sequence: the index of the sequence with changed padding
    """

    def __init__(self, model: nn.Module, number: int, batch: Batch, name: str, places: Collection[Place]) -> None:
        self._model, self._batch, self._name, self._places = model, batch, name, places
        self._mask = batch.masks[name]
        with naming_batch(number):
            self.seen = _run(model, batch.args, batch.kwargs, places)
        self.sequence = _sequence(self._mask)
        self.tokens, ways = _tokens(batch, name)
        self._runs: dict[str, dict[Place, list[Tensor | None]] | None] = {"padding": None}
        self._dims = (0, 1)
        for dims in ways:  # changed padding reaches fewer rows than changed tokens would
            moved = self._compare({self.tokens: self._changed(dims, self._padding)})
            before = self._runs["padding"]
            if moved is not None and (before is None or _n_moved(moved) < _n_moved(before)):
                self._runs["padding"], self._dims = moved, dims

    def moved(self, change: str, place: Place, n_before: int) -> Tensor | None:
        """Return a bool for each row, True = changed; None if rows come or go, or the model does not run.

        change is one of

        padding: the padding of one sequence becomes other tokens
        unmasked: the same, and the mask calls them tokens
        everywhere: the padding of all sequences becomes other tokens
        others: all arguments change, but not the mask's tokens
        """
        if change not in self._runs:
            self._runs[change] = self._compare(self._change(change))
        moved = self._runs[change]
        return None if moved is None else moved[place][n_before]

    @property
    def _padding(self) -> Tensor:
        padding = torch.zeros_like(self._mask)
        padding[self.sequence] = ~self._mask[self.sequence]
        return padding

    def _change(self, change: str) -> dict[str, Tensor]:
        """Return the changed arguments by name."""
        if change == "others":
            return {key: _other(value, value) for key, value in self._batch.named.items() if self._is_other(key, value)}
        if change == "everywhere":
            return {self.tokens: self._changed(self._dims, ~self._mask)}
        mask: Tensor = self._batch.named[self._name]
        unmasked = torch.where(self._padding, (mask == 0).to(mask.dtype), mask)
        return {self.tokens: self._changed(self._dims, self._padding), self._name: unmasked}

    def _is_other(self, key: str, value: Any) -> bool:
        return key != self.tokens and _is_input(key, value)

    def _changed(self, dims: tuple[int, int], where: Tensor) -> Tensor:
        """Return a copy of the tokens, or of their features, with others where `where`, (batch, length), is True."""
        changed: Tensor = self._batch.named[self.tokens].clone()
        tokens = changed.movedim(dims, (0, 1))
        tokens[where] = _other(tokens[where], tokens[self._mask])
        return changed

    def _compare(self, changed: Mapping[str, Tensor]) -> dict[Place, list[Tensor | None]] | None:
        """Run the model with some changed arguments; None if it does not run, as with tokens that are no text."""
        try:
            again = _run(self._model, *self._batch.replaced(changed), self._places)
        except Exception:  # whatever the model's own code raises
            return None
        return {place: _moved(calls, again.get(place, [])) for place, calls in self.seen.items()}


def part_padding(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each sequence whether it has padding and several tokens, and its amount of telling padding.

    In a square mask, padding on the diagonal lies at the same place in either layout, and tells nothing.
    """
    n_padding = (~mask).sum(1)
    on_diagonal = (~mask).diagonal().to(n_padding) if mask.shape[0] == mask.shape[1] else torch.zeros_like(n_padding)
    return (n_padding > 0) & (mask.sum(1) > 1), n_padding - on_diagonal


def can_be_turned(mask: Tensor) -> bool:
    """Return whether the transposed mask has the same shape, and other values."""
    return mask.shape[0] == mask.shape[1] and not torch.equal(mask, mask.T)


def _sequence(mask: Tensor) -> int:
    partial, n_padding = part_padding(mask)
    first = partial if bool(partial.any()) else ~mask.all(1)
    return int((n_padding + first * mask.numel()).argmax())


def _run(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], places: Collection[Place]
) -> dict[Place, list[Call]]:
    """Run the model, and return the calls at each place."""
    calls: dict[Place, list[Call]] = {}

    def note(place: Place, tensor: Tensor) -> None:
        calls.setdefault(place, []).append(_call(tensor))

    def before(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = first_tensor(args, kwargs)
            note(("input", name), module.rows(tensor) if isinstance(module, MaskedLayer) else tensor)

        return see

    def after(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if (parts := split_hidden(output)) is not None and parts[0].dim() > 0:
                note(("output", name), parts[0])

        return see

    with contextlib.ExitStack() as hooks, _same_draws(model), torch.inference_mode(False), torch.no_grad():
        for kind, name in places:
            module = model.get_submodule(name)
            if kind == "input":
                hooks.callback(module.register_forward_pre_hook(before(name), with_kwargs=True).remove)
            else:
                hooks.callback(module.register_forward_hook(after(name)).remove)
        model(*args, **kwargs)
    return calls


@contextlib.contextmanager
def _same_draws(model: nn.Module) -> Iterator[None]:
    """Let a model draw the same random numbers each time."""
    devices = {parameter.device.index or 0 for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(0)
        yield


def _call(tensor: Tensor) -> Call:
    """Return the checksums of the rows of a tensor (..., features): their products with one vector."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    vector = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float64)
    vector = vector.to(rows.device)
    parts = rows.split(max(_CHUNK // max(rows.shape[1], 1), 1))
    values = torch.cat([part.to(vector) @ vector for part in parts])
    sizes = torch.cat([part.to(vector).abs() @ vector.abs() for part in parts])
    return Call(tuple(tensor.shape[:-1]), values, sizes)


def _moved(seen: Sequence[Call], again: Sequence[Call]) -> list[Tensor | None]:
    """Return a bool for each row of each call, True = changed; None for calls with rows added or left out."""
    pairs = zip(seen, [*again, *[None] * len(seen)], strict=False)
    return [
        None
        if other is None or other.lead != call.lead
        else (call.values - other.values).abs() > _TOLERANCE * torch.maximum(call.sizes, other.sizes)
        for call, other in pairs
    ]


def _n_moved(moved: Mapping[Place, Sequence[Tensor | None]]) -> int:
    return sum(int(rows.sum()) for calls in moved.values() for rows in calls if rows is not None)


def _tokens(batch: Batch, name: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the name of the argument with a mask's tokens, and its possible dimensions (batch, length).

    It is the first with sizes that allow it and a name that begins like the mask's, before "attention_mask".
    """
    n_batch, n_length = batch.masks[name].shape
    start = name.removesuffix("attention_mask").removesuffix("key_padding_mask").rstrip("_")
    foreign = () if start else ("decoder", "encoder", "labels")
    tensors = {
        key: value.shape
        for key, value in batch.named.items()
        if key.startswith(start) and not key.startswith(foreign) and _is_input(key, value)
    }
    for sizes in ((n_batch, n_length), (n_length, n_batch)):
        for key, shape in tensors.items():
            if shape[:2] == sizes:
                both = [(0, 1), (1, 0)]
                return key, both if can_be_turned(batch.masks[name]) else [both[sizes != (n_batch, n_length)]]
    for key, shape in tensors.items():
        if shape[0] == n_batch and n_length in shape[2:]:
            return key, [(0, shape.index(n_length, 2))]
    return "", []


def _is_input(key: str, value: Any) -> bool:
    plain = isinstance(value, Tensor) and value.dim() >= 2 and value.dtype != torch.bool
    return plain and key not in _NO_TOKENS and not is_mask(key)


def _other(values: Tensor, known: Tensor) -> Tensor:
    """Return other tokens in place of these, of the known ones; or other features, of the known ones' size."""
    if values.is_floating_point():
        noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(0), device="cpu")
        return (noise.to(values.device) * known.float().std().nan_to_num(1.0).clamp_min(1e-3)).to(values)
    tokens = known.unique()
    one = int(tokens[len(tokens) // 2]) if len(tokens) else 0
    two = next((int(other) for other in tokens.tolist() if other != one), 0 if one else 1)
    return torch.where(values == one, two, one).to(values)
