"""The part that converters of torch's own layers to a `TorchLayer` have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sparsify.conversion.converters.base import OF_LAYERS, Converter
from sparsify.conversion.foreign_masks import (
    check_names,
    check_plain,
    check_plain_parameter,
    parameter_and_mask,
    remove_prune_hook,
)
from sparsify.layers import PackedLayer
from sparsify.layers.torch_layer import TorchLayer


def torch_converter(
    sparse: type[TorchLayer], check: Callable[[Any, Tensor], None], packed: type[PackedLayer] | None = None
) -> Converter:
    """Return the converter of a layer of torch, chosen by `types` or for models of its kind.

    check(layer, weight): raise ValueError, with the reason, for settings or shapes with another computation.
    """
    dense = sparse.dense_type

    def check_layer(layer: nn.Module) -> None:
        check_plain(layer, dense, f"nn.{dense.__name__}")
        check_names(layer, dense, sparse, *([packed] if packed else []), needs=OF_LAYERS)
        weight, _ = parameter_and_mask(layer)
        check_plain_parameter(weight)
        check(layer, weight)

    def matrices(layer: Any) -> dict[str, Tensor]:
        return {"": sparse.matrix_of(layer.weight, layer.__dict__)}

    def to_sparse(layer: nn.Module) -> TorchLayer:
        weight, mask = parameter_and_mask(layer)
        remove_prune_hook(layer)
        return sparse.from_dense(layer, mask, weight=weight)

    return Converter(dense, sparse, check_layer, matrices, to_sparse, sparse.to_dense, packed=packed, by_default=False)
