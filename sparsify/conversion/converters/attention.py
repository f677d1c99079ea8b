"""nn.MultiheadAttention becomes UnfusedAttention, whose projections are layers; the encoder around it follows."""

from __future__ import annotations

from collections.abc import Set

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sparsify.conversion.converters.base import OF_LAYERS, Converter
from sparsify.conversion.foreign_masks import (
    check_forward,
    check_names,
    check_plain,
    check_plain_parameter,
    parameter_and_mask,
    remove_prune_hook,
)
from sparsify.conversion.module_surgery import plain_type, replace_in_place
from sparsify.layers import CSRLinear, SparseLinear, UnfusedAttention, UnfusedEncoder


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
    found = {layer: getattr(attention, f"{layer}_weight") for layer in _in_projections(attention)}
    return {**found, "out_proj": attention.out_proj.weight}


def _to_layered(attention: nn.MultiheadAttention) -> UnfusedAttention:
    """Lay an attention out: layers that torch pruned are masked, others still dense; out_proj is the same object."""
    masks = {}
    for holder, layer, key in (
        *((attention, layer, f"{layer}_weight") for layer in _in_projections(attention)),
        (attention.out_proj, "out_proj", "weight"),
    ):
        holder._parameters[key], masks[layer] = parameter_and_mask(holder, key)
        remove_prune_hook(holder, key)
    layered = UnfusedAttention(attention)
    for layer, mask in masks.items():
        if mask is not None:
            layered.add_module(layer, SparseLinear.from_linear(getattr(layered, layer), mask))
    replace_in_place(attention.out_proj, layered.out_proj)
    layered.out_proj = attention.out_proj
    return layered


def _to_attention(layered: UnfusedAttention) -> nn.MultiheadAttention:
    """Undo that; an attention with a layer by now that nn.MultiheadAttention cannot hold stays as it is."""
    if any(type(layered.get_submodule(layer)) is not nn.Linear for layer in layered.layers):
        return layered
    attention = layered.to_attention()
    replace_in_place(layered.out_proj, attention.out_proj)
    attention.out_proj = layered.out_proj
    return attention


def _to_layered_encoder(encoder: nn.TransformerEncoder) -> UnfusedEncoder:
    layered = UnfusedEncoder.__new__(UnfusedEncoder)
    layered.__dict__.update(encoder.__dict__)
    return layered


def _to_encoder(layered: UnfusedEncoder) -> nn.TransformerEncoder:
    encoder = nn.TransformerEncoder.__new__(nn.TransformerEncoder)
    encoder.__dict__.update(layered.__dict__)
    return encoder


def _check_encoder(encoder: nn.TransformerEncoder) -> None:
    if type(encoder) is not nn.TransformerEncoder:
        raise ValueError(
            f"it is a {type(encoder).__name__}, a subclass of nn.TransformerEncoder that may compute something else"
        )


ATTENTION = Converter(nn.MultiheadAttention, UnfusedAttention, _check, _matrices, _to_layered, _to_attention, _layers)
#: It has no weights of its own: it is never asked for, and follows what is in it.
ENCODER = Converter(
    nn.TransformerEncoder,
    UnfusedEncoder,
    _check_encoder,
    lambda _: {},
    _to_layered_encoder,
    _to_encoder,
    layers=lambda _: (),
    by_default=False,
)


def bypasses_its_layers(module: nn.Module) -> bool:
    """Say whether a module uses the weights of its Linears without calling them, and cannot be kept from it."""
    if isinstance(module, nn.TransformerEncoderLayer):
        return any(isinstance(m, nn.MultiheadAttention) and not _can_be_laid_out(m) for m in module.children())
    return isinstance(module, nn.MultiheadAttention) and not isinstance(module, UnfusedAttention)


def dependent_modules(model: nn.Module, changed: Set[nn.Module]) -> dict[str, Converter]:
    """Return what else has to be laid out, by name, when the modules in `changed` are.

    Torch's encoder layers and encoders have a fused inference kernel that reads the weights of all that is in them. A
    laid out attention keeps a layer from it; an encoder does without.
    """
    found: dict[str, Converter] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            if changed.isdisjoint(module.modules()):
                continue
            if type(module) is nn.TransformerEncoder:
                found[name] = ENCODER
            for child, attention in module.named_children():
                if type(attention) is nn.MultiheadAttention:
                    found[f"{name}.{child}".lstrip(".")] = ATTENTION
    return found


def _can_be_laid_out(attention: nn.MultiheadAttention) -> bool:
    try:
        if not isinstance(attention, UnfusedAttention):
            _check(attention)
    except ValueError:
        return False
    return True
