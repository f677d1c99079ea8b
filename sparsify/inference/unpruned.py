"""The rest of a model as int8: Linears without a mask, and Embeddings."""

from __future__ import annotations

import math
import warnings
from collections import Counter

from torch import nn

from sparsify.conversion.convert import convert
from sparsify.conversion.converters.table import converters
from sparsify.conversion.module_surgery import Model, copy_replacing, layers_of_type
from sparsify.errors import LeftDenseWarning
from sparsify.layers import Int8Embedding
from sparsify.layers.inference_mode import making_tensors
from sparsify.layers.records import Rounding, set_rounding


def with_masks_everywhere(model: Model) -> Model:
    """Return a model over the same memory in which every Linear that converts has a mask, where needed of all True."""
    with making_tensors():
        masked = copy_replacing(model, {}, share_memory=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftDenseWarning)
        types = [converter.dense for converter in converters() if converter.by_default]
        return convert(masked, types=types, tied="skip")


def int8_embeddings(model: nn.Module, max_error: float) -> tuple[dict[nn.Module, nn.Module], dict[str, Rounding]]:
    """Return an Int8Embedding for each Embedding of a model, and the records of all of these by name.

    An Embedding that shares its weight, or rescales its rows (max_norm), is left out. One whose weight would change by
    more than `max_error` of its size has a record, and no replacement.
    """
    n_uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    rounded: dict[nn.Module, nn.Module] = {}
    roundings = {}
    for name, embedding in layers_of_type(model, nn.Embedding).items():
        weight = embedding._parameters["weight"]
        if type(embedding) is not nn.Embedding or embedding.max_norm is not None or n_uses[id(weight)] != 1:
            continue
        layer = _rounded(embedding)
        error = math.nan if layer is None else _error(embedding, layer)
        roundings[name] = Rounding(error, None, max_error, on_example=False)
        if layer is not None and roundings[name].allowed:
            set_rounding(layer, roundings[name])
            rounded[embedding] = layer
    return rounded, roundings


def _rounded(embedding: nn.Embedding) -> Int8Embedding | None:
    """Round an embedding; None if its rows have no int8 form."""
    if not embedding.weight.is_floating_point() or embedding.weight.is_meta:
        return None
    try:
        return Int8Embedding.from_embedding(embedding)
    except ValueError:
        return None


def _error(embedding: nn.Embedding, layer: Int8Embedding) -> float:
    """Return the relative change of an embedding's weight."""
    weight = embedding.weight.detach().float()
    change, size = float((layer.weight.float() - weight).norm()), float(weight.norm())
    return change / size if change else 0.0
