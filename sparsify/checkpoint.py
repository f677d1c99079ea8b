"""Save a model's sparse layers compactly, and load them onto a fresh dense model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparsify import container
from sparsify.choose import Choice
from sparsify.container import Header, LayerEntry
from sparsify.edit import Model, become, layers_of_type, replace
from sparsify.errors import CheckpointError, MeasuredElsewhereWarning
from sparsify.formats import (
    CSR,
    Bitmask,
    bitmask_bytes,
    bitmask_to_csr,
    check_csr,
    csr_bytes,
    csr_to_dense,
    dense_to_csr,
    pack_bitmask,
)
from sparsify.fuse import fuse_activations
from sparsify.kernels import FORMS, form_for
from sparsify.kinds import Kind, followers, join, kind_of, kinds, matrices
from sparsify.kinds.functional import functional_kind
from sparsify.layers import Masked, Packed
from sparsify.layers.functional import layer_name
from sparsify.layers.tied import check_tieable, tie
from sparsify.machine import machine_name
from sparsify.report import Report, Row

#: The tensors that hold the weight of layer NAME: NAME.weight.PART, or NAME.weight itself for "dense".
_PARTS: dict[str, tuple[str, ...]] = {"csr": CSR._fields, "bitmask": Bitmask._fields, "dense": ()}

#: The state that a layer's own entry stands for; all other state is stored under its own name.
_OWN_STATE = ("weight", "mask", *CSR._fields)


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
        entry, parts = _pack(module)
        if entry.module == "Linear" and entry.format == "dense":
            continue
        layers[name] = entry
        first_of = packed.setdefault(id(_held(module)), name)
        if first_of != name:
            aliases[join(name, "weight")] = join(first_of, "weight")
        else:
            tensors |= {join(name, "weight", part): tensor for part, tensor in parts.items()}
    for name in own_keys(model, layers):
        state.pop(name, None)
    first: dict[int, str] = {}
    for name, value in state.items():
        if leader := _packed_as(model, name, value, layers, packed):
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
            _check_layers(model, header.layers)
            weights = _take_weights(_stored(header), tensors)
            _add_aliases(header, tensors, weights)
            _check_rest(model, header.layers, weights, tensors)
            _check_choices(model, header.choices)
            _check_tied(model, header)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
    modules = dict(model.named_modules())
    made = {}
    for name, entry in header.layers.items():
        made[modules[name]] = _make(entry, modules[name], weights[name], header.choices.get(name))
    for name, kind in followers(model, set(made)).items():
        made[modules[name]] = kind.to_sparse(modules[name])
    replace(model, made)
    _tie_again(header, modules)
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


def read_layer(path: str | os.PathLike[str]) -> tuple[LayerEntry, dict[str, Tensor]]:
    """Read a file that `save` wrote of one masked layer: its entry, and its tensors by their names below the layer."""
    header, tensors = container.read(path)
    if list(header.layers) != [""]:
        raise CheckpointError(f"{path}: not a file of one layer")
    return header.layers[""], tensors


def unpack_layer(entry: LayerEntry, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the weight and the mask, both (out_features, in_features), that `read_layer` has read packed."""
    csr = _take_weights({"": entry}, dict(tensors))[""]
    return csr_to_dense(csr, entry.shape)


def inspect_file(path: str | os.PathLike[str]) -> Report:
    """List the layers that a file holds, without a model; bytes are those in the file.

    Everything is checked as in `load`. Raises CheckpointError.
    """
    header, tensors = container.read(path)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    try:
        weights = _take_weights(_stored(header), tensors)
        _add_aliases(header, tensors, weights)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    rows = []
    for name, entry in header.layers.items():
        values = weights[name].values
        n_weights = entry.out_features * entry.in_features
        sparsity = 1 - values.numel() / n_weights if n_weights else 0.0
        n_bytes = sum(sizes.get(key, 0) for key in _part_names(name, entry))  # one that is tied takes none
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


