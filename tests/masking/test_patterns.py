"""Scores become masks of exact counts; ties go to the first in order."""

import math

import numpy as np
import pytest
import torch
from cases import DTYPES, PATTERNS, SHAPES, masks, repeatable, weight
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsify.masking.patterns import (
    Pattern,
    check_fits,
    expand_units,
    keep_largest,
    nm_mask,
    parse_pattern,
    unit_any,
    unit_scores,
)


def reference_keep_largest(scores: list[Tensor], n_keep: int) -> list[list[bool]]:
    """Sort everything with a stable sort, and keep the front."""
    flat = np.concatenate([s.double().numpy().reshape(-1) for s in scores])
    kept = np.zeros(flat.size, dtype=bool)
    kept[np.argsort(-flat, kind="stable")[:n_keep]] = True
    return [part.tolist() for part in np.split(kept, np.cumsum([s.numel() for s in scores])[:-1])]


def check_keep_largest(scores: list[Tensor], n_keep: int) -> None:
    result = keep_largest(scores, n_keep)
    assert [m.flatten().tolist() for m in result] == reference_keep_largest(scores, n_keep)
    assert [(m.shape, m.dtype) for m in result] == [(s.shape, torch.bool) for s in scores]


TIED = st.sampled_from([-2.0, -0.0, 0.0, 0.5, 1.0, float("inf"), float("-inf")])
ANY = st.floats(allow_nan=False, width=32)


