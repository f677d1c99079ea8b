"""The layers of a file, made in a model: unfused modules first, then each saved layer in its place."""

from __future__ import annotations

import bisect
import os
import warnings
from collections.abc import Iterable

from torch import nn

from sparsify.checkpoint.container import Header, LayerEntry
from sparsify.checkpoint.shared_tensors import restore_sharing
from sparsify.checkpoint.state_names import Names
from sparsify.checkpoint.weight_codec import StoredWeight
from sparsify.conversion.converters.functional import Reader, functional_kind, readers
from sparsify.conversion.converters.table import Converter, converter_for, dependent_modules, matrices, packed_type
from sparsify.conversion.module_surgery import replace, replace_in_place
from sparsify.conversion.transaction import Transaction
from sparsify.errors import CheckpointError, MeasuredElsewhereWarning
from sparsify.hardware.machine import machine_name
from sparsify.kernels import FORMS, form_for
from sparsify.kernels.csr import CSR, csr_to_dense
from sparsify.layer_names import join
from sparsify.layers import Int8Embedding, MaskedLayer
from sparsify.layers.functional_module import layer_name
from sparsify.layers.inference_mode import making_tensors
from sparsify.layers.records import FormChoice, set_form_choice, set_record


def make_layers(names: Names, header: Header, weights: dict[str, StoredWeight]) -> None:
    """Let the model's Linears be the layers of the file; each packed weight is let go when its layer is made."""
    made = {}
    for name, entry in header.layers.items():
        made[names.modules[name]] = _make(entry, names.modules[name], weights.pop(name), header.choices.get(name))
    for name, converter in dependent_modules(names.model, set(made)).items():
        module = names.model.get_submodule(name)
        made[module] = converter.to_sparse(module)
    replace(names.model, made)
    restore_sharing(header, names.places)


def lay_out_as(keys: Iterable[str], names: Names, undo: Transaction) -> None:
    """Unfuse the attentions and other holders of layers, as they were when tensors of these names were saved."""
    ordered, around = sorted(keys), readers(names.model)
    for name, module in names.modules.items():
        converter = converter_for(module) or _functional_kind(module, name, ordered, around.get(module))
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


def set_records(names: Names, header: Header, source: str | os.PathLike[str]) -> None:
    """Record a file's form choices and errors on its layers, with a warning if the forms are of another machine."""
    choices = header.choices
    for name, choice in choices.items():
        set_form_choice(names.modules[name], choice)
    for name, record in header.records.items():
        set_record(names.modules[name], record)
    here = machine_name(next((parameter.device for parameter in names.model.parameters()), None))
    elsewhere = sorted({choice.machine for choice in choices.values() if choice.times_us} - {here})
    if elsewhere:
        warnings.warn(
            f"{source}: its forms were chosen on another machine ({elsewhere[0]}), this is {here}; "
            "they are right everywhere, but may not be the fastest here: sparsify.export(model) chooses anew",
            MeasuredElsewhereWarning,
            stacklevel=3,
        )


def _functional_kind(module: nn.Module, prefix: str, ordered: list[str], reader: Reader | None) -> Converter | None:
    """Return the unfused form of a module with Parameters stored as layers in the file."""
    layers = [join(prefix, layer_name(name)) for name in module._parameters]
    try:
        return functional_kind(module, reader) if _any_below(layers, ordered) else None
    except ValueError:
        return None


def _any_below(layers: Iterable[str], ordered: list[str]) -> bool:
    """Return whether any of the ordered names is one of a tensor below any of the layers."""
    firsts = ((f"{layer}.", bisect.bisect_left(ordered, f"{layer}.")) for layer in layers)
    return any(number < len(ordered) and ordered[number].startswith(prefix) for prefix, number in firsts)


@making_tensors()
def _make(entry: LayerEntry, old: nn.Module, stored: StoredWeight, choice: FormChoice | None) -> nn.Module:
    """Build the saved layer around the old one's bias, on its device, in the form chosen at export.

    On a device without kernels for it, another form stands in, until the layer is moved to a device with them.
    """
    if entry.module == "Embedding":
        assert stored.scale is not None
        assert isinstance(old, nn.Embedding)
        device = stored.values.device if old.weight.is_meta else old.weight.device
        rows = stored.values.to(device), stored.scale.to(device)
        return Int8Embedding(*rows, stored.dtype, old.padding_idx).train(old.training)
    converter, weight, bias = converter_for(old), matrices(old)[""], old._parameters.get("bias")
    assert converter is not None
    assert issubclass(converter.sparse, MaskedLayer)
    device = stored.values.device if weight.is_meta else weight.device
    settings = converter.sparse.settings_of(old)
    packed = packed_type(old) if entry.module == "CSRLinear" else None
    on_device = CSR(*(part.to(device) for part in (stored.csr if packed else stored.plain)))
    if packed is None:
        sparse = converter.sparse.from_matrix(*csr_to_dense(on_device, entry.shape), bias, settings)
        sparse.weight.requires_grad_(weight.requires_grad)
        return sparse if entry.module == "SparseLinear" else converter.to_dense(sparse)
    wanted = choice.form if choice and choice.form in FORMS else "csr"
    layer = packed(
        *(entry.in_features, entry.out_features, on_device, bias),
        scale=stored.scale.to(device) if stored.scale is not None else None,
        dtype=stored.dtype,
        form=form_for(wanted, on_device, entry.shape, stored.dtype),
        masked_type=converter.sparse,
        dense_settings=settings,
    )
    layer.wanted_form = wanted
    return layer
