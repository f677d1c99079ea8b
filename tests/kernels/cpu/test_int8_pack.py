"""Packing of int8 values for the forms that quantise inputs: there and back, damaged indices, and memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from table import before_a_guard_page, random_weight, to_csr
from torch import Tensor

from sparsify.kernels.cpu import library as native

QUANTIZED = True
every_form = pytest.mark.parametrize("form", native.QUANTIZES_INPUTS)


def pack(form: str, shape: tuple[int, int], sparsity: float) -> tuple[Tensor, Tensor]:
    """Pack a random weight with int8 values, checked: (index, values)."""
    weight, mask = random_weight(shape, sparsity)
    index, values = native.pack(form, *to_csr(mask), (weight[mask] * 50).to(torch.int8), shape)
    native.check(form, index, values.numel(), shape)
    return index, values


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(native.QUANTIZES_INPUTS),
    st.integers(0, 150),
    st.integers(0, 300),
    st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.6, 1.0]),
    st.integers(0, 10**6),
)
def test_unpack_is_the_inverse_of_pack(form, out, in_, density, seed):
    generator = torch.Generator().manual_seed(seed)
    crow, col = to_csr(torch.rand(out, in_, generator=generator) < density)
    kept = torch.randint(-127, 128, (col.numel(),), generator=generator).to(torch.int8)
    kept[::3] = 0  # kept weights may be zero, and stay kept
    index, values = native.pack(form, crow, col, kept, (out, in_))
    native.check(form, index, values.numel(), (out, in_))
    for a, b in zip(native.unpack(form, index, values, (out, in_)), (crow, col, kept), strict=True):
        assert torch.equal(a, b)


@every_form
def test_rows_and_columns_of_uneven_density(kernel, form):
    """Dense and empty rows side by side, inputs far apart, one that everybody keeps."""
    mask = torch.rand(200, 3000, generator=torch.Generator().manual_seed(0)) < 0.004
    mask[:, 7] = mask[:, 2999] = True
    mask[10:30] = False
    mask[40:43] = True
    mask[41, 5:] = False
    weight = torch.randint(-127, 128, mask.shape, generator=torch.Generator().manual_seed(1)).to(torch.int8) * mask
    index, values = native.pack(form, *to_csr(mask), weight[mask], (200, 3000))
    native.check(form, index, values.numel(), (200, 3000))
    # Integers from 0 to 255 are their own quantised inputs: every operation is exact.
    x = torch.randint(0, 256, (9, 3000), generator=torch.Generator().manual_seed(2)).float()
    x[:, 0] = 255
    y = native.linear_int8(form, x, index, values, torch.ones(200), None, (200, 3000))
    assert torch.equal(y, (x.double() @ weight.double().T).float())


@every_form
@pytest.mark.parametrize(("crow", "col"), [([0, 2, 1], [0, 1]), ([0, 1, 2], [0, 3]), ([0, 2, 2], [1, 1])])
def test_pack_refuses_what_is_no_csr(form, crow, col):
    with pytest.raises(ValueError, match="no CSR matrix"):
        native.pack(form, torch.tensor(crow), torch.tensor(col), torch.ones(2, dtype=torch.int8), (2, 3))


@every_form
@pytest.mark.parametrize("sparsity", [0.3, 0.85])
def test_check_leaves_nothing_that_can_harm(kernel, form, sparsity):
    """Any single byte of an index may be changed: check refuses, or kernels and unpack stay inside their inputs."""
    shape = (20, 45)
    index, values = pack(form, shape, sparsity)
    values, x = before_a_guard_page(values), before_a_guard_page(torch.randn(2, 45))
    generator = torch.Generator().manual_seed(4)
    n_refused = n_tried = 0
    for position in range(index.numel()):
        for flip in {1, 128, int(torch.randint(1, 256, (), generator=generator))}:
            hostile = index.clone()
            hostile[position] ^= flip
            n_tried += 1
            try:
                native.check(form, hostile, values.numel(), shape)
            except ValueError:
                n_refused += 1
                continue
            hostile = before_a_guard_page(hostile)
            crow, col, kept = native.unpack(form, hostile, values, shape)
            native.pack(form, crow, col, kept, shape)  # a CSR matrix again
            native.linear_int8(form, x, hostile, values, torch.ones(20), None, shape)
    assert n_refused > n_tried / 3


@every_form
def test_check_refuses_other_sizes_and_forms(form):
    index, values = pack(form, (20, 45), 0.5)
    for n in (0, 1, 63, 64, index.numel() - 1):
        with pytest.raises(ValueError, match="damaged"):
            native.check(form, before_a_guard_page(index[:n].clone()), values.numel(), (20, 45))
    for bad_index, n_values, shape in (
        (torch.cat([index, index[:1]]), values.numel(), (20, 45)),
        (index, values.numel() - 1, (20, 45)),
        (index, values.numel() + 1, (20, 45)),
        (index, values.numel(), (21, 45)),
        (index, values.numel(), (20, 44)),
        (index, values.numel(), (20, 49)),
    ):
        with pytest.raises(ValueError, match="damaged"):
            native.check(form, bad_index, n_values, shape)
    others = set(native.INT8_FORMS) - {form}
    assert others
    for other in others:
        with pytest.raises(ValueError, match="damaged"):
            native.check(other, index, values.numel(), (20, 45))


@pytest.mark.parametrize(
    ("form", "limits"),
    [
        ("quadmask", (0.65, 0.45, 0.35, 0.25, 0.19)),
        ("quadsteps", (1.2, 0.75, 0.52, 0.3, 0.21)),
        ("widesteps", (1.06, 0.65, 0.44, 0.23, 0.135)),
    ],
)
def test_resident_bytes(form, limits):
    """In the smallest form a weight takes at most .70/.50/.38/.26 bytes at 50/70/80/90%."""
    for sparsity, limit in zip((0.5, 0.7, 0.8, 0.9, 0.95), limits, strict=True):
        index, values = pack(form, (768, 768), sparsity)
        assert (index.numel() + values.numel()) / 768**2 <= limit, sparsity
