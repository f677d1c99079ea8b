"""The only code that walks a model and edits it.

A converted layer is the same object as before: its class and its contents change, its place does not. So hooks,
optimizers, shared uses, references from outside and even a root that is itself a Linear need no special case
(torch.nn.utils.parametrize changes classes in the same way).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from sparsify.errors import LeftDenseWarning
from sparsify.interop import MaskedParts, masked_parts, remove_prune_hook
from sparsify.layers import CSRLinear, SparseLinear
from sparsify.layers.bare import bare_linear
from sparsify.match import Selector, select

Model = TypeVar("Model", bound=nn.Module)
Layer = TypeVar("Layer", bound=nn.Module)

#: Modules that read the weights of their Linears themselves instead of calling them.
_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class Plan:
    """What `convert` would do: the layers it swaps, those already swapped, and those left dense with the reason."""

    swap: dict[str, MaskedParts]
    already: tuple[str, ...]
    left: dict[str, str]


def convert(
    model: Model,
    *,
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
) -> Model:
    """Swap every nn.Linear of a model for a SparseLinear, in place, and return the model.

    Nothing is pruned yet: all outputs stay as they were, bit for bit, and so do Parameter objects, names, devices,
    dtypes, flags and hooks. A Linear pruned by torch.nn.utils.prune or torch.ao.pruning keeps its mask. Layers are
    chosen by globs over their names, "re:" patterns, or module types; see `sparsify.match.Selector`.

    Layers that cannot be swapped stay dense, and one LeftDenseWarning names them and their share of the parameters.
    Raises ValueError, before anything is changed, for a selector that matches nothing, for a weight shared with another
    module, and if there is nothing to convert.

    >>> convert(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))[0]
    SparseLinear(in_features=4, out_features=3, bias=True, sparsity=0)
    """
    plan = plan_convert(model, include=include, exclude=exclude)
    if not plan.swap and not plan.already:
        reasons = "; ".join(f"{name or '(root)'}: {why}" for name, why in list(plan.left.items())[:3])
        raise ValueError(f"the model has no nn.Linear that can be converted. {reasons}".rstrip())
    if plan.left:  # said before any change: a program may turn warnings into errors
        warnings.warn(_notice(model, plan.left), LeftDenseWarning, stacklevel=2)
    modules = dict(model.named_modules())
    for name, (weight, mask) in plan.swap.items():
        linear = modules[name]
        assert isinstance(linear, nn.Linear)
        plain = bare_linear(nn.Linear, weight, linear.bias)
        remove_prune_hook(linear)
        _become(linear, SparseLinear.from_linear(plain, mask))
    return model


def plan_convert(
    model: nn.Module,
    *,
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
) -> Plan:
    """Say what `convert` would do with the same arguments, and raise what it would raise; the model is not touched."""
    linears = layers_of_type(model, nn.Linear)
    swap: dict[str, MaskedParts] = {}
    left: dict[str, str] = {}
    readers = {
        id(child): f"{type(owner).__name__} reads its weight directly"
        for owner in model.modules()
        if isinstance(owner, _READS_WEIGHTS)
        for child in owner.modules()
    }
    chosen = select(model, linears, include, exclude)
    for name in chosen:
        linear = linears[name]
        if isinstance(linear, SparseLinear):
            continue
        if id(linear) in readers:
            left[name] = readers[id(linear)]
            continue
        try:
            _check_plain(linear)
            swap[name] = masked_parts(linear)
        except ValueError as error:
            left[name] = str(error)
    if include is not None and left and not swap and len(left) == len(chosen):
        name, why = next(iter(left.items()))
        raise ValueError(f"{name or '(root)'}: cannot be converted, {why}")
    _check_untied(model, swap)
    already = tuple(name for name in chosen if isinstance(linears[name], SparseLinear))
    return Plan(swap, already, left)


def to_dense(model: Model) -> Model:
    """Swap every SparseLinear and CSRLinear for a plain nn.Linear with zeros, in place, and return the model.

    >>> to_dense(convert(nn.Sequential(nn.Linear(4, 3))))[0]
    Linear(in_features=4, out_features=3, bias=True)
    """
    for layer in layers_of_type(model, CSRLinear).values():
        _become(layer, layer.to_sparse())
    for sparse in layers_of_type(model, SparseLinear).values():
        _become(sparse, sparse.to_linear())
    return model


def masks_from_zeros(
    model: Model,
    *,
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
) -> Model:
    """Take the zeros in the weights of a converted model as its masks, and return the model.

    For models pruned elsewhere and saved as dense weights with zeros.
    """
    layers = sparse_layers(model, include, exclude)
    for name, layer in layers.items():
        if layer.weight.is_meta:
            raise ValueError(
                f"{name}: the weight is on the meta device and has no data; load the model's weights first"
            )
    for layer in layers.values():
        layer.set_mask(layer.weight.detach() != 0)
    return model


def layers_of_type(model: nn.Module, kind: type[Layer]) -> dict[str, Layer]:
    """Return the model's modules of a type by their (first) name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def sparse_layers(
    model: nn.Module,
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
) -> dict[str, SparseLinear]:
    """Return the chosen SparseLinears by name. Raises ValueError if the model has none."""
    layers = layers_of_type(model, SparseLinear)
    if not layers:
        raise ValueError("the model has no SparseLinear; call sparsify.convert(model) first")
    return {name: layers[name] for name in select(model, layers, include, exclude)}


