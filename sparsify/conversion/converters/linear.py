"""Converter of nn.Linear to SparseLinear."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from sparsify.conversion.converters.base import OF_LAYERS, Converter
from sparsify.conversion.foreign_masks import (
    check_names,
    check_plain_parameter,
    check_shapes,
    parameter_and_mask,
    remove_prune_hook,
)
from sparsify.conversion.module_surgery import plain_type
from sparsify.layers import CSRLinear, SparseLinear
from sparsify.layers.construct import linear_from_parameters
from sparsify.layers.own_forward import check_forward

#: Methods of a subclass that change neither the computation nor the use as an nn.Linear.
_HARMLESS = {"__init__", "reset_parameters", "extra_repr", "__repr__"}


def _check(linear: nn.Linear) -> None:
    subclass = plain_type(linear)
    if own := sorted(_own_behaviour(subclass)):
        raise ValueError(
            f"it is a {subclass.__name__}, a subclass of nn.Linear with its own {', '.join(own[:3])}, "
            "which may compute something else"
        )
    check_forward(linear)
    check_names(linear, nn.Linear, SparseLinear, CSRLinear, needs=OF_LAYERS)
    weight, _ = parameter_and_mask(linear)
    check_plain_parameter(weight)
    check_shapes(weight, linear.bias, 2, weight.shape[0])


def _own_behaviour(subclass: type[nn.Module]) -> set[str]:
    """Return the names of a subclass's methods and properties beyond those of nn.Linear."""
    own: set[str] = set()
    for ancestor in subclass.__mro__[: subclass.__mro__.index(nn.Linear)]:
        if ancestor is not nn.LazyLinear and ancestor is not LazyModuleMixin:
            own |= {name for name, value in vars(ancestor).items() if callable(value) or hasattr(value, "__get__")}
    return own - _HARMLESS


def _matrices(linear: nn.Linear) -> dict[str, Tensor]:
    return {"": linear.weight}


def _to_sparse(linear: nn.Linear) -> SparseLinear:
    weight, mask = parameter_and_mask(linear)
    remove_prune_hook(linear)
    return SparseLinear.from_linear(linear_from_parameters(nn.Linear, weight, linear.bias), mask)


LINEAR = Converter(nn.Linear, SparseLinear, _check, _matrices, _to_sparse, SparseLinear.to_linear)
