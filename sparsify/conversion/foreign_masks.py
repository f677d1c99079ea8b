"""What other tools left in a model: masks of torch.nn.utils.prune and torch.ao.pruning, adapters, packed weights.

`convert` calls `masked_parts` on each layer, so models pruned by torch's own tools just convert. Zeros are no mask by
themselves (a fresh bias-free layer may hold some): `masks_from_zeros` is asked for.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod


class MaskedParts(NamedTuple):
    """A weight taken apart: its own Parameter, and the mask another tool holds over it."""

    weight: nn.Parameter
    mask: Tensor | None


def masked_parts(module: nn.Module, key: str = "weight") -> MaskedParts:
    """Return the Parameter behind a weight of a module, and its mask if torch pruned it.

    Raises ValueError, saying why, if the weight is computed in another way, or if the bias is pruned too.
    """
    if "bias_mask" in module._buffers:
        raise ValueError("its bias is pruned too; make that permanent with torch.nn.utils.prune.remove(layer, 'bias')")
    if parametrize.is_parametrized(module):
        return _from_fake_sparsity(module)
    weight = module._parameters.get(key)
    if weight is not None:
        return MaskedParts(weight, None)
    original, mask = module._parameters.get(f"{key}_orig"), module._buffers.get(f"{key}_mask")
    if original is None or mask is None:
        raise ValueError(
            f"its {key} is computed by a hook (weight_norm, spectral_norm ...); remove that first, with "
            "torch.nn.utils.remove_weight_norm(layer) or remove_spectral_norm(layer)"
        )
    return MaskedParts(original, _as_bool(mask))


def check_weight(weight: Tensor) -> None:
    """Raise ValueError, saying why, if a Parameter is not plain numbers: sharded, quantized, complex."""
    if type(weight).__name__ == "DTensor":
        raise ValueError(
            "its weight is sharded (a DTensor); convert the model before fully_shard or parallelize_module"
        )
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        dtype = "" if weight.is_floating_point() and weight.dtype.itemsize > 1 else f" of {weight.dtype}"
        raise ValueError(
            f"its weight is a {type(weight).__name__}{dtype}, not a plain floating Parameter; "
            "prune the model before it is quantized or wrapped"
        )


def adapters(model: nn.Module) -> set[nn.Module]:
    """Return the modules that peft put beside the layers it wraps: low-rank deltas, not to be pruned."""
    peft: Any = sys.modules.get("peft.tuners.tuners_utils")
    wrapped = [m for m in model.modules() if peft and isinstance(m, peft.BaseTunerLayer)]
    beside = [child for layer in wrapped for name, child in layer.named_children() if name != "base_layer"]
    return {module for child in beside for module in child.modules()}


def remove_prune_hook(module: nn.Module, key: str = "weight") -> None:
    """Drop the hook by which torch.nn.utils.prune recomputes a weight, and the attribute it writes."""
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
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
        )
    return MaskedParts(chain["weight"].original, _as_bool(chain["weight"][0].mask))


def _is_fake_sparsity(module: nn.Module) -> bool:
    """Know torch.ao.pruning's parametrization by its name: importing that package is slow, and it may go away."""
    return type(module).__name__ == "FakeSparsity" and isinstance(getattr(module, "mask", None), Tensor)


def _as_bool(mask: Tensor) -> Tensor:
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("its mask holds other values than 0 and 1; only plain masks can be taken over")
    return mask.to(torch.bool)
