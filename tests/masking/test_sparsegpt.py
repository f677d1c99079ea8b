"""SparseGPT against the textbook: one column at a time, with the full inverse of what is left of the Hessian."""

import importlib

import pytest
import torch
from cases import weight
from torch import Tensor

from sparsify.masking.gram import add_damping
from sparsify.masking.layer_solve import output_error
from sparsify.masking.methods.sparsegpt import inverse_factor, sparsegpt
from sparsify.masking.patterns import parse_pattern


def gram_of(n_features: int, n_rows: int = 200, seed: int = 3) -> Tensor:
    """The Gram matrix of inputs that depend on each other."""
    mixed = weight((n_rows, n_features), torch.float64, seed) @ weight(
        (n_features, n_features), torch.float64, seed + 1
    )
    return mixed.T @ mixed


def textbook(weight: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """Remove what a mask removes, from left to right; each removal is made up for by all columns behind it (OBS)."""
    hessian, w = add_damping(gram), weight.double().clone()
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(hessian[j:, j:])
        for row in range(w.shape[0]):
            if not mask[row, j]:
                w[row, j:] -= w[row, j] / inverse[0, 0] * inverse[0]
    return w * mask


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1x4", "4x1", "rows", "columns"])
@pytest.mark.parametrize("block", [8, 12, 128])
def test_the_kept_weights_are_those_of_the_textbook(pattern: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("sparsify.masking.methods.sparsegpt"), "BLOCK", block)
    w, gram, parsed = weight((12, 24)), gram_of(24), parse_pattern(pattern)
    everything = torch.ones_like(w, dtype=torch.bool)
    new, mask = sparsegpt(w, everything, round(0.5 * parsed.n_units(w.shape)), parsed, gram=gram)
    assert int(mask.sum()) == mask.numel() // 2
    torch.testing.assert_close(new, textbook(w, mask, gram), rtol=1e-9, atol=1e-11)


def test_the_mask_is_that_of_the_textbook() -> None:
    """With blocks of one column each row of scores is w² over the diagonal of the inverse, with w as updated so far."""
    w, gram = weight((6, 8)), gram_of(8)
    new, mask = sparsegpt(w, torch.ones_like(w, dtype=torch.bool), 24, parse_pattern("1:2"), gram=gram)
    current, hessian = w.double().clone(), add_damping(gram)
    for start in range(0, 8, 2):
        inverses = [torch.linalg.inv(hessian[j:, j:])[0, 0] for j in (start, start + 1)]
        scores = torch.stack([current[:, start + i] ** 2 / inverses[i] for i in (0, 1)], 1)
        expected = scores == scores.max(1, keepdim=True).values
        assert torch.equal(mask[:, start : start + 2], expected)
        for j in (start, start + 1):
            inverse = torch.linalg.inv(hessian[j:, j:])
            for row in range(6):
                if not mask[row, j]:
                    current[row, j:] -= current[row, j] / inverse[0, 0] * inverse[0]
    torch.testing.assert_close(new, current * mask, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 3), (13, 17), (33, 260), (3, 128), (3, 129)])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 1.0])
def test_counts_are_exact_and_masks_nest(shape: tuple[int, int], sparsity: float) -> None:
    w, gram, pattern = weight(shape), gram_of(shape[1]), parse_pattern("unstructured")
    some = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.8
    already = int((~some).sum())
    n_removed = round(sparsity * w.numel())
    new, mask = sparsegpt(w * some, some, n_removed, pattern, gram=gram)
    assert int((~mask).sum()) == n_removed
    assert not new[~mask].any()
    assert not bool((mask & ~some).any()) if n_removed >= already else not bool((some & ~mask).any())


def test_it_loses_less_than_the_same_mask_without_updates() -> None:
    w, gram = weight((32, 64)), gram_of(64)
    new, mask = sparsegpt(w, torch.ones_like(w, dtype=torch.bool), 1024, parse_pattern("unstructured"), gram=gram)
    assert output_error(w, new, gram) < 0.9 * output_error(w, w * mask, gram)


@pytest.mark.parametrize("gram", [torch.zeros(8, 8, dtype=torch.float64), torch.ones(8, 8, dtype=torch.float64)])
def test_a_singular_gram_matrix_is_damped(gram: Tensor) -> None:
    w = weight((4, 8))
    new, mask = sparsegpt(w, torch.ones_like(w, dtype=torch.bool), 16, parse_pattern("unstructured"), gram=gram)
    assert torch.isfinite(new).all()
    assert int(mask.sum()) == 16


@pytest.mark.parametrize("n", [1, 7, 300, 523])
def test_the_factor_is_that_of_the_inverse(n: int) -> None:
    matrix = add_damping(gram_of(n, n_rows=2 * n))
    upper = inverse_factor(matrix)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper @ matrix @ upper.T, torch.eye(n, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 256), (4, 601)])
def test_the_output_error_is_that_of_the_outputs(shape: tuple[int, int]) -> None:
    x, w, new = weight((50, shape[1]), torch.float64), weight(shape, torch.float64, 1), weight(shape, torch.float64, 2)
    expected = ((w - new) @ x.T).norm() / (w @ x.T).norm()
    assert output_error(w, new, x.T @ x) == pytest.approx(float(expected), rel=1e-9)
