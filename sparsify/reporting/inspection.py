"""Preview of `convert`: its layers, the modules left dense with the reason, and the share of each in the model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from torch import nn

from sparsify.conversion.convert import Plan, plan_convert
from sparsify.inference.multiply_adds import memory_of, multiply_adds
from sparsify.layer_names import Selector, join
from sparsify.reporting.file_report import inspect_file
from sparsify.reporting.report import Report
from sparsify.tables import Listed, Listing, Table


@dataclass(frozen=True)
class Part:
    """One layer of a model, or all other modules of one type.

    becomes: the type of its masked layer, "" for a part left dense.
    reason: the reason to leave it dense.
    n_multiply_adds: those of one run of the example, None without one.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    n_parameters: int
    n_multiply_adds: int | None
    becomes: str
    reason: str


@dataclass(frozen=True)
class Inspection(Listed, Sequence[Part]):
    """The parts of a model; `str()` of it is a table for people. The totals are those of the whole model."""

    parts: tuple[Part, ...]
    n_parameters: int
    n_multiply_adds: int | None

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.parts[index]

    def share(self, *, converted: bool = True) -> tuple[float, float | None]:
        """Return the fraction of parameters, and of multiply-adds, in layers to convert, or in all other parts."""
        parts = [part for part in self.parts if bool(part.becomes) == converted]
        n_parameters = sum(part.n_parameters for part in parts) / max(self.n_parameters, 1)
        if self.n_multiply_adds is None:
            return n_parameters, None
        return n_parameters, sum(part.n_multiply_adds or 0 for part in parts) / max(self.n_multiply_adds, 1)

    def listing(self) -> Listing:
        """Return the share of the layers to convert, and a table of all parts."""
        head = ("layer", "type", "shape", "parameters", "multiply-adds", "becomes")
        rows = []
        for part in self.parts:
            shape = "x".join(map(str, part.shape))
            parameters = _percent(part.n_parameters, self.n_parameters)
            adds = _percent(part.n_multiply_adds, self.n_multiply_adds)
            becomes = part.becomes or f"stays dense: {part.reason}"
            rows.append((part.name or "(root)", part.type, shape, parameters, adds, becomes))
        n_parameters, adds_share = self.share()
        of_adds = "" if adds_share is None else f" and {adds_share:.1%} of the {self.n_multiply_adds:,} multiply-adds"
        total = f"convert takes layers with {n_parameters:.1%} of the {self.n_parameters:,} parameters{of_adds}"
        return Listing([total], [("", Table(head, rows, left=("type", "becomes"), spare=("shape", "type")))])


@overload
def inspect(model: str | os.PathLike[str]) -> Report: ...


@overload
def inspect(
    model: nn.Module,
    example: Any = None,
    *,
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
    types: type[nn.Module] | Sequence[type[nn.Module]] | None = None,
    functional: bool = False,
) -> Inspection: ...


def inspect(
    model: nn.Module | str | os.PathLike[str],
    example: Any = None,
    *,
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
    types: type[nn.Module] | Sequence[type[nn.Module]] | None = None,
    functional: bool = False,
) -> Report | Inspection:
    """List the layers in a file, or the effect of `convert` on a model with the same arguments.

    Of a file: a Report of its layers, without a model; everything is checked as in `load`. Raises CheckpointError.

    Of a model: the layers to swap, the others with the reason (tied weights among them), and the share of each in the
    parameters. With an example input (a tensor, a tuple of arguments, or a dict of them) the model runs on it once, and
    the share in the multiply-adds is listed too. The model does not change.

    >>> parts = inspect(nn.Sequential(nn.Linear(8, 4), nn.Conv1d(4, 4, 1)), functional=False)
    >>> [(part.name, part.becomes) for part in parts], parts.share()
    ([('0', 'SparseLinear'), ('1 x Conv1d', '')], (0.6428571428571429, None))
    """
    if not isinstance(model, nn.Module):
        if example is not None:
            raise ValueError("an example input has no effect with a file, which is listed without running it")
        return inspect_file(model)
    plan = plan_convert(model, include=include, exclude=exclude, types=types, tied="skip", functional=functional)
    layers, holder = _layers(model, plan)
    counts = None if example is None else multiply_adds(model, example)
    parameters = {p for p in model.parameters() if not isinstance(p, nn.UninitializedParameter)}
    n_parameters: Counter[str] = Counter()
    for parameter in parameters:
        n_parameters[holder[memory_of(parameter)]] += parameter.numel()
    n_multiply_adds: Counter[str | None] = Counter()
    for memory, n in (counts or {}).items():
        n_multiply_adds[holder.get(memory)] += n
    parts = tuple(
        Part(name, type_, shape, n_parameters[name], None if counts is None else n_multiply_adds[name], becomes, reason)
        for name, (type_, shape, becomes, reason) in layers.items()
    )
    return Inspection(parts, n_parameters.total(), None if counts is None else n_multiply_adds.total())


def _layers(model: nn.Module, plan: Plan) -> tuple[dict[str, tuple[str, tuple[int, ...], str, str]], dict[int, str]]:
    """Return type, shape, masked type and reason of every part by name; and the name of the part by memory."""
    layers: dict[str, tuple[str, tuple[int, ...], str, str]] = {}
    holder: dict[int, str] = {}
    modules = dict(model.named_modules())
    for owner, module in modules.items():
        kind = plan.swap.get(owner)
        for layer in kind.layers(module) if kind else [""] * (owner in plan.already):
            name = join(owner, layer)
            if name in plan.weights:
                weight = plan.weights[name]
                becomes = f"{'layer of ' if layer else ''}{kind.sparse.__name__}" if kind else "already masked"
                layers[name] = type(module).__name__, tuple(weight.shape), becomes, ""
                biases = [p for key, p in module.named_parameters() if key.startswith(layer)]
                holder |= {memory_of(tensor): name for tensor in (weight, *biases)}
        if owner in plan.left:
            layers[owner] = type(module).__name__, (), "", plan.left[owner]
            for parameter in module.parameters():
                holder.setdefault(memory_of(parameter), owner)
    rest: dict[str, list[nn.Parameter]] = {}
    n_modules: Counter[str] = Counter()
    for module in modules.values():
        own = [p for p in module._parameters.values() if p is not None and memory_of(p) not in holder]
        if own:
            n_modules[type(module).__name__] += 1
            rest.setdefault(type(module).__name__, []).extend(own)
    for type_, parameters in rest.items():
        name = f"{n_modules[type_]} x {type_}"
        layers[name] = type_, (), "", "not of the types that convert, or not chosen"
        holder |= {memory_of(parameter): name for parameter in parameters}
    return layers, holder


def _percent(part: int | None, whole: int | None) -> str:
    return "-" if part is None or whole is None else f"{part / max(whole, 1):.1%}"
