"""Save a model's sparse layers compactly, and load them onto a fresh dense model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsify.checkpoint import container
from sparsify.checkpoint.compatibility import (
    check_layers,
    check_records,
    check_state,
    check_state_names,
)
from sparsify.checkpoint.container import Header
from sparsify.checkpoint.contents import contents_of
from sparsify.checkpoint.saved_layers import lay_out_as, make_layers, set_records
from sparsify.checkpoint.shared_tensors import (
    check_aliases,
    check_tied,
    entries_with_tensors,
    expand_shared,
)
from sparsify.checkpoint.state_names import Names
from sparsify.checkpoint.weight_codec import StoredWeight, decode_weights, other_tensors
from sparsify.conversion.module_surgery import Model
from sparsify.conversion.transaction import Transaction
from sparsify.errors import CheckpointError
from sparsify.inference.fusion import fuse_activations


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a converted or exported model to one safetensors file.

    The weight of each exported, masked and plain layer is stored as CSR, bitmask or dense, the smallest of
    them, all other state as it is. A model built anew can load it: the names of wrappers (nn.DataParallel,
    torch.compile) are left out, and a tensor computed by torch.nn.utils.prune is stored as in use. The file is written
    beside its place and moved there when complete: a crash leaves the old one.

    Raises ValueError, with the way out, for state without plain data for a file (no tensor; meta, sharded, complex or
    sparse tensors). Raises OSError for a place without permission to write, or not an ordinary file. A
    SavedParametrizedWarning names parametrized modules other than our layers.
    """
    contents = contents_of(model)
    container.write(path, contents.layers, contents.aliases, contents.choices, contents.tensors, contents.records)


def load(path: str | os.PathLike[str], model: Model) -> Model:
    """Load a file written by `save` onto a fresh dense model of the same architecture, in place, and return the model.

    The saved sparse layers take the place of the model's Linears; all other tensors are copied into the model, or
    assigned to tensors on the meta device. Raises CheckpointError, before the model is touched, if the file
    is not a whole, unaltered checkpoint, or is one of another architecture. After any other
    exception, such as one of the model's own hooks, the model is as it was.

    >>> model = sparsify.prune(sparsify.convert(nn.Sequential(nn.Linear(8, 4))), 0.5)
    >>> save(sparsify.export(model, format="csr"), tmp_path / "model.safetensors")
    >>> load(tmp_path / "model.safetensors", nn.Sequential(nn.Linear(8, 4)))[0]
    CSRLinear(in_features=8, out_features=4, bias=True, sparsity=0.5)
    """
    header, tensors = Names(model).of_file(*container.read(path))
    with torch.inference_mode(False), Transaction(model) as undo:
        try:
            lay_out_as(tensors, Names(model), undo)
            names = Names(model)
            weights = _checked(names, header, tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        make_layers(names, header, weights)
        _fill(names, tensors, undo)
        fuse_activations(model)
        set_records(names, header, path)
    return model


def _checked(names: Names, header: Header, tensors: dict[str, Tensor]) -> dict[str, StoredWeight]:
    """Check everything about a file and a model; return the packed weights, with their parts taken out of `tensors`.

    Names and sizes come first: a file of few bytes may claim to stand for many large tensors.
    """
    layers = entries_with_tensors(header)
    check_layers(names, header.layers)
    others = other_tensors(layers, tensors)
    check_aliases(header, others)
    check_state_names(names, header, others)
    weights = decode_weights(layers, tensors)
    expand_shared(header, tensors, weights)
    check_state(names, header.layers, weights, tensors)
    check_records(names, header)
    check_tied(names, header)
    return weights


def _fill(names: Names, tensors: Mapping[str, Tensor], undo: Transaction) -> None:
    """Copy the tensors in; on the meta device assign them, and restore ties."""
    tied: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in names.model.modules():
        for key, parameter in module._parameters.items():
            tied.setdefault(id(parameter), []).append((module, key))
    places = {name: place for name, place in names.state().items() if name in tensors}
    on_meta = any(place.is_meta for place in places.values())
    state = {name: tensors[name] if place.is_meta else tensors[name].to(place.device) for name, place in places.items()}
    if unknown := [module for module in names.model.modules() if _loads_its_own_way(module)]:
        undo.keep(places.values())
        undo.keep(buffer for module in unknown for buffer in module.buffers())
    elif not on_meta:
        n_uses = Counter(id(tensor) for tensor in state.values())  # of names that were tied in the file
        for name, place in {id(place): (name, place) for name, place in places.items()}.values():
            undo.exchange(place, state[name] if n_uses[id(state[name])] == 1 else state[name].clone())
        state = {name: place.detach() for name, place in places.items()}
    names.load(state, assign=on_meta)
    for (first, first_key), *others in tied.values():
        for module, key in others:
            module._parameters[key] = first._parameters[first_key]


def _loads_its_own_way(module: nn.Module) -> bool:
    """Return whether other code than torch's and ours takes part when a module loads its state."""
    methods = (module.load_state_dict, module._load_from_state_dict)
    hooks = module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks
    return bool(hooks) or any(method.__module__.split(".")[0] not in ("torch", "sparsify") for method in methods)