def own_keys(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return the state_dict keys that the entries of these layers stand for, under every name such a layer has."""
    ids = {id(model.get_submodule(name)) for name in names}
    return {
        join(name, key)
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in ids
        for key in _OWN_STATE
    }


def _pack(module: nn.Module) -> tuple[LayerEntry, dict[str, Tensor]]:
    """Choose the smallest format for a layer's weight, and pack it."""
    if isinstance(module, Packed):
        becomes = "CSRLinear"
        weight, mask = csr_to_dense(module.csr, module.shape)
    elif isinstance(module, Masked):
        becomes = "SparseLinear"
        weight, mask = module.weight_matrix, module.matrix(module.mask)
    else:
        becomes = "Linear"
        weight = matrices(module)[""].detach()
        mask = _not_zero(weight)
    shape, n_kept, itemsize = (weight.shape[0], weight.shape[1]), int(mask.sum()), weight.element_size()
    sizes = {"bitmask": bitmask_bytes(shape, n_kept, itemsize), "csr": csr_bytes(shape, n_kept, itemsize)}
    if torch.equal(mask, _not_zero(weight)):  # only then do dense weights say which are kept
        sizes["dense"] = weight.numel() * itemsize
    chosen = min(sizes, key=lambda name: sizes[name])
    entry = LayerEntry.model_validate(
        {"module": becomes, "format": chosen, "out_features": shape[0], "in_features": shape[1]}
    )
    if chosen == "dense":
        return entry, {"": weight}
    return entry, (dense_to_csr if chosen == "csr" else pack_bitmask)(weight, mask)._asdict()


def _not_zero(weight: Tensor) -> Tensor:
    """Say which weights have any bit set: -0.0 is stored like any other value."""
    return (weight != 0) | weight.signbit()


def _part_names(name: str, entry: LayerEntry) -> list[str]:
    return [join(name, "weight", part) for part in _PARTS[entry.format]] or [join(name, "weight")]


def _stored(header: Header) -> dict[str, LayerEntry]:
    """Return the layers with tensors of their own; the others' weights are packed in those of another."""
    return {name: entry for name, entry in header.layers.items() if join(name, "weight") not in header.aliases}


def _take_weights(layers: Mapping[str, LayerEntry], tensors: dict[str, Tensor]) -> dict[str, CSR]:
    """Take the parts of every packed weight out of `tensors`, check them, and return them as CSR."""
    weights = {}
    for name, entry in layers.items():
        parts = _part_names(name, entry)
        if missing := [key for key in parts if key not in tensors]:
            raise CheckpointError(f"{name}: the tensor {missing[0]!r} is missing")
        taken = [tensors.pop(key) for key in parts]
        try:
            weights[name] = _as_csr(entry, taken)
        except ValueError as error:
            raise CheckpointError(f"{name or '(root)'}: {error}") from None
    return weights


def _add_aliases(header: Header, tensors: dict[str, Tensor], weights: dict[str, CSR]) -> None:
    """Give every tensor and every packed weight its other names too."""
    layers = {join(name, "weight"): name for name in header.layers}
    packed = {key: name for key, name in layers.items() if name in weights}
    added: dict[str, Tensor] = {}
    for alias, name in header.aliases.items():
        if alias in tensors or alias in packed or (name not in tensors and name not in packed):
            raise CheckpointError(f"the header says {alias!r} is the same tensor as {name!r}, which cannot be")
        if alias not in layers:
            entry = header.layers[packed[name]] if name in packed else None
            added[alias] = csr_to_dense(weights[packed[name]], entry.shape)[0] if entry else tensors[name]
        elif name in packed and header.layers[layers[alias]] == header.layers[packed[name]]:
            weights[layers[alias]] = weights[packed[name]]
        else:
            raise CheckpointError(f"the header says {alias!r} is packed as {name!r} is, which cannot be")
    tensors |= added


def _held(module: nn.Module) -> Tensor | None:
    """Return the tensor by which layers that share a weight are known."""
    return module.parts[-1] if isinstance(module, Packed) else module._parameters.get("weight")


def _packed_as(
    model: nn.Module, name: str, value: object, layers: Mapping[str, LayerEntry], packed: Mapping[int, str]
) -> str | None:
    """Return the layer whose packed weight says all of a state's tensor: a tied one, or the Embedding of an export."""
    if id(value) in packed:
        return packed[id(value)]
    owner = dict(model.named_modules()).get(name.rpartition(".")[0])
    if type(owner) is not nn.Embedding or value is not owner.weight:
        return None
    for layer, entry in layers.items():
        module = model.get_submodule(layer)
        if entry.module == "CSRLinear" and isinstance(module, Packed) and entry.shape == owner.weight.shape:
            dense = csr_to_dense(module.csr, module.shape)[0]
            if dense.dtype == owner.weight.dtype and torch.equal(_bytes(dense), _bytes(owner.weight.detach())):
                return layer
    return None


def _tied_to_masked(header: Header) -> dict[str, str]:
    """Return the modules that used the mask of a layer when the file was written, and that layer."""
    layers = {join(name, "weight"): name for name, entry in header.layers.items() if entry.module == "SparseLinear"}
    return {
        alias.rpartition(".")[0]: layers[name]
        for alias, name in header.aliases.items()
        if name in layers and alias not in layers and alias.rpartition(".")[2] == "weight"
    }


def _check_tied(model: nn.Module, header: Header) -> None:
    """Raise CheckpointError unless every module that uses another's mask in the file can do so in the model."""
    for name, leader in _tied_to_masked(header).items():
        try:
            check_tieable(model.get_submodule(name))
        except ValueError as error:
            raise CheckpointError(f"{name} is tied to {leader} in the file, but in the model {error}") from None


def _tie_again(header: Header, modules: Mapping[str, nn.Module]) -> None:
    """Let modules share what they shared when the file was written: a masked layer's weight, or packed tensors."""
    for name, leader in _tied_to_masked(header).items():
        masked = modules[leader]
        assert isinstance(masked, Masked)
        modules[name]._parameters["weight"] = masked._parameters["weight"]
        tie(modules[name], masked)
    for alias, name in header.aliases.items():
        one, other = modules.get(alias.rpartition(".")[0]), modules.get(name.rpartition(".")[0])
        if isinstance(one, Packed) and isinstance(other, Packed) and one.form == other.form:
            one._buffers = dict(other._buffers)


def _as_csr(entry: LayerEntry, parts: list[Tensor]) -> CSR:
    if entry.format == "csr":
        csr = CSR(*parts)
        check_csr(csr, entry.shape)
        return csr
    if entry.format == "bitmask":
        return bitmask_to_csr(Bitmask(*parts), entry.shape)
    if parts[0].shape != entry.shape or not parts[0].is_floating_point():
        raise ValueError(
            f"a dense weight must be floating of shape {entry.shape}, got {parts[0].dtype} {tuple(parts[0].shape)}"
        )
    return dense_to_csr(parts[0], _not_zero(parts[0]))


def _check_layers(model: nn.Module, layers: Mapping[str, LayerEntry]) -> None:
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


def _check_rest(
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


def _check_ties(state: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if the file has different values for names that are one tensor in the model."""
    first: dict[int, str] = {}
    for name, value in state.items():
        one, other = tensors[first.setdefault(id(value), name)], tensors[name]
        if one is not other and not torch.equal(_bytes(one), _bytes(other)):
            raise CheckpointError(
                f"for another architecture: {first[id(value)]} and {name} are one tensor in the model, "
                "but two different ones in the file; untie them"
            )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _choices(model: nn.Module) -> dict[str, Choice]:
    """Return the choices that export made, by layer name."""
    found = {name: module.__dict__.get("choice") for name, module in model.named_modules()}
    return {name: choice for name, choice in found.items() if isinstance(choice, Choice)}


def _check_choices(model: nn.Module, choices: Mapping[str, Choice]) -> None:
    modules = dict(model.named_modules())
    for name in choices:
        if name not in modules or "" not in matrices(modules[name]):
            raise CheckpointError(f"the header has a choice for {name!r}, which is no linear layer of the model")


def _check_dtype(name: str, stored: Tensor, wanted: Tensor) -> None:
    if stored.dtype != wanted.dtype:
        raise CheckpointError(
            f"{name} is {stored.dtype} in the file, {wanted.dtype} in the model; make it model.to({stored.dtype})"
        )


def _make(entry: LayerEntry, old: nn.Module, csr: CSR, choice: Choice | None) -> nn.Module:
    """Build the saved layer around the old one's bias, on its device, in the form chosen when it was exported."""
    kind, weight, bias = kind_of(old), matrices(old)[""], old._parameters.get("bias")
    assert kind is not None
    assert issubclass(kind.sparse, Masked)
    device = torch.device("cpu") if weight.is_meta else weight.device
    form = choice.form if choice and entry.module == "CSRLinear" and choice.form in FORMS else "csr"
    on_device = CSR(*(part.to(device) for part in csr))
    form = form_for(form, on_device, entry.shape)
    layer = kind.packed(entry.in_features, entry.out_features, on_device, bias, form=form, masked_type=kind.sparse)
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
