"""Refit and the mask search: exact least squares for the mask, and never a larger error than before."""

import importlib

import pytest
import torch
from cases import masks, weight
from test_sparsegpt import gram_of
from torch import Tensor

from sparsify.masking.gram import add_damping
from sparsify.masking.layer_solve import output_error
from sparsify.masking.methods.alps import alps
from sparsify.masking.methods.refit import refit
from sparsify.masking.methods.sparsegpt import sparsegpt
from sparsify.masking.patterns import parse_pattern


def by_lstsq(weight: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """Solve each row by torch.linalg.lstsq on inputs whose Gram matrix is the damped one."""
    inputs = torch.linalg.cholesky(add_damping(gram)).T
    new = torch.zeros_like(weight, dtype=torch.float64)
    for row in range(len(weight)):
        kept = mask[row]
        if kept.any():
            outputs = inputs @ weight[row].double()
            new[row, kept] = torch.linalg.lstsq(inputs[:, kept], outputs[:, None], driver="gelsd").solution[:, 0]
    return new


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 3), (13, 17), (33, 60)])
@pytest.mark.parametrize("kind", ["all", "none", "empty row", "empty column", "half", "few", "most"])
@pytest.mark.parametrize("batch_bytes", [1, 20_000, 2**26])
def test_each_row_is_the_least_squares_solution(
    shape: tuple[int, int], kind: str, batch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("sparsify.masking.methods.refit"), "_BATCH_BYTES", batch_bytes)
    w, gram = weight(shape), gram_of(shape[1])
    draws = torch.rand(shape, generator=torch.Generator().manual_seed(7))
    mask = (masks(shape) | {"few": draws < 0.1, "most": draws < 0.9})[kind]
    new = refit(w, mask, gram=gram)
    assert not new[~mask].any()
    torch.testing.assert_close(new, by_lstsq(w, mask, gram), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1x4"])
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
def test_each_step_lowers_the_error(pattern: str, sparsity: float) -> None:
    """SparseGPT, its refit, the search: each at most the error of the one before, on the damped inputs."""
    w, gram, parsed = weight((48, 64)), gram_of(64, n_rows=500), parse_pattern(pattern)
    everything, n = torch.ones_like(w, dtype=torch.bool), round(sparsity * parsed.n_units(w.shape))
    updated, mask = sparsegpt(w, everything, n, parsed, gram=gram)
    refitted = refit(w, mask, gram=gram)
    searched, other = alps(w, everything, n, parsed, gram=gram)
    errors = [output_error(w, new, add_damping(gram)) for new in (updated, refitted, searched)]
    assert errors == sorted(errors, reverse=True)
    assert int(other.sum()) == int(mask.sum())
    assert not searched[~other].any()


def test_the_search_is_near_the_best_mask() -> None:
    """All 70 masks of a row of 8 with 4 kept, tried one by one."""
    from itertools import combinations

    gram = gram_of(8)
    for seed in range(5):
        w = weight((1, 8), seed=seed)
        errors = []
        for kept in combinations(range(8), 4):
            mask = torch.zeros(1, 8, dtype=torch.bool)
            mask[0, list(kept)] = True
            errors.append(output_error(w, refit(w, mask, gram=gram), gram))
        found, _ = alps(w, torch.ones(1, 8, dtype=torch.bool), 4, parse_pattern("unstructured"), gram=gram)
        assert sorted(errors)[:10][-1] >= output_error(w, found, gram)


@pytest.mark.parametrize("gram", [torch.zeros(8, 8, dtype=torch.float64), torch.ones(8, 8, dtype=torch.float64)])
def test_a_singular_gram_matrix(gram: Tensor) -> None:
    w = weight((4, 8))
    for new in (refit(w, masks((4, 8))["half"], gram=gram), alps(w, w != 0, 16, parse_pattern("2:4"), gram=gram)[0]):
        assert torch.isfinite(new).all()


def test_what_does_not_converge_is_solved_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    w, gram, mask = weight((5, 12)), gram_of(12), masks((5, 12))["half"]
    monkeypatch.setattr(importlib.import_module("sparsify.masking.methods.refit"), "_TOLERANCE", -1.0)
    torch.testing.assert_close(refit(w, mask, gram=gram), by_lstsq(w, mask, gram), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_a_weight_without_entries_stays(shape: tuple[int, int]) -> None:
    gram = torch.eye(shape[1], dtype=torch.float64)
    assert refit(torch.zeros(shape), torch.ones(shape, dtype=torch.bool), gram=gram).shape == shape
