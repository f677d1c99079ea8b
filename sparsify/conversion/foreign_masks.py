"""Foreign masks, of torch.nn.utils.prune and torch.ao.pruning; checks for adapters and weights of other tools.

`convert` calls `parameter_and_mask` on each layer, so models pruned by torch's own tools just convert. Zeros alone are
no mask (any weight may have some): only `masks_from_zeros` makes a mask of them.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from sparsify.conversion.module_surgery import own_mask, plain_type, put_on
from sparsify.layers import MaskedLayer
from sparsify.layers.fsdp import is_sharded
from sparsify.layers.own_forward import check_forward


class MaskedParts(NamedTuple):
    """The Parameter of a weight, and another tool's mask over it."""

    weight: nn.Parameter
    mask: Tensor | None


def parameter_and_mask(module: nn.Module, key: str = "weight") -> MaskedParts:
    """Return the Parameter behind a weight of a module, and its mask from torch's pruning or the user's buffer.

    Raises ValueError, with the reason, for a weight computed in another way, and for a bias that is no Parameter.
    """
    if parametrize.is_parametrized(module):
        return _from_fake_sparsity(module)
    if "bias" not in module._parameters and hasattr(module, "bias"):
        raise ValueError(_not_a_parameter(module, "bias"))
    weight = module._parameters.get(key)
    if weight is not None:
        return MaskedParts(weight, None if isinstance(module, MaskedLayer) else _own_mask(module))
    original, mask = module._parameters.get(f"{key}_orig"), module._buffers.get(f"{key}_mask")
    if original is None or mask is None:
        raise ValueError(_not_a_parameter(module, key))
    return MaskedParts(original, _as_bool(mask))


def check_plain(module: nn.Module, dense: type[nn.Module], name: str) -> None:
    """Raise ValueError, with the reason, if a module may compute anything but `dense`, called `name` in the message."""
    own = plain_type(module)
    if own is not dense:
        raise ValueError(f"it is a {own.__name__}, a subclass of {name} that may compute something else")
    check_forward(module)


def check_names(module: nn.Module, dense: type[nn.Module], *becomes: type[nn.Module], needs: Collection[str]) -> None:
    """Raise ValueError, with the name, if anything put on a module by its user has a name needed by the new layer.

    becomes: the classes of the layer's later life; their attributes, beyond those of `dense`, are needed.
    needs: further names, of attributes of their instances.
    """
    own = {name for kind in dense.__mro__ for name in (*dir(kind), *vars(kind).get("__annotations__", ()))}
    names = {name for kind in becomes for name in dir(kind)} - own | set(needs)
    for name, value in put_on(module).items():
        if name in names and not type(value).__module__.startswith("sparsify."):  # ours, from an earlier life
            places: dict[str, Collection[str]]
            places = {"a Parameter": module._parameters, "a buffer": module._buffers, "a child": module._modules}
            kind = next((kind for kind, place in places.items() if name in place), "an attribute")
            raise ValueError(f"it has {kind} {name!r}, a name that {becomes[0].__name__} needs; rename that")


def check_plain_parameter(weight: Tensor) -> None:
    """Raise ValueError, with the reason, if a Parameter is not plain numbers: sharded, quantized, complex."""
    if is_sharded(weight):
        raise ValueError(
            "its weight is sharded (a DTensor); convert the model before fully_shard or parallelize_module"
        )
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        dtype = "" if weight.is_floating_point() and weight.dtype.itemsize > 1 else f" of {weight.dtype}"
        raise ValueError(
            f"its weight is a {type(weight).__name__}{dtype}, not a plain floating Parameter; "
            "prune the model before it is quantized or wrapped"
        )


def check_shapes(weight: Tensor, bias: Tensor | None, n_dims: int, n_outputs: int) -> None:
    """Raise ValueError, with the reason, if a weight or a bias has not the shape needed by its layer."""
    if weight.ndim != n_dims:
        raise ValueError(f"its weight has the shape {tuple(weight.shape)}, where {n_dims} dimensions are needed")
    if bias is not None and bias.shape != (n_outputs,):
        raise ValueError(f"its bias has the shape {tuple(bias.shape)}, where {(n_outputs,)} is needed")


