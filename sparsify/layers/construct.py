"""A Linear around existing Parameters: nothing is allocated, initialised or drawn."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

Linear = TypeVar("Linear", bound=nn.Linear)


def linear_from_parameters(kind: type[Linear], weight: Tensor, bias: Tensor | None) -> Linear:
    """Make a layer of the class `kind`, nn.Linear or a subclass, around these very Parameters.

    >>> weight = nn.Parameter(torch.zeros(3, 2))
    >>> linear_from_parameters(nn.Linear, weight, None).weight is weight
    True
    """
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = weight.shape
    layer.register_parameter("weight", weight)  # type: ignore[arg-type]
    layer.register_parameter("bias", bias)  # type: ignore[arg-type]
    return layer
