"""Converters of nn.Embedding, nn.EmbeddingBag and nn.Bilinear, in use if chosen by `types`."""

from __future__ import annotations

from torch import Tensor, nn

from sparsify.conversion.converters.torch_layer import torch_converter
from sparsify.conversion.foreign_masks import check_shapes
from sparsify.layers.sparse_bilinear import SparseBilinear
from sparsify.layers.sparse_embedding import SparseEmbedding, SparseEmbeddingBag


def _check_embedding(embedding: nn.Embedding | nn.EmbeddingBag, weight: Tensor) -> None:
    check_shapes(weight, None, 2, 0)
    if embedding.max_norm is not None:
        raise ValueError("its max_norm changes the weight as it is used")


def _check_bag(embedding: nn.EmbeddingBag, weight: Tensor) -> None:
    _check_embedding(embedding, weight)
    if embedding.sparse:
        raise ValueError("its gradients are sparse (sparse=True), which a mask over the whole table does not take")


def _check_bilinear(bilinear: nn.Bilinear, weight: Tensor) -> None:
    check_shapes(weight, bilinear.bias, 3, weight.shape[0])
    inputs = bilinear.in1_features, bilinear.in2_features
    if weight.shape[1:] != inputs:
        raise ValueError(f"its weight has the shape {tuple(weight.shape)}, where inputs of {inputs} are needed")


TABLES = (torch_converter(SparseEmbedding, _check_embedding), torch_converter(SparseEmbeddingBag, _check_bag))
BILINEAR = torch_converter(SparseBilinear, _check_bilinear)
