"""Tied weights of a model, the same Parameter or the same memory, and their handling by `convert`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from sparsify.layer_names import join
from sparsify.layers.tied import check_tieable

#: Ways to handle a weight of several modules.
TIED = ("error", "skip", "share")


class ParameterRef(NamedTuple):
    """A Parameter, with the name of its module and its key there."""

    module: str
    key: str
    parameter: nn.Parameter

    def __str__(self) -> str:
        return join(self.module, self.key)


def resolve_tied_weights(
    model: nn.Module, weights: Mapping[str, Collection[Tensor]], tied: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the modules to leave dense, each with the reason, and the modules to tie, each with its owner's name.

    weights: the weights about to be masked, by the names of their modules.
    Raises ValueError for tied="error", and for a module that cannot share a mask.
    """
    if tied not in TIED:
        raise ValueError(f"tied={tied!r} is none of: {', '.join(TIED)}")
    skipped: dict[str, str] = {}
    shared: dict[str, str] = {}
    for name, places in _ties(model, weights):
        together = " and ".join(map(str, places))
        inside = ".*" if next(model.get_submodule(name).children(), None) is not None else ""
        if tied == "error":
            raise ValueError(
                f"{name}: its weight is tied: {together} are one Parameter, and a mask would change both; leave it "
                f"dense with exclude=[{name + inside!r}] or tied='skip', let both use one mask with tied='share', "
                "or untie it"
            )
        if tied == "skip":
            skipped[name] = f"its weight is tied: {together} are one Parameter"
        elif name not in shared:
            for place in places:
                if place.module != name:
                    _check_shareable(model, name, place)
                    shared[place.module] = name
    return skipped, shared


def _check_shareable(model: nn.Module, name: str, place: ParameterRef) -> None:
    """Raise ValueError if the module at a place cannot use the mask of the layer `name`."""
    owner = model.get_submodule(name)
    try:
        if place.parameter is not owner._parameters.get("weight") or place.key != "weight":
            raise ValueError("it is not the same Parameter `weight`, it only overlaps in memory")
        if not isinstance(owner, nn.Linear):
            raise ValueError("only the mask of an nn.Linear can be shared")
        check_tieable(model.get_submodule(place.module))
    except ValueError as error:
        raise ValueError(
            f"{name}: its weight is tied to {place}, which cannot share its mask: {error}; "
            f"leave it dense with exclude=[{name!r}], or untie it"
        ) from None


def _ties(model: nn.Module, weights: Mapping[str, Collection[Tensor]]) -> Iterator[tuple[str, list[ParameterRef]]]:
    """Yield each of the named modules with a weight in several places, and those places."""
    places: dict[object, list[ParameterRef]] = {}
    for module_name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(_memory(parameter)[0], []).append(ParameterRef(module_name, key, parameter))
    for name, own in weights.items():
        for weight in own:
            used = [place for place in places[_memory(weight)[0]] if _overlap(weight, place.parameter)]
            if weight.ndim > 1 and len(used) > 1:
                yield name, used


def _memory(parameter: Tensor) -> tuple[object, int, int]:
    """Return a Parameter's memory, as an identity and its range of bytes; without an address, the Parameter itself."""
    plain = type(parameter) in (nn.Parameter, Tensor)
    if not plain or parameter.is_meta or parameter.numel() == 0:
        return id(parameter), 0, 1
    start = parameter.data_ptr()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    return parameter.untyped_storage().data_ptr(), start, start + extent * parameter.element_size()


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Return whether two Parameters share any memory."""
    (memory, start, end), (other_memory, other_start, other_end) = _memory(one), _memory(other)
    return memory == other_memory and start < other_end and other_start < end
