"""Converters of nn.MultiheadAttention to UnfusedAttention, and of the encoder around it to UnfusedEncoder."""

from __future__ import annotations

from collections.abc import Set

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sparsify.conversion.converters.base import OF_LAYERS, Converter
from sparsify.conversion.foreign_masks import (
    check_names,
    check_plain,
    check_plain_parameter,
    parameter_and_mask,
    remove_prune_hook,
)
from sparsify.conversion.module_surgery import plain_type, replace_in_place
from sparsify.layer_names import join
from sparsify.layers import CSRLinear, SparseLinear, UnfusedAttention, UnfusedEncoder
from sparsify.layers.own_forward import check_forward


def _in_projections(attention: nn.MultiheadAttention) -> tuple[str, ...]:
    return ("in_proj",) if attention._qkv_same_embed_dim else ("q_proj", "k_proj", "v_proj")


def _layers(attention: nn.MultiheadAttention) -> tuple[str, ...]:
    return (*_in_projections(attention), "out_proj")


def _check(attention: nn.MultiheadAttention) -> None:
    check_plain(attention, nn.MultiheadAttention, "nn.MultiheadAttention")
    out = attention.out_proj
    if plain_type(out) not in (nn.Linear, NonDynamicallyQuantizableLinear):
        raise ValueError(f"its out_proj is a {type(out).__name__} that may compute something else")
    try:
        check_forward(out)
        check_names(out, nn.Linear, SparseLinear, CSRLinear, needs=OF_LAYERS)
        check_plain_parameter(parameter_and_mask(out).weight)
    except ValueError as error:
        raise ValueError(f"its out_proj cannot: {error}") from None
    if "in_proj_bias_mask" in attention._buffers:
        raise ValueError(
            "its bias is pruned too; make that permanent with torch.nn.utils.prune.remove(attention, 'in_proj_bias')"
        )
    for layer in _in_projections(attention):
        check_plain_parameter(parameter_and_mask(attention, f"{layer}_weight").weight)
    check_names(attention, nn.MultiheadAttention, UnfusedAttention, needs=("in_proj", "q_proj", "k_proj", "v_proj"))


def _matrices(attention: nn.MultiheadAttention) -> dict[str, Tensor]:
    in_weights = {layer: getattr(attention, f"{layer}_weight") for layer in _in_projections(attention)}
    return {**in_weights, "out_proj": attention.out_proj.weight}


def _to_unfused(attention: nn.MultiheadAttention) -> UnfusedAttention:
    """Unfuse an attention: layers pruned by torch are masked, others still dense; out_proj is the same object."""
    masks = {}
    for holder, layer, key in (
        *((attention, layer, f"{layer}_weight") for layer in _in_projections(attention)),
        (attention.out_proj, "out_proj", "weight"),
    ):
        holder._parameters[key], masks[layer] = parameter_and_mask(holder, key)
        remove_prune_hook(holder, key)
    unfused = UnfusedAttention(attention)
    for layer, mask in masks.items():
        if mask is not None:
            unfused.add_module(layer, SparseLinear.from_linear(getattr(unfused, layer), mask))
    replace_in_place(attention.out_proj, unfused.out_proj)
    unfused.out_proj = attention.out_proj
    return unfused


def _to_attention(unfused: UnfusedAttention) -> nn.MultiheadAttention:
    """Undo `_to_unfused`; an attention with a layer of a type foreign to nn.MultiheadAttention stays as it is."""
    if any(type(unfused.get_submodule(layer)) is not nn.Linear for layer in unfused.layers):
        return unfused
    attention = unfused.to_attention()
    replace_in_place(unfused.out_proj, attention.out_proj)
    attention.out_proj = unfused.out_proj
    return attention


def _to_unfused_encoder(encoder: nn.TransformerEncoder) -> UnfusedEncoder:
    unfused = UnfusedEncoder.__new__(UnfusedEncoder)
    unfused.__dict__.update(encoder.__dict__)
    return unfused


def _to_encoder(unfused: UnfusedEncoder) -> nn.TransformerEncoder:
    encoder = nn.TransformerEncoder.__new__(nn.TransformerEncoder)
    encoder.__dict__.update(unfused.__dict__)
    return encoder


def _check_encoder(encoder: nn.TransformerEncoder) -> None:
    check_plain(encoder, nn.TransformerEncoder, "nn.TransformerEncoder")


ATTENTION = Converter(nn.MultiheadAttention, UnfusedAttention, _check, _matrices, _to_unfused, _to_attention, _layers)
#: An encoder has no weights of its own: it is never chosen, and is changed for a change inside it.
ENCODER = Converter(
    nn.TransformerEncoder,
    UnfusedEncoder,
    _check_encoder,
    lambda _: {},
    _to_unfused_encoder,
    _to_encoder,
    layers=lambda _: (),
    by_default=False,
)


def bypasses_its_layers(module: nn.Module) -> bool:
    """Return whether a module reads the weights of its Linears without a call, and cannot be unfused."""
    if isinstance(module, nn.TransformerEncoderLayer):
        return any(isinstance(m, nn.MultiheadAttention) and not _can_be_unfused(m) for m in module.children())
    return isinstance(module, nn.MultiheadAttention) and not isinstance(module, UnfusedAttention)


def dependent_modules(model: nn.Module, changed: Set[nn.Module]) -> dict[str, Converter]:
    """Return the further modules to unfuse, by name, after a change of the modules in `changed`.

    Torch's encoder layers and encoders have a fused inference kernel, a reader of all weights inside. An encoder layer
    with an unfused attention does not use the kernel; an UnfusedEncoder never does.
    """
    dependent: dict[str, Converter] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            if changed.isdisjoint(module.modules()):
                continue
            if type(module) is nn.TransformerEncoder:
                dependent[name] = ENCODER
            for child, attention in module.named_children():
                if type(attention) is nn.MultiheadAttention:
                    dependent[join(name, child)] = ATTENTION
    return dependent


def _can_be_unfused(attention: nn.MultiheadAttention) -> bool:
    try:
        if not isinstance(attention, UnfusedAttention):
            _check(attention)
    except ValueError:
        return False
    return True
