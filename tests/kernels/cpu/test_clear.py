"""Masked weights are set to zero, and nothing else is."""

import pytest
import torch
from table import before_a_guard_page

from sparsify.kernels.cpu import training

FORM = "panel"  # an instruction set with panel kernels of its own has these of its own


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_the_mask_does_not_keep_becomes_zero(kernel, dtype):
    for n in (0, 1, 15, 255, 256, 257, 70_001, 2**18 + 3):
        values = torch.randn(n).to(dtype)
        values[::7], values[3::11], values[5::13] = float("nan"), float("-inf"), -0.0
        mask = torch.rand(n) < 0.3
        expected = torch.where(mask, values, torch.zeros((), dtype=dtype))
        values, mask = before_a_guard_page(values), before_a_guard_page(mask)
        training.clear_masked(values, mask)
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        assert torch.equal(values.view(bits), expected.view(bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_hidden_value_is_found_wherever_it_is(kernel, dtype):
    for n in (0, 1, 15, 255, 256, 257, 65_536, 70_001, 2**18 + 3):
        mask = torch.rand(n) < 0.3
        values = torch.where(mask, torch.randn(n), 0.0).to(dtype)
        values, mask = before_a_guard_page(values), before_a_guard_page(mask)
        assert not training.hides_values(values, mask)
        for place in {0, n // 2, n - 1} if n else ():
            for value in (1.0, float("nan"), torch.finfo(dtype).smallest_normal):
                kept, values[place] = (bool(mask[place]), values[place].item()), value
                assert training.hides_values(values, mask) is not kept[0]
                values[place] = kept[1]


def test_threads_do_not_matter_and_autograd_knows_of_the_change():
    values, mask = torch.randn(2**18 + 5), torch.rand(2**18 + 5) < 0.5
    kept = values.clone()
    version = values._version
    training.clear_masked(values, mask)
    assert values._version > version
    assert torch.equal(values, kept * mask)


def test_what_cannot_be_cleared_natively_is_known():
    mask = torch.ones(4, 6, dtype=torch.bool)
    assert training.can_clear(torch.zeros(4, 6), mask)
    assert training.can_clear(torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.float64)), mask)
    assert not training.can_clear(torch.zeros(6, 4).T, mask)
    assert not training.can_clear(torch.zeros(4, 7), mask)
    assert not training.can_clear(torch.zeros(4, 6), mask.float())
    assert not training.can_clear(torch.zeros(4, 6), mask.T.contiguous().T)
    assert not training.can_clear(torch.zeros(4, 6, device="meta"), mask)
    assert not training.can_clear(torch.zeros(4, 6, dtype=torch.float8_e4m3fn), mask)
