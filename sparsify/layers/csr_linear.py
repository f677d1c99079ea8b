"""CSRLinear: what an exported layer runs. Only the kept weights are in memory."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsify.formats import CSR, check_csr, csr_to_dense, dense_to_csr
from sparsify.kernels import linear_csr
from sparsify.layers.sparse_linear import SparseLinear


class CSRLinear(nn.Module):
    """A linear layer over a weight in CSR format, held in plain buffers.

    `crow` int32 (out_features + 1), `col` uint8, uint16 or int32 (n_kept), whichever is the narrowest, `values`
    (n_kept) in the layer's dtype; `bias` is a Parameter or None. Being plain tensors, they survive deepcopy, pickle,
    state_dict, `.to()`, torch.compile and torch.export. The gradient reaches the input and the bias, not the values:
    train a SparseLinear instead.

    >>> layer = CSRLinear.from_sparse(SparseLinear(8, 4, 0.75, seed=1))
    >>> layer.n_kept, layer.col.dtype, layer(torch.ones(2, 8)).shape
    (8, torch.uint8, torch.Size([2, 4]))
    """

    crow: Tensor
    col: Tensor
    values: Tensor
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, csr: CSR, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        check_csr(csr, (out_features, in_features))
        self.in_features, self.out_features = in_features, out_features
        self._set_csr(csr)
        self.register_parameter("bias", bias)

    @classmethod
    def from_sparse(cls, layer: SparseLinear) -> CSRLinear:
        """Pack the kept weights of a SparseLinear (kept zeros included); the bias is shared."""
        csr = dense_to_csr(layer.weight.detach(), layer.mask)
        return cls(layer.in_features, layer.out_features, csr, layer.bias).train(layer.training)

    def to_sparse(self) -> SparseLinear:
        """Unpack into a SparseLinear that can be trained again; the bias is shared."""
        weight, mask = csr_to_dense(self.csr, (self.out_features, self.in_features))
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight)
        linear.register_parameter("bias", self.bias)
        return SparseLinear.from_linear(linear, mask).train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to (..., in_features); returns (..., out_features)."""
        values, bias = self.values, cast(Tensor | None, self.bias)
        device = input.device.type
        if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            input, values = input.to(dtype), values.to(dtype)
            bias = bias if bias is None else bias.to(dtype)
        return linear_csr(input, self.crow, self.col, values, self.in_features, bias)

    @property
    def csr(self) -> CSR:
        """The weight's three tensors."""
        return CSR(self.crow, self.col, self.values)

    @property
    def weight(self) -> Tensor:
        """A dense copy (out_features, in_features), made at each access: for code that looks at a Linear's weight."""
        return csr_to_dense(self.csr, (self.out_features, self.in_features))[0]

    @property
    def n_kept(self) -> int:
        """How many weights are kept."""
        return self.values.numel()

    @property
    def sparsity(self) -> float:
        """The fraction of weights that are gone (0 for a layer without weights)."""
        total = self.in_features * self.out_features
        return (total - self.n_kept) / total if total else 0.0

    def extra_repr(self) -> str:
        """Describe the layer as nn.Linear does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"sparsity={self.sparsity:.4g}"
        )

    def _set_csr(self, csr: CSR) -> None:
        for name, tensor in zip(CSR._fields, csr, strict=True):
            self.register_buffer(name, tensor)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load another set of kept weights of the same layer shape, after checking that they are a valid CSR weight."""
        given = [state_dict.get(prefix + name) for name in CSR._fields]
        if all(isinstance(tensor, Tensor) for tensor in given):
            csr = CSR(*given)  # type: ignore[arg-type]
            try:
                check_csr(csr, (self.out_features, self.in_features))
            except ValueError as error:
                args[4].append(f"{prefix.rstrip('.')}: {error}")
                return
            if csr.values.shape != self.values.shape or csr.col.dtype != self.col.dtype:
                self._set_csr(
                    CSR(
                        torch.empty_like(self.crow),
                        torch.empty_like(csr.col, device=self.col.device),
                        torch.empty_like(csr.values, device=self.values.device, dtype=self.values.dtype),
                    )
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
