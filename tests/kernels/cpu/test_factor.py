"""Cholesky's factors of parts of a matrix are those of torch in float64, as far as float32 goes."""

import pytest
import torch
from table import before_a_guard_page

from sparsify.kernels.cpu import training


def positive(n: int) -> torch.Tensor:
    """Draw a symmetric matrix (n, n) with eigenvalues from 0.1 on, whose last row stands for one of the identity."""
    torch.manual_seed(n)
    rows = torch.randn(n - 1, 2 * n)
    matrix = rows @ rows.T / n + 0.1 * torch.eye(n - 1)
    return torch.nn.functional.pad(matrix, (0, 1, 0, 1), value=float("nan"))  # which nobody reads


def expected(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Factorise each part by itself, in float64."""
    n = len(matrix) - 1
    whole = torch.eye(n + 1, dtype=torch.float64)
    whole[:n, :n] = matrix[:n, :n]
    parts = whole[order[:, :, None], order[:, None, :]]
    is_identity = order == n
    parts[(is_identity[:, :, None] | is_identity[:, None, :])] = 0
    parts.diagonal(dim1=1, dim2=2)[is_identity] = 1
    return torch.linalg.cholesky(parts)


@pytest.mark.parametrize(
    ("n", "size"), [(2, 1), (9, 5), (40, 31), (40, 32), (40, 33), (70, 64), (130, 100), (260, 257)]
)
def test_factors_are_those_of_each_part(kernel: str, n: int, size: int) -> None:
    matrix = positive(n)
    # Some parts end with rows of the identity, one is nothing else.
    order = torch.stack([torch.randperm(n - 1)[:size].sort().values for _ in range(5)])
    order[1, size // 2 :] = n - 1
    order[2, :] = n - 1
    lower = torch.full((5, size, size), float("nan"))
    training.factor_parts(before_a_guard_page(matrix), before_a_guard_page(order), lower)
    exact = expected(matrix, order)
    assert not lower.triu(1).any()
    # |L L' - A| <= (size + 1) u |L| |L'| (Higham, Accuracy and Stability, theorem 10.3); dividing by a block through
    # its inverse multiplies that by the block's condition, which is under 10 here: eigenvalues from 0.1 to about 6.
    bound = 20 * (size + 1) * 2**-24 * (exact.abs() @ exact.mT.abs())
    assert ((lower.double() @ lower.mT.double() - exact @ exact.mT).abs() <= bound).all()
    alone = torch.empty(1, size, size)
    training.factor_parts(matrix, order[3:4].contiguous(), alone)
    assert torch.equal(alone[0], lower[3])  # neither the other parts nor threads matter


def test_a_part_that_is_not_positive_definite_gives_nan_and_no_other(kernel: str) -> None:
    matrix = positive(50)
    matrix[45, 45] = -1.0
    order = torch.stack([torch.arange(40), torch.arange(9, 49)])
    lower = torch.empty(2, 40, 40)
    training.factor_parts(matrix, order, lower)
    assert lower[0].isfinite().all()
    assert lower[1].isnan().any()


def test_nothing_is_no_mistake() -> None:
    training.factor_parts(torch.ones(1, 1), torch.empty(0, 3, dtype=torch.int64), torch.empty(0, 3, 3))
    training.factor_parts(torch.ones(1, 1), torch.empty(2, 0, dtype=torch.int64), torch.empty(2, 0, 0))
