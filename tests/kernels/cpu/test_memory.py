"""Nothing outside the arrays is touched: by a trusted index, nor by any index that check lets pass."""

import itertools

import pytest
import torch
from table import DTYPES, FORMS, before_a_guard_page, pack, random_weight

from sparsify.kernels.cpu import library as native


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_past_the_end_is_read(kernel, form, dtype):
    for shape, sparsity in itertools.product(((1, 1), (5, 37), (16, 32), (70, 96), (33, 1003)), (0.0, 0.4, 0.9, 1.0)):
        weight, mask = random_weight(shape, sparsity)
        index, values = pack(form, weight.to(dtype), mask)
        index, values = before_a_guard_page(index), before_a_guard_page(values)
        bias = before_a_guard_page(torch.randn(shape[0]).to(dtype))
        for tokens in (1, 2, 5, 8, 16, 35):
            x = before_a_guard_page(torch.randn(tokens, shape[1]).to(dtype))
            for rows in ((0, shape[0]), (shape[0] // 2, shape[0])):
                y = before_a_guard_page(torch.full((tokens, rows[1] - rows[0]), float("nan"), dtype=dtype))
                native.linear(form, x, index, values, bias, shape, out=y, rows=rows)
                assert bool(y.isfinite().all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sparsity", [0.3, 0.85])
def test_check_leaves_nothing_that_can_harm(kernel, form, sparsity):
    """Any single byte of an index may be changed: check refuses, or kernels and unpack stay inside their inputs."""
    shape = (20, 45)
    index, values = pack(form, *random_weight(shape, sparsity))
    values, x = before_a_guard_page(values), before_a_guard_page(torch.randn(2, 45))
    generator = torch.Generator().manual_seed(4)
    n_refused = 0
    for position in range(index.numel()):
        for flip in {1, 128, int(torch.randint(1, 256, (), generator=generator))}:
            hostile = index.clone()
            hostile[position] ^= flip
            try:
                native.check(form, hostile, values.numel(), shape)
            except ValueError:
                n_refused += 1
                continue
            hostile = before_a_guard_page(hostile)
            crow, col, _ = native.unpack(form, hostile, values, shape)
            native.pack(form, crow, col, torch.ones(col.numel()), shape)  # a CSR matrix again
            native.linear(form, x, hostile, values, None, shape)
    assert n_refused > index.numel()  # most changes are noticed: a third of them at the very least


@pytest.mark.parametrize("form", FORMS)
def test_check_refuses_other_sizes(form):
    index, values = pack(form, *random_weight((20, 45), 0.5))
    for n in (0, 1, 63, 64, index.numel() - 1):
        with pytest.raises(ValueError, match="damaged"):
            native.check(form, before_a_guard_page(index[:n].clone()), values.numel(), (20, 45))
    longer = torch.cat([index, index[:1]])
    for bad_index, n_values, shape in (
        (longer, values.numel(), (20, 45)),
        (index, values.numel() - 1, (20, 45)),
        (index, values.numel() + 1, (20, 45)),
        (index, values.numel(), (21, 45)),
        (index, values.numel(), (20, 44)),
        (index, values.numel(), (20, 46)),
    ):
        with pytest.raises(ValueError, match="damaged"):
            native.check(form, bad_index, n_values, shape)


@pytest.mark.parametrize("form", FORMS)
def test_check_refuses_the_index_of_another_form(form):
    for other in set(FORMS) - {form}:
        index, values = pack(other, *random_weight((20, 45), 0.5))
        with pytest.raises(ValueError, match="damaged"):
            native.check(form, index, values.numel(), (20, 45))
