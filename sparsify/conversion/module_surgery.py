"""Module surgery: modules changed in place, and a model copied with some modules changed.

A changed module is the same object with another class and contents. So hooks, optimizers, shared uses, references from
outside and even a layer as the root need no special case (torch.nn.utils.parametrize changes classes in the same way).
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from sparsify.kernels import FORMS
from sparsify.kernels.forms import SCALE
from sparsify.layers import Int8Embedding, MaskedLayer, PackedLayer, Tied, UnfusedAttention
from sparsify.layers.held_weight import HeldWeight
from sparsify.layers.inference_mode import making_tensors, writing_to
from sparsify.layers.transposed import Transposed

#: State with the weight and bias of a dense layer: plain, parametrized, or pruned by torch.
_OF_DENSE = frozenset({"weight", "bias", "weight_orig", "weight_mask", "parametrizations"})
_OF_PACKED = frozenset({"bias", SCALE} | {part for parts in FORMS.values() for part in parts})
_OF_ATTENTION = frozenset(
    {f"{layer}_weight{end}" for layer in ("in_proj", "q_proj", "k_proj", "v_proj") for end in ("", "_orig", "_mask")}
    | {"out_proj", "in_proj_bias", "bias_k", "bias_v", "parametrizations"}
)
_OF_UNFUSED = frozenset({"in_proj", "q_proj", "k_proj", "v_proj", "out_proj", "in_proj_bias", "bias_k", "bias_v"})

#: Dense layers with a weight, and perhaps a bias, of their own.
_DENSE = (nn.Linear, _ConvNd, nn.Embedding, nn.EmbeddingBag, nn.Bilinear, Transposed, HeldWeight)

#: Classes with declared attributes of ours, without meaning after a change of a layer's type.
_OURS = (MaskedLayer, PackedLayer, Tied, Int8Embedding)
#: The exception: the record of a layer's pruning stays on the layer.
_STAYS = "pruning_result"

Model = TypeVar("Model", bound=nn.Module)
Layer = TypeVar("Layer", bound=nn.Module)


def layers_of_type(model: nn.Module, kind: type[Layer]) -> dict[str, Layer]:
    """Return the model's modules of a type by their (first) name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def replace_in_place(module: nn.Module, new: nn.Module) -> None:
    """Give `module` the class and contents of `new`, and keep its hooks and the user's attributes, state and children.

    Where both have a name, the value of `new` counts.
    """
    state = {**_extra(module), **new.__dict__, **_own_state(module)}
    for key, put in beside(module).items():
        state[key] = put | state[key]
    state["_non_persistent_buffers_set"] = _not_persistent(module, new)
    module.__dict__.clear()
    module.__dict__.update(state)
    module.__class__ = type(new)


