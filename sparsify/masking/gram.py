"""The Gram matrix of a layer's inputs, summed over batches, for calibrated methods."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean of the diagonal
_BLOCK = 384  # columns of one product: above the diagonal only, the products of a 1536-wide layer take 0.63 of the time


class Gram:
    """The sum of x xᵀ over the rows x of a layer's input, (in_features, in_features).

    Each batch's product is taken in float32 (float64 inputs: in float64) and added up in float64, so that the result
    does not lose digits over many batches and hardly depends on their order: the sums of several processes, each over
    its part of the data, can be added.

    >>> gram = Gram(2)
    >>> gram.add(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    >>> gram.matrix.tolist(), gram.n_rows
    ([[1.0, 2.0], [2.0, 5.0]], 2)
    """

    def __init__(self, n_features: int, device: torch.device | str = "cpu") -> None:
        self.sum = torch.zeros(n_features, n_features, dtype=torch.float64, device=device)
        self.cross: Tensor | None = None
        self.n_rows = 0

    def add(self, rows: Tensor, dense: Tensor | None = None) -> None:
        """Add the rows of a batch, (rows, in_features), and to `cross` their products d xᵀ with those of a dense model.

        Raises ValueError if one of the rows holds NaN or Inf.
        """
        rows, dtype = rows.detach(), rows.dtype
        rows = rows if rows.dtype == torch.float64 else rows.float()
        for start in range(0, rows.shape[1], _BLOCK):
            left = rows[:, start : start + _BLOCK]
            product = left.T @ rows[:, start:]
            if not torch.isfinite(product.diagonal()).all():  # a sum of squares is finite only if its values are
                hint = ": float16 ends at 65504; calibrate in float32 or bfloat16" if dtype == torch.float16 else ""
                raise ValueError(f"holds NaN or Inf, or values whose squares overflow{hint}")
            self.sum[start : start + _BLOCK, start:] += product
        if dense is not None:
            self.cross = torch.zeros_like(self.sum) if self.cross is None else self.cross
            product = dense.to(rows).T @ rows
            if not torch.isfinite(product).all():
                raise ValueError("held NaN or Inf in the dense model")
            self.cross += product
        self.n_rows += rows.shape[0]

    @property
    def matrix(self) -> Tensor:
        """The full symmetric matrix, float64 (a copy: the sum keeps its upper part only)."""
        upper = self.sum.triu()
        return upper + upper.triu(1).T


def add_damping(matrix: Tensor) -> Tensor:
    """Add DAMPING times the mean of the diagonal to the diagonal, so that a Gram matrix can be inverted.

    A feature without activity, or a repeated one, makes a Gram matrix singular. With damping, a method leaves the
    weights of such features as they are. A matrix of zeros becomes the identity times DAMPING.
    """
    mean = float(matrix.diagonal().mean()) if len(matrix) else 0.0
    return matrix + DAMPING * (mean or 1.0) * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
