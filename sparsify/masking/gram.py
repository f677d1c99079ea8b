"""The Gram matrix of a layer's inputs, summed over batches, for calibrated methods."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean of the diagonal
_BLOCK = 384  # columns of one product: above the diagonal only, the products of a 1536-wide layer take 0.63 of the time
_SAMPLE = 4096  # rows of a SampledGram at most, at least half of it


class Gram:
    """The sum of x xᵀ over the rows x of a layer's input, (in_features, in_features).

    With n_groups above 1, as for a convolution with groups: one such sum for each group of outputs, (n_groups,
    in_features, in_features), over rows (rows, n_groups, in_features).

    Each batch's product is taken in float32 (float64 inputs: in float64) and added up in float64, so that the result
    does not lose digits over many batches and hardly depends on their order: the sums of several processes, each over
    its part of the data, can be added.

    >>> gram = Gram(2)
    >>> gram.add(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    >>> gram.matrix.tolist(), gram.n_rows
    ([[1.0, 2.0], [2.0, 5.0]], 2)
    """

    def __init__(self, n_features: int, device: torch.device | str = "cpu", n_groups: int = 1) -> None:
        groups = () if n_groups == 1 else (n_groups,)
        self.sum = torch.zeros(*groups, n_features, n_features, dtype=torch.float64, device=device)
        self.n_groups = n_groups
        self.cross: Tensor | None = None
        self.n_rows = 0

    def add(self, rows: Tensor, dense: Tensor | None = None, group: int | None = None) -> None:
        """Add the rows of a batch, (rows, in_features), and to `cross` their products d xᵀ with those of a dense model.

        group: the only group of outputs with these rows, as for an expert. Raises ValueError if one of the rows holds
        NaN or Inf.
        """
        if group is not None:
            part = Gram(0, self.sum.device)
            part.sum, part.n_rows = self.sum[group], self.n_rows
            if dense is not None:
                self.cross = torch.zeros_like(self.sum) if self.cross is None else self.cross
                part.cross = self.cross[group]
            part.add(rows, dense)
            self.n_rows = part.n_rows
            return
        rows, dtype = self._by_group(_widened(rows)), rows.dtype
        for start in range(0, rows.shape[-1], _BLOCK):
            left = rows[..., start : start + _BLOCK]
            product = left.mT @ rows[..., start:]
            _check_squares(product.diagonal(dim1=-2, dim2=-1), dtype)
            self.sum[..., start : start + _BLOCK, start:] += product
        if dense is not None:
            self.cross = torch.zeros_like(self.sum) if self.cross is None else self.cross
            product = self._by_group(dense).to(rows).mT @ rows
            if not torch.isfinite(product).all():
                raise ValueError("held NaN or Inf in the dense model")
            self.cross += product
        self.n_rows += rows.shape[-2]

    def finish(self) -> Gram:
        """Return the matrix of all rows so far: itself."""
        return self

    @property
    def matrix(self) -> Tensor:
        """The full symmetric matrix, or that of each group, float64 (a copy: the sum keeps its upper part only)."""
        upper = self.sum.triu()
        return upper + upper.triu(1).mT

    @property
    def is_empty(self) -> bool:
        """True if no row has had a value other than zero."""
        return not bool(self.sum.diagonal(dim1=-2, dim2=-1).any())

    @property
    def unseen_groups(self) -> list[int]:
        """The groups of outputs without a row other than zero."""
        if self.n_groups == 1:
            return []
        return (~self.sum.diagonal(dim1=-2, dim2=-1).any(-1)).nonzero().flatten().tolist()

    def fill_unseen(self) -> list[int]:
        """Let the inputs of groups without evidence be alike and independent, and return the numbers of these groups.

        Then all that counts in such a group is the size of a weight.
        """
        unseen = self.unseen_groups
        if unseen:
            one = torch.eye(self.sum.shape[-1], dtype=self.sum.dtype, device=self.sum.device)
            for sums in (self.sum, *([] if self.cross is None else [self.cross])):
                sums[unseen] = one * self.sum.diagonal(dim1=-2, dim2=-1).max()
        return unseen

    def _by_group(self, rows: Tensor) -> Tensor:
        """Return rows as (rows, in_features), or (n_groups, rows, in_features)."""
        return rows if self.n_groups == 1 else rows.transpose(0, 1)


class SampledGram(Gram):
    """A Gram matrix with a diagonal of all rows, and with other entries of a sample of the rows.

    A method that looks at the diagonal alone (Wanda) loses nothing; the error of a layer is then one of the sample.
    The sample has up to 4096 rows, evenly spread; of 4096 rows and fewer all. Its products are scaled to all rows.

    >>> gram = SampledGram(2)
    >>> gram.add(torch.ones(10_000, 2))
    >>> gram.finish().matrix.tolist()
    [[10000.0, 10000.0], [10000.0, 10000.0]]
    """

    def __init__(self, n_features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(0, device)
        self._squares = torch.zeros(n_features, dtype=torch.float64, device=device)
        self._sample: list[Tensor] = []
        self._step = 1

    def add(self, rows: Tensor, dense: Tensor | None = None, group: int | None = None) -> None:
        """Add the rows of a batch, (rows, in_features); those of a dense model are left out."""
        rows, dtype = _widened(rows), rows.dtype
        squares = rows.square().sum(0)
        _check_squares(squares, dtype)
        self._squares += squares
        self._sample.append(rows[-self.n_rows % self._step :: self._step].clone())  # the model may write into its own
        self.n_rows += rows.shape[0]
        while sum(map(len, self._sample)) > _SAMPLE:
            self._sample = [torch.cat(self._sample)[::2].clone()]
            self._step *= 2

    def finish(self) -> Gram:
        """Return the matrix of all rows so far."""
        made = Gram(len(self._squares), self._squares.device)
        for rows in self._sample:
            made.add(rows)
        made.sum *= self.n_rows / max(made.n_rows, 1)
        made.sum.diagonal().copy_(self._squares)
        made.n_rows = self.n_rows
        return made


def add_damping(matrix: Tensor) -> Tensor:
    """Add DAMPING times the mean of the diagonal to the diagonal, so that a Gram matrix can be inverted.

    A feature without activity, or a repeated one, makes a Gram matrix singular. With damping, a method leaves the
    weights of such features as they are. A matrix of zeros becomes the identity times DAMPING.
    """
    mean = float(matrix.diagonal().mean()) if len(matrix) else 0.0
    return matrix + DAMPING * (mean or 1.0) * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _widened(rows: Tensor) -> Tensor:
    """Return rows without gradient, in float32 unless they are float64."""
    return rows.detach() if rows.dtype == torch.float64 else rows.detach().float()


def _check_squares(sums: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless the sums of squares of all features are finite: only then are the values."""
    if not torch.isfinite(sums).all():
        hint = ": float16 ends at 65504; calibrate in float32 or bfloat16" if dtype == torch.float16 else ""
        raise ValueError(f"holds NaN or Inf, or values whose squares overflow{hint}")
