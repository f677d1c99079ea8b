"""Weights shared by several places of a model: stored once in a file, shared again after loading."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from sparsify.checkpoint.container import Header, LayerEntry
from sparsify.checkpoint.state_names import Names
from sparsify.checkpoint.weight_codec import StoredWeight
from sparsify.errors import CheckpointError
from sparsify.kernels import part_names
from sparsify.kernels.csr import csr_to_dense
from sparsify.layer_names import join
from sparsify.layers import Int8Embedding, MaskedLayer, PackedLayer
from sparsify.layers.tied import check_tieable, tie


def identity_tensor(module: nn.Module) -> Tensor | None:
    """Return the tensor that identifies a shared weight."""
    return module.values if isinstance(module, (PackedLayer, Int8Embedding)) else module._parameters.get("weight")


def packed_embeddings(names: Names, layers: Mapping[str, LayerEntry]) -> dict[int, str]:
    """Return the exported layers with the very weights of an Embedding, by the id of its weight: once tied, they are
    equal bit for bit.
    """
    embeddings = {id(m.weight): m.weight for m in names.modules.values() if type(m) is nn.Embedding}
    shapes = {weight.shape for weight in embeddings.values()}
    layer_of: dict[tuple[torch.dtype, tuple[int, ...], bytes], str] = {}
    for name, entry in layers.items():
        module = names.modules[name]
        if entry.module == "CSRLinear" and isinstance(module, PackedLayer) and entry.shape in shapes:
            layer_of.setdefault(_content(csr_to_dense(module.csr, module.shape)[0]), name)
    if not layer_of:
        return {}
    found = {identity: layer_of.get(_content(weight.detach())) for identity, weight in embeddings.items()}
    return {identity: layer for identity, layer in found.items() if layer is not None}


def entries_with_tensors(header: Header) -> dict[str, LayerEntry]:
    """Return the layers with tensors of their own; the others' weights are packed in those of another."""
    return {name: entry for name, entry in header.layers.items() if join(name, "weight") not in header.aliases}


def check_aliases(header: Header, others: Collection[str]) -> None:
    """Raise CheckpointError unless every alias is a new name for a tensor, or for the packed weight of a layer.

    others: the tensors of the file outside of all layers' weights.
    """
    layers = {join(name, "weight"): entry for name, entry in header.layers.items()}
    packed = {join(name, "weight"): entry for name, entry in entries_with_tensors(header).items()}
    for alias, name in header.aliases.items():
        if alias in others or alias in packed or (name not in others and name not in packed):
            raise CheckpointError(f"the header says {alias!r} is the same tensor as {name!r}, which cannot be")
        if alias in layers and layers[alias] != packed.get(name):
            raise CheckpointError(f"the header says {alias!r} is packed as {name!r} is, which cannot be")


def expand_shared(header: Header, tensors: dict[str, Tensor], weights: dict[str, StoredWeight]) -> None:
    """Give every tensor and every packed weight its other names too; a packed one is unpacked once at most."""
    layers = {join(name, "weight"): name for name in header.layers}
    dense: dict[str, Tensor] = {}
    for alias, name in header.aliases.items():
        if alias in layers:
            weights[layers[alias]] = weights[layers[name]]
        elif name not in layers:
            dense[alias] = tensors[name]
        elif name in dense:
            dense[alias] = dense[name]
        else:
            dense[alias] = dense[name] = csr_to_dense(weights[layers[name]].plain, header.layers[layers[name]].shape)[0]
    tensors |= {alias: dense[alias] for alias in header.aliases if alias not in layers}


def check_tied(names: Names, header: Header) -> None:
    """Raise CheckpointError unless every module with another's mask in the file can have it in the model."""
    for name, owner in _tied_to_masked(header).items():
        try:
            check_tieable(names.places[name])
        except ValueError as error:
            raise CheckpointError(f"{name} is tied to {owner} in the file, but in the model {error}") from None


def restore_sharing(header: Header, modules: Mapping[str, nn.Module]) -> None:
    """Let modules share tensors as when the file was written: a masked layer's weight, or packed tensors."""
    for name, owner in _tied_to_masked(header).items():
        masked = modules[owner]
        assert isinstance(masked, MaskedLayer)
        modules[name]._parameters["weight"] = masked._parameters["weight"]
        tie(modules[name], masked)
    for alias, name in header.aliases.items():
        one, other = modules.get(alias.rpartition(".")[0]), modules.get(name.rpartition(".")[0])
        if isinstance(one, PackedLayer) and isinstance(other, PackedLayer) and one.form == other.form:
            names = part_names(other.form, quantized=other.own_dtype is not None)
            one._buffers |= {part: other._buffers[part] for part in names}


def _tied_to_masked(header: Header) -> dict[str, str]:
    """Return the modules with the mask of a layer when the file was written, and the layer."""
    layers = {join(name, "weight"): name for name, entry in header.layers.items() if entry.module == "SparseLinear"}
    return {
        alias.rpartition(".")[0]: layers[name]
        for alias, name in header.aliases.items()
        if name in layers and alias not in layers and alias.rpartition(".")[2] == "weight"
    }


def _content(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """Return dtype, shape and SHA-256 of a tensor, the same for equal bits only."""
    return tensor.dtype, tuple(tensor.shape), hashlib.sha256(as_bytes(tensor).cpu().numpy().data).digest()


def as_bytes(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as its bytes: equal means the same bits."""
    return tensor.reshape(-1).view(torch.uint8)
