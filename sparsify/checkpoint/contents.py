"""Contents of a model's file: the packed layers, the other tensors, and the names of shared ones."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparsify.checkpoint import container
from sparsify.checkpoint.compatibility import packed_state_keys
from sparsify.checkpoint.container import LayerEntry
from sparsify.checkpoint.plain_state import check_computed, make_plain, parametrized_besides
from sparsify.checkpoint.shared_tensors import identity_tensor, packed_embeddings
from sparsify.checkpoint.state_names import Names
from sparsify.checkpoint.weight_codec import encode_weight
from sparsify.conversion.converters.table import converters, matrices
from sparsify.conversion.module_surgery import layers_of_type
from sparsify.errors import SavedParametrizedWarning
from sparsify.layer_names import join
from sparsify.layers import Int8Embedding, MaskedLayer, PackedLayer
from sparsify.layers.copies import warn_stale
from sparsify.layers.fsdp import refuse_flattened
from sparsify.layers.records import FormChoice, LayerRecord, form_choice, record_of


@dataclass(frozen=True)
class Contents:
    """Everything that a file holds of a model, by the names in `container.Header`."""

    layers: dict[str, LayerEntry]
    aliases: dict[str, str]
    choices: dict[str, FormChoice]
    tensors: dict[str, Tensor]
    records: dict[str, LayerRecord]


def contents_of(model: nn.Module) -> Contents:
    """Return the contents of a model's file, with the errors and warnings of `save`."""
    names = Names(model)
    state = _storable_state(names)
    layers: dict[str, LayerEntry] = {}
    tensors: dict[str, Tensor] = {}
    warn_stale(layers_of_type(model, MaskedLayer))
    aliases: dict[str, str] = {}
    packed: dict[int, str] = {}
    for name, module in _linear_layers(names).items():
        refuse_flattened(name, module)
        check_computed(name, module)
        entry, parts = encode_weight(module)
        if entry.module == "Linear" and entry.format == "dense":
            continue
        layers[name] = entry
        first_of = name if (weight := identity_tensor(module)) is None else packed.setdefault(id(weight), name)
        if first_of != name:
            aliases[join(name, "weight")] = join(first_of, "weight")
        else:
            tensors |= {join(name, "weight", part): tensor for part, tensor in parts.items()}
    make_plain(state, names, layers)
    for name in packed_state_keys(names, layers):
        state.pop(name, None)
    packed = packed_embeddings(names, layers) | packed
    first: dict[int, str] = {}
    for name, value in state.items():
        if id(value) in packed:
            aliases[name] = join(packed[id(value)], "weight")
        elif first.setdefault(id(value), name) != name:
            aliases[name] = first[id(value)]
        elif name in tensors:
            raise ValueError(f"{name}: this name is also needed for a packed weight; rename the parameter")
        else:
            tensors[name] = value
    if besides := list(parametrized_besides(names, layers)):
        shown = ", ".join(besides[:3]) + (f" and {len(besides) - 3} more" if len(besides) > 3 else "")
        warnings.warn(
            f"{shown}: parametrized, and stored so; the file loads only onto a model that is parametrized alike, or "
            "fold that before saving, with torch.nn.utils.parametrize.remove_parametrizations or remove_weight_norm",
            SavedParametrizedWarning,
            stacklevel=3,
        )
    return Contents(layers, aliases, _choices(names), tensors, _records(names))


def _storable_state(names: Names) -> dict[str, Any]:
    """Return a model's state, ready for a file. Raises ValueError for any other."""
    state = names.state()
    for name, value in state.items():
        container.check_storable(name, value)
    return state


def _linear_layers(names: Names) -> dict[str, nn.Module]:
    """Return the layers with packed weights in the file: ours, and dense ones with a weight of their own.

    A dense table is one of them only after an export: any other may have been tied to a layer.
    """
    used: dict[int, int] = {}
    for module in names.modules.values():
        for parameter in module._parameters.values():
            used[id(parameter)] = used.get(id(parameter), 0) + 1
    return {
        name: module
        for name, module in names.modules.items()
        if isinstance(module, (MaskedLayer, PackedLayer, Int8Embedding))
        or (
            any(type(module) is converter.dense and converter.layers(module) == ("",) for converter in converters())
            and module._parameters.get("weight") is not None
            and (not isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or form_choice(module) is not None)
            and "" in matrices(module)
            and used.get(id(module._parameters.get("weight"))) == 1
        )
    }


def _choices(names: Names) -> dict[str, FormChoice]:
    """Return the form choices of an export, by layer name."""
    return {name: choice for name, module in names.modules.items() if (choice := form_choice(module)) is not None}


def _records(names: Names) -> dict[str, LayerRecord]:
    """Return the errors of the layers, by layer name."""
    return {name: record for name, module in names.modules.items() if (record := record_of(module)) is not None}
