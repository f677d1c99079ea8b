"""Converters of nn.LSTM, nn.GRU, nn.RNN and their cells: each of their matrices becomes a layer. In use by `types`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparsify.conversion.converters.base import Converter
from sparsify.conversion.converters.torch_layer import torch_converter
from sparsify.conversion.foreign_masks import check_plain, check_plain_parameter
from sparsify.layers.functional_module import Functional, layer_name, undo, unfuse
from sparsify.layers.held_weight import CSRHeldWeight, HeldWeight, SparseHeldWeight

_TYPES = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)


def _names(module: Any) -> list[str]:
    """Return the names of the matrices of a module, in torch's order."""
    names = module._flat_weights_names if isinstance(module, nn.RNNBase) else ("weight_ih", "weight_hh")
    return [name for name in names if name.startswith("weight")]


def _layers(module: nn.Module) -> tuple[str, ...]:
    return tuple(map(layer_name, _names(module)))


def _matrices(module: nn.Module) -> dict[str, Tensor]:
    weights = {name: module._parameters.get(name) for name in _names(module)}
    return {layer_name(name): weight for name, weight in weights.items() if weight is not None}


def _check(module: nn.Module) -> None:
    dense = next(dense for dense in _TYPES if isinstance(module, dense))
    check_plain(module, dense, f"nn.{dense.__name__}")
    for name in _names(module):
        weight = module._parameters.get(name)
        if f"{name}_orig" in module._parameters:
            raise ValueError(
                f"its {name} is pruned by torch; make that permanent with torch.nn.utils.prune.remove(module, {name!r})"
            )
        if weight is None:
            raise ValueError(f"its {name} is not a Parameter of its own, but computed by a hook or a parametrization")
        check_plain_parameter(weight)
        if hasattr(module, layer_name(name)):
            raise ValueError(f"it has an attribute {layer_name(name)!r}, the name that a layer for {name!r} would get")


def _to_unfused(module: nn.Module) -> nn.Module:
    weights: dict[str, Any] = {name: module._parameters[name] for name in _names(module)}
    return unfuse(module, {name: HeldWeight(weight, one_by_one=True) for name, weight in weights.items()})


def _check_held(layer: HeldWeight, weight: Tensor) -> None:
    if weight.ndim < 2:
        raise ValueError(f"its weight has the shape {tuple(weight.shape)}, where a matrix is needed")


RECURRENT = tuple(
    Converter(dense, Functional, _check, _matrices, _to_unfused, undo, _layers, packed=None, by_default=False)
    for dense in _TYPES
)

#: For the matrices inside of them.
HELD = torch_converter(SparseHeldWeight, _check_held, CSRHeldWeight)
