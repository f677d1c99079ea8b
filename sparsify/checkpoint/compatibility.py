"""Whether a file is one for a model: the same layers, shapes, dtypes and other tensors. Nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsify.checkpoint.container import LayerEntry
from sparsify.checkpoint.shared_tensors import as_bytes
from sparsify.conversion.converters.table import join, matrices
from sparsify.conversion.module_surgery import own_mask
from sparsify.errors import CheckpointError
from sparsify.inference.form_selection import Choice
from sparsify.kernels.csr import CSR
from sparsify.layers import Masked, Packed


def own_keys(model: nn.Module, layers: Mapping[str, LayerEntry]) -> set[str]:
    """Return the state_dict keys that the entries of these layers stand for, under every name such a layer has.

    All other state is stored under its own name.
    """
    entries = {id(model.get_submodule(name)): entry for name, entry in layers.items()}
    return {
        join(name, key)
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in entries
        for key in _own_state(module, entries[id(module)])
    }


def _own_state(layer: nn.Module, entry: LayerEntry) -> tuple[str, ...]:
    if isinstance(layer, Packed):
        return CSR._fields
    masked = isinstance(layer, Masked) or (own_mask(layer) is not None and entry.module != "Linear")
    return ("weight", "mask") if masked else ("weight",)


def check_layers(model: nn.Module, layers: Mapping[str, LayerEntry]) -> None:
    """Raise CheckpointError unless the model has a Linear of the same shape for every layer of the file."""
    modules = dict(model.named_modules())
    for name, entry in layers.items():
        module = modules.get(name)
        weight = None if module is None else matrices(module).get("")
        if weight is None:
            raise CheckpointError(
                f"for another architecture: it has a layer {name or '(root)'!r}, the model has "
                + (
                    "none of that name"
                    if module is None
                    else f"a {type(module).__name__} there (load onto a dense model)"
                )
            )
        if weight.shape != entry.shape:
            raise CheckpointError(
                f"for another architecture: {name or '(root)'} is {entry.shape} in the file, "
                f"{tuple(weight.shape)} in the model"
            )


def check_rest(
    model: nn.Module, layers: Mapping[str, LayerEntry], weights: Mapping[str, CSR], tensors: Mapping[str, Tensor]
) -> None:
    """Raise CheckpointError unless the dtypes fit, and the remaining tensors are exactly the model's other state."""
    for name, csr in weights.items():
        _check_dtype(name, csr.values, matrices(model.get_submodule(name))[""])
    for prefix, module in model.named_modules():
        for key in module._non_persistent_buffers_set:
            if (buffer := module._buffers.get(key)) is not None and buffer.is_meta:
                raise CheckpointError(
                    f"{join(prefix, key)} is on the meta device and, being a non-persistent buffer, in no checkpoint; "
                    "build the model on the CPU"
                )
    own = own_keys(model, layers)
    expected = {name: value for name, value in model.state_dict(keep_vars=True).items() if name not in own}
    missing, odd = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or odd:
        raise CheckpointError(
            f"for another architecture: the file lacks {len(missing)} of the model's tensors {missing[:3]} "
            f"and has {len(odd)} too many {odd[:3]}"
        )
    for name, value in expected.items():
        if isinstance(value, Tensor):
            if value.shape != tensors[name].shape:
                raise CheckpointError(
                    f"for another architecture: {name} is {tuple(tensors[name].shape)} in the file, "
                    f"{tuple(value.shape)} in the model"
                )
            _check_dtype(name, tensors[name], value)
    _check_ties(expected, tensors)


def check_choices(model: nn.Module, choices: Mapping[str, Choice]) -> None:
    """Raise CheckpointError if a choice of form is for something that is no layer of the model."""
    modules = dict(model.named_modules())
    for name in choices:
        if name not in modules or "" not in matrices(modules[name]):
            raise CheckpointError(f"the header has a choice for {name!r}, which is no linear layer of the model")


def _check_ties(state: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if the file has different values for names that are one tensor in the model."""
    first: dict[int, str] = {}
    for name, value in state.items():
        one, other = tensors[first.setdefault(id(value), name)], tensors[name]
        if one is not other and not torch.equal(as_bytes(one), as_bytes(other)):
            raise CheckpointError(
                f"for another architecture: {first[id(value)]} and {name} are one tensor in the model, "
                "but two different ones in the file; untie them"
            )


def _check_dtype(name: str, stored: Tensor, wanted: Tensor) -> None:
    if stored.dtype != wanted.dtype:
        raise CheckpointError(
            f"{name} is {stored.dtype} in the file, {wanted.dtype} in the model; make it model.to({stored.dtype})"
        )
