"""Plans of fused blocks, read off a module's code: the calls after a convolution that nobody sees between.

The code is traced with torch.fx. A plan may stand for it only if it holds all that the code reads of the module itself
(`layers/fused_block.py` compares), so reads and writes of attributes are noted meanwhile.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from sparsify.layers.activations import activation_call
from sparsify.layers.csr_convolution import CSRConv1d, CSRConv2d, CSRConvolution
from sparsify.layers.csr_linear import CSRLinear
from sparsify.layers.depthwise import DepthwiseConv2d
from sparsify.layers.fused_block import Call, FusedBlock, FusedCall, Method, Plan, Slot, may_fuse
from sparsify.layers.max_pool import MaxPool2d

#: BatchNorms that a kernel applies after a convolution.
_NORMS = {CSRConv1d: nn.BatchNorm1d, CSRConv2d: nn.BatchNorm2d, DepthwiseConv2d: nn.BatchNorm2d}
#: Convolutions that run what follows them.
_CONVOLUTIONS = (CSRConvolution, DepthwiseConv2d)
#: Sums, and those of them that write to their first argument.
_SUMS_IN_PLACE = {operator.iadd, "add_"}
_SUMS = {operator.add, torch.add, "add", *_SUMS_IN_PLACE}
#: Modules that write to nothing but their own output and, if told to work in place, their input.
_PURE = (
    *(nn.Conv1d, nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.Sequential, nn.Identity, nn.ReLU, nn.ReLU6),
    *(nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    *(CSRConv1d, CSRConv2d, CSRLinear, DepthwiseConv2d, MaxPool2d),
)
#: Values of attributes that a plan can be compared by.
_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_OF_ALL_MODULES = frozenset(nn.Module().__dict__)


def read_plan(owner: nn.Module, activation_of: dict[nn.Module, str]) -> Plan | None:
    """Return the plan of a module with fused calls; None where nothing can be fused, or the plan might not be the code.

    activation_of: the kernels' names of modules that are activations.
    """
    if not any(isinstance(child, _CONVOLUTIONS) for child in owner.children()) or not may_fuse(owner):
        return None
    graph, names = _trace(owner)
    nodes = [] if graph is None else list(graph.nodes)
    if [node.op for node in nodes].count("placeholder") != 1 or any(node.op == "get_attr" for node in nodes):
        return None
    own = owner.__dict__
    found = names & own.keys() - _OF_ALL_MODULES
    settings = {**{name: own[name] for name in sorted(found)}, "training": False}
    result = nodes[-1].args[0]
    if not isinstance(result, fx.Node) or not all(isinstance(value, _PLAIN) for value in settings.values()):
        return None
    chains = list(_chains(owner, nodes, activation_of))
    if not chains:
        return None
    children = tuple((name, owner._modules[name]) for name in sorted(names & owner._modules.keys()))
    of_chains = dict.fromkeys(callee(owner, node) for chain in chains for node in chain.nodes)
    left_out = tuple((module, type(module), _settings_of(module, activation_of)) for module in of_chains if module)
    steps, slot = _steps(owner, nodes, chains)
    return Plan(steps, slot[result], children, tuple(settings.items()), left_out)


@dataclass(frozen=True)
class _Chain:
    """A convolution and the nodes after it that are one call with it."""

    nodes: tuple[fx.Node, ...]
    norm: fx.Node | None = None
    residual: fx.Node | None = None
    activation: str = "none"
    pool: fx.Node | None = None


def _chains(owner: nn.Module, nodes: list[fx.Node], activation_of: dict[nn.Module, str]) -> Iterator[_Chain]:
    """Yield the convolutions with something to be fused with."""
    taken: set[fx.Node] = set()
    for node in nodes:
        layer = callee(owner, node)
        if not isinstance(layer, _CONVOLUTIONS) or layer.activation != "none" or not _takes_one(node):
            continue
        longer = list(_growing(owner, _Chain((node,)), activation_of))
        fitting = [x for x in longer if not taken.intersection(x.nodes) and _may_wait(owner, x, nodes)]
        if fitting:
            taken.update(fitting[-1].nodes)
            yield fitting[-1]


def _growing(owner: nn.Module, chain: _Chain, activation_of: dict[nn.Module, str]) -> Iterator[_Chain]:
    """Yield longer and longer chains that begin with this one: a norm, a sum, an activation, a pool of images."""
    layer, last = callee(owner, chain.nodes[0]), chain.nodes[-1]
    after = _only_user(last)
    if after is not None and type(callee(owner, after)) is _NORMS[type(layer)] and _takes_one(after):
        chain = _Chain((*chain.nodes, after), norm=after)
        yield chain
        after = _only_user(after)
    if after is not None and (residual := _added(after, chain.nodes[-1])) is not None:
        chain = _Chain((*chain.nodes, after), chain.norm, residual)
        yield chain
        after = _only_user(after)
    if after is not None and (name := _activation(owner, after, activation_of)) is not None:
        chain = _Chain((*chain.nodes, after), chain.norm, chain.residual, name)
        yield chain
        after = _only_user(after)
    if after is not None and _is_pool(callee(owner, after)) and _takes_one(after) and layer.n_dims == 2:  # type: ignore[union-attr]
        yield replace(chain, nodes=(*chain.nodes, after), pool=after)


def _may_wait(owner: nn.Module, chain: _Chain, nodes: list[fx.Node]) -> bool:
    """Return whether the convolution may run when the chain ends: nothing between may write to what it reads."""
    between = nodes[nodes.index(chain.nodes[0]) : nodes.index(chain.nodes[-1])]
    return all(node in chain.nodes or is_pure(callee(owner, node)) for node in between)


def _is_pool(module: nn.Module | None) -> bool:
    return type(module) in (nn.MaxPool2d, MaxPool2d) and not module.return_indices  # type: ignore[union-attr]


def is_pure(module: nn.Module | None) -> bool:
    """Return whether a module writes to nothing but its output."""
    if module is None:
        return False
    kinds = ((m.plain if isinstance(m, FusedBlock) else type(m), m) for m in module.modules())
    return all(kind in _PURE and not getattr(m, "inplace", False) for kind, m in kinds)


def _added(node: fx.Node, chain_end: fx.Node) -> fx.Node | None:
    """Return what a sum adds to the end of a chain; None for another node, or a sum that writes to something else."""
    if node.target not in _SUMS or node.op == "call_module" or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    other = second if first is chain_end else None if node.target in _SUMS_IN_PLACE else first
    return other if isinstance(other, fx.Node) and other is not chain_end else None


def _activation(owner: nn.Module, node: fx.Node, activation_of: dict[nn.Module, str]) -> str | None:
    """Return the kernels' name of a node that is an activation of one value."""
    if node.op == "call_module":
        return activation_of.get(owner.get_submodule(str(node.target))) if _takes_one(node) else None
    return activation_call(node.target, node.args[1:], node.kwargs)[0] if node.args else None


