"""int8 values: every kernel against the reference. Where inputs are quantised, bit for bit."""

import itertools

import pytest
import torch
from table import (
    DTYPES,
    SHAPES,
    SPARSITIES,
    TOKENS,
    TOKENS_PER_WEIGHT,
    before_a_guard_page,
    cases,
    random_weight,
    rounding_error,
    to_csr,
)
from torch import Tensor

from sparsify.kernels import reference
from sparsify.kernels.cpu import library as native

QUANTIZED = True
every_form = pytest.mark.parametrize("form", native.INT8_FORMS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
exact_form = pytest.mark.parametrize("form", native.QUANTIZES_INPUTS)

Packed = tuple[Tensor, Tensor, Tensor]


def int8_weight(shape: tuple[int, int], sparsity: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight as int8 (out, in), its scales and its mask; some kept weights are 0, some -127 and 127."""
    weight, mask = random_weight(shape, sparsity)
    largest = weight.abs().amax(1) if shape[1] else weight.new_zeros(shape[0])
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (weight / scale[:, None]).round().to(torch.int8), scale, mask


def pack(form: str, weight: Tensor, scale: Tensor, mask: Tensor) -> Packed:
    """(index, values, scale), checked."""
    index, values = native.pack(form, *to_csr(mask), weight[mask], tuple(weight.shape))
    native.check(form, index, values.numel(), tuple(weight.shape))
    return index, values, scale


def assert_right(
    form: str, y: Tensor, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str | None
) -> None:
    """Equal to the reference before the activation if inputs are quantised, else near it."""
    exact = reference.linear_int8(
        x.float(),
        weight,
        scale,
        None if bias is None else bias.float(),
        activation or "none",
        quantize_inputs=form in native.QUANTIZES_INPUTS,
    )
    if form in native.QUANTIZES_INPUTS and activation in (None, "relu"):
        assert torch.equal(y, exact.to(x.dtype))
        return
    # A chain of n additions is off by at most n units of 2^-24 of the sum of sizes (Higham, section 3.1); sums are
    # split into about sqrt(n) parts of sqrt(n), and an activation has a slope of at most 1.5 and 4 units of its own.
    size = (x.double().abs() @ weight.double().abs().T) * scale.double() + (0 if bias is None else bias.double().abs())
    n = 4 * max(x.shape[-1], 1) ** 0.5 + 16
    bound = 1.5 * n * 2**-24 * size + rounding_error(exact, x.dtype)
    assert bool(((y.double() - exact.double()).abs() <= bound).all())


@every_dtype
@every_form
def test_linear_over_the_table(kernel, form, dtype):
    n_cases = 0
    for shape, sparsity, tokens, activation, with_bias, gap in cases():
        out, in_ = shape
        weight, scale, mask = int8_weight(shape, sparsity)
        packed = pack(form, weight, scale, mask)
        generator = torch.Generator().manual_seed(n_cases)
        x = torch.randn(tokens, in_ + gap, generator=generator).to(dtype)[:, :in_]
        bias = torch.randn(out, generator=generator).to(dtype) if with_bias else None
        y = torch.full((tokens, out + 5), float("nan"), dtype=dtype)
        native.linear_int8(form, x, *packed, bias, shape, native.ACTIVATIONS[activation], out=y[:, :out])
        assert_right(form, y[:, :out], x, weight, scale, bias, activation)
        assert bool(y[:, out:].isnan().all()), "wrote beside the output"
        n_cases += 1
    assert n_cases == len(SHAPES) * len(SPARSITIES) * TOKENS_PER_WEIGHT


def strange_rows(n: int) -> Tensor:
    """Rows of n inputs with unusual numbers, one kind a row."""
    x = torch.randn(17, n, generator=torch.Generator().manual_seed(5))
    x[0] = 0
    x[1] = -0.0
    x[2] = x[2].abs()  # nothing below 0
    x[3] = -x[3].abs()
    x[4] *= 1e-42  # subnormal: 255 / range is infinite
    x[5] *= 2e-36  # and here it is not
    x[6] *= 1e38
    x[7, 0], x[7, -1] = 3e38, -3e38  # the range is not finite
    x[8, n // 2] = float("inf")
    x[9, -1] = float("-inf")
    x[10, 0] = float("nan")
    x[11, -1] = float("nan")
    x[12] = 1.0
    x[13] = 0
    x[13, n // 3] = -1e-3
    x[14] = torch.arange(n) * 0.5  # ties
    x[15] = torch.arange(n) * 1.0 - n // 2
    x[16] *= torch.logspace(-6, 3, n)
    return x


@exact_form
def test_strange_inputs_give_the_same_bits_everywhere(kernel, form):
    for n in (3, 37, 256):
        weight, scale, mask = int8_weight((50, n), 0.5)
        packed, x = pack(form, weight, scale, mask), strange_rows(n)
        y = native.linear_int8(form, x, *packed, None, (50, n))
        expected = reference.linear_int8(x, weight, scale, None, quantize_inputs=True)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.nan_to_num(), expected.nan_to_num())
        assert y[[7, 8, 9, 10, 11]].isnan().all()
        assert not y[[0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16]].isnan().any()
        assert (y[[0, 1, 4]] == 0).all()


@every_dtype
@every_form
def test_a_token_does_not_depend_on_its_company_nor_on_strides_nor_on_threads(kernel, form, dtype):
    for shape, sparsity in itertools.product(((70, 90), (256, 512)), (0.5, 0.9)):
        packed = pack(form, *int8_weight(shape, sparsity))
        x = torch.randn(200, shape[1], generator=torch.Generator().manual_seed(2)).to(dtype)
        together = native.linear_int8(form, x, *packed, None, shape)
        for n in (1, 2, 3, 5, 8, 16, 33, 64):
            assert torch.equal(native.linear_int8(form, x[:n], *packed, None, shape), together[:n])
        wide = torch.cat([x, x], 1)[:, : shape[1]]
        assert torch.equal(native.linear_int8(form, wide, *packed, None, shape), together)
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(native.linear_int8(form, x, *packed, None, shape), together)
        finally:
            torch.set_num_threads(before)


@every_dtype
@every_form
def test_some_rows_are_that_part_of_all_rows(kernel, form, dtype):
    for shape, ranges in (((300, 130), [(0, 1), (1, 300), (63, 65), (128, 256), (17, 17)]), ((17, 33), [(16, 17)])):
        packed = pack(form, *int8_weight(shape, 0.7))
        generator = torch.Generator().manual_seed(0)
        bias = torch.randn(shape[0], generator=generator).to(dtype)
        for tokens, gelu in ((1, 0), (7, 2), (130, 2)):
            x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
            whole = native.linear_int8(form, x, *packed, bias, shape, gelu)
            for first, end in ranges:
                y = torch.full((tokens, end - first + 3), float("nan"), dtype=dtype)
                native.linear_int8(form, x, *packed, bias, shape, gelu, out=y[:, : end - first], rows=(first, end))
                assert torch.equal(y[:, : end - first], whole[:, first:end])
                assert bool(y[:, end - first :].isnan().all()), "wrote beside the output"


@every_dtype
@every_form
def test_nothing_past_the_end_is_read(kernel, form, dtype):
    for shape, sparsity in itertools.product(((1, 1), (5, 37), (16, 32), (70, 96), (33, 1003)), (0.0, 0.4, 0.9, 1.0)):
        index, values, scale = (before_a_guard_page(t) for t in pack(form, *int8_weight(shape, sparsity)))
        bias = before_a_guard_page(torch.randn(shape[0]).to(dtype))
        for tokens in (1, 2, 5, 8, 16, 35):
            x = before_a_guard_page(torch.randn(tokens, shape[1]).to(dtype))
            for rows in ((0, shape[0]), (shape[0] // 2, shape[0])):
                y = before_a_guard_page(torch.full((tokens, rows[1] - rows[0]), float("nan"), dtype=dtype))
                native.linear_int8(form, x, index, values, scale, bias, shape, out=y, rows=rows)
                assert bool(y.isfinite().all())


@exact_form
def test_what_a_form_of_quantised_inputs_cannot_hold_is_refused(form):
    crow, col = torch.tensor([0, 1]), torch.tensor([0])
    with pytest.raises(ValueError, match="takes int8 values"):
        native.pack(form, crow, col, torch.ones(1), (1, 4))
    with pytest.raises(ValueError, match="at most 65536 inputs"):
        native.pack(form, crow, col, torch.ones(1, dtype=torch.int8), (1, 65537))


@exact_form
def test_the_largest_sum_does_not_overflow(kernel, form):
    n = native.MOST_QUANTIZED_IN
    packed = native.pack(form, torch.tensor([0, n]), torch.arange(n), torch.full((n,), 127, dtype=torch.int8), (1, n))
    y = native.linear_int8(form, torch.ones(1, n), *packed, torch.ones(1), None, (1, n))
    assert y.item() == reference.linear_int8(
        torch.ones(1, n), torch.full((1, n), 127, dtype=torch.int8), torch.ones(1), None, quantize_inputs=True
    )
    assert abs(y.item() / (127 * n) - 1) < 1e-5


def test_every_number_of_tokens_of_the_table_is_met():
    assert {tokens for _, _, tokens, *_ in cases()} == set(TOKENS)
