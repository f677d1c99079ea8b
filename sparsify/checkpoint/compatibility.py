"""Compatibility of a file with a model: the same layers, shapes, dtypes and other tensors. Nothing is changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.checkpoint.container import Header, LayerEntry
from sparsify.checkpoint.shared_tensors import as_bytes
from sparsify.checkpoint.state_names import Names
from sparsify.checkpoint.weight_codec import StoredWeight
from sparsify.conversion.converters.table import matrices, packed_type
from sparsify.conversion.module_surgery import own_mask
from sparsify.conversion.writable import cannot_be_written
from sparsify.errors import CheckpointError
from sparsify.kernels.csr import CSR
from sparsify.kernels.forms import SCALE
from sparsify.layer_names import join
from sparsify.layers import Int8Embedding, MaskedLayer, PackedLayer


def packed_state_keys(names: Names, layers: Mapping[str, LayerEntry]) -> set[str]:
    """Return the state names covered by the entries of these layers, under every name of such a layer.

    All other state is stored under its own name.
    """
    entries = {id(names.modules[name]): entry for name, entry in layers.items()}
    return {
        join(name, key)
        for name, module in names.places.items()
        if id(module) in entries
        for key in _own_state(module, entries[id(module)])
    }


def _own_state(layer: nn.Module, entry: LayerEntry) -> tuple[str, ...]:
    if isinstance(layer, Int8Embedding):
        return "values", SCALE
    if isinstance(layer, PackedLayer):
        return (*CSR._fields, SCALE)
    masked = isinstance(layer, MaskedLayer) or (own_mask(layer) is not None and entry.module != "Linear")
    return ("weight", "mask") if masked else ("weight",)


def _weight_of(module: nn.Module, entry: LayerEntry) -> Tensor | None:
    """Return the weight of a dense module in the place of a layer of the file; None for a module of another kind."""
    if entry.module == "Embedding":
        return module.weight if isinstance(module, nn.Embedding) else None
    return matrices(module).get("")


def check_layers(names: Names, layers: Mapping[str, LayerEntry]) -> None:
    """Raise CheckpointError unless the model has a Linear, or Embedding, of the same shape for every saved layer."""
    for name, entry in layers.items():
        module = names.modules.get(name)
        weight = None if module is None else _weight_of(module, entry)
        if weight is None:
            raise CheckpointError(
                f"for another architecture: it has a layer {name or '(root)'!r}, the model has "
                + (
                    "none of that name"
                    if module is None
                    else f"a {type(module).__name__} there (load onto a dense model)"
                )
            )
        assert module is not None
        if entry.module == "CSRLinear" and packed_type(module) is None:
            raise CheckpointError(
                f"for another architecture: {name or '(root)'} is packed in the file, and the model has a "
                f"{type(module).__name__} there that is never packed"
            )
        if weight.shape != entry.shape:
            raise CheckpointError(
                f"for another architecture: {name or '(root)'} is {entry.shape} in the file, "
                f"{tuple(weight.shape)} in the model"
            )


def check_state_names(names: Names, header: Header, others: Collection[str]) -> None:
    """Raise CheckpointError unless a file has the very state of the model beside its layers, judged by names.

    others: the tensors of the file outside of all layers' weights.
    """
    packed = {join(name, "weight") for name in header.layers}
    given = {*others, *(alias for alias in header.aliases if alias not in packed)}
    expected = _other_state(names, header.layers).keys()
    missing, odd = sorted(expected - given), sorted(given - expected)
    if missing or odd:
        raise CheckpointError(
            f"for another architecture: the file lacks {len(missing)} of the model's tensors {missing[:3]} "
            f"and has {len(odd)} too many {odd[:3]}{_way_out(odd)}"
        )


def check_state(
    names: Names, layers: Mapping[str, LayerEntry], weights: Mapping[str, StoredWeight], tensors: Mapping[str, Tensor]
) -> None:
    """Raise CheckpointError unless shapes and dtypes fit, and every tensor has a writable place."""
    for name, stored in weights.items():
        wanted = _weight_of(names.modules[name], stored.entry)
        assert wanted is not None
        _check_dtype(name, stored.dtype, wanted)
    for prefix, module in names.places.items():
        for key in module._non_persistent_buffers_set:
            if (buffer := module._buffers.get(key)) is not None and buffer.is_meta:
                raise CheckpointError(
                    f"{join(prefix, key)} is on the meta device and, being a non-persistent buffer, in no checkpoint; "
                    "build the model on the CPU"
                )
    expected = {name: value for name, value in _other_state(names, layers).items() if isinstance(value, Tensor)}
    for name, value in expected.items():
        if value.shape != tensors[name].shape:
            raise CheckpointError(
                f"for another architecture: {name} is {tuple(tensors[name].shape)} in the file, "
                f"{tuple(value.shape)} in the model"
            )
        _check_dtype(name, tensors[name].dtype, value)
    _check_ties(expected, tensors)
    if reason := next(cannot_be_written(expected), None):
        raise CheckpointError(reason)


def check_records(names: Names, header: Header) -> None:
    """Raise CheckpointError if a form choice or an error is of no layer of the model."""
    if odd := sorted(header.records.keys() - names.modules.keys()):
        raise CheckpointError(f"the file has an error of {odd[0]!r}, which is no layer of the model")
    for name in header.choices:
        if name not in names.modules or "" not in matrices(names.modules[name]):
            raise CheckpointError(f"the header has a choice for {name!r}, which is no linear layer of the model")


def _other_state(names: Names, layers: Mapping[str, LayerEntry]) -> dict[str, Any]:
    own = packed_state_keys(names, layers)
    return {name: value for name, value in names.state().items() if name not in own}


def _way_out(odd: Collection[str]) -> str:
    """Guess the saved kind of model from the names found in the file only."""
    for name in odd:
        if ".parametrizations." in f".{name}":
            return "; save it after torch.nn.utils.parametrize.remove_parametrizations, or parametrize the model alike"
        if name.endswith(("_orig", "_mask")):
            return "; save it after torch.nn.utils.prune.remove"
        if name == "n_averaged":
            return "; it is of an AveragedModel: save its module"
    return ""


def _check_ties(state: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if the file has different values for several names of one tensor in the model."""
    first: dict[int, str] = {}
    for name, value in state.items():
        one, other = tensors[first.setdefault(id(value), name)], tensors[name]
        if one is not other and not torch.equal(as_bytes(one), as_bytes(other)):
            raise CheckpointError(
                f"for another architecture: {first[id(value)]} and {name} are one tensor in the model, "
                "but two different ones in the file; untie them"
            )


def _check_dtype(name: str, stored: torch.dtype, wanted: Tensor) -> None:
    if stored != wanted.dtype:
        raise CheckpointError(
            f"{name} is {stored} in the file, {wanted.dtype} in the model; make it model.to({stored})"
        )
