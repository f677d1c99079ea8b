"""Unfused modules: Parameters multiplied by a module's own code, as in F.linear(x, self.up), become child layers.

The code stays as it is: `self.up` is now a property. It reads the weight of the layer `up_layer`: under the mask in
training, a WeightView (sparse in products) after export.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from sparsify.layers.construct import linear_from_parameters
from sparsify.layers.csr_linear import CSRLinear
from sparsify.layers.masked import MaskedLayer
from sparsify.layers.transposed import SparseTransposed, Transposed


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


def layer_name(name: str) -> str:
    """Return the name of a Parameter's layer.

    The Parameter's own name stays in use: the module's code reads it.
    """
    return f"{name}_layer"


def unfuse(module: nn.Module, transposed: Mapping[str, bool]) -> Functional:
    """Make a module of the same code, with the named Parameters in dense layers.

    transposed: the Parameters' names, each with True if stored (in_features, out_features).
    """
    made = _bare(type(module), tuple(transposed), tuple(module._parameters))
    made.__dict__.update(module.__dict__)
    made._parameters = {key: value for key, value in module._parameters.items() if key not in transposed}
    layers: dict[str, nn.Module] = {}
    for name, is_transposed in transposed.items():
        weight = module._parameters[name]
        assert weight is not None
        layer = Transposed(weight) if is_transposed else linear_from_parameters(nn.Linear, weight, None)
        layers[layer_name(name)] = layer.train(module.training)
    made._modules = {**module._modules, **layers}
    return made


def undo(module: Functional) -> nn.Module:
    """Make the plain module of an unfused one with only dense layers; return any other as it is."""
    layers = {name: module._modules[layer_name(name)] for name in module.weight_names}
    if any(type(layer) not in (nn.Linear, Transposed) for layer in layers.values()):
        return module
    plain: nn.Module = module.plain.__new__(module.plain)
    plain.__dict__.update(module.__dict__)
    plain._modules = {key: value for key, value in module._modules.items() if key not in map(layer_name, layers)}
    weights: dict[str, Any] = {name: layer._parameters["weight"] for name, layer in layers.items() if layer}
    parameters = {**module._parameters, **weights}
    plain._parameters = {
        name: parameters[name] for name in (*module.parameter_names, *parameters) if name in parameters
    }
    return plain


def _bare(plain: type[nn.Module], names: tuple[str, ...], parameters: tuple[str, ...]) -> Functional:
    """Make an empty unfused module, of the class for these names."""
    reads = {name: property(partial(_read, name)) for name in names}
    own = {"plain": plain, "weight_names": names, "parameter_names": parameters}
    kind: Any = type(f"Functional{plain.__name__}", (Functional, plain), {**reads, **own})
    made: Functional = kind.__new__(kind)
    return made


def _read(name: str, module: nn.Module) -> Tensor:
    """Return the weight of a layer of an unfused module, in the layout expected by the module's code."""
    layer = module._modules[layer_name(name)]
    assert layer is not None
    if isinstance(layer, MaskedLayer):
        return layer.masked_weight()
    if isinstance(layer, CSRLinear):
        return layer.weight.t() if issubclass(layer.masked_type, SparseTransposed) else layer.weight
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight
