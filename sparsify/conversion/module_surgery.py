"""Modules changed in place, and a model copied with some of them changed.

A changed module is the same object as before: its class and its contents change, its place does not. So hooks,
optimizers, shared uses, references from outside and even a root that is itself a layer need no special case
(torch.nn.utils.parametrize changes classes in the same way).
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
Layer = TypeVar("Layer", bound=nn.Module)


def layers_of_type(model: nn.Module, kind: type[Layer]) -> dict[str, Layer]:
    """Return the model's modules of a type by their (first) name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def become(module: nn.Module, new: nn.Module) -> None:
    """Let `module` be what `new` is, keeping its own hooks and whatever attributes a user put on it."""
    state = {**_extra(module), **new.__dict__, **_own_state(module)}
    module.__dict__.clear()
    module.__dict__.update(state)
    module.__class__ = type(new)


def replace(model: Model, replacements: dict[nn.Module, nn.Module]) -> Model:
    """Turn modules of a model into others, in place, and return the model."""
    for old, new in replacements.items():
        become(old, new)
    return model


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


def _extra(module: nn.Module) -> dict[str, Any]:
    """Return what is on a module beyond what every module has: its class's own attributes, and the user's."""
    plain = {*nn.Module().__dict__, "leader"}  # a Tied layer's, which what it becomes has not
    return {key: value for key, value in module.__dict__.items() if key not in plain}


def _own_state(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in module.__dict__.items() if "_hook" in key or key == "training"}