def copy_with(model: Model, replacements: dict[nn.Module, nn.Module]) -> Model:
    """Copy a model's structure, with some modules replaced; the memory of every other tensor is shared.

    The tensors themselves are new ones over that memory, so that converting the copy (`.half()`, `.to()`) leaves the
    original alone. A replacement takes over the hooks and attributes of the module it stands for. Raises ValueError if
    a module cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()):
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = _alias(value)
    for old, new in replacements.items():
        new.__dict__.update({**_extra(old), **new.__dict__, **_own_state(old)})
        for key, parameter in new._parameters.items():
            new._parameters[key] = memo.get(id(parameter), parameter)
        memo[id(old)] = new
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(f"the model cannot be copied: {error}") from error


def _alias(tensor: Tensor) -> Tensor:
    """Return another tensor over the same memory; of a class that is not torch's own, the tensor itself."""
    if type(tensor) is nn.Parameter:
        return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
    return tensor.detach() if type(tensor) is Tensor else tensor


def replace(model: Model, replacements: dict[nn.Module, nn.Module]) -> Model:
    """Turn modules of a model into others, in place, and return the model."""
    for old, new in replacements.items():
        _become(old, new)
    return model


def _become(module: nn.Module, new: nn.Module) -> None:
    """Let `module` be what `new` is, keeping its own hooks and whatever attributes a user put on it."""
    state = {**_extra(module), **new.__dict__, **_own_state(module)}
    module.__dict__.clear()
    module.__dict__.update(state)
    module.__class__ = type(new)


def _extra(module: nn.Module) -> dict[str, Any]:
    """Return what is on a module beyond what every module has: its class's own attributes, and the user's."""
    return {key: value for key, value in module.__dict__.items() if key not in nn.Module().__dict__}


def _own_state(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in module.__dict__.items() if "_hook" in key or key == "training"}


def _check_plain(linear: nn.Linear) -> None:
    """Raise ValueError, saying why, if another layer could not stand in for this one."""
    kind = type(linear)
    if isinstance(linear, nn.LazyLinear) and linear.has_uninitialized_params():
        raise ValueError("it is not initialised yet; run one batch through the model first")
    if kind.__mro__[1] is nn.Linear and kind.__name__ == "ParametrizedLinear":
        return
    if kind is not nn.Linear:
        raise ValueError(f"it is a {kind.__name__}, a subclass of nn.Linear that may compute something else")
    if "forward" in linear.__dict__:
        raise ValueError("its forward was replaced on the instance")


def _check_untied(model: nn.Module, swap: dict[str, MaskedParts]) -> None:
    """Raise ValueError if a weight to be masked is also used by another module."""
    places: dict[object, list[tuple[str, Tensor]]] = {}
    for module_name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                place = f"{module_name}.{key}".lstrip("."), parameter
                places.setdefault(_memory(parameter)[0], []).append(place)
    for name, (weight, _) in swap.items():
        used = [place for place, parameter in places[_memory(weight)[0]] if _overlap(weight, parameter)]
        if len(used) > 1:
            raise ValueError(
                f"{name}: its weight is tied: {' and '.join(used)} are one Parameter, and a mask would change both; "
                f"leave it dense with exclude=[{name!r}], or untie it first"
            )


def _memory(parameter: Tensor) -> tuple[object, int, int]:
    """Return which memory a Parameter uses, from which byte to which; one without memory is its own."""
    if isinstance(parameter, nn.UninitializedParameter) or parameter.is_meta or parameter.numel() == 0:
        return id(parameter), 0, 1
    start = parameter.data_ptr()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    return parameter.untyped_storage().data_ptr(), start, start + extent * parameter.element_size()


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Say whether two Parameters use the same memory anywhere."""
    (memory, start, end), (other_memory, other_start, other_end) = _memory(one), _memory(other)
    return memory == other_memory and start < other_end and other_start < end


def _notice(model: nn.Module, left: dict[str, str]) -> str:
    """Say what stays dense and how much of the model that is."""
    modules = dict(model.named_modules())
    dense = {modules[name] for name in left}
    owners = {m for m in modules.values() if isinstance(m, _READS_WEIGHTS) and not dense.isdisjoint(m.modules())}
    share = _n_parameters(dense | owners) / max(_n_parameters({model}), 1)
    names = [f"{name or '(root)'} ({why})" for name, why in left.items()]
    shown = "; ".join(names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")
    attention = "with their attention " if owners else ""
    count = "1 layer stays" if len(left) == 1 else f"{len(left)} layers stay"
    return f"{count} dense, {attention}{share:.1%} of the parameters: {shown}"


def _n_parameters(modules: Iterable[nn.Module]) -> int:
    """Count the parameters of modules, each once, and none where a lazy one has no shape yet."""
    parameters = {p for module in modules for p in module.parameters()}
    return sum(p.numel() for p in parameters if not isinstance(p, nn.UninitializedParameter))