@repeatable
@given(st.data(), st.sampled_from(DTYPES), st.sampled_from([TIED, ANY]))
def test_keep_largest_is_a_stable_sort(data: st.DataObject, dtype: torch.dtype, values: st.SearchStrategy) -> None:
    lists = data.draw(st.lists(st.lists(values, min_size=0, max_size=12), min_size=1, max_size=4))
    scores = [torch.tensor(x, dtype=torch.float64).to(dtype) for x in lists]
    check_keep_largest(scores, data.draw(st.integers(0, sum(map(len, lists)))))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keep_largest_in_two_dimensions(shape: tuple[int, int], dtype: torch.dtype) -> None:
    scores = weight(shape, dtype)
    for n_keep in {0, 1, scores.numel() // 2, scores.numel() - 1, scores.numel()}:
        check_keep_largest([scores], n_keep)


def test_keep_largest_of_equal_scores_keeps_the_first() -> None:
    assert keep_largest([torch.zeros(3), torch.zeros(2, 2)], 4)[1].tolist() == [[True, False], [False, False]]


def test_keep_largest_sees_all_bits_of_float64() -> None:
    scores = torch.tensor([1.0, 1.0 + 2**-50, 1.0 - 2**-50], dtype=torch.float64)
    assert keep_largest([scores], 1)[0].tolist() == [False, True, False]
    # ... also where another tensor is float32
    mixed = keep_largest([torch.tensor([1.0]), scores], 1)
    assert [m.tolist() for m in mixed] == [[False], [False, True, False]]


def test_keep_largest_ranks_tiny_and_negative_scores() -> None:
    check_keep_largest([torch.tensor([-1e-45, 1e-45, 0.0, -0.0, -3e38, 3e38])], 3)


@pytest.mark.parametrize("n_keep", [-1, 4])
def test_keep_largest_refuses_an_impossible_count(n_keep: int) -> None:
    with pytest.raises(ValueError, match=f"cannot keep {n_keep} of 3"):
        keep_largest([torch.zeros(3)], n_keep)


def reference_nm(scores: Tensor, keep: int, group: int) -> list[list[bool]]:
    """Go through the groups one by one."""
    result = []
    for row in scores.tolist():
        kept = []
        for start in range(0, len(row), group):
            order = sorted(range(start, start + group), key=lambda i: (-row[i], i))
            kept += [i in order[:keep] for i in range(start, start + group)]
        result.append(kept)
    return result


@repeatable
@given(st.data(), st.sampled_from([(1, 2), (2, 4), (4, 8), (1, 4), (3, 5), (4, 9), (5, 16)]))
def test_nm_mask_keeps_the_best_of_each_group(data: st.DataObject, nm: tuple[int, int]) -> None:
    keep, group = nm
    rows, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    values = data.draw(st.lists(TIED, min_size=rows * groups * group, max_size=rows * groups * group))
    scores = torch.tensor(values).reshape(rows, groups * group)
    assert nm_mask(scores, keep, group).tolist() == reference_nm(scores, keep, group)


def test_nm_mask_of_large_tied_groups_keeps_the_leftmost() -> None:
    assert nm_mask(torch.ones(1, 64), 16, 64).tolist() == [[True] * 16 + [False] * 48]


def test_nm_mask_ranks_infinite_scores() -> None:
    scores = torch.tensor([[math.inf, -math.inf, math.inf, 0.0, -math.inf, -math.inf, -math.inf, -math.inf]])
    assert nm_mask(scores, 2, 4).tolist() == reference_nm(scores, 2, 4)


def test_nm_mask_needs_whole_groups() -> None:
    with pytest.raises(ValueError, match="divisible by 4, got 6"):
        nm_mask(torch.zeros(2, 6), keep=2, group=4)


def fitting(shape: tuple[int, int]) -> list[Pattern]:
    """Return the patterns of PATTERNS, but N:M, that a shape can be cut into."""
    patterns = []
    for pattern in map(parse_pattern, PATTERNS):
        rows, columns = pattern.unit_shape(shape)
        if not pattern.is_nm and shape[0] % rows == 0 and shape[1] % columns == 0:
            patterns.append(pattern)
    return patterns


@pytest.mark.parametrize("shape", SHAPES)
def test_units_are_summed_and_expanded(shape: tuple[int, int]) -> None:
    scores = weight(shape).abs()
    patterns = fitting(shape)
    assert len(patterns) >= 3  # unstructured, rows and columns always fit
    for pattern in patterns:
        check_fits(pattern, shape, "layer")
        rows, columns = pattern.unit_shape(shape)
        units = unit_scores(scores, pattern)
        assert units.shape == (shape[0] // rows, shape[1] // columns)
        assert units.numel() == pattern.n_units(shape)
        for i in range(units.shape[0]):
            for j in range(units.shape[1]):
                block = scores[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                torch.testing.assert_close(float(units[i, j]), float(block.double().sum()))
        for mask in masks(shape).values():
            spread = expand_units(unit_any(mask, pattern), pattern, shape)
            assert spread.shape == shape
            assert bool((spread | ~mask).all())  # no kept weight is lost
            assert torch.equal(unit_any(spread, pattern), unit_any(mask, pattern))
            if pattern.text == "unstructured":
                assert torch.equal(spread, mask)


def test_the_scores_of_a_block_do_not_overflow_half_precision() -> None:
    scores = torch.full((4, 1), 60000.0, dtype=torch.float16)
    assert unit_scores(scores, parse_pattern("4x1")).item() == 240000.0


def test_a_block_with_one_kept_weight_of_many_is_not_gone() -> None:
    mask = torch.zeros(512, 1, dtype=torch.bool)
    mask[7] = True
    assert unit_any(mask, parse_pattern("512x1")).tolist() == [[True]]
    assert unit_any(torch.ones(512, 1, dtype=torch.bool), parse_pattern("256x1")).all()


@pytest.mark.parametrize(
    ("text", "block", "keep", "group"),
    [
        ("unstructured", (1, 1), 0, 0),
        ("rows", (1, 0), 0, 0),
        ("columns", (0, 1), 0, 0),
        ("2:4", (1, 1), 2, 4),
        ("16:32", (1, 1), 16, 32),
        ("4x1", (4, 1), 0, 0),
        ("16x32", (16, 32), 0, 0),
    ],
)
def test_parse_pattern(text: str, block: tuple[int, int], keep: int, group: int) -> None:
    assert parse_pattern(text) == Pattern(text, block, keep, group)
    assert parse_pattern(text).is_nm == (group > 0)


@pytest.mark.parametrize(
    "text", ["", "row", "4:4", "5:4", "0:4", "2:4:8", "0x4", "4x0", "x4", "-2:4", "2 : 4", "2:4\n"]
)
def test_a_pattern_that_is_none_lists_the_kinds(text: str) -> None:
    with pytest.raises(ValueError, match="is none of: unstructured, rows, columns, N:M"):
        parse_pattern(text)


@pytest.mark.parametrize(
    ("pattern", "shape", "message"),
    [
        ("2:4", (8, 770), r"enc\.fc1: pattern 2:4 needs in_features divisible by 4, got 770; .*exclude=\['enc\.fc1'\]"),
        ("4x1", (6, 8), r"enc\.fc1: pattern 4x1 needs .* divisible by \(4, 1\), got \(6, 8\); .*exclude="),
        ("1x4", (8, 6), r"divisible by \(1, 4\), got \(8, 6\)"),
    ],
)
def test_a_shape_that_does_not_divide_is_named(pattern: str, shape: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_fits(parse_pattern(pattern), shape, "enc.fc1")