def check_converted(layer: nn.Module) -> None:
    """Raise ValueError, with the reason and the way out, unless a layer's weight and bias are still its Parameters.

    They are not after torch has parametrized, pruned or quantized the layer. A sharded weight passes.
    """
    weight, mask = parameter_and_mask(layer)
    if mask is not None:
        raise ValueError(
            "torch has put a mask of its own on its weight; make that permanent with "
            + (
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
                if parametrize.is_parametrized(layer)
                else "torch.nn.utils.prune.remove(layer, 'weight')"
            )
        )
    if not is_sharded(weight):
        check_plain_parameter(weight)


def peft_adapters(model: nn.Module) -> set[nn.Module]:
    """Return the adapters put beside wrapped layers by peft: low-rank deltas, not to be pruned."""
    peft: Any = sys.modules.get("peft.tuners.tuners_utils")
    wrapped = [m for m in model.modules() if peft and isinstance(m, peft.BaseTunerLayer)]
    beside = [child for layer in wrapped for name, child in layer.named_children() if name != "base_layer"]
    return {module for child in beside for module in child.modules()}


def pruned_by_torch(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and present value of each tensor of a module computed by torch.nn.utils.prune.

    The module's attribute of the same name is only as new as its last call.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            key = hook._tensor_name
            original, mask = module._parameters.get(f"{key}_orig"), module._buffers.get(f"{key}_mask")
            if original is not None and mask is not None:
                yield key, original.detach() * mask.to(original.dtype)


def remove_prune_hook(module: nn.Module, key: str = "weight") -> None:
    """Drop torch.nn.utils.prune's hook for a weight, and the attribute written by the hook."""
    for number, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == key:
            del module._forward_pre_hooks[number]
            # The hook's last result. Left there, it would hide the Parameter of the same name.
            module.__dict__.pop(key, None)


def _from_fake_sparsity(module: nn.Module) -> MaskedParts:
    chain: Any = module.parametrizations
    if set(chain.keys()) != {"weight"} or len(chain["weight"]) != 1 or not _is_fake_sparsity(chain["weight"][0]):
        raise ValueError(
            "it is parametrized; fold that first, with "
            f"torch.nn.utils.parametrize.remove_parametrizations(layer, {next(iter(chain))!r})"
        )
    return MaskedParts(chain["weight"].original, _as_bool(chain["weight"][0].mask))


def _own_mask(module: nn.Module) -> Tensor | None:
    """Return the mask in a module's buffer `mask`. Raises ValueError unless the weight follows this mask."""
    mask = own_mask(module)
    if mask is None:
        return None
    kept = _as_bool(mask)
    weight = module._parameters["weight"]
    if weight is not None and bool(weight.detach().masked_fill(kept, 0).any()):
        raise ValueError("it has a buffer 'mask' that its weight does not follow; multiply them, or rename the buffer")
    return kept


def _not_a_parameter(module: nn.Module, key: str) -> str:
    """Return the reason why a weight or bias is not among a module's Parameters, with the way out."""
    if key in module._buffers:
        return f"its {key} is a buffer, not a Parameter"
    if f"{key}_orig" in module._parameters and f"{key}_mask" in module._buffers:
        return f"its {key} is pruned too; make that permanent with torch.nn.utils.prune.remove(layer, {key!r})"
    if module._forward_pre_hooks:
        return (
            f"its {key} is computed by a hook (weight_norm, spectral_norm ...); remove that first, with "
            "torch.nn.utils.remove_weight_norm(layer) or remove_spectral_norm(layer)"
        )
    return f"its {key} is not a Parameter of its own"


def _is_fake_sparsity(module: nn.Module) -> bool:
    """Return whether a module is torch.ao.pruning's parametrization, known by name: that package is slow to import."""
    return type(module).__name__ == "FakeSparsity" and isinstance(getattr(module, "mask", None), Tensor)


def _as_bool(mask: Tensor) -> Tensor:
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("its mask holds other values than 0 and 1; only plain masks can be taken over")
    return mask.to(torch.bool)
