"""Export of a masked model: layers that hold only the kept weights."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from copy import copy as shallow_copy
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from sparsify.calibration.layer_inputs import layer_inputs
from sparsify.conversion.converters.table import packed_type
from sparsify.conversion.foreign_masks import check_converted
from sparsify.conversion.module_surgery import Model, copy_replacing, layers_of_type
from sparsify.errors import LeftDenseWarning
from sparsify.inference.coverage import notice
from sparsify.inference.followers import steps_after
from sparsify.inference.form_selection import FormSelector, exported_as
from sparsify.inference.fusion import fuse_activations
from sparsify.inference.input_layout import lay_out_as_inputs
from sparsify.inference.rounding import MAX_ERROR, MAX_INPUT_ERROR, QUANTIZE, RoundingJudge, warn_left_float
from sparsify.inference.unpruned import int8_embeddings, with_masks_everywhere
from sparsify.inference.whole_modules import dense_where_faster, inputs_of_recurrent
from sparsify.kernels import FORMS, PATTERNED, fits, quantizes_inputs, supports
from sparsify.kernels.csr import csr_to_dense, dense_to_csr
from sparsify.layer_names import join
from sparsify.layers import CSRLinear, MaskedLayer, PackedLayer, Tied
from sparsify.layers.copies import warn_stale
from sparsify.layers.fsdp import check_whole, refuse_flattened
from sparsify.layers.fused_block import unfuse
from sparsify.layers.inference_mode import making_tensors
from sparsify.layers.records import FormChoice, rounding_of, set_disturbance, set_form_choice, set_rounding
from sparsify.layers.tied import untie

FORMATS = ("auto", "dense", *FORMS)


def export(
    model: Model,
    *,
    format: str = "auto",
    tokens: int | None = None,
    example: Any = None,
    prefer: str = "speed",
    device: torch.device | str | None = None,
    quantize: str | None = None,
    max_error: float = MAX_ERROR,
    max_input_error: float = MAX_INPUT_ERROR,
    quantize_rest: bool = False,
    fuse: bool = True,
    progress: bool = False,
    copy: bool = True,
) -> Model:
    """Return a copy for inference: each masked layer is a CSRLinear, or a dense layer as before `convert`.

    The model itself stays as it was, and its later changes do not reach the copy: they share no memory and no hooks.
    copy=False lets both share the memory of biases, norms, embeddings and layers without a mask, for a model with no
    training or loading ahead. Outputs equal the masked model's. An activation with a layer's output as its only input
    and no other reader of this output is applied by the layer; after a convolution a BatchNorm in eval mode too, and
    the sum with a shortcut. Layers exported before are exported anew.

    format: the form of the weights in memory. "auto" measures each layer here and takes the fastest form, dense if
    no sparse one is faster: no layer is left slower than dense. A convolution is measured with the BatchNorm and the
    activation after it. Where the weights of all layers are more than the last-level cache holds, each is measured from
    memory. Or one form for all layers: "csr" (runs anywhere, on the reference kernel), "panel" (many tokens),
    "bitmask", "gather" and "sell" (few), on GPUs "tiles" and "narrow" (moderate and high sparsity), "blocks" and "2:4"
    (masks of these patterns), "dense" (zeros in plain weights).
    The choice is on each exported layer as `choice`, and in `report`. A bfloat16 or float16 layer keeps its dtype
    on any processor: half of the memory, multiplied in float32 by the native kernels.
    example: a typical input of the model (a tensor, a tuple, or a dict by name). The model runs on it once, and "auto"
    measures each layer with its own input.
    tokens: rows of input (batch x sequence, or positions of an image; 128 if not given) for layers out of reach of the
    example, and for all layers without one.
    prefer: for "auto", "speed" as above (of forms equally fast the smallest), or "memory": the smallest form, however
    fast.
    device: the device of the copy, if not the model's; the copy is measured (on a GPU as replays of a CUDA graph),
    packed and put there.
    quantize: "int8" rounds kept weights to int8, with a scale for each output, and where it is faster also the inputs
    of a layer, each row by itself as it comes; "int8-weights" rounds no inputs. A layer that "auto" keeps dense is not
    rounded. With an example of enough rows, a third more than a layer has inputs, its weights make up for each other's
    rounding, if that is better on rows left out; else each goes to the nearest value.
    quantize_rest: with `quantize`, int8 for the rest too: "auto" keeps no layer dense, Linears without a mask are
    layers with all weights kept, and Embeddings hold int8 rows.
    fuse: False leaves activations, BatchNorms and sums to the modules after a layer.
    max_error: a layer stays as it is if rounding changes its outputs by more than this share of their size, on the
    example or else on random rows. A LeftFloatWarning and `report` name it.
    max_input_error: the same for its inputs: above it only the weights are rounded, and `report` says so.

    A LeftDenseWarning has the share of the model's parameters, and of the example's work, in pruned layers, and names
    the rest, if that is the larger part.
    Raises ValueError if there is nothing to export, a form does not run here, or the model cannot be copied.

    >>> model = sparsify.convert(torch.nn.Sequential(torch.nn.Linear(8, 4)))
    >>> export(sparsify.prune(model, 0.75), format="csr")[0]
    CSRLinear(in_features=8, out_features=4, bias=True, sparsity=0.75)
    """
    check_format(format, tokens, quantize=quantize)
    _check_options(format, example, prefer, quantize, quantize_rest)
    model = _with_masks(model)
    model = with_masks_everywhere(model) if quantize_rest else model
    if device is not None:
        model = copy_replacing(model, {}, share_memory=True).to(device)
    layers = _layers_to_export(model, format, quantize)
    n_bytes = sum(layer.weight.nbytes for layer in layers.values())
    rows = 128 if tokens is None else tokens
    chooser = FormSelector(rows, prefer, may_be_dense=not quantize_rest, model_bytes=n_bytes)
    with making_tensors():
        judge = None if quantize is None else RoundingJudge(model, quantize, max_error, example, max_input_error)
        given = judge.inputs if judge else {} if example is None else layer_inputs(model, example)
        given = given | inputs_of_recurrent(model, given, chooser.tokens) if format == "auto" else given
        after = steps_after(model, layers.values()) if format == "auto" and fuse else {}
        replacements: dict[nn.Module, nn.Module] = {}
        hidden = not progress or format != "auto" or None  # None: shown on a terminal only
        for layer in tqdm(layers.values(), desc="measuring layers", disable=hidden):
            packs = packed_type(layer) is not None
            rounding = judge.judge(layer, chooser.tokens) if judge and packs else None
            allowed = rounding.allowed if rounding else ""
            auto = format == "auto" or (not packs and format != "dense")
            if auto:
                form = chooser.choose(layer, given.get(layer), allowed, after.get(layer))
            else:
                form = form_asked_for(layer, format, allowed)
            quantized, rounded = allowed != "" and form.form != "dense", judge.take(layer) if judge else None
            replacements[layer] = exported_as(layer, form.form, quantized=quantized, rounded=rounded)
            set_form_choice(replacements[layer], form)
            set_rounding(replacements[layer], rounding)
            set_disturbance(replacements[layer], chooser.others_cores(form))
        if format == "auto" and prefer == "speed" and not quantize_rest:
            replacements |= dense_where_faster(model, replacements, example, chooser)
        for tied in layers_of_type(model, Tied).values():
            replacements[tied] = _export_tied(tied, replacements[tied.owner[0]])
        embeddings, roundings = int8_embeddings(model, max_error) if quantize_rest else ({}, {})
        replacements |= embeddings
        fast = copy_replacing(model, replacements, share_memory=not copy)
        fast = _finished(fast, fuse, example if format == "auto" and copy else None)
    roundings |= {name: r for name, layer in layers.items() if (r := rounding_of(replacements[layer])) is not None}
    warn_left_float(roundings)
    _tell_coverage(model, layers.values(), example)
    return fast


def _finished(model: Model, fuse: bool, example: Any) -> Model:
    """Return an exported model with its fusions, and dense weights that lie as the images of an example."""
    fast = fuse_activations(model) if fuse else model
    if example is not None:
        lay_out_as_inputs(fast, example)
    return fast


def _check_options(format: str, example: Any, prefer: str, quantize: str | None, quantize_rest: bool) -> None:
    """Raise ValueError for options without effect beside others."""
    if format != "auto" and example is not None and quantize is None:
        raise ValueError(f"example has no effect with format {format!r}; only 'auto' measures")
    if format != "auto" and prefer != "speed":
        raise ValueError(f"prefer={prefer!r} has no effect with format {format!r}; only 'auto' chooses")
    if quantize_rest and quantize is None:
        raise ValueError("quantize_rest has no effect without quantize; say quantize='int8' or 'int8-weights'")


def _tell_coverage(model: nn.Module, layers: Collection[MaskedLayer], example: Any) -> None:
    """Warn, with the shares, if most of a model is in none of its masked layers."""
    if said := notice(model, layers, example):
        warnings.warn(said, LeftDenseWarning, stacklevel=3)


def _with_masks(model: Model) -> Model:
    """Return a model with masked layers in the place of packed ones, over the same memory; itself if it has none."""
    packed = [layer for layer in layers_of_type(model, PackedLayer).values() if layer.activation == "none"]
    if not packed:
        return model
    with making_tensors():
        masked = copy_replacing(model, {layer: layer.to_sparse() for layer in packed}, share_memory=True)
    unfuse(masked)
    return masked


def _layers_to_export(model: nn.Module, format: str, quantize: str | None) -> dict[str, MaskedLayer]:
    """Return the masked layers of a model by name. Raises ValueError if there is none, or one cannot be exported."""
    layers = layers_of_type(model, MaskedLayer)
    if not layers:
        raise ValueError("the model has no SparseLinear to export; call sparsify.convert(model) and prune it first")
    for name, layer in layers.items():
        _check_layer(name, layer, format, quantize)
    warn_stale(layers)
    return layers


def _check_layer(name: str, layer: MaskedLayer, format: str, quantize: str | None) -> None:
    """Raise ValueError unless a layer can be exported in a form."""
    refuse_flattened(name, layer)
    try:
        check_converted(layer)
    except ValueError as error:
        raise ValueError(f"{name or '(root)'}: {error}") from None
    check_whole(join(name, "weight"), layer.weight)
    weight = layer.weight
    if weight.is_meta:
        raise ValueError(f"{name}: the weight is on the meta device and has no data; load the model's weights first")
    if packed_type(layer) is None:  # dense in any format
        return
    if format in FORMS and not supports(format, weight.device, weight.dtype, quantized=quantize is not None):
        rounded = "" if quantize is None else " with int8 values"
        raise ValueError(
            f"{name}: the form {format!r} does not run on {weight.device.type} in {weight.dtype}{rounded} here; "
            "see 'sparsify doctor', or use format='csr'"
        )
    if format in PATTERNED or quantizes_inputs(format):
        csr = dense_to_csr(layer.weight_matrix, layer.matrix(layer.mask))
        if not fits(format, csr, layer.shape):
            what, other = ("mask", "tiles") if format in PATTERNED else ("number of inputs", "panel")
            raise ValueError(f"{name}: its {what} does not fit the form {format!r}; use format='auto' or {other!r}")


def form_asked_for(layer: MaskedLayer, format: str, allowed: str) -> FormChoice:
    """Return the form asked for, or one that runs for a layer that may not be rounded as much as that form needs."""
    form = format
    if quantizes_inputs(format) and allowed != "int8":
        weight = layer.weight
        quantized = bool(allowed)
        form = "panel" if supports("panel", weight.device, weight.dtype, quantized=quantized) else "csr"
    return FormChoice(form, 0, {}, "")


def check_format(
    format: str, tokens: int | None = None, device: torch.device | None = None, quantize: str | None = None
) -> None:
    """Raise ValueError for an unknown format, rows without effect, or a device without support for the format."""
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is none of: {', '.join(FORMATS)}")
    if format != "auto" and tokens is not None:
        raise ValueError(f"tokens={tokens} has no effect with format {format!r}; only 'auto' measures")
    if quantize is not None and quantize not in QUANTIZE:
        raise ValueError(f"quantize={quantize!r} is none of: {', '.join(QUANTIZE)}")
    if quantize is not None and format == "dense":
        raise ValueError(f"quantize={quantize!r} has no effect with format 'dense', whose weights are plain")
    if quantize == "int8-weights" and quantizes_inputs(format):
        raise ValueError(f"the form {format!r} rounds the inputs of a layer; use quantize='int8', or another form")
    if quantize is None and quantizes_inputs(format):
        raise ValueError(f"the form {format!r} is for int8 values; use quantize='int8'")
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    quantized = quantize is not None
    if device is not None and format in FORMS and not supports(format, device, torch.float32, quantized=quantized):
        raise ValueError(f"the form {format!r} does not run here; see 'sparsify doctor', or use format='csr'")


def _export_tied(tied: Tied, owner: nn.Module) -> nn.Module:
    """Let a tied layer hold the exported owner's own tensors, packed or dense; an Embedding needs them dense."""
    if isinstance(owner, CSRLinear) and isinstance(tied, nn.Linear):
        packed = shallow_copy(owner)
        packed._parameters = {"bias": tied._parameters["bias"]}
        packed._buffers = dict(owner._buffers)
        return packed
    plain = shallow_copy(tied)
    untie(plain)
    weight: Any = owner.weight
    if isinstance(owner, PackedLayer):
        rounded = csr_to_dense(owner.csr, owner.shape)[0] if owner.own_dtype is not None else None
        weight = tied.owner[0].masked_weight().detach() if rounded is None else rounded
        weight = nn.Parameter(weight, requires_grad=tied.weight.requires_grad)
    plain._parameters = {**plain._parameters, "weight": weight}
    return plain
