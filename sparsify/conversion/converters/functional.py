"""Converter of modules with products in their own code, as in F.linear(x, self.weight): found by tracing.

Each module is traced alone, without its children, so that one with untraceable code does not affect the others. A
ParameterDict or ParameterList has no code: the module around reads its Parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsify.conversion.converters.base import Converter
from sparsify.conversion.converters.held import experts, held
from sparsify.conversion.foreign_masks import check_plain_parameter
from sparsify.layers.functional_module import Functional, dense_layer, layer_name, undo, unfuse
from sparsify.layers.held_weight import HeldWeight
from sparsify.layers.transposed import SparseTransposed, Transposed

_MULTIPLY = (torch.matmul, torch.mm, torch.addmm)
_MULTIPLY_METHODS = ("matmul", "mm", "__matmul__", "addmm")
#: Modules without code.
_CONTAINERS = (nn.ParameterDict, nn.ParameterList, nn.ModuleDict, nn.ModuleList)


class _OwnCode(fx.Tracer):
    """Tracer of one module's own code, without its children."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class Code:
    """A module's own code, traced when it is first asked for."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @functools.cached_property
    def nodes(self) -> list[fx.Node]:
        """The nodes of the traces in both modes, training and not."""
        module, was_training = self._module, self._module.training
        try:
            found: list[fx.Node] = []
            for module.training in (was_training, not was_training):
                found += _OwnCode().trace(module).nodes
            return found
        finally:
            module.training = was_training


class Reader(NamedTuple):
    """The code that reads a module's Parameters, and the prefix of their names there."""

    code: Code
    prefix: str


class Products(NamedTuple):
    """The Parameters multiplied by a module's own code, each with True if stored (in, out).

    layers: those multiplied as matrices of one product. held: those in other products (held.py).
    """

    layers: dict[str, bool]
    held: dict[str, bool]


def readers(model: nn.Module) -> dict[nn.Module, Reader]:
    """Return the readers of the containers of Parameters in a model: the nearest module around with code of its own."""
    found: dict[nn.Module, Reader] = {}

    def look(container: nn.Module, reader: Reader) -> None:
        for name, child in container.named_children():
            if isinstance(child, _CONTAINERS):
                of_child = Reader(reader.code, f"{reader.prefix}{name}.")
                found.setdefault(child, of_child)
                look(child, of_child)

    for module in model.modules():
        if not isinstance(module, _CONTAINERS):
            look(module, Reader(Code(module), ""))
    return found


def multiplied(module: nn.Module, reader: Reader | None = None) -> Products:
    """Return the Parameters of a module that code multiplies: its own, or that of its reader.

    Raises ValueError if the code cannot be traced.
    """
    if of_experts := experts(module):
        return Products({}, of_experts)
    code, prefix = reader or Reader(Code(module), "")
    factors = {prefix + name: p for name, p in module._parameters.items() if p is not None and p.ndim in (2, 3)}
    matrices = {name for name, p in factors.items() if p.ndim == 2}
    layers: dict[str, bool] = {}
    others: dict[str, bool] = {}
    if not factors:
        return Products({}, {})
    try:
        for node in code.nodes:
            for name, transposed in _uses(node):
                if name in matrices:
                    layers.setdefault(name, transposed)
            for name, transposed in held(factors, node).items():
                others.setdefault(name, transposed)
    except Exception as error:  # of any kind: the code gets proxies instead of tensors
        if not matrices:  # other Parameters are seldom factors: positions, tokens
            return Products({}, {})
        raise ValueError(f"its code cannot be traced by torch.fx ({str(error).splitlines()[0]})") from None
    return Products(
        {name: layers[prefix + name] for name in module._parameters if prefix + name in layers},
        {name: others[prefix + name] for name in module._parameters if prefix + name in others.keys() - layers.keys()},
    )


def functional_kind(module: nn.Module, reader: Reader | None = None) -> Converter | None:
    """Return the converter of a module with multiplied Parameters, or None. Raises ValueError for untraceable code.

    reader: of a container of Parameters.
    """
    if isinstance(module, Functional) or not any(products := multiplied(module, reader)):
        return None
    transposed = products.layers | products.held
    layers = tuple(map(layer_name, transposed))

    def matrices(dense: nn.Module) -> dict[str, Tensor]:
        weights = {name: dense._parameters[name] for name in transposed}
        return {layer_name(name): _matrix(w, transposed[name]) for name, w in weights.items() if w is not None}

    def check(dense: nn.Module) -> None:
        for name in transposed:
            if hasattr(dense, layer_name(name)):
                raise ValueError(
                    f"it has an attribute {layer_name(name)!r}, the name that a layer for {name!r} would get"
                )
            weight = dense._parameters[name]
            assert weight is not None
            check_plain_parameter(weight)

    def to_unfused(dense: nn.Module) -> nn.Module:
        weights = {name: weight for name, weight in dense._parameters.items() if weight is not None}
        made: dict[str, nn.Module] = {
            name: dense_layer(weights[name], transposed=t) for name, t in products.layers.items()
        }
        one_by_one = bool(experts(dense))
        for name, stored in products.held.items():
            made[name] = HeldWeight(weights[name], transposed=stored, one_by_one=one_by_one)
        return unfuse(dense, made)

    return Converter(type(module), Functional, check, matrices, to_unfused, undo, lambda _: layers)


def _matrix(weight: Tensor, transposed: bool) -> Tensor:
    """Return a weight, or a stack of weights, as one matrix (out_features, in_features)."""
    rows = weight.mT if transposed else weight
    return rows if rows.ndim == 2 else rows.flatten(0, 1)


#: For the layer of a Parameter multiplied as `x @ self.weight`, inside an unfused module.
TRANSPOSED = Converter(
    Transposed,
    SparseTransposed,
    lambda layer: check_plain_parameter(layer.weight),
    lambda layer: {"": layer.weight.t()},
    lambda layer: SparseTransposed(layer.weight),
    SparseTransposed.to_transposed,
)


def _uses(node: fx.Node) -> list[tuple[str, bool]]:
    """Return the attribute multiplied with the input in a call, with True if stored (in, out)."""
    weight: Any = None
    if node.op == "call_function" and node.target is F.linear:
        weight = node.kwargs.get("weight", node.args[1] if len(node.args) > 1 else None)
        return [(str(weight.target), False)] if _is_attribute(weight) else []
    multiplies = (node.op == "call_function" and (node.target in _MULTIPLY or _name(node.target) == "matmul")) or (
        node.op == "call_method" and node.target in _MULTIPLY_METHODS
    )
    if not multiplies or not node.args:
        return []
    weight = node.args[-1]
    if _is_attribute(weight):
        return [(str(weight.target), True)]
    turned = _turned(weight)
    return [(str(turned.target), False)] if turned is not None else []


def _turned(node: Any) -> fx.Node | None:
    """Return the attribute transposed by a node, or None."""
    if not isinstance(node, fx.Node) or not node.args or not _is_attribute(node.args[0]):
        return None
    name, rest = _name(node.target), tuple(node.args[1:])
    turns = name == "t" or (name in ("transpose", "swapaxes", "permute") and set(_flat(rest)) in ({0, 1}, {-1, -2}))
    turns = turns or (name == "getattr" and rest in (("T",), ("mT",)))
    return node.args[0] if turns and isinstance(node.args[0], fx.Node) else None


def _flat(rest: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest


def _is_attribute(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _name(target: str | Callable[..., Any]) -> str:
    return target if isinstance(target, str) else target.__name__