def beside(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Return a user's own _parameters, _buffers and _modules on a layer, beside its weight and bias.

    Empty for modules other than layers: their converters copy all state by themselves.
    """
    own = _state_of(module)
    tables = ("_parameters", "_buffers", "_modules") if own else ()
    return {table: {key: value for key, value in module.__dict__[table].items() if key not in own} for table in tables}


def own_mask(module: nn.Module) -> Tensor | None:
    """Return the user's own mask of a dense layer: a buffer `mask` of its weight's shape."""
    mask, weight = module._buffers.get("mask"), module._parameters.get("weight")
    return mask if mask is not None and weight is not None and mask.shape == weight.shape else None


def put_on(module: nn.Module) -> dict[str, Any]:
    """Return everything on a layer from its user, by name: attributes, class attributes, state and children."""
    attributes = {key: value for key, value in _extra(module).items() if f"{key}_orig" not in module._parameters}
    return attributes | {key: value for put in beside(module).values() for key, value in put.items()}


def plain_type(module: nn.Module) -> type[nn.Module]:
    """Return a module's class; for a parametrized one the class before torch put its own over it."""
    return type(module).__mro__[1] if parametrize.is_parametrized(module) else type(module)


def replace(model: Model, replacements: dict[nn.Module, nn.Module]) -> Model:
    """Turn modules of a model into others, in place, and return the model."""
    for old, new in replacements.items():
        replace_in_place(old, new)
    return model


def copy_replacing(model: Model, replacements: dict[nn.Module, nn.Module], *, share_memory: bool) -> Model:
    """Copy a model, with some modules replaced; every other tensor is a copy, or a new tensor over the same memory.

    Either way converting the copy (`.half()`, `.to()`) leaves the original alone. A replacement gets copies of the
    hooks and attributes of its original. Raises ValueError if a module cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()):
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = _alias(value) if share_memory else _copy(value)
    memo |= {id(old): new for old, new in replacements.items()}
    try:
        for old, new in replacements.items():
            own, state = copy.deepcopy((_extra(old), _own_state(old)), memo)
            new.__dict__.update({**own, **new.__dict__, **state})
            for key, parameter in new._parameters.items():
                new._parameters[key] = memo.get(id(parameter), parameter)
            for key, put in beside(old).items():
                new.__dict__[key] = copy.deepcopy(put, memo) | new.__dict__[key]
            new._non_persistent_buffers_set = _not_persistent(old, new)
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(f"the model cannot be copied: {error}") from error


def _alias(tensor: Tensor) -> Tensor:
    """Return another tensor over the same memory, or the tensor itself if its class is not torch's own."""
    if type(tensor) is nn.Parameter:
        with writing_to(tensor):
            return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
    return tensor.detach() if type(tensor) is Tensor else tensor


def _copy(tensor: Tensor) -> Tensor:
    """Return a trainable copy, or the tensor itself if its class is not torch's own."""
    if type(tensor) not in (nn.Parameter, Tensor):
        return tensor
    stretched = [n > 1 and stride == 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    with making_tensors():
        once = tensor.detach()[tuple(slice(1) if is_stretched else slice(None) for is_stretched in stretched)]
        copied = once.clone().expand(tensor.shape)  # expanded like the original: no more memory
        return nn.Parameter(copied, tensor.requires_grad) if type(tensor) is nn.Parameter else copied


def _extra(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes beyond those of every module: its class's own data, and the user's."""
    ours = {name for kind in _OURS if isinstance(module, kind) for name in kind.__annotations__} - {_STAYS}
    # A forward on the instance is the class's own here (check_forward).
    not_kept = {*nn.Module().__dict__, *ours, "forward"}
    class_data = _class_data(plain_type(module)) if _state_of(module) else {}
    return class_data | {key: value for key, value in module.__dict__.items() if key not in not_kept}


def _class_data(kind: type[nn.Module]) -> dict[str, Any]:
    """Return the data in a user's own subclass of a layer, lost otherwise with the change of class."""
    data: dict[str, Any] = {}
    for ancestor in kind.__mro__:
        if ancestor.__module__.partition(".")[0] in ("torch", "sparsify"):
            break
        own = {name: value for name, value in vars(ancestor).items() if not name.startswith(("__", "_abc_"))}
        plain = {key: value for key, value in own.items() if not callable(value) and not hasattr(value, "__get__")}
        data = plain | data
    return data


def _state_of(module: nn.Module) -> frozenset[str]:
    """Return the names of the Parameters, buffers and children of a layer by its type; empty for other modules."""
    if isinstance(module, nn.MultiheadAttention):
        return _OF_UNFUSED if isinstance(module, UnfusedAttention) else _OF_ATTENTION
    if isinstance(module, PackedLayer):
        return _OF_PACKED
    if isinstance(module, MaskedLayer):
        return _OF_DENSE | {"mask"}
    if isinstance(module, _DENSE) or plain_type(module).__name__ == "Conv1D":
        return _OF_DENSE | ({"mask"} if own_mask(module) is not None else set())
    return frozenset()


def _not_persistent(old: nn.Module, new: nn.Module) -> set[str]:
    """Return the names of buffers to stay out of a state_dict after `old` becomes `new`."""
    put = beside(old).get("_buffers", {})
    return new._non_persistent_buffers_set | {key for key in old._non_persistent_buffers_set if key in put}


def _own_state(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in module.__dict__.items() if "_hook" in key or key == "training"}
