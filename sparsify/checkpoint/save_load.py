"""Save a model's sparse layers compactly, and load them onto a fresh dense model."""

from __future__ import annotations

import bisect
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.checkpoint import container
from sparsify.checkpoint.compatibility import (
    check_choices,
    check_layers,
    check_state,
    check_state_names,
    packed_state_keys,
)
from sparsify.checkpoint.container import Header, LayerEntry
from sparsify.checkpoint.plain_state import check_computed, make_plain, parametrized_besides
from sparsify.checkpoint.shared_tensors import (
    check_aliases,
    check_tied,
    entries_with_tensors,
    expand_shared,
    identity_tensor,
    packed_embeddings,
    restore_sharing,
)
from sparsify.checkpoint.state_names import Names
from sparsify.checkpoint.weight_codec import decode_weights, encode_weight, other_tensors
from sparsify.conversion.converters.functional import functional_kind
from sparsify.conversion.converters.table import Converter, converter_for, converters, dependent_modules, matrices
from sparsify.conversion.module_surgery import Model, layers_of_type, replace, replace_in_place
from sparsify.conversion.transaction import Transaction
from sparsify.errors import CheckpointError, MeasuredElsewhereWarning, SavedParametrizedWarning
from sparsify.hardware.machine import machine_name
from sparsify.inference.fusion import fuse_activations
from sparsify.kernels import FORMS, form_for
from sparsify.kernels.csr import CSR
from sparsify.layer_names import join
from sparsify.layers import MaskedLayer, PackedLayer
from sparsify.layers.copies import warn_stale
from sparsify.layers.fsdp import refuse_flattened
from sparsify.layers.functional_module import layer_name
from sparsify.layers.inference_mode import making_tensors
from sparsify.layers.records import FormChoice, form_choice, set_form_choice


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
            stacklevel=2,
        )
    container.write(path, layers, aliases, _choices(names), tensors)


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
            _lay_out_as(tensors, Names(model), undo)
            names = Names(model)
            weights = _checked(names, header, tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        _make_layers(names, header, weights)
        _fill(names, tensors, undo)
        fuse_activations(model)
        for name, choice in header.choices.items():
            set_form_choice(names.modules[name], choice)
        here = machine_name(next((parameter.device for parameter in model.parameters()), None))
        elsewhere = sorted({choice.machine for choice in header.choices.values() if choice.times_us} - {here})
        if elsewhere:
            warnings.warn(
                f"{path}: its forms were chosen on another machine ({elsewhere[0]}), this is {here}; "
                "they are right everywhere, but may not be the fastest here: sparsify.export(model) chooses anew",
                MeasuredElsewhereWarning,
                stacklevel=2,
            )
    return model


def _storable_state(names: Names) -> dict[str, Any]:
    """Return a model's state, ready for a file. Raises ValueError for any other."""
    state = names.state()
    for name, value in state.items():
        container.check_storable(name, value)
    return state


def _checked(names: Names, header: Header, tensors: dict[str, Tensor]) -> dict[str, CSR]:
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
    check_choices(names, header.choices)
    check_tied(names, header)
    return weights


def _make_layers(names: Names, header: Header, weights: dict[str, CSR]) -> None:
    """Let the model's Linears be the layers of the file; each packed weight is let go when its layer is made."""
    made = {}
    for name, entry in header.layers.items():
        made[names.modules[name]] = _make(entry, names.modules[name], weights.pop(name), header.choices.get(name))
    for name, converter in dependent_modules(names.model, set(made)).items():
        module = names.model.get_submodule(name)
        made[module] = converter.to_sparse(module)
    replace(names.model, made)
    restore_sharing(header, names.places)


def _lay_out_as(keys: Iterable[str], names: Names, undo: Transaction) -> None:
    """Unfuse the attentions and other holders of layers, as they were when tensors of these names were saved."""
    ordered = sorted(keys)
    for name, module in names.modules.items():
        converter = converter_for(module) or _functional_kind(module, name, ordered)
        if converter is None or isinstance(module, converter.sparse):
            continue
        new = [join(name, layer) for layer in converter.layers(module) if layer and layer not in module._modules]
        if _any_below(new, ordered):
            try:
                converter.check(module)
            except ValueError as error:
                raise CheckpointError(
                    f"for another architecture: the file has layers in {name or '(root)'}, and in the model {error}"
                ) from None
            if next(module.buffers(), None) is not None:  # masks of torch.nn.utils.prune: removed weights become zero
                undo.keep(module.parameters())
            replace_in_place(module, converter.to_sparse(module))


def _functional_kind(module: nn.Module, prefix: str, ordered: list[str]) -> Converter | None:
    """Return the unfused form of a module with Parameters stored as layers in the file."""
    layers = [join(prefix, layer_name(name)) for name in module._parameters]
    try:
        return functional_kind(module) if _any_below(layers, ordered) else None
    except ValueError:
        return None


def _any_below(layers: Iterable[str], ordered: list[str]) -> bool:
    """Return whether any of the ordered names is one of a tensor below any of the layers."""
    firsts = ((f"{layer}.", bisect.bisect_left(ordered, f"{layer}.")) for layer in layers)
    return any(number < len(ordered) and ordered[number].startswith(prefix) for prefix, number in firsts)


def _linear_layers(names: Names) -> dict[str, nn.Module]:
    """Return the layers with packed weights in the file: ours, and dense ones with a weight of their own."""
    used: dict[int, int] = {}
    for module in names.modules.values():
        for parameter in module._parameters.values():
            used[id(parameter)] = used.get(id(parameter), 0) + 1
    return {
        name: module
        for name, module in names.modules.items()
        if isinstance(module, (MaskedLayer, PackedLayer))
        or (
            any(type(module) is converter.dense and converter.layers(module) == ("",) for converter in converters())
            and module._parameters.get("weight") is not None
            and "" in matrices(module)
            and used.get(id(module._parameters.get("weight"))) == 1
        )
    }


def _choices(names: Names) -> dict[str, FormChoice]:
    """Return the form choices of an export, by layer name."""
    return {name: choice for name, module in names.modules.items() if (choice := form_choice(module)) is not None}


@making_tensors()
def _make(entry: LayerEntry, old: nn.Module, csr: CSR, choice: FormChoice | None) -> nn.Module:
    """Build the saved layer around the old one's bias, on its device, in the form chosen at export.

    On a device without kernels for it, another form stands in, until the layer is moved to a device with them.
    """
    converter, weight, bias = converter_for(old), matrices(old)[""], old._parameters.get("bias")
    assert converter is not None
    assert issubclass(converter.sparse, MaskedLayer)
    device = torch.device("cpu") if weight.is_meta else weight.device
    wanted = choice.form if choice and entry.module == "CSRLinear" and choice.form in FORMS else "csr"
    on_device = CSR(*(part.to(device) for part in csr))
    form = form_for(wanted, on_device, entry.shape)
    layer = converter.packed(
        entry.in_features, entry.out_features, on_device, bias, form=form, masked_type=converter.sparse
    )
    layer.wanted_form = wanted
    if entry.module == "CSRLinear":
        return layer
    sparse = layer.to_sparse()
    sparse.weight.requires_grad_(weight.requires_grad)
    return sparse if entry.module == "SparseLinear" else converter.to_dense(sparse)


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
