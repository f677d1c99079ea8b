"""Unfused modules: Parameters multiplied by a module's own code, as in F.linear(x, self.up), become child layers.

The code stays as it is: `self.up` is now a property. It reads the weight of the layer `up_layer`: under the mask in
training, a WeightView (sparse in products) after export.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.layers.construct import linear_from_parameters
from sparsify.layers.csr_linear import CSRLinear
from sparsify.layers.held_weight import CSRHeldWeight, HeldWeight, SparseHeldWeight
from sparsify.layers.masked import MaskedLayer
from sparsify.layers.recurrent import Recurrent
from sparsify.layers.transposed import SparseTransposed, Transposed
from sparsify.layers.weight_view import WeightView

#: In each thread, the weights read in a call of experts.
_Call = threading.local()

#: Attributes of an nn.RNNBase that refer to its Parameters.
_OF_RECURRENT = ("_flat_weights", "_flat_weight_refs")


class Functional(nn.Module):
    """The mixin of unfused modules. Their classes are made at run time, from the plain class and Parameter names."""

    plain: Any
    weight_names: tuple[str, ...]
    #: The names of all Parameters of the plain module, in their order.
    parameter_names: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the arguments of `_bare`; the class itself is in no module."""
        return _bare, (self.plain, self.weight_names, self.parameter_names), self.__dict__

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a dense state_dict too, with a layer's weight under the Parameter's name."""
        for name in self.weight_names:
            if prefix + name in state_dict:
                state_dict[f"{prefix}{layer_name(name)}.weight"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)


class ReadsOnce(nn.Module):
    """The mixin of experts: their code reads a weight for each expert in use, and gets one tensor for a call."""

    #: The plain forward that takes expert after expert: transformers has others, that read all experts at once.
    one_by_one: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as the plain class does."""
        all_at_once = self.one_by_one is None or not any(_by_calls(child) for child in self._modules.values())
        if torch.compiler.is_compiling() and all_at_once:
            return super().forward(*args, **kwargs)  # what is kept for a call would break the graph
        before, _Call.weights = getattr(_Call, "weights", None), {}
        try:
            return (super().forward if all_at_once else partial(self.one_by_one, self))(*args, **kwargs)
        finally:
            _Call.weights = before


def _called(layer: MaskedLayer) -> Tensor:
    """Return the weight of a layer as a view with products that are calls of the layer: hooks wait for them."""

    def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
        output: Tensor = layer(x)
        return output if bias is None else output + bias

    def dense() -> Tensor:
        return layer.matrix(layer.masked_weight())

    view = WeightView.make(layer.shape, layer.weight.dtype, layer.weight.device, multiply, dense)
    return view.turn() if isinstance(layer, SparseTransposed) else view


def _by_calls(layer: nn.Module | None) -> bool:
    """Return whether a layer's weight is a view, so that the code around should take its matrices one by one."""
    return isinstance(layer, CSRHeldWeight) or (isinstance(layer, SparseHeldWeight) and layer.seen_by_hooks())


def is_experts(kind: type[nn.Module]) -> bool:
    """Return whether a class is one of experts in transformers, as its decorator leaves it."""
    return hasattr(kind, "_apply_gate")


def layer_name(name: str) -> str:
    """Return the name of a Parameter's layer.

    The Parameter's own name stays in use: the module's code reads it.
    """
    return f"{name}_layer"


def dense_layer(weight: nn.Parameter, *, transposed: bool) -> nn.Module:
    """Return the dense layer of a Parameter multiplied by a module's own code; transposed: stored (in, out)."""
    return Transposed(weight) if transposed else linear_from_parameters(nn.Linear, weight, None)


def unfuse(module: nn.Module, layers: Mapping[str, nn.Module]) -> Functional:
    """Make a module of the same code, with the named Parameters in these dense layers."""
    made = _bare(type(module), tuple(layers), tuple(module._parameters))
    made.__dict__.update({key: value for key, value in module.__dict__.items() if key not in _OF_RECURRENT})
    made._parameters = {key: value for key, value in module._parameters.items() if key not in layers}
    children = {layer_name(name): layer.train(module.training) for name, layer in layers.items()}
    made._modules = {**module._modules, **children}
    if isinstance(made, Recurrent):
        made.__dict__.update(dict.fromkeys(_OF_RECURRENT, ()))
    return made


def undo(module: Functional) -> nn.Module:
    """Make the plain module of an unfused one with only dense layers; return any other as it is."""
    layers = {name: module._modules[layer_name(name)] for name in module.weight_names}
    if any(type(layer) not in (nn.Linear, Transposed, HeldWeight) for layer in layers.values()):
        return module
    plain: nn.Module = module.plain.__new__(module.plain)
    plain.__dict__.update(module.__dict__)
    plain._modules = {key: value for key, value in module._modules.items() if key not in map(layer_name, layers)}
    weights: dict[str, Any] = {name: layer._parameters["weight"] for name, layer in layers.items() if layer}
    parameters = {**module._parameters, **weights}
    plain._parameters = {
        name: parameters[name] for name in (*module.parameter_names, *parameters) if name in parameters
    }
    if isinstance(plain, nn.RNNBase):
        plain._init_flat_weights()
    return plain


def _bare(plain: type[nn.Module], names: tuple[str, ...], parameters: tuple[str, ...]) -> Functional:
    """Make an empty unfused module, of the class for these names."""
    reads = {name: property(partial(_read, name)) for name in names}
    own: dict[str, Any] = {"plain": plain, "weight_names": names, "parameter_names": parameters}
    mixin = (Recurrent,) if issubclass(plain, nn.RNNBase) else (ReadsOnce,) if is_experts(plain) else ()
    if ReadsOnce in mixin:
        eager = getattr(plain.forward, "__wrapped__", None)
        own["one_by_one"] = eager and staticmethod(eager)
    kind: Any = type(f"Functional{plain.__name__}", (*mixin, Functional, plain), {**reads, **own})
    made: Functional = kind.__new__(kind)
    return made


def _read(name: str, module: nn.Module) -> Any:
    """Return the weight of a layer of an unfused module, in the layout expected by the module's code."""
    layer = module._modules[layer_name(name)]
    assert layer is not None
    if isinstance(layer, SparseHeldWeight):
        of_call: dict[int, Tensor] | None = None
        if not torch.compiler.is_compiling():
            of_call = getattr(_Call, "weights", None)
        if of_call is None:
            return layer.view(layer.forward_weight()) if layer.seen_by_hooks() else layer.forward_weight()
        if id(layer) not in of_call:
            of_call[id(layer)] = layer.forward_weight()
        weight = of_call[id(layer)]
        return layer.view(weight) if layer.seen_by_hooks() else weight
    if isinstance(layer, MaskedLayer):
        if layer._forward_pre_hooks or layer._forward_hooks:
            return _called(layer)
        return layer.masked_weight()
    if isinstance(layer, CSRLinear):
        return layer.weight.t() if issubclass(layer.masked_type, SparseTransposed) else layer.weight
    plain: Any = layer.weight  # a proxy while torch.fx traces this code, to see what a container in it is for
    return plain
