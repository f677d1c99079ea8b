"""CSR and bitmask: literal bytes, round trips of any weight and mask, sizes, and what is refused."""

import math

import pytest
import torch
from cases import DTYPES, SHAPES, masks, repeatable, weight
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsify.kernels.csr import (
    CSR,
    Bitmask,
    bitmask_bytes,
    check_csr,
    col_dtype,
    csr_bytes,
    csr_to_dense,
    dense_to_csr,
    pack_bitmask,
    unpack_bitmask,
)

DENSE = torch.tensor([[0.0, 1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0], [3.0, 0.0, -4.0, 0.0]])
CSR_OF_DENSE = CSR(
    torch.tensor([0, 2, 2, 4], dtype=torch.int32),
    torch.tensor([1, 3, 0, 2], dtype=torch.uint8),
    torch.tensor([1.0, 2.0, 3.0, -4.0]),
)


@st.composite
def weights_and_masks(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Any small shape (empty ones too), dtype, mask, and values: zeros of both signs, Inf and NaN as well."""
    shape = draw(st.tuples(st.integers(0, 12), st.integers(0, 12)))
    dtype = draw(st.sampled_from(DTYPES))
    n = math.prod(shape)
    special = st.sampled_from([0.0, -0.0, 1.0, -2.5, math.inf, -math.inf, math.nan])
    values = draw(st.lists(special, min_size=n, max_size=n))
    kept = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    return torch.tensor(values, dtype=dtype).reshape(shape), torch.tensor(kept, dtype=torch.bool).reshape(shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def n_bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def expected(weight: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))


def test_csr_of_a_literal() -> None:
    for found, wanted in zip(dense_to_csr(DENSE, DENSE != 0), CSR_OF_DENSE, strict=True):
        assert same_bits(found, wanted)


def test_bitmask_of_a_literal() -> None:
    packed = pack_bitmask(DENSE, DENSE != 0)
    assert packed.bits.tolist() == [0b00001010, 0b0101]  # weights 1 and 3; 8 and 10; four padding bits
    assert packed.values.tolist() == [1.0, 2.0, 3.0, -4.0]


@given(weights_and_masks())
@repeatable
def test_csr_round_trip(case: tuple[Tensor, Tensor]) -> None:
    weight, mask = case
    shape = (weight.shape[0], weight.shape[1])
    csr = dense_to_csr(weight, mask)
    check_csr(csr, shape)
    unpacked, kept = csr_to_dense(csr, shape)
    assert torch.equal(kept, mask)
    assert same_bits(unpacked, expected(weight, mask))
    assert n_bytes(*csr) == csr_bytes(shape, int(mask.sum()), weight.element_size())


@given(weights_and_masks())
@repeatable
def test_bitmask_round_trip(case: tuple[Tensor, Tensor]) -> None:
    weight, mask = case
    shape = (weight.shape[0], weight.shape[1])
    packed = pack_bitmask(weight, mask)
    unpacked, kept = unpack_bitmask(packed, shape)
    assert torch.equal(kept, mask)
    assert same_bits(unpacked, expected(weight, mask))
    assert n_bytes(*packed) == bitmask_bytes(shape, int(mask.sum()), weight.element_size())


@pytest.mark.parametrize("shape", SHAPES)
def test_both_formats_keep_every_mask_of_the_table(shape: tuple[int, int]) -> None:
    dense = weight(shape)
    tried = 0
    for mask in masks(shape).values():
        for unpacked in (
            csr_to_dense(dense_to_csr(dense, mask), shape),
            unpack_bitmask(pack_bitmask(dense, mask), shape),
        ):
            assert same_bits(unpacked[0], expected(dense, mask))
            assert torch.equal(unpacked[1], mask)
            tried += 1
    assert tried == 2 * len(masks(shape))


def test_a_kept_zero_is_stored() -> None:
    dense, mask = torch.tensor([[0.0, -0.0, 1.0]]), torch.tensor([[True, True, False]])
    assert dense_to_csr(dense, mask).values.numel() == 2
    weight, kept = unpack_bitmask(pack_bitmask(dense, mask), (1, 3))
    assert same_bits(weight, torch.tensor([[0.0, -0.0, 0.0]]))
    assert torch.equal(kept, mask)


def test_weights_and_masks_need_not_be_contiguous() -> None:
    dense = weight((8, 6)).T
    mask = dense > 0
    assert not dense.is_contiguous()
    assert same_bits(csr_to_dense(dense_to_csr(dense, mask), (6, 8))[0], expected(dense, mask))
    assert same_bits(unpack_bitmask(pack_bitmask(dense, mask), (6, 8))[0], expected(dense, mask))


@pytest.mark.parametrize("inner", [255, 256, 257, 65535, 65536, 65537])
def test_the_column_index_is_the_narrowest_that_fits(inner: int) -> None:
    limits = {torch.uint8: 2**8, torch.uint16: 2**16, torch.int32: 2**31}
    fitting = [dtype for dtype, limit in limits.items() if inner <= limit]
    assert col_dtype(inner) == fitting[0]
    dense = torch.zeros(2, inner)
    dense[0, 0], dense[1, -1] = 1.0, 2.0  # the last column is the largest index
    csr = dense_to_csr(dense, dense != 0)
    assert csr.col.dtype == fitting[0]
    check_csr(csr, (2, inner))
    assert torch.equal(csr_to_dense(csr, (2, inner))[0], dense)


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def u8(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


BROKEN_CSR = {
    "row pointers too short": (CSR_OF_DENSE._replace(crow=i32(0, 2, 4)), "row pointers must be int32"),
    "row pointers int64": (CSR_OF_DENSE._replace(crow=torch.tensor([0, 2, 2, 4])), "row pointers must be int32"),
    "row pointers 2-d": (CSR_OF_DENSE._replace(crow=i32(0, 2, 2, 4)[None]), "row pointers must be int32"),
    "do not start at 0": (CSR_OF_DENSE._replace(crow=i32(1, 2, 2, 4)), "rise from 0"),
    "do not end at n": (CSR_OF_DENSE._replace(crow=i32(0, 2, 2, 3)), "rise from 0"),
    "end beyond n": (CSR_OF_DENSE._replace(crow=i32(0, 2, 2, 5)), "rise from 0"),
    "fall": (CSR_OF_DENSE._replace(crow=i32(0, 3, 2, 4)), "rise from 0"),
    "negative": (CSR_OF_DENSE._replace(crow=i32(0, -1, 2, 4)), "rise from 0"),
    "difference overflows int32": (CSR_OF_DENSE._replace(crow=i32(0, 2**31 - 1, -(2**31), 4)), "rise from 0"),
    "wide columns": (CSR_OF_DENSE._replace(col=i32(1, 3, 0, 2)), "must be torch.uint8"),
    "column out of range": (CSR_OF_DENSE._replace(col=u8(1, 4, 0, 2)), r"lie in \[0, 4\)"),
    "unsorted": (CSR_OF_DENSE._replace(col=u8(3, 1, 0, 2)), "strictly increasing"),
    "twice": (CSR_OF_DENSE._replace(col=u8(1, 1, 0, 2)), "strictly increasing"),
    "fewer columns than values": (CSR_OF_DENSE._replace(col=u8(1, 3, 0)), "one list each"),
    "integer values": (CSR_OF_DENSE._replace(values=torch.tensor([1, 2, 3, 4])), "one list each"),
    "2-d values": (CSR_OF_DENSE._replace(values=torch.ones(4, 1)), "one list each"),
}


@pytest.mark.parametrize("case", BROKEN_CSR)
def test_check_csr_refuses(case: str) -> None:
    csr, message = BROKEN_CSR[case]
    with pytest.raises(ValueError, match=message):
        check_csr(csr, (3, 4))


def test_check_csr_takes_what_is_right() -> None:
    check_csr(CSR_OF_DENSE, (3, 4))
    check_csr(CSR(i32(0), u8(), torch.zeros(0)), (0, 4))
    check_csr(CSR(i32(0, 0, 0), u8(), torch.zeros(0)), (2, 0))


def test_check_csr_finds_a_column_of_an_earlier_row_that_is_out_of_range() -> None:
    """Column 5 of row 0 would be the same position as column 1 of row 1."""
    with pytest.raises(ValueError, match=r"lie in \[0, 4\)"):
        check_csr(CSR(i32(0, 1, 2), u8(5, 3), torch.ones(2)), (2, 4))


BROKEN_BITMASKS = {
    "too few bytes": (Bitmask(u8(10), torch.ones(4)), "must be uint8 of shape"),
    "too many bytes": (Bitmask(u8(10, 5, 0), torch.ones(4)), "must be uint8 of shape"),
    "other dtype": (Bitmask(i32(10, 5), torch.ones(4)), "must be uint8 of shape"),
    "padding bit": (Bitmask(u8(10, 0b10000101), torch.ones(4)), "padding bits"),
    "padding bit instead of a weight": (Bitmask(u8(10, 0b10000001), torch.ones(4)), "padding bits"),
    "too few values": (Bitmask(u8(10, 5), torch.ones(3)), "keeps 4 weights"),
    "too many values": (Bitmask(u8(10, 5), torch.ones(5)), "keeps 4 weights"),
    "2-d values": (Bitmask(u8(10, 5), torch.ones(2, 2)), "keeps 4 weights"),
    "integer values": (Bitmask(u8(10, 5), torch.ones(4, dtype=torch.int32)), "keeps 4 weights"),
}


@pytest.mark.parametrize("case", BROKEN_BITMASKS)
def test_unpack_bitmask_refuses(case: str) -> None:
    packed, message = BROKEN_BITMASKS[case]
    with pytest.raises(ValueError, match=message):
        unpack_bitmask(packed, (3, 4))
