"""Embeddings under a mask, for pruning and training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.layers.torch_layer import TorchLayer


class SparseEmbedding(TorchLayer, nn.Embedding):
    """nn.Embedding under a mask; see `MaskedLayer`. A row of the matrix is the vector of one index."""

    dense_type = nn.Embedding
    setting_names = (
        "num_embeddings",
        "embedding_dim",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
    )
    has_bias = False
    multiplies_rows = False

    def forward(self, input: Tensor) -> Tensor:
        """Look up the rows of `input`; returns (..., embedding_dim)."""
        look_up: Callable[[Tensor], Tensor] = super().forward
        if self.accumulator is None and self.masked_mode != "trained":  # of the rows in use only
            return torch.where(self.mask[input], look_up(input), 0.0)
        settings: Any = (self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq)
        return F.embedding(input, self.masked_weight(), *settings)


class SparseEmbeddingBag(TorchLayer, nn.EmbeddingBag):
    """nn.EmbeddingBag under a mask; see `MaskedLayer`. A row of the matrix is the vector of one index."""

    dense_type = nn.EmbeddingBag
    setting_names = (
        *("num_embeddings", "embedding_dim", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse"),
        *("include_last_offset", "padding_idx"),
    )
    has_bias = False
    multiplies_rows = False

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Look up and reduce bags of rows, as torch's class does."""
        return F.embedding_bag(
            input,
            self.forward_weight(),
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )
