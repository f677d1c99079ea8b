"""Layers around existing Parameters: nothing is allocated, initialised or drawn."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)
Linear = TypeVar("Linear", bound=nn.Linear)


def layer_from_parameters(kind: type[Layer], weight: Tensor, bias: Tensor | None, **settings: Any) -> Layer:
    """Make a layer of the class `kind` around these very Parameters, with its settings as attributes."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.__dict__.update(settings)
    layer.register_parameter("weight", weight)  # type: ignore[arg-type]
    layer.register_parameter("bias", bias)  # type: ignore[arg-type]
    return layer


def linear_from_parameters(kind: type[Linear], weight: Tensor, bias: Tensor | None) -> Linear:
    """Make a layer of the class `kind`, nn.Linear or a subclass, around these very Parameters.

    >>> weight = nn.Parameter(torch.zeros(3, 2))
    >>> linear_from_parameters(nn.Linear, weight, None).weight is weight
    True
    """
    out_features, in_features = weight.shape
    return layer_from_parameters(kind, weight, bias, in_features=in_features, out_features=out_features)
