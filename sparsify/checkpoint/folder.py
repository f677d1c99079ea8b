"""A model in the files of another library: its tensors, split over files as that library likes, and our header in each.

A library such as transformers writes the tensors, chooses the files, and reads them back. The header, the same in all
files, names each tensor with its hash, so that a file altered, exchanged or left out is noticed. A model with masked
layers is written as dense weights with zeros, each with its mask beside it, for readers without this library.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsify.checkpoint import container
from sparsify.checkpoint.container import Header, LayerEntry
from sparsify.checkpoint.contents import Contents, contents_of
from sparsify.checkpoint.tensor_file import TensorFile
from sparsify.checkpoint.weight_codec import part_names
from sparsify.conversion.module_surgery import layers_of_type
from sparsify.errors import CheckpointError
from sparsify.layer_names import join
from sparsify.layers import Int8Embedding, MaskedLayer, PackedLayer
from sparsify.layers.records import form_choice

#: The two kinds of model in a folder.
KINDS = ("packed", "masked")

#: The tensor of a packed weight in the format dense, below NAME.weight.
DENSE_PART = "values"


@dataclass(frozen=True)
class Place:
    """The dtype and shape of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def kind_of(model: nn.Module) -> str | None:
    """Return the kind of a model: "packed" if exported, "masked" if converted, None for a dense one.

    An export in which dense was fastest for every layer is an export, too.
    Raises ValueError for a model with layers of both kinds.
    """
    masked, packed = layers_of_type(model, MaskedLayer), layers_of_type(model, PackedLayer)
    if masked and packed:
        raise ValueError(
            f"{next(iter(masked))} is masked and {next(iter(packed))} exported; a folder holds models of one kind: "
            "export the whole model, or to_dense it"
        )
    exported = packed or any(isinstance(m, Int8Embedding) or form_choice(m) is not None for m in model.modules())
    return "masked" if masked else "packed" if exported else None


def tensors_and_metadata(model: nn.Module, left_out: Collection[str] = ()) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a masked or exported model by name, and the metadata for each of its files.

    left_out: names of state that the library never stores.
    Raises ValueError as `sparsify.save` does.
    """
    contents = contents_of(model)
    contents = (_with_dense_weights if kind_of(model) == "masked" else _with_named_parts)(model, contents)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for alias in contents.aliases.keys() & buffers.keys():  # libraries share Parameters, and copy buffers
        contents.tensors[alias] = buffers[alias]
        del contents.aliases[alias]
    tensors = _unshared({name: value for name, value in contents.tensors.items() if name not in left_out})
    aliases = {alias: name for alias, name in contents.aliases.items() if alias not in left_out}
    hashes = {name: container.hash_of(value) for name, value in tensors.items()}
    header = container.header_of(contents.layers, aliases, contents.choices, hashes, contents.records)
    return tensors, container.metadata_of(header)


def read_headers(paths: Sequence[str | os.PathLike[str]]) -> tuple[Header, dict[str, Place]]:
    """Check every tensor of the files of one model by its hash; return their header, and each tensor's place.

    Raises CheckpointError unless all files lie in one folder, carry the same header, and hold what it says.
    """
    if len({os.path.dirname(os.path.abspath(path)) for path in paths}) != 1:
        raise CheckpointError(f"the files of one model must lie in one folder, got {[os.fspath(p) for p in paths[:3]]}")
    header: Header | None = None
    places: dict[str, Place] = {}
    for path in paths:
        with TensorFile(path) as file:
            own = container.read_header(file.metadata, path)
            if header is not None and own != header:
                raise CheckpointError(f"{path}: its header is not that of {paths[0]}; the files are of two models")
            header = own
            for name in file:
                if name not in header.tensors or name in places:
                    raise CheckpointError(f"{path}: the files and their header disagree about the tensor {name!r}")
                container.read_tensor(file, name, header.tensors[name], path)
                places[name] = Place(file.dtype(name), file.shape(name))
    assert header is not None
    if missing := sorted(header.tensors.keys() - places.keys()):
        raise CheckpointError(
            f"{paths[0]}: {len(missing)} tensors of the model are in none of the {len(paths)} files, such as "
            f"{missing[0]!r}; are all files there?"
        )
    return header, places


def _with_dense_weights(model: nn.Module, contents: Contents) -> Contents:
    """Exchange the packed weights of masked and dense layers for plain ones, and add the masks."""
    modules = dict(model.named_modules())
    masked = {name: entry for name, entry in contents.layers.items() if entry.module == "SparseLinear"}
    tensors = dict(contents.tensors)
    for name, entry in contents.layers.items():
        for part in part_names(name, entry):
            tensors.pop(part, None)
        weight = join(name, "weight")
        module = modules[name]
        if weight in contents.aliases:
            continue
        if isinstance(module, MaskedLayer):
            hidden = module.masked_mode != "zero"  # of a schedule under way: removed weights may come back
            tensors[weight] = module.weight.detach() if hidden else module.masked_weight().detach()
            tensors[join(name, "mask")] = module.mask
        else:
            tensors[weight] = module.weight.detach()
    layers = {name: entry.model_copy(update={"format": "dense"}) for name, entry in masked.items()}
    return replace(contents, layers=layers, tensors=tensors)


def _with_named_parts(model: nn.Module, contents: Contents) -> Contents:
    """Give packed weights of the format dense a name of their own: NAME.weight is that of a plain layer's."""
    tensors = {part_in_folder(name, contents.layers): tensor for name, tensor in contents.tensors.items()}
    return replace(contents, tensors=tensors)


def part_in_folder(name: str, layers: Mapping[str, LayerEntry]) -> str:
    """Return the name that a tensor of a checkpoint has in a folder: another one for a packed weight stored dense."""
    layer, _, key = name.rpartition(".")
    entry = layers.get(layer) if key == "weight" else None
    dense = entry is not None and entry.format == "dense" and entry.module != "SparseLinear"
    return f"{name}.{DENSE_PART}" if dense else name


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detach tensors, and copy those with memory in common: safetensors writes each once."""
    seen: set[tuple[torch.device, int]] = set()
    result = {}
    for name, value in tensors.items():
        place = (value.device, value.untyped_storage().data_ptr())
        result[name] = value.detach().clone() if place in seen else value.detach()
        seen.add(place)
    return result
