"""Save a model's sparse layers compactly, and load them onto a fresh dense model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparsify.checkpoint import container
from sparsify.checkpoint.compatibility import check_choices, check_layers, check_rest, own_keys
from sparsify.checkpoint.container import LayerEntry
from sparsify.checkpoint.shared_tensors import add_aliases, check_tied, held, packed_as, stored, tie_again
from sparsify.checkpoint.weight_codec import pack_layer, part_names, take_weights
from sparsify.conversion.converters.functional import functional_kind
from sparsify.conversion.converters.table import Kind, followers, join, kind_of, kinds, matrices
from sparsify.conversion.module_surgery import Model, become, layers_of_type, replace
from sparsify.errors import CheckpointError, MeasuredElsewhereWarning
from sparsify.hardware.machine import machine_name
from sparsify.inference.form_selection import Choice
from sparsify.inference.fusion import fuse_activations
from sparsify.kernels import FORMS, form_for
from sparsify.kernels.csr import CSR
from sparsify.layers import Masked, Packed
from sparsify.layers.fsdp import refuse_flattened
from sparsify.layers.functional_module import layer_name
from sparsify.layers.inference_mode import making_tensors
from sparsify.reporting.report import Report, Row


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a converted or exported model to one safetensors file.

    The weight of each exported, masked and plain layer is stored as CSR, bitmask or dense, whichever is smallest,
    all other state as it is. The file is written beside its place and moved there when complete: a crash leaves the old
    one. Raises ValueError if the model holds state that is no tensor, or on the meta device.
    """
    layers: dict[str, LayerEntry] = {}
    tensors: dict[str, Tensor] = {}
    state = model.state_dict(keep_vars=True)
    aliases: dict[str, str] = {}
    packed: dict[int, str] = {}
    for name, module in _linear_layers(model).items():
        refuse_flattened(name, module)
        entry, parts = pack_layer(module)
        if entry.module == "Linear" and entry.format == "dense":
            continue
        layers[name] = entry
        first_of = packed.setdefault(id(held(module)), name)
        if first_of != name:
            aliases[join(name, "weight")] = join(first_of, "weight")
        else:
            tensors |= {join(name, "weight", part): tensor for part, tensor in parts.items()}
    for name in own_keys(model, layers):
        state.pop(name, None)
    first: dict[int, str] = {}
    for name, value in state.items():
        if leader := packed_as(model, name, value, layers, packed):
            aliases[name] = join(leader, "weight")
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: a checkpoint holds tensors only, got {type(value).__name__} (get_extra_state?)")
        if first.setdefault(id(value), name) != name:
            aliases[name] = first[id(value)]
        elif name in tensors:
            raise ValueError(f"{name}: this name is also needed for a packed weight; rename the parameter")
        else:
            tensors[name] = value
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{name}: it is on the meta device and has no data; load the model's weights first")
    container.write(path, layers, aliases, _choices(model), tensors)


def load(path: str | os.PathLike[str], model: Model) -> Model:
    """Load a file written by `save` onto a fresh dense model of the same architecture, in place, and return the model.

    The saved sparse layers take the place of the model's Linears; all other tensors are copied into the model, or
    assigned where it is on the meta device. Raises CheckpointError, before the model is touched, if the file
    is not a whole, unaltered checkpoint, or is one of another architecture.

    >>> model = sparsify.prune(sparsify.convert(nn.Sequential(nn.Linear(8, 4))), 0.5)
    >>> save(sparsify.export(model, format="csr"), tmp_path / "model.safetensors")
    >>> load(tmp_path / "model.safetensors", nn.Sequential(nn.Linear(8, 4)))[0]
    CSRLinear(in_features=8, out_features=4, bias=True, sparsity=0.5)
    """
    header, tensors = container.read(path)
    with _laid_out_as(tensors, model):
        try:
            # Before anything is unpacked: a bitmask of few bytes may claim to stand for a huge weight.
            check_layers(model, header.layers)
            weights = take_weights(stored(header), tensors)
            add_aliases(header, tensors, weights)
            check_rest(model, header.layers, weights, tensors)
            check_choices(model, header.choices)
            check_tied(model, header)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
    modules = dict(model.named_modules())
    made = {}
    for name, entry in header.layers.items():
        made[modules[name]] = _make(entry, modules[name], weights[name], header.choices.get(name))
    for name, kind in followers(model, set(made)).items():
        made[modules[name]] = kind.to_sparse(modules[name])
    replace(model, made)
    tie_again(header, modules)
    _fill(model, tensors)
    fuse_activations(model)
    for name, choice in header.choices.items():
        modules[name].__dict__["choice"] = choice
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


