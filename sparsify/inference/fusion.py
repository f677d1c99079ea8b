"""Activations worked out by the layer before them: one pass over the outputs less.

Where a module of the model calls an exported layer and passes its result to an activation and nowhere else, the layer
applies the activation as it writes its outputs, and the activation passes on what it gets. What follows what is read
off the module's own forward, traced with torch.fx; one that cannot be traced is left as it is.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator

from torch import Tensor, fx, nn
from torch.nn import functional as F

from sparsify.conversion.module_surgery import Model, replace
from sparsify.layers import PackedLayer


class FusedActivation(nn.Module):
    """Stands for an activation that the layer `layer_name` of `owner` applies by itself.

    If there is another layer in that place by now, the activation is applied here, as before.
    """

    def __init__(self, activation: nn.Module, owner: nn.Module, layer_name: str, name: str) -> None:
        super().__init__()
        self.activation = activation
        self.owner = (owner,)  # in a tuple, where nn.Module does not take it for a child
        self.layer_name, self.name = layer_name, name

    def forward(self, input: Tensor) -> Tensor:
        """Return the input as it is, or activated if its layer did not do that."""
        layer = self.owner[0]._modules.get(self.layer_name)
        applied = isinstance(layer, PackedLayer) and layer.activation == self.name
        return input if applied else self.activation(input)

    def extra_repr(self) -> str:
        """Say where the activation is applied."""
        return f"applied by {self.layer_name!r}"


def fuse_activations(model: Model) -> Model:
    """Let every exported layer that can apply the activation that follows it, in place, and return the model.

    A layer or activation that has hooks, or stands in several places of the model, stays as it is.
    """
    paths = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    replacements: dict[nn.Module, nn.Module] = {}
    for owner in model.modules():
        free = {name: m for name, m in owner.named_children() if paths[id(m)] == 1 and not _has_hooks(m)}
        layers = {name: m for name, m in free.items() if isinstance(m, PackedLayer) and m.activation == "none"}
        activations = {name: known for name, m in free.items() if (known := activation_name(m))} if layers else {}
        if not activations:
            continue
        for layer_name, name in _followed_by(owner):
            if layer_name in layers and name in activations:
                layers[layer_name].activation = activations[name]
                inner = copy.copy(free[name])
                replacements[free[name]] = FusedActivation(inner, owner, layer_name, activations[name])
    return replace(model, replacements)


def unfuse_activations(model: Model) -> Model:
    """Put every activation back that `fuse_activations` replaced, in place, and return the model."""
    for owner in model.modules():
        for name, child in owner._modules.items():
            if isinstance(child, FusedActivation):
                owner._modules[name] = child.activation
    return model


def activation_name(module: nn.Module) -> str | None:
    """Return which of the kernels' activations a module computes; None if it is something else.

    >>> activation_name(nn.GELU(approximate="tanh")), activation_name(nn.Tanh())
    ('gelu_tanh', None)
    """
    if next(module.parameters(), None) is not None or isinstance(module, FusedActivation):
        return None
    try:
        nodes = list(_Shallow().trace(module).nodes)
    except Exception:  # whatever its code does with a tensor that is none
        return None
    if [node.op for node in nodes] != ["placeholder", "call_function", "output"] or nodes[1].args != (nodes[0],):
        return None
    options = {key: value for key, value in nodes[1].kwargs.items() if key != "inplace"}
    if nodes[1].target is F.gelu:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(options.pop("approximate", "none")))
    return {F.relu: "relu", F.silu: "silu"}.get(nodes[1].target) if not options else None


class _Shallow(fx.Tracer):
    """Traces one module's own code, not that of its children."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _followed_by(owner: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (child, child that gets its output and is the only one to), both called once, training or not."""
    was_training = owner.training
    pairs = []
    try:
        for owner.training in (False, True):
            pairs.append(_pairs(_Shallow().trace(owner)))
    except Exception:  # whatever its code does with a tensor that is none
        return
    finally:
        owner.training = was_training
    yield from pairs[0] & pairs[1]


def _pairs(graph: fx.Graph) -> set[tuple[str, str]]:
    calls = [node for node in graph.nodes if node.op == "call_module"]
    n_calls = Counter(node.target for node in calls)
    return {
        (str(node.target), str(user.target))
        for node in calls
        for user in node.users
        if len(node.users) == 1
        and user.op == "call_module"
        and user.args == (node,)
        and not user.kwargs
        and n_calls[node.target] == n_calls[user.target] == 1
    }


def _has_hooks(module: nn.Module) -> bool:
    return any(value for key, value in module.__dict__.items() if "_hooks" in key and isinstance(value, dict))
