"""Masks that other tools left in a model: torch.nn.utils.prune, torch.ao.pruning, or plain zeros.

`convert` calls `masked_parts` on each layer, so models pruned by torch's own tools just convert. Zeros are no mask by
themselves (a fresh bias-free layer may hold some): `masks_from_zeros` is asked for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod


class MaskedParts(NamedTuple):
    """A Linear taken apart: its own Parameter, and the mask another tool holds over it."""

    weight: nn.Parameter
    mask: Tensor | None


def masked_parts(linear: nn.Linear) -> MaskedParts:
    """Return the Parameter behind a Linear's weight, and its mask if torch pruned it.

    Raises ValueError, saying why, if the weight is computed in another way, or if the bias is pruned too.
    """
    if "bias_mask" in linear._buffers:
        raise ValueError("its bias is pruned too; make that permanent with torch.nn.utils.prune.remove(layer, 'bias')")
    if parametrize.is_parametrized(linear):
        return _from_fake_sparsity(linear)
    weight = linear._parameters.get("weight")
    if weight is not None:
        return MaskedParts(weight, None)
    original, mask = linear._parameters.get("weight_orig"), linear._buffers.get("weight_mask")
    if original is None or mask is None:
        raise ValueError("its weight is computed by a hook (weight_norm, spectral_norm ...); remove that first")
    return MaskedParts(original, _as_bool(mask))


def remove_prune_hook(module: nn.Module) -> None:
    """Drop the hook by which torch.nn.utils.prune recomputes `weight`, and the attribute it writes."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight":
            del module._forward_pre_hooks[key]
            # The hook's last result. Left there, it would hide the Parameter of the same name.
            module.__dict__.pop("weight", None)


def _from_fake_sparsity(linear: nn.Linear) -> MaskedParts:
    chain: Any = linear.parametrizations
    if set(chain.keys()) != {"weight"} or len(chain["weight"]) != 1 or not _is_fake_sparsity(chain["weight"][0]):
        raise ValueError("it is parametrized; fold that with torch.nn.utils.parametrize.remove_parametrizations first")
    return MaskedParts(chain["weight"].original, _as_bool(chain["weight"][0].mask))


def _is_fake_sparsity(module: nn.Module) -> bool:
    """Know torch.ao.pruning's parametrization by its name: importing that package is slow, and it may go away."""
    return type(module).__name__ == "FakeSparsity" and isinstance(getattr(module, "mask", None), Tensor)


def _as_bool(mask: Tensor) -> Tensor:
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("its mask holds other values than 0 and 1; only plain masks can be taken over")
    return mask.to(torch.bool)