def _steps(
    owner: nn.Module, nodes: list[fx.Node], chains: Sequence[_Chain]
) -> tuple[tuple[tuple[Call | FusedCall, tuple[int, ...]], ...], dict[fx.Node, int]]:
    """Return the steps of a plan, and the Slot of each node with a value."""
    chain_at = {chain.nodes[-1]: chain for chain in chains}
    inside = {node for chain in chains for node in chain.nodes[:-1]}
    run = [node for node in nodes if node.op not in ("placeholder", "output") and node not in inside]
    slot = {node: number for number, node in enumerate([nodes[0], *run])}
    read_by: dict[fx.Node, int] = {}
    steps: list[Call | FusedCall] = []
    for number, node in enumerate(run):
        chain = chain_at.get(node)
        if chain is None:
            read, step = list(node.all_input_nodes), _call(owner, node, slot)
        else:
            x: Any = chain.nodes[0].args[0]
            read = [x] if chain.residual is None else [x, chain.residual]
            norm = None if chain.norm is None else callee(owner, chain.norm)
            layer: Any = callee(owner, chain.nodes[0])
            residual = None if chain.residual is None else slot[chain.residual]
            pool = None if chain.pool is None else callee(owner, chain.pool)
            step = FusedCall(layer, norm, chain.activation, slot[x], residual, pool)  # type: ignore[assignment]
        read_by |= dict.fromkeys(read, number)
        steps.append(step)
    read_by[nodes[-1].args[0]] = len(run)  # type: ignore[index]  # the result: never done
    done = [tuple(slot[n] for n, last in read_by.items() if last == number) for number in range(len(run))]
    return tuple(zip(steps, done, strict=True)), slot


def _settings_of(module: nn.Module, activation_of: dict[nn.Module, str]) -> tuple[tuple[str, Any], ...]:
    """Return the settings that make a module the activation or pool it is."""
    own = module.__dict__.items() if module in activation_of or _is_pool(module) else ()
    return tuple((name, value) for name, value in own if name not in _OF_ALL_MODULES and isinstance(value, _PLAIN))


