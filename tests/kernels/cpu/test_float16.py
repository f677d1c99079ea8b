"""float16 in and out of the kernels: every number is widened exactly, and rounded as torch rounds it."""

import pytest
import torch
from table import pack, to_csr
from torch import Tensor

from sparsify.kernels.cpu import library as native

EVERY_BITS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


def bits(a: Tensor) -> Tensor:
    """The bits of float16 values; one pattern for all NaN."""
    return torch.where(a.isnan(), torch.full_like(a, float("nan")), a).view(torch.int16)


@pytest.mark.parametrize("form", native.FORMS)
def test_every_input_and_every_weight_is_widened_exactly(kernel, form):
    every = EVERY_BITS.view(torch.float16)
    one = pack(form, torch.ones(1, 1, dtype=torch.float16), torch.ones(1, 1, dtype=torch.bool))
    y = native.linear(form, every[:, None], *one, None, (1, 1))
    assert torch.equal(bits(y[:, 0] + 0), bits(every + 0))  # a sum that begins with +0 has no -0
    diagonal = torch.arange(2**16 + 1, dtype=torch.int32)
    n = 2**10  # weights as a column each of 64 matrices; all rows see the input 1
    for part in every.split(n):
        index, values = native.pack(form, diagonal[: n + 1], torch.zeros(n, dtype=torch.int32), part, (n, 1))
        y = native.linear(form, torch.ones(1, 1, dtype=torch.float16), index, values, None, (n, 1))
        assert torch.equal(bits(y[0] + 0), bits(part + 0))


def test_every_rounding_is_that_of_torch(kernel):
    """Outputs on every number of float16, halfway between two, and one float32 to either side of halfway."""
    finite = EVERY_BITS.view(torch.float16).float().abs().unique()
    finite = finite[finite.isfinite()]
    above = torch.cat([finite[1:], torch.tensor([65536.0])])
    halfway = (finite + above) / 2
    infinity = torch.tensor(float("inf"))
    wanted = torch.cat([finite, halfway, halfway.nextafter(infinity), halfway.nextafter(-infinity), infinity[None]])
    mask = torch.ones(len(wanted), 1, dtype=torch.bool)
    index, values = native.pack("panel", *to_csr(mask), torch.ones(len(wanted), dtype=torch.int8), tuple(mask.shape))
    for sign in (1, -1):
        x = torch.full((3, 1), sign, dtype=torch.float16)
        y = native.linear_int8("panel", x, index, values, wanted, None, tuple(mask.shape))
        expected = (sign * wanted).half()
        for row in y:
            assert torch.equal(bits(row + 0), bits(expected + 0))


def test_small_numbers_stay_where_a_thread_flushes_them(kernel):
    """A subnormal float16 is a normal float32."""
    smallest = torch.full((1, 1), 2.0**-24, dtype=torch.float16)
    packed = pack("panel", torch.ones(1, 1, dtype=torch.float16), torch.ones(1, 1, dtype=torch.bool))
    torch.set_flush_denormal(True)
    try:
        y = native.linear("panel", smallest, *packed, None, (1, 1))
        assert y.view(torch.int16).item() == 1
    finally:
        torch.set_flush_denormal(False)
