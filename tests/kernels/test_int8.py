"""Weights rounded to int8: the rule, its edges, and what is refused."""

import pytest
import torch
from cases import SHAPES, masks, weight
from torch import Tensor

from sparsify.kernels import linear, pack, supports, unpack, unpack_as
from sparsify.kernels.csr import CSR, csr_to_dense, dense_to_csr
from sparsify.kernels.int8 import SMALLEST_SCALE, check_quantized, dequantize, quantize

CPU = torch.device("cpu")


def rounded(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of a dense weight by the definition, with Python's own numbers and round."""
    scales, rows = [], []
    for row in dense.tolist():
        largest = max((abs(w) for w in row), default=0.0)
        scale = float(torch.tensor(largest, dtype=torch.float32) / 127) if largest else 1.0
        scales.append(scale)
        rows.append([round(float(torch.tensor(w) / torch.tensor(scale))) for w in row])
    return torch.tensor(rows, dtype=torch.int8).reshape(dense.shape), torch.tensor(scales)


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_rounded_by_the_rule(shape: tuple[int, int]) -> None:
    tried = 0
    for mask in masks(shape).values():
        dense = weight(shape, torch.float32, seed=1) * mask
        csr, scale = quantize(dense_to_csr(dense, mask), shape[0])
        wanted, scales = rounded(dense)
        assert torch.equal(csr_to_dense(csr, shape)[0], wanted)
        assert torch.equal(csr_to_dense(csr, shape)[1], mask)
        assert torch.equal(scale, scales)
        check_quantized(csr.values, scale, shape[0])
        back = csr_to_dense(dequantize(csr, scale, torch.float32), shape)[0]
        # half a step, and the rounding of the two products
        assert bool(((back - dense).abs() <= scale[:, None] * (0.5 + 2 * 127 * 2**-24)).all())
        tried += 1
    assert tried == 5


def test_halves_go_to_even_and_kept_zeros_stay_kept() -> None:
    dense = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0]])
    csr, scale = quantize(dense_to_csr(dense, torch.ones(2, 4, dtype=torch.bool)), 2)
    assert csr.values.tolist() == [127, 0, 2, -2, 0, 0, 0, 0]
    assert scale.tolist() == [1.0, 1.0]


def test_rounding_twice_changes_nothing() -> None:
    dense = weight((5, 9), torch.float32, seed=2)
    csr = dense_to_csr(dense, torch.ones(5, 9, dtype=torch.bool))
    once, scale = quantize(csr, 5)
    twice, same_scale = quantize(dequantize(once, scale, torch.float32), 5)
    assert torch.equal(once.values, twice.values)
    torch.testing.assert_close(scale, same_scale, rtol=2**-22, atol=0)


def test_tiny_and_huge_weights_have_usable_scales() -> None:
    dense = torch.tensor([[1e-44, 0.0], [3e38, -3e38], [2.0**-126, 2.0**-130]])
    csr, scale = quantize(dense_to_csr(dense, torch.ones(3, 2, dtype=torch.bool)), 3)
    check_quantized(csr.values, scale, 3)
    assert scale[0] == scale[2] == SMALLEST_SCALE
    assert csr.values.tolist() == [0, 0, 127, -127, 1, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_without_an_int8_form_is_refused(bad: float) -> None:
    dense = torch.tensor([[1.0, bad]])
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantize(dense_to_csr(dense, torch.tensor([[True, True]])), 1)
    kept = quantize(dense_to_csr(dense, torch.tensor([[True, False]])), 1)[0]
    assert kept.values.tolist() == [127]
    with pytest.raises(ValueError, match="too large"):
        quantize(dense_to_csr(torch.tensor([[1e300]], dtype=torch.float64), torch.tensor([[True]])), 1)


@pytest.mark.parametrize(
    ("values", "scale", "message"),
    [
        (torch.ones(1), torch.ones(2), "belongs to int8 values"),
        (torch.ones(1, dtype=torch.int8), torch.ones(3), r"float32 of shape \(2,\)"),
        (torch.ones(1, dtype=torch.int8), torch.ones(2, dtype=torch.float64), "float32"),
        (torch.ones(1, dtype=torch.int8), torch.tensor([1.0, torch.nan]), "finite and greater than 0, got nan"),
        (torch.ones(1, dtype=torch.int8), torch.tensor([1.0, torch.inf]), "got inf"),
        (torch.ones(1, dtype=torch.int8), torch.tensor([0.0, 1.0]), "got 0.0"),
        (torch.ones(1, dtype=torch.int8), torch.tensor([-1.0, 1.0]), "got -1.0"),
        (torch.ones(1, dtype=torch.int8), torch.tensor([1e-40, 1.0]), "greater than 0"),
        (torch.tensor([-128], dtype=torch.int8), torch.ones(2), r"\[-127, 127\], got -128"),
    ],
)
def test_hostile_scales_and_values_are_refused(values: Tensor, scale: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_quantized(values, scale, 2)
    csr = CSR(torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.uint8), values)
    with pytest.raises(ValueError, match=message):
        pack("csr", csr, (2, 3), scale)


def test_int8_values_without_a_scale_are_refused() -> None:
    csr, _ = quantize(dense_to_csr(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)), 2)
    with pytest.raises(ValueError, match="float32 of shape"):
        pack("csr", csr, (2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_reference_multiplies_with_the_weights_that_values_stand_for(dtype: torch.dtype) -> None:
    dense = weight((6, 10), torch.float32, seed=3)
    mask = dense > 0
    csr, scale = quantize(dense_to_csr(dense, mask), 6)
    parts = pack("csr", csr, (6, 10), scale, dtype)
    x = weight((4, 10), dtype, seed=4)
    wide = csr_to_dense(dequantize(csr, scale, dtype), (6, 10))[0]
    assert wide.dtype == dtype
    assert torch.equal(linear(x, parts, "csr", (6, 10)), torch.nn.functional.linear(x, wide))
    assert torch.equal(unpack("csr", parts, (6, 10)).values, csr.values)
    assert torch.equal(csr_to_dense(unpack_as(dtype, "csr", parts, (6, 10)), (6, 10))[0], wide)


def test_a_form_without_kernels_for_int8_says_so() -> None:
    csr, scale = quantize(dense_to_csr(torch.ones(2, 8), torch.ones(2, 8, dtype=torch.bool)), 2)
    assert not supports("2:4", CPU, torch.float32, quantized=True)
    with pytest.raises(ValueError, match="no kernels for int8 values"):
        pack("2:4", csr, (2, 8), scale)
