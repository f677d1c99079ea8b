"""Swaps end where no pair of a kept and a removed weight gains anything, and never raise the error."""

import itertools

import pytest
import torch
from cases import weight
from torch import Tensor

from sparsify.masking.gram import add_damping
from sparsify.masking.methods.swaps import _SMALLEST, swap
from sparsify.masking.patterns import choose_mask, parse_pattern

SHAPES = [(1, 1), (1, 8), (5, 4), (3, 12), (17, 24)]


def inputs_gram(n_features: int) -> Tensor:
    x = weight((3 * n_features, n_features), seed=7).double() @ weight((n_features, n_features), seed=8).double()
    return x.T @ x


def errors(target: Tensor, found: Tensor, gram: Tensor) -> Tensor:
    """Return the error of each row."""
    change = target.double() - found.double()
    return ((change @ gram) * change).sum(1)


def best_gain(target: Tensor, found: Tensor, kept: Tensor, gram: Tensor, group: int, *, fit: bool) -> float:
    """Try every pair of one row, and return the largest fall of the error."""
    (now,) = errors(target[None], found[None], gram).tolist()
    gains = [0.0]
    for out, back in itertools.product(kept.nonzero()[:, 0].tolist(), (~kept).nonzero()[:, 0].tolist()):
        if group and out // group != back // group:
            continue
        tried = found.clone()
        tried[out] = 0
        slope = (target - tried) @ gram[back]
        tried[back] = slope / gram[back, back] if fit else target[back]
        gains.append(now - float(errors(target[None], tried[None], gram)))
    return max(gains)


@pytest.mark.parametrize("fit", [False, True])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_pair_is_left_that_gains(shape: tuple[int, int], sparsity: float, pattern: str, fit: bool) -> None:
    parsed = parse_pattern(pattern)
    if parsed.is_nm and (shape[1] % 4 or sparsity != 0.5):
        pytest.skip("2:4 has one sparsity, and groups of four")
    target, gram = weight(shape).double(), add_damping(inputs_gram(shape[1]))
    present = torch.ones(shape, dtype=torch.bool)
    mask = choose_mask(target.abs(), present, parsed, round(sparsity * target.numel()))
    pruned = target.masked_fill(~mask, 0)
    found, kept = swap(target, pruned, mask, present, parsed, gram=inputs_gram(shape[1]), fit=fit)
    assert torch.equal(kept.sum(1), mask.sum(1))
    assert bool((found[~kept] == 0).all())
    if parsed.is_nm:
        assert bool((kept.reshape(-1, 4).sum(1) == 2).all())
    if not fit:
        assert torch.equal(found[kept], target[kept])
    before, after = errors(target, pruned, gram), errors(target, found, gram)
    energy = ((target @ gram) * target).sum(1)
    assert bool((after <= before * (1 + 1e-9)).all())
    if sparsity == 0.5 and shape[1] > 4:
        assert bool(after.sum() < before.sum())
    if shape[1] <= 12:  # the eight cheapest to remove are tried: of twelve at most half are kept at 0.5 and more
        for row in range(shape[0] if sparsity >= 0.5 else 0):
            gain = best_gain(target[row], found[row], kept[row], gram, parsed.group, fit=fit)
            assert gain <= 2 * _SMALLEST * float(energy[row])


def test_inputs_of_zeros_change_nothing() -> None:
    target, mask = weight((3, 8)).double(), weight((3, 8), seed=2) > 0
    pruned = target.masked_fill(~mask, 0)
    present = torch.ones_like(mask)
    found, kept = swap(target, pruned, mask, present, parse_pattern("unstructured"), gram=torch.zeros(8, 8), fit=False)
    energy_before, energy_after = pruned.square().sum(1), found.square().sum(1)
    assert bool((energy_after >= energy_before).all())  # damping alone ranks: the largest stay
    assert torch.equal(kept.sum(1), mask.sum(1))


@pytest.mark.parametrize("fit", [False, True])
def test_weights_removed_before_stay_removed(fit: bool) -> None:
    target, present = weight((9, 16)).double(), weight((9, 16), seed=3) > -0.5
    mask = choose_mask(target.abs(), present, parse_pattern("unstructured"), 90)
    pruned = target.masked_fill(~mask, 0)
    gram = inputs_gram(16)
    found, kept = swap(target, pruned, mask, present, parse_pattern("unstructured"), gram=gram, fit=fit)
    assert not bool((kept & ~present).any())
    assert bool(errors(target, found, gram).sum() < errors(target, pruned, gram).sum())
