"""A module whose Parameters are multiplied by its own code, laid out so that they are layers.

The code stays as it is: where it reads `self.up`, it gets what the layer `up_layer` holds, masked while it trains, and
a WeightView, which runs sparse, once it is exported.
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
    """The mixin by which a laid out module is known. Its class is made of its own and the Parameters' names."""

    plain: Any
    weight_names: tuple[str, ...]
    #: All of the plain module's Parameters, in their order.
    parameter_names: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by what the class is made of."""
        return _bare, (self.plain, self.weight_names, self.parameter_names), self.__dict__

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take a dense state_dict as well: there a layer's weight is under the Parameter's name."""
        for name in self.weight_names:
            if prefix + name in state_dict:
                state_dict[f"{prefix}{layer_name(name)}.weight"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)


def layer_name(name: str) -> str:
    """Return the name of the layer that holds the Parameter of this name.

    The name itself is taken: it is what the module's code reads.
    """
    return f"{name}_layer"


def unfuse(module: nn.Module, transposed: Mapping[str, bool]) -> Functional:
    """Make a module of the same code whose named Parameters are layers, dense still.

    `transposed` says of each whether it is stored (in_features, out_features).
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
    """Make the module that was laid out, if all of its layers are dense again; otherwise return it as it is."""
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
    """Make an empty module of the class for these names."""
    reads = {name: property(partial(_read, name)) for name in names}
    own = {"plain": plain, "weight_names": names, "parameter_names": parameters}
    kind: Any = type(f"Functional{plain.__name__}", (Functional, plain), {**reads, **own})
    made: Functional = kind.__new__(kind)
    return made


def _read(name: str, module: nn.Module) -> Tensor:
    """Return the weight of a layer of a laid out module, in the layout in which the module's code multiplies it."""
    layer = module._modules[layer_name(name)]
    assert layer is not None
    if isinstance(layer, MaskedLayer):
        return layer.masked_weight()
    if isinstance(layer, CSRLinear):
        return layer.weight.t() if issubclass(layer.masked_type, SparseTransposed) else layer.weight
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight
