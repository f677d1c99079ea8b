"""Layers that wait for their tensors: another library fills a model from files, and then the layers are made.

Before: each packed layer of the file gives up its weight for a child of the same name, whose buffers are called and
sized as the tensors in the file. So the library loads, places and counts them like any others. After: the buffers
become the layer. A masked layer is made at once, since its weight and mask are plain tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.checkpoint.compatibility import check_layers, check_records, check_state_names
from sparsify.checkpoint.container import Header, LayerEntry
from sparsify.checkpoint.folder import DENSE_PART, Place, part_in_folder
from sparsify.checkpoint.saved_layers import lay_out_as, make_layers, set_records
from sparsify.checkpoint.shared_tensors import check_aliases, check_tied, entries_with_tensors, expand_shared
from sparsify.checkpoint.state_names import Names
from sparsify.checkpoint.weight_codec import decode_weights, other_tensors, part_names
from sparsify.conversion.converters.table import converter_for
from sparsify.conversion.module_surgery import layers_of_type, replace
from sparsify.conversion.transaction import Transaction
from sparsify.errors import CheckpointError
from sparsify.inference.fusion import fuse_activations
from sparsify.layer_names import join
from sparsify.layers import MaskedLayer, PackedLayer
from sparsify.layers.tied import tie


class WaitingWeight(nn.Module):
    """The tensors of a packed weight, in the place of a Parameter, which `dense` keeps.

    Without tensors it holds the place of a Parameter to be shared with another module.
    """

    def __init__(self, dense: Tensor, places: Mapping[str, Place]) -> None:
        super().__init__()
        self.dense = (dense,)  # in a tuple, as nn.Module would take a bare one for its own
        self.shape = dense.shape  # as code expects of a weight
        for part, place in places.items():
            self.register_buffer(part, torch.empty(place.shape, dtype=place.dtype, device=dense.device))


def await_layers(
    model: nn.Module, header: Header, places: Mapping[str, Place], *, tied: Collection[str] = (), partly: bool = False
) -> None:
    """Let a dense model, on the meta device or not, wait for the tensors of a file.

    places: the dtype and shape of every tensor in the file.
    tied: names of state that the library ties to others by itself.
    partly: the file may lack some of the model's state, or have more.
    Raises CheckpointError if the file is of another architecture.
    """
    places = {_canonical(name, header): place for name, place in places.items()}
    with Transaction(model) as undo:
        lay_out_as(places, Names(model), undo)
        names = Names(model)
        masked, packed = _by_kind(header)
        check_layers(names, header.layers)
        _check_places(names, header, places)
        others = other_tensors(entries_with_tensors(packed), places)
        check_aliases(packed, others | masked.layers.keys())
        check_records(names, header)
        check_tied(names, masked)
        _mask(names, masked)
        if not partly:
            check_state_names(names, packed, others)
        for name, entry in packed.layers.items():
            _wait(names.modules[name], name, entry, header, places)
        for alias in header.aliases:
            owner, _, key = alias.rpartition(".")
            module = names.places.get(owner)
            if alias not in tied and module is not None and key in module._parameters:
                _put(module, key, {})


def make_waiting_layers(
    model: nn.Module, header: Header, source: str, *, dtype: torch.dtype | None = None
) -> list[nn.Module]:
    """Turn the waiting layers of a model into layers, with the loaded tensors, and return them.

    dtype: the dtype of the layers, if not that of the file.
    Raises CheckpointError for tensors that are no valid weight.
    """
    names = Names(model)
    packed = _by_kind(header)[1]
    tensors: dict[str, Tensor] = {}
    for name, entry in packed.layers.items():
        tensors |= _take(names.modules[name], name, entry)
    names = Names(model)
    try:
        weights = decode_weights(entries_with_tensors(packed), tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    places = {name: value for name, value in names.state().items() if name in header.tensors}
    aliases = {alias: name for alias, name in header.aliases.items() if name in places or name in _weights(packed)}
    shared = packed.model_copy(update={"aliases": aliases})
    dense = dict(places)
    expand_shared(shared, dense, weights)
    _share(names, aliases, dense)
    make_layers(names, shared, weights)
    for layer in layers_of_type(model, MaskedLayer).values():
        layer._settle()
    made = [names.modules[name] for name in header.layers]
    for layer in made:
        if dtype is not None and isinstance(layer, PackedLayer):
            layer.to(dtype)
    fuse_activations(model)
    set_records(names, header, source)
    return made


def _by_kind(header: Header) -> tuple[Header, Header]:
    """Return the header with the masked layers only, and that with the others."""
    masked = {name: entry for name, entry in header.layers.items() if entry.module == "SparseLinear"}
    packed = {name: entry for name, entry in header.layers.items() if name not in masked}
    return header.model_copy(update={"layers": masked}), header.model_copy(update={"layers": packed})


def _weights(header: Header) -> set[str]:
    return {join(name, "weight") for name in header.layers}


def _canonical(name: str, header: Header) -> str:
    """Return the name that a tensor of a folder has in a checkpoint."""
    weight = name.removesuffix(f".{DENSE_PART}")
    return weight if part_in_folder(weight, header.layers) == name else name


def _check_places(names: Names, header: Header, places: Mapping[str, Place]) -> None:
    """Raise CheckpointError unless plain tensors have the shapes of the model's, and masks are bool."""
    for name, value in names.state().items():
        place = places.get(name)
        if place is not None and isinstance(value, Tensor) and tuple(value.shape) != place.shape:
            raise CheckpointError(
                f"for another architecture: {name} is {place.shape} in the file, {tuple(value.shape)} in the model"
            )
    for layer, entry in header.layers.items():
        if entry.module != "SparseLinear":
            continue
        mask, weight = places.get(join(layer, "mask")), names.modules[layer]._parameters.get("weight")
        if mask is None or weight is None or mask.dtype != torch.bool or mask.shape != tuple(weight.shape):
            raise CheckpointError(f"{layer or '(root)'}: its mask must be bool of the weight's shape, got {mask}")