def inspect_file(path: str | os.PathLike[str]) -> Report:
    """List the layers that a file holds, without a model; bytes are those in the file.

    Everything is checked as in `load`. Raises CheckpointError.
    """
    header, tensors = container.read(path)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    try:
        weights = take_weights(stored(header), tensors)
        add_aliases(header, tensors, weights)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    rows = []
    for name, entry in header.layers.items():
        values = weights[name].values
        n_weights = entry.out_features * entry.in_features
        sparsity = 1 - values.numel() / n_weights if n_weights else 0.0
        n_bytes = sum(sizes.get(key, 0) for key in part_names(name, entry))  # one that is tied takes none
        rows.append(Row(name, entry.shape, sparsity, entry.format, n_bytes, n_weights * values.element_size()))
    return Report(tuple(rows))


@contextmanager
def _laid_out_as(names: Iterable[str], model: nn.Module) -> Iterator[None]:
    """Lay out the attentions that were so when tensors of these names were saved; if what follows fails, undo that."""
    names, laid_out = tuple(names), []
    for name, module in list(model.named_modules()):
        kind = kind_of(module) or _functional_kind(module, name, names)
        if kind is None or isinstance(module, kind.sparse):
            continue
        new = tuple(f"{join(name, layer)}." for layer in kind.layers(module) if layer and layer not in module._modules)
        if new and any(key.startswith(new) for key in names):
            kind.check(module)
            become(module, kind.to_sparse(module))
            laid_out.append((module, kind))
    try:
        yield
    except BaseException:
        for module, kind in laid_out:
            become(module, kind.to_dense(module))
        raise


def _functional_kind(module: nn.Module, prefix: str, names: Iterable[str]) -> Kind | None:
    """Return how a module is laid out whose Parameters are layers in the file."""
    layers = tuple(f"{join(prefix, layer_name(name))}." for name in module._parameters)
    try:
        return functional_kind(module) if layers and any(key.startswith(layers) for key in names) else None
    except ValueError:
        return None


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers whose weights are stored packed: ours, and dense ones that own their weight alone."""
    used: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            used[id(parameter)] = used.get(id(parameter), 0) + 1
    return {
        name: module
        for name, module in layers_of_type(model, nn.Module).items()
        if isinstance(module, (Masked, Packed))
        or (
            any(type(module) is kind.dense and kind.layers(module) == ("",) for kind in kinds())
            and "" in matrices(module)
            and used.get(id(module._parameters.get("weight"))) == 1
        )
    }


def _choices(model: nn.Module) -> dict[str, Choice]:
    """Return the choices that export made, by layer name."""
    found = {name: module.__dict__.get("choice") for name, module in model.named_modules()}
    return {name: choice for name, choice in found.items() if isinstance(choice, Choice)}


@making_tensors()
def _make(entry: LayerEntry, old: nn.Module, csr: CSR, choice: Choice | None) -> nn.Module:
    """Build the saved layer around the old one's bias, on its device, in the form chosen when it was exported.

    Where that does not run, another stands in for it, until the layer is moved to where it does.
    """
    kind, weight, bias = kind_of(old), matrices(old)[""], old._parameters.get("bias")
    assert kind is not None
    assert issubclass(kind.sparse, Masked)
    device = torch.device("cpu") if weight.is_meta else weight.device
    wanted = choice.form if choice and entry.module == "CSRLinear" and choice.form in FORMS else "csr"
    on_device = CSR(*(part.to(device) for part in csr))
    form = form_for(wanted, on_device, entry.shape)
    layer = kind.packed(entry.in_features, entry.out_features, on_device, bias, form=form, masked_type=kind.sparse)
    layer.wanted_form = wanted
    if entry.module == "CSRLinear":
        return layer
    sparse = layer.to_sparse()
    sparse.weight.requires_grad_(weight.requires_grad)
    return sparse if entry.module == "SparseLinear" else kind.to_dense(sparse)


def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors in; on the meta device assign them, and tie again what was tied."""
    tied: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            tied.setdefault(id(parameter), []).append((module, key))
    places = {name: place for name, place in model.state_dict(keep_vars=True).items() if name in tensors}
    on_meta = any(place.is_meta for place in places.values())
    state = {name: tensors[name] if place.is_meta else tensors[name].to(place.device) for name, place in places.items()}
    model.load_state_dict(state, strict=False, assign=on_meta)
    for (first, first_key), *others in tied.values():
        for module, key in others:
            module._parameters[key] = first._parameters[first_key]
