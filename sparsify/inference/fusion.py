"""Activations, BatchNorms and sums fused into the layer before them: some passes over the outputs less.

A module with convolutions gets a plan where its code allows one (`block_plan.py`). If another module calls an exported
layer and passes its result to an activation only, the layer defers its output until that asks for it
(`layers/deferred.py`), and where another exported layer reads the activation, until that does: in the same module, or
in the next one that the module around both calls. The order of calls is read off a module's own forward, traced with
torch.fx; a module without a trace is left as it is. There the trace only finds the outputs worth deferring: an output
is right for any use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import fx, nn
from torch.utils._pytree import tree_leaves

from sparsify.conversion.module_surgery import Model
from sparsify.inference.block_plan import Shallow, callee, is_pure, read_plan
from sparsify.layers import CSRLinear, PackedLayer
from sparsify.layers.activations import activation_call
from sparsify.layers.deferred import begin, end, pass_on
from sparsify.layers.fused_block import FASTER_KINDS, FusedCall, fuse_block

#: Below so many outputs a row telling the layer when to defer costs as much as the activation by itself.
FEWEST_FEATURES = 256
#: Who reads what a module returns.
OUTPUT = "output of the module"


def fuse_activations(model: Model) -> Model:
    """Let exported layers apply what follows them, in place, and return the model.

    Depthwise convolutions get their kernel, and pools channels last.

    A layer, BatchNorm or activation with hooks, or a linear layer in several places of the model, stays as it is.
    """
    if any(isinstance(m, PackedLayer) and m.form != "csr" for m in model.modules()):  # "csr" has torch's results
        for module in model.modules():
            for kind in FASTER_KINDS:
                if kind.replaces(module) and not _has_hooks(module):
                    module.__class__ = kind
    known = {m: name for m in model.modules() if (name := activation_name(m))}
    for owner in list(model.modules()):
        if (plan := read_plan(owner, known)) is not None:
            fuse_block(owner, plan)
            for step, _ in plan.steps:
                if isinstance(step, FusedCall):
                    step.layer.followed_by = step.followed_by
    paths = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    givers: dict[nn.Module, CSRLinear] = {}
    for owner in list(model.modules()):
        free = {name: m for name, m in owner.named_children() if paths[id(m)] == 1 and not _has_hooks(m)}
        layers = {name: m for name, m in free.items() if isinstance(m, CSRLinear) and _is_worth_it(m)}
        readers = {name: known[m] for name, m in free.items() if m in known} if layers else {}
        if not readers:
            continue
        reader_of = _readers(owner)
        for layer_name, name in reader_of.items():
            if layer_name in layers and name in readers:
                layers[layer_name].followed_by = readers[name]
                layers[layer_name].feeds_linear = _feeds_linear(owner, name, reader_of)
                _let_defer(owner)
                if reader_of.get(name) == OUTPUT and paths[id(owner)] == 1:
                    givers[owner] = layers[layer_name]
    for owner in [m for m in model.modules() if any(child in givers for child in m.children())]:
        _let_pass_on(owner, givers)
    return model


def _let_pass_on(owner: nn.Module, givers: Mapping[nn.Module, CSRLinear]) -> None:
    """Let children of a module give deferred outputs to those that are read by an exported linear layer first.

    givers: modules whose output is the activation of a layer's output, with that layer.
    """
    for name, reader in _readers(owner).items():
        giver = owner.get_submodule(name)
        hooks = giver._forward_hooks
        if giver not in givers or list(hooks.values()) != [end] or reader == OUTPUT:
            continue
        if _takes_linear(owner.get_submodule(reader)):
            givers[giver].feeds_linear = True
            hooks[next(iter(hooks))] = pass_on
            _let_defer(owner)


def _is_worth_it(layer: PackedLayer) -> bool:
    """Return whether a layer has enough outputs."""
    return layer.activation == "none" and layer.out_features >= FEWEST_FEATURES


def _takes_linear(module: nn.Module) -> bool:
    """Return whether an exported linear layer alone reads the first argument of a module, before anything changes."""
    if isinstance(module, CSRLinear):
        return True
    graph = Shallow().try_trace(module)
    nodes = [] if graph is None else list(graph.nodes)
    if not nodes or len(nodes[0].users) != 1:
        return False
    user = next(iter(nodes[0].users))
    before = nodes[: nodes.index(user)]
    return (
        isinstance(callee(module, user), CSRLinear)
        and user.args == (nodes[0],)
        and not user.kwargs
        and all(_is_harmless(module, node) for node in before)
    )


def _let_defer(owner: nn.Module) -> None:
    """Tell the layers of a module when it runs."""
    if begin not in owner._forward_pre_hooks.values():
        owner.register_forward_pre_hook(begin)
        owner.register_forward_hook(end, always_call=True)


def activation_name(module: nn.Module) -> str | None:
    """Return the name of a module's activation among the kernels'; None for another module.

    >>> activation_name(nn.GELU(approximate="tanh")), activation_name(nn.Tanh())
    ('gelu_tanh', None)
    """
    if next(module.parameters(), None) is not None:
        return None
    graph = Shallow().try_trace(module)
    nodes = [] if graph is None else list(graph.nodes)
    if [node.op for node in nodes] != ["placeholder", "call_function", "output"] or nodes[1].args[:1] != (nodes[0],):
        return None
    return activation_call(nodes[1].target, nodes[1].args[1:], nodes[1].kwargs)[0]


def _feeds_linear(owner: nn.Module, name: str, reader_of: Mapping[str, str]) -> bool:
    """Return whether the output of a child is read by an exported linear layer alone, dropout or not."""
    children = {**owner._modules, OUTPUT: None}
    while type(children.get(name := reader_of.get(name, OUTPUT))) in (nn.Dropout, nn.Identity):
        pass
    return isinstance(children.get(name), CSRLinear)


def _readers(owner: nn.Module) -> dict[str, str]:
    """Return the only reader, a child or OUTPUT, of the output of each child that is called once, training or not.

    The output is the first argument of the reader. Nothing that is called between the two may write to anything: a
    deferred output reads its input late.
    """
    was_training = owner.training
    pairs = []
    try:
        for owner.training in (False, True):
            graph = Shallow().try_trace(owner)
            pairs.append(set() if graph is None else _pairs(owner, graph))
    finally:
        owner.training = was_training
    return dict(sorted(pairs[0] & pairs[1]))


def _pairs(owner: nn.Module, graph: fx.Graph) -> set[tuple[str, str]]:
    nodes = list(graph.nodes)
    calls = [node for node in nodes if node.op == "call_module"]
    n_calls = Counter(node.target for node in calls)
    return {
        (str(node.target), OUTPUT if user.op == "output" else str(user.target))
        for node in calls
        for user in node.users
        if len(node.users) == 1
        and user.op in ("call_module", "output")
        and user.args[:1] == (node,)
        and not any(other is node for other in tree_leaves((user.args[1:], user.kwargs)))
        and n_calls[node.target] == 1
        and all(_is_harmless(owner, other) for other in nodes[nodes.index(node) + 1 : nodes.index(user)])
    }


def _is_harmless(owner: nn.Module, node: fx.Node) -> bool:
    """Return whether a node writes to nothing but its own output."""
    return node.op in ("placeholder", "get_attr") or is_pure(callee(owner, node))


def _has_hooks(module: nn.Module) -> bool:
    return any(value for key, value in module.__dict__.items() if "_hooks" in key and isinstance(value, dict))