def _mask(names: Names, header: Header) -> None:
    """Make the masked layers of a file, and let others use their masks as when it was written."""
    made: dict[nn.Module, nn.Module] = {}
    for name in header.layers:
        module = names.modules[name]
        converter = converter_for(module)
        assert converter is not None
        made[module] = converter.to_sparse(module)
    replace(names.model, made)
    owners = {join(name, "weight"): names.modules[name] for name in header.layers}
    for alias, name in header.aliases.items():
        if isinstance(owner := owners.get(name), MaskedLayer):
            tie(names.places[alias.rpartition(".")[0]], owner)


def _wait(module: nn.Module, name: str, entry: LayerEntry, header: Header, places: Mapping[str, Place]) -> None:
    own: dict[str, Place] = {}
    if name in entries_with_tensors(header):
        own = {_buffer(name, part): places[part] for part in part_names(name, entry)}
    _put(module, "weight", own)


def _put(module: nn.Module, key: str, places: Mapping[str, Place]) -> None:
    parameter = module._parameters.pop(key)
    assert parameter is not None
    module._modules[key] = WaitingWeight(parameter, places)


def _take(module: nn.Module, name: str, entry: LayerEntry) -> dict[str, Tensor]:
    """Return the loaded tensors of a layer, and give it a weight without data."""
    waiting: Any = module._modules.pop("weight")
    module._parameters = {"weight": nn.Parameter(waiting.dense[0].to("meta")), **module._parameters}
    buffers = waiting._buffers
    return {part: buffers[_buffer(name, part)] for part in part_names(name, entry)} if buffers else {}


def _buffer(name: str, part: str) -> str:
    """Return the buffer's name for a part of a layer's weight."""
    return part.removeprefix(join(name, "weight")).removeprefix(".") or DENSE_PART


def _share(names: Names, aliases: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    """Let each place of a shared Parameter have it again; those of a packed weight's values share a new one."""
    made: dict[int, nn.Parameter] = {}
    for alias in aliases:
        owner, _, key = alias.rpartition(".")
        module = names.places.get(owner)
        if module is None or alias not in tensors or not isinstance(module._modules.get(key), WaitingWeight):
            continue
        del module._modules[key]
        value = tensors[alias]
        if not isinstance(value, nn.Parameter):
            value = made.setdefault(id(value), nn.Parameter(value))
        module._parameters[key] = value
