"""Export of a masked model: layers that hold only the kept weights."""

from __future__ import annotations

from copy import copy as shallow_copy
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from sparsify.calibration.layer_inputs import layer_inputs
from sparsify.conversion.foreign_masks import check_converted
from sparsify.conversion.module_surgery import Model, copy_replacing, layers_of_type
from sparsify.inference.form_selection import FormSelector, exported_as
from sparsify.inference.fusion import fuse_activations
from sparsify.kernels import FORMS, PATTERNED, fits, supports
from sparsify.kernels.csr import dense_to_csr
from sparsify.layer_names import join
from sparsify.layers import CSRLinear, MaskedLayer, PackedLayer, Tied
from sparsify.layers.copies import warn_stale
from sparsify.layers.fsdp import check_whole, refuse_flattened
from sparsify.layers.inference_mode import making_tensors
from sparsify.layers.records import FormChoice, set_form_choice
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
    progress: bool = False,
    copy: bool = True,
) -> Model:
    """Return a copy for inference: each masked layer is a CSRLinear, or a dense layer as before `convert`.

    The model itself stays as it was, and its later changes do not reach the copy: they share no memory and no hooks.
    copy=False lets both share the memory of biases, norms, embeddings and layers without a mask, for a model with no
    training or loading ahead. Outputs equal the masked model's. An activation with a layer's output as its only input,
    and no other reader of this output, is applied by the layer.

    format: the form of the weights in memory. "auto" measures each layer here and takes the fastest form, dense if
    no sparse one is faster: no layer is left slower than dense. Or one form for all layers: "csr" (runs anywhere,
    on the reference kernel), "panel" (many tokens), "bitmask" and "gather" (few), on GPUs "tiles" and "narrow"
    (moderate and high sparsity), "blocks" and "2:4" (masks of these patterns), "dense" (zeros in plain weights).
    The choice is on each exported layer as `choice`, and in `report`.
    example: a typical input of the model (a tensor, a tuple, or a dict by name). The model runs on it once, and "auto"
    measures each layer with its own input.
    tokens: rows of input (batch x sequence, or positions of an image; 128 if not given) for layers out of reach of the
    example, and for all layers without one.
    prefer: for "auto", "speed" as above (of forms equally fast the smallest), or "memory": the smallest form, however
    fast.
    device: the device of the copy, if not the model's; the copy is measured (on a GPU as replays of a CUDA graph),
    packed and put there.

    Raises ValueError if there is nothing to export, a form does not run here, or the model cannot be copied.

    >>> model = sparsify.convert(torch.nn.Sequential(torch.nn.Linear(8, 4)))
    >>> export(sparsify.prune(model, 0.75), format="csr")[0]
    CSRLinear(in_features=8, out_features=4, bias=True, sparsity=0.75)
    """
    check_format(format, tokens)
    if format != "auto" and example is not None:
        raise ValueError(f"example has no effect with format {format!r}; only 'auto' measures")
    if format != "auto" and prefer != "speed":
        raise ValueError(f"prefer={prefer!r} has no effect with format {format!r}; only 'auto' chooses")
    if device is not None:
        model = copy_replacing(model, {}, share_memory=True).to(device)
    layers = layers_of_type(model, MaskedLayer)
    if not layers:
        raise ValueError("the model has no SparseLinear to export; call sparsify.convert(model) and prune it first")
    for name, layer in layers.items():
        refuse_flattened(name, layer)
        try:
            check_converted(layer)
        except ValueError as error:
            raise ValueError(f"{name or '(root)'}: {error}") from None
        check_whole(join(name, "weight"), layer.weight)
        if layer.weight.is_meta:
            raise ValueError(
                f"{name}: the weight is on the meta device and has no data; load the model's weights first"
            )
        if format in FORMS and not supports(format, layer.weight.device, layer.weight.dtype):
            raise ValueError(
                f"{name}: the form {format!r} does not run on {layer.weight.device.type} in {layer.weight.dtype} here; "
                "see 'sparsify doctor', or use format='csr'"
            )
        if format in PATTERNED:
            csr = dense_to_csr(layer.weight_matrix, layer.matrix(layer.mask))
            if not fits(format, csr, layer.shape):
                raise ValueError(f"{name}: its mask does not fit the form {format!r}; use format='auto' or 'tiles'")
    warn_stale(layers)
    chooser = FormSelector(128 if tokens is None else tokens, prefer)
    with making_tensors():
        given = {} if example is None else layer_inputs(model, example)
        replacements: dict[nn.Module, nn.Module] = {}
        for layer in tqdm(layers.values(), desc="measuring layers", disable=not progress or format != "auto"):
            choice = chooser.choose(layer, given.get(layer)) if format == "auto" else FormChoice(format, 0, {}, "")
            replacements[layer] = exported_as(layer, choice.form)
            set_form_choice(replacements[layer], choice)
        for tied in layers_of_type(model, Tied).values():
            replacements[tied] = _export_tied(tied, replacements[tied.owner[0]])
        return fuse_activations(copy_replacing(model, replacements, share_memory=not copy))


def check_format(format: str, tokens: int | None = None, device: torch.device | None = None) -> None:
    """Raise ValueError for an unknown format, rows without effect, or a device without support for the format."""
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is none of: {', '.join(FORMATS)}")
    if format != "auto" and tokens is not None:
        raise ValueError(f"tokens={tokens} has no effect with format {format!r}; only 'auto' measures")
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    if device is not None and format in FORMS and not supports(format, device, torch.float32):
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
        weight = nn.Parameter(tied.owner[0].masked_weight().detach(), requires_grad=tied.weight.requires_grad)
    plain._parameters = {**plain._parameters, "weight": weight}
    return plain
