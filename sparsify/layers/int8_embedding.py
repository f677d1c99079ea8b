"""Int8Embedding: an embedding whose rows are int8 in memory, with a scale for each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.kernels.csr import dense_to_csr
from sparsify.kernels.int8 import check_quantized, quantize
from sparsify.layers.records import Rounding
from sparsify.layers.tracing import refuse_script


class Int8Embedding(nn.Module):
    """An nn.Embedding with int8 `values` (num_embeddings, embedding_dim) and `weight_scale`, float32 (num_embeddings).

    A row is its values times its scale, rounded to the layer's own dtype, which moves with `.half()` and the like.
    There is no gradient.

    >>> embedding = nn.Embedding.from_pretrained(torch.tensor([[0.5, -1.0], [0.0, 127.0]]))
    >>> Int8Embedding.from_embedding(embedding)(torch.tensor([1, 0]))
    tensor([[  0.0000, 127.0000],
            [  0.5039,  -1.0000]])
    """

    values: Tensor
    weight_scale: Tensor
    own_dtype: torch.dtype
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    #: The change by rounding, if `export` made the layer.
    rounding: Rounding | None = None

    def __init__(self, values: Tensor, scale: Tensor, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__()
        check_quantized(values, scale, len(values))
        self.num_embeddings, self.embedding_dim = values.shape
        self.own_dtype, self.padding_idx = dtype, padding_idx
        self.register_buffer("values", values)
        self.register_buffer("weight_scale", scale)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> Self:
        """Round the rows of an embedding. Raises ValueError for a NaN or Inf."""
        weight = embedding.weight.detach()
        every = torch.ones((), dtype=torch.bool, device=weight.device).expand(weight.shape)
        rounded, scale = quantize(dense_to_csr(weight, every), len(weight))
        layer = cls(rounded.values.reshape(weight.shape), scale, weight.dtype, embedding.padding_idx)
        return layer.train(embedding.training)

    def to_embedding(self) -> nn.Embedding:
        """Make an embedding of the rows that the values stand for."""
        shape = self.num_embeddings, self.embedding_dim
        return nn.Embedding(*shape, self.padding_idx, _weight=self.weight).train(self.training)

    @property
    def weight(self) -> Tensor:
        """The rows in the layer's own dtype, unpacked at each reading."""
        return self._widened(self.values, self.weight_scale)

    def forward(self, input: Tensor) -> Tensor:
        """Look up rows: (...) of any integers to (..., embedding_dim)."""
        return self._widened(F.embedding(input, self.values), self.weight_scale[input])

    def _widened(self, values: Tensor, scale: Tensor) -> Tensor:
        return (values.float() * scale.unsqueeze(-1)).to(self.own_dtype)

    def extra_repr(self) -> str:
        """Describe the layer as nn.Embedding does."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, values=int8"

    def __prepare_scriptable__(self) -> None:
        """Refuse torch.jit.script, which asks each module for this first."""
        refuse_script()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert as any module does; scales stay float32."""
        scale = self.weight_scale
        self.own_dtype = fn(torch.empty(0, dtype=self.own_dtype, device=scale.device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load rows after a check of their scales."""
        values, scale = state_dict.get(f"{prefix}values"), state_dict.get(f"{prefix}weight_scale")
        if isinstance(values, Tensor) and isinstance(scale, Tensor):
            try:
                check_quantized(values, scale, self.num_embeddings)
            except ValueError as error:
                args[-1].append(f"{prefix.rstrip('.')}: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)