def _call(owner: nn.Module, node: fx.Node, slot: dict[fx.Node, int]) -> Call:
    """Return the step of a node that is not fused."""
    function: Any = node.target
    if node.op == "call_module":
        function = callee(owner, node)
    elif node.op == "call_method":
        function = Method(str(node.target))
    return Call(function, _with_slots(node.args, slot), {k: _with_slots(v, slot) for k, v in node.kwargs.items()})


def _with_slots(value: Any, slot: dict[fx.Node, int]) -> Any:
    """Return an argument of a node with Slots in the place of nodes, in plain containers."""
    if isinstance(value, fx.Node):
        return Slot(slot[value])
    if isinstance(value, (tuple, list)):
        return (tuple if isinstance(value, tuple) else list)([_with_slots(item, slot) for item in value])
    if isinstance(value, dict):
        return {key: _with_slots(item, slot) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_with_slots(item, slot) for item in (value.start, value.stop, value.step)))
    return value


def callee(owner: nn.Module, node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls."""
    return owner.get_submodule(str(node.target)) if node.op == "call_module" else None


def _takes_one(node: fx.Node) -> bool:
    return len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


class _Proxy(fx.Proxy):
    """A value in a trace, of which `+=` and the like are recorded as they are, not as sums into new values."""


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


_State = dict[str, dict[str, Any]]


def _state(module: nn.Module) -> _State:
    """Return copies of a module's attributes, under "", and of its tables."""
    own = module.__dict__
    return {"": dict(own), **{key: dict(own[key]) for key in ("_parameters", "_buffers", "_modules") if key in own}}


def _restore(module: nn.Module, before: _State) -> bool:
    """Give a module its attributes and tables of before; return whether they were others."""
    now = _state(module)
    same = now.keys() == before.keys() and all(
        table.keys() == now[key].keys() and all(now[key][name] is value for name, value in table.items())
        for key, table in before.items()
    )
    if not same:
        for key, table in before.items():
            attributes = module.__dict__[key] if key else module.__dict__
            attributes.clear()
            attributes.update(table)
    return not same


class Shallow(fx.Tracer):
    """Traces one module's own code, without its children's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return True: no child is looked into."""
        return True

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Return the code and its arguments: the module, and a value for each that may be given by position.

        torch's own way gives `**kwargs` one value, which no code can pass on, and mistakes the names of wrapped code.
        """
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        named = [p for p in inspect.signature(root_fn).parameters.values() if p.kind in kinds]
        defaults = [() if p.default is p.empty else (p.default,) for p in named[1:]]
        return root_fn, [
            self.root,
            *(self.create_proxy("placeholder", p.name, d, {}) for p, d in zip(named[1:], defaults, strict=True)),
        ]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the value of a node."""
        return _Proxy(node, self)

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]
        """Trace a module; its code changes no module by that. Raises ValueError if it would."""
        before = {module: _state(module) for module in root.modules()}
        try:
            graph = super().trace(root, concrete_args)
        finally:
            changed = [module for module, state in before.items() if _restore(module, state)]
        if changed:
            raise ValueError(f"the code of {type(root).__name__} changes a {type(changed[0]).__name__}")
        return graph

    def try_trace(self, root: nn.Module) -> fx.Graph | None:
        """Trace a module; return None for code that cannot be traced."""
        try:
            return self.trace(root)
        except Exception:  # whatever the code does with a tensor that is none
            return None


def _trace(owner: nn.Module) -> tuple[fx.Graph | None, set[str]]:
    """Trace a module's forward of one argument, in eval mode; return the graph, and the attributes that it reads.

    There is no graph for code that cannot be traced, that writes attributes, or reads some that are nowhere.
    """
    plain, noted, read, written = type(owner), set[str](), set[str](), set[str]()

    class Noting(plain):  # type: ignore[misc, valid-type]
        def forward(self, x: Any) -> Any:
            noted.clear()  # of what the tracer reads itself
            y = plain.forward(self, x)
            read.update(noted)
            return y

        def __getattribute__(self, name: str) -> Any:
            noted.add(name)
            return super().__getattribute__(name)

        def __setattr__(self, name: str, value: Any) -> None:
            written.add(name)
            super().__setattr__(name, value)

    was_training = owner.training
    try:
        owner.__class__ = Noting
        owner.__dict__["training"] = False
        graph = Shallow().try_trace(owner)
    finally:
        owner.__class__ = plain
        owner.__dict__["training"] = was_training
    lost = {name for name in read if not hasattr(owner, name)}
    return (None if written - {"__class__"} or lost else graph), read
