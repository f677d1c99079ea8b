"""Convert a dense model into one with masked layers, and back. converters/ has the rules for each type of module."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from sparsify.conversion.converters.convolution import is_depthwise
from sparsify.conversion.converters.functional import functional_kind, readers
from sparsify.conversion.converters.table import (
    Converter,
    bypasses_its_layers,
    converter_for,
    converters,
    dependent_modules,
    select_converters,
)
from sparsify.conversion.coreml_marks import check_mark, mark_for_coreml
from sparsify.conversion.foreign_masks import check_converted, peft_adapters
from sparsify.conversion.left_dense import DEPTHWISE, convolutions_notice, notice, uncovered
from sparsify.conversion.module_surgery import Model, layers_of_type, replace_in_place
from sparsify.conversion.tied_weights import resolve_tied_weights
from sparsify.conversion.transaction import Transaction
from sparsify.errors import DefaultTypesWarning, LeftDenseWarning
from sparsify.layer_names import Selector, join, select
from sparsify.layers import Int8Embedding, MaskedLayer, PackedLayer, Tied
from sparsify.layers.copies import warn_stale
from sparsify.layers.fsdp import data_or_shape, refuse_flattened
from sparsify.layers.functional_module import Functional
from sparsify.layers.functional_module import undo as undo_unfuse
from sparsify.layers.fused_block import unfuse
from sparsify.layers.held_weight import HeldWeight
from sparsify.layers.inference_mode import making_tensors
from sparsify.layers.records import set_form_choice
from sparsify.layers.tied import tie, untie
from sparsify.layers.transposed import Transposed


@dataclass(frozen=True)
class Plan:
    """The changes of a `convert` before they are made.

    swap: the modules to change, each with its converter.
    already: the chosen layers with a mask from before.
    left: the modules left dense, each with the reason.
    weights: the matrix (out_features, in_features) of every chosen layer, masked now or by this plan.
    shared: the modules to be tied to a masked layer, each with the name of that owner.
    converters: those in use.
    """

    swap: dict[str, Converter]
    already: tuple[str, ...]
    left: dict[str, str]
    weights: dict[str, Tensor]
    shared: dict[str, str]
    converters: tuple[Converter, ...]


def convert(
    model: Model,
    *,
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
    types: type[nn.Module] | Sequence[type[nn.Module]] | None = None,
    tied: str = "error",
    functional: bool = False,
) -> Model:
    """Swap the linear layers of a model, or also its convolutions, for masked layers, in place, and return the model.

    Nothing is pruned yet: all outputs stay as they were, bit for bit, and so do Parameter objects, names, devices,
    dtypes, flags and hooks. An nn.MultiheadAttention becomes a `UnfusedAttention` first, which adds up in another
    order: its outputs stay the same up to rounding. A Linear pruned by torch.nn.utils.prune or torch.ao.pruning keeps
    its mask. A subclass of nn.Linear without methods of its own is converted too, and comes back as nn.Linear. The
    adapters of peft (LoRA) stay dense; the layers under them convert.

    include, exclude: layers by globs over their names, "re:" patterns, or module types; see
        `sparsify.layer_names.Selector`.
    types: the dense types to convert at all. By default every type made of linear maps only; in a model with more
        convolutions than Linears, counted or by their weights, convolutions too, except depthwise ones.
    tied: for a weight used by several modules, such as an output head and its Embedding:
        "error": raise ValueError.
        "skip": leave the weight dense.
        "share": the first linear layer among them gets the mask, and the others use the same masked weight.
    functional: also convert Parameters multiplied by a module's own code, in F.linear(x, self.weight),
        x @ self.weight, einsum and their like, found with torch.fx, and experts of transformers. Such a Parameter
        becomes a layer with its name and "_layer", the code stays as it is, and a dense state_dict still loads. Modules
        with untraceable code stay dense.

    One LeftDenseWarning names the layers that stay dense because they cannot be swapped, and their share of the
    parameters. It also names weights outside of all convertible layers (recurrent layers, convolutions, experts,
    einsum), if they are the majority and neither `types` nor `include` is given. A DefaultTypesWarning says that
    convolutions are taken by default, and their share.
    Raises ValueError, before any change, for a selector without a match, for a weight shared with another module, and
    for a model with nothing to convert.

    >>> convert(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))[0]
    SparseLinear(in_features=4, out_features=3, bias=True, sparsity=0)
    """
    plan = plan_convert(model, include=include, exclude=exclude, types=types, tied=tied, functional=functional)
    if not plan.swap and not plan.already:
        reasons = "; ".join(f"{name or '(root)'}: {why}" for name, why in list(plan.left.items())[:3])
        public = [converter.dense for converter in plan.converters if converter.dense not in (Transposed, HeldWeight)]
        names = ", ".join(map(_name, public))
        raise ValueError(f"the model has no layer that can be converted (of the types {names}). {reasons}".rstrip())
    says_what = types is not None or include not in (None, "*", ["*"])
    modules = dict(model.named_modules())
    taken = [p for name in plan.swap for p in modules[name].parameters(recurse=False)]
    rest = () if says_what else uncovered(model, [*plan.weights.values(), *taken], plan.left, plan.converters)
    if said := notice(model, plan.left, rest, functional):  # before any change: warnings may be errors
        warnings.warn(said, LeftDenseWarning, stacklevel=2)
    if not says_what and (said := convolutions_notice(model, plan.swap)):
        warnings.warn(said, DefaultTypesWarning, stacklevel=2)
    with Transaction(model) as undo:
        _swap(model, plan, undo)
    return model


def _swap(model: nn.Module, plan: Plan, undo: Transaction) -> None:
    """Carry out a plan."""
    modules = dict(model.named_modules())
    for name in plan.swap:  # set_mask zeroes a weight pruned by torch
        undo.keep(p for key, p in modules[name].named_parameters() if key.endswith(("_orig", ".original")))
    for name, converter in plan.swap.items():
        replace_in_place(modules[name], converter.to_sparse(modules[name]))
    for name in plan.weights:
        layer = model.get_submodule(name)
        if not isinstance(layer, MaskedLayer) and (inner := converter_for(layer)):  # in an unfused module
            replace_in_place(layer, inner.to_sparse(layer))
    for name, owner in plan.shared.items():
        masked = modules[owner]
        assert isinstance(masked, MaskedLayer)
        tie(modules[name], masked)


def plan_convert(
    model: nn.Module,
    *,
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
    types: type[nn.Module] | Sequence[type[nn.Module]] | None = None,
    tied: str = "error",
    functional: bool = False,
) -> Plan:
    """Return the plan of `convert` for the same arguments, with the same errors; the model is not changed."""
    chosen = select_converters(model, types)
    owners, left = _owners(model, chosen, functional)
    everything = types is None and include in (None, "*", ["*"])
    bypassed = {
        id(child): f"{type(owner).__name__} reads its weight directly"
        for owner in model.modules()
        if bypasses_its_layers(owner)
        for child in owner.children()
    }
    swap: dict[str, Converter] = {}
    already: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for layer in select(model, {layer: module for layer, (_, module, _) in owners.items()}, include, exclude):
        name, module, converter = owners[layer]
        refuse_flattened(name, module)
        if isinstance(module, MaskedLayer):
            already[layer] = module.matrix(data_or_shape(module.weight.detach()))
            continue
        assert converter is not None
        if any(isinstance(p, nn.UninitializedParameter) for p in module.parameters()):
            raise ValueError(
                f"{name or '(root)'}: it is not initialised yet; run one batch through the model first, "
                f"or leave it dense with exclude=[{name!r}]"
            )
        if id(module) in bypassed:
            left[name] = bypassed[id(module)]
            continue
        if everything and is_depthwise(module):
            left[name] = DEPTHWISE
            continue
        try:
            converter.check(module)
        except ValueError as error:
            left[name] = str(error)
            continue
        swap[name] = converter
        weights[layer] = converter.matrices(module)[layer.removeprefix(name).removeprefix(".")]
    if include is not None and left and not swap and not already:
        name, why = next(iter(left.items()))
        raise ValueError(f"{name or '(root)'}: cannot be converted, {why}")
    modules = dict(model.named_modules())
    masked = {
        name: list(modules[name].parameters(converter.sparse is not Functional)) for name, converter in swap.items()
    }
    skipped, shared = resolve_tied_weights(model, masked, tied)
    left |= skipped
    swap = {name: converter for name, converter in swap.items() if name not in skipped and name not in shared}
    weights = {layer: weight for layer, weight in weights.items() if owners[layer][0] in swap}
    swap = dependent_modules(model, {modules[name] for name in swap}) | swap
    return Plan(swap, tuple(already), left, already | weights, shared, chosen)


def to_dense(model: Model, *, mark: str | None = None) -> Model:
    """Turn every converted or exported layer back into its dense type, with zeros, in place, and return the model.

    Masked weights become zero even in the middle of a schedule. Raises ValueError, before any change, for a layer
    parametrized, pruned or quantized by torch since `convert`.

    mark: "coreml" adds the buffers by which coremltools stores these weights sparse, as a bitmask and the kept values.
        They are in the state_dict, under names that begin with `_COREML_/`.

    >>> to_dense(convert(nn.Sequential(nn.Linear(4, 3))))[0]
    Linear(in_features=4, out_features=3, bias=True)
    """
    check_mark(mark)
    layers = layers_of_type(model, MaskedLayer)
    sparse = [*layers, *layers_of_type(model, PackedLayer)]
    for name, masked in layers.items():
        try:
            check_converted(masked)
        except ValueError as error:
            raise ValueError(f"{name or '(root)'}: {error}") from None
    warn_stale(layers)
    with Transaction(model) as undo:
        undo.keep(masked.weight for masked in layers.values() if masked.hides_values())
        for layer in layers_of_type(model, PackedLayer).values():
            with making_tensors():
                replace_in_place(layer, layer.to_sparse())
        for embedding in layers_of_type(model, Int8Embedding).values():
            with making_tensors():
                replace_in_place(embedding, embedding.to_embedding())
        unfuse(model)
        for tied in layers_of_type(model, Tied).values():
            untie(tied)
        for converter in converters():
            for module in layers_of_type(model, converter.sparse).values():
                replace_in_place(module, converter.to_dense(module))
        for unfused in layers_of_type(model, Functional).values():
            replace_in_place(unfused, undo_unfuse(unfused))
        for module in model.modules():
            set_form_choice(module, None)  # the layer no longer has that form
    if mark == "coreml":
        mark_for_coreml(model, sparse)
    return model


def masks_from_zeros(
    model: Model,
    *,
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
) -> Model:
    """Take the zeros in the weights of a converted model as its masks, and return the model.

    For models pruned elsewhere and saved as dense weights with zeros.
    """
    layers = sparse_layers(model, include, exclude)
    for name, layer in layers.items():
        if layer.weight.is_meta:
            raise ValueError(
                f"{name}: the weight is on the meta device and has no data; load the model's weights first"
            )
    for layer in layers.values():
        layer.set_mask((layer.weight_matrix != 0) & layer.matrix(layer.mask))  # masked is zero
    return model


def sparse_layers(
    model: nn.Module,
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
) -> dict[str, MaskedLayer]:
    """Return the chosen masked layers by name. Raises ValueError if the model has none."""
    layers = layers_of_type(model, MaskedLayer)
    if not layers:
        raise ValueError("the model has no SparseLinear; call sparsify.convert(model) first")
    chosen = {name: layers[name] for name in select(model, layers, include, exclude)}
    for name, layer in chosen.items():
        refuse_flattened(name, layer)
    return chosen


def _owners(
    model: nn.Module, chosen: Sequence[Converter], functional: bool
) -> tuple[dict[str, tuple[str, nn.Module, Converter | None]], dict[str, str]]:
    """Return every masked or convertible layer by name, with its module's name, that module and the converter.

    The second dict has the modules with untraceable code, each with the reason.
    """
    owners: dict[str, tuple[str, nn.Module, Converter | None]] = {}
    unread: dict[str, str] = {}
    beside, around = peft_adapters(model), readers(model)
    for name, module in model.named_modules():
        if module in beside or isinstance(module, Tied):
            continue
        if isinstance(module, MaskedLayer):
            owners[name] = name, module, None
            continue
        matching = [
            converter
            for converter in chosen
            if isinstance(module, converter.dense) and not isinstance(module, converter.sparse)
        ]
        if functional and converter_for(module) is None and name not in owners:
            try:
                matching += [converter] if (converter := functional_kind(module, around.get(module))) else []
            except ValueError as error:
                unread[name] = str(error)
        for converter in matching if name not in owners else ():
            owners |= {join(name, layer): (name, module, converter) for layer in converter.layers(module)}
    return owners, unread


def _name(dense: type[nn.Module]) -> str:
    return f"nn.{dense.__name__}" if dense.__module__.startswith("torch.nn") else dense.__name__
