"""Packing: unpack is the inverse, what is no CSR matrix is refused, and a packed weight is as small as promised."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from table import DTYPES, FORMS, pack, packed_random_weight, random_weight, to_csr

from sparsify.kernels.cpu import library as native


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.integers(0, 150),
    st.integers(0, 300),
    st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.6, 1.0]),
    st.integers(0, 10**6),
    st.sampled_from(DTYPES),
)
def test_unpack_is_the_inverse_of_pack(form, out, in_, density, seed, dtype):
    mask = torch.rand(out, in_, generator=torch.Generator().manual_seed(seed)) < density
    crow, col = to_csr(mask)
    kept = torch.randn(col.numel(), generator=torch.Generator().manual_seed(seed)).to(dtype)
    kept[::3] = 0  # kept weights may be zero, and stay kept
    index, values = native.pack(form, crow, col, kept, (out, in_))
    native.check(form, index, values.numel(), (out, in_))
    for a, b in zip(native.unpack(form, index, values, (out, in_)), (crow, col, kept), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("crow", "col", "why"),
    [
        ([0, 2, 1], [0, 1], "pointers fall"),
        ([0, 1, 2], [0, 3], "column too large"),
        ([0, 1, 2], [0, -1], "column negative"),
        ([0, 2, 2], [1, 1], "column twice"),
        ([0, 2, 2], [2, 1], "columns fall"),
        ([1, 2, 2], [0, 1], "does not start at 0"),
        ([0, 1000000, 2], [0, 1], "pointer past the columns"),
    ],
)
def test_pack_refuses_what_is_no_csr(form, crow, col, why):
    assert why
    with pytest.raises(ValueError, match="no CSR matrix"):
        native.pack(form, torch.tensor(crow), torch.tensor(col), torch.ones(2), (2, 3))


@pytest.mark.parametrize("form", FORMS)
def test_rows_and_columns_of_uneven_density(form):
    """Real masks are not uniform: dense and empty rows side by side, a few columns that everybody keeps."""
    generator = torch.Generator().manual_seed(0)
    row, column = torch.rand(200, 1, generator=generator), torch.rand(1, 500, generator=generator)
    mask = torch.rand(200, 500, generator=generator) < (row * column * 2)
    mask[:, 7] = True
    mask[10:30] = False
    weight = torch.randn(200, 500, generator=generator) * mask
    index, values = pack(form, weight, mask)
    x = torch.randn(40, 500, generator=generator)
    y = native.linear(form, x, index, values, None, (200, 500))
    torch.testing.assert_close(y.double(), x.double() @ weight.double().T, rtol=1e-4, atol=1e-4)
    if form == "panel":
        assert values.numel() <= 1.15 * int(mask.sum()), "too much padding"


@pytest.mark.parametrize(
    ("form", "sparsity", "limit"),
    [
        ("panel", 0.5, 0.6),
        ("panel", 0.9, 0.14),
        ("gather", 0.5, 0.83),
        ("gather", 0.9, 0.17),
        ("sell", 0.5, 0.69),
        ("sell", 0.9, 0.145),
        ("bitmask", 0.5, 0.55),
    ],
)
def test_resident_bytes(form, sparsity, limit):
    index, values = packed_random_weight(form, (768, 768), sparsity, torch.float32)
    assert (index.numel() + 4 * values.numel()) / (4 * 768 * 768) <= limit


@pytest.mark.parametrize(("sparsity", "limit"), [(0.5, 0.64), (0.9, 0.14)])
def test_resident_bytes_of_a_panel_with_or_without_patterns(kernel, sparsity, limit):
    index, values = pack("panel", *random_weight((768, 768), sparsity))
    assert (index.numel() + 4 * values.numel()) / (4 * 768 * 768) <= limit


def test_quads_put_inputs_together_that_the_same_rows_keep():
    """Columns come in four kinds, mixed; each kind is kept by other rows, so that a quarter of the quads is used."""
    kind = torch.arange(256) * 7 % 4
    mask = torch.arange(128)[:, None] % 4 == kind[None]
    weight = torch.ones(128, 256, dtype=torch.int8) * mask
    _, values = pack("quads", weight, mask)
    assert values.numel() - 4 * 128 <= 1.4 * int(mask.sum())  # with the padding of runs
    natural = mask.view(128, 64, 4).any(2).sum() * 4
    assert natural > 3.9 * int(mask.sum())
