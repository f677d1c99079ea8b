"""The plain state of a model, as of one built anew: a tensor computed by torch from others is plain again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from sparsify.checkpoint.container import LayerEntry
from sparsify.checkpoint.state_names import Names
from sparsify.conversion.foreign_masks import pruned_by_torch
from sparsify.layer_names import join
from sparsify.layers import MaskedLayer, PackedLayer


def make_plain(state: dict[str, Any], names: Names, layers: Mapping[str, LayerEntry]) -> None:
    """Put computed tensors in the place of their sources: torch's pruning, parametrizations of `layers`.

    Another parametrized module keeps its state: a model built anew may be parametrized too.
    """
    computed: dict[int, dict[str, Tensor]] = {}  # by module: a module may have several names
    sources: set[str] = set()  # names of tensors, and of modules
    for name, module in names.places.items():
        if id(module) not in computed:
            computed[id(module)] = dict(pruned_by_torch(module))
            if name in layers and parametrize.is_parametrized(module):
                keys: Any = module.parametrizations
                computed[id(module)] |= {key: getattr(module, key).detach() for key in keys}
        for key, value in computed[id(module)].items():
            sources |= {join(name, raw) for raw in (f"{key}_orig", f"{key}_mask", f"parametrizations.{key}")}
            state[join(name, key)] = value
    for name in [name for name in state if sources and not sources.isdisjoint(_with_owners(name))]:
        del state[name]


def _with_owners(name: str) -> Iterator[str]:
    """Yield a dotted name, and the names of all modules around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def check_computed(name: str, layer: nn.Module) -> None:
    """Raise ValueError if the weight of a layer of ours is computed in a way unknown to files."""
    hooks = [type(hook).__name__ for hook in layer._forward_pre_hooks.values() if _is_old_norm(hook)]
    if isinstance(layer, MaskedLayer) and hooks:
        raise ValueError(
            f"{name or '(root)'}: its weight is computed by a hook ({hooks[0]}); fold that first, with "
            "torch.nn.utils.remove_weight_norm(layer) or remove_spectral_norm(layer)"
        )
    if isinstance(layer, PackedLayer) and parametrize.is_parametrized(layer):
        raise ValueError(
            f"{name or '(root)'}: it was exported and is parametrized; fold that first, with "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, ...)"
        )


def parametrized_besides(names: Names, layers: Mapping[str, LayerEntry]) -> Iterator[str]:
    """Yield the parametrized modules besides `layers`: only a model with the same parametrization can load them."""
    for name, module in names.modules.items():
        if name not in layers and (
            parametrize.is_parametrized(module) or any(map(_is_old_norm, module._forward_pre_hooks.values()))
        ):
            yield name


def _is_old_norm(hook: object) -> bool:
    return isinstance(hook, (WeightNorm, SpectralNorm))
