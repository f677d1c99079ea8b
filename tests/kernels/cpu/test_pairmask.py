"""The form of bfloat16 for AMX: right on every instruction set, chosen where there is AMX."""

import itertools

import pytest
import torch
from table import ACTIVATIONS, SHAPES, SPARSITIES, TOKENS_PER_WEIGHT, before_a_guard_page, cases, random_weight, to_csr
from torch import Tensor

from sparsify.kernels import forms
from sparsify.kernels.cpu import library as native

FORM = native.PAIRMASK


def pack(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pack bfloat16 values, checked: (index, values)."""
    index, values = native.pack(FORM, *to_csr(mask), weight[mask].bfloat16(), tuple(weight.shape))
    native.check(FORM, index, values.numel(), tuple(weight.shape))
    return index, values


def test_linear_over_the_table(kernel):
    n_cases = 0
    for shape, sparsity, tokens, activation, with_bias, gap in cases():
        out, in_ = shape
        weight, mask = random_weight(shape, sparsity)
        packed, weight = pack(weight, mask), weight.bfloat16()
        generator = torch.Generator().manual_seed(n_cases)
        x = torch.randn(tokens, in_ + gap, generator=generator).bfloat16()[:, :in_]
        bias = torch.randn(out, generator=generator).bfloat16() if with_bias else None
        y = torch.full((tokens, out + 5), float("nan"), dtype=torch.bfloat16)
        native.linear(FORM, x, *packed, bias, shape, native.ACTIVATIONS[activation], out=y[:, :out])
        exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        # Products of bfloat16 are exact in float32; AMX adds 16 and 16 of a register, both, and a register to the
        # total. A chain of n additions is off by at most n 2^-24 of the sum of sizes (Higham, section 3.1); an
        # activation has a slope of at most 1.5 and 4 units of its own; the output is rounded once.
        size = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
        n = 16 + 2 + in_ / 32 + 1
        right = ACTIVATIONS[activation](exact)
        bound = 1.5 * (n + 4) * 2**-24 * size + 2**-8 * right.abs() + 1e-37
        assert bool(((y[:, :out].double() - right).abs() <= bound).all())
        assert bool(y[:, out:].isnan().all()), "wrote beside the output"
        n_cases += 1
    assert n_cases == len(SHAPES) * len(SPARSITIES) * TOKENS_PER_WEIGHT


def test_a_token_does_not_depend_on_its_company_nor_on_strides_nor_on_threads(kernel):
    for shape, sparsity in itertools.product(((70, 90), (256, 1500)), (0.5, 0.9)):
        packed = pack(*random_weight(shape, sparsity))
        x = torch.randn(300, shape[1], generator=torch.Generator().manual_seed(2)).bfloat16()
        together = native.linear(FORM, x, *packed, None, shape)
        for n in (1, 2, 5, 16, 17, 33, 64, 257):
            assert torch.equal(native.linear(FORM, x[:n], *packed, None, shape), together[:n])
        assert torch.equal(native.linear(FORM, torch.cat([x, x], 1)[:, : shape[1]], *packed, None, shape), together)
        for first, end in ((0, 1), (3, 70), (63, 65), (17, 17)):
            rows = native.linear(FORM, x, *packed, None, shape, rows=(first, end))
            assert torch.equal(rows, together[:, first:end])
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(native.linear(FORM, x, *packed, None, shape), together)
        finally:
            torch.set_num_threads(before)


def test_inf_and_nan_reach_only_the_outputs_that_keep_their_column(kernel):
    shape, n_masked = (64, 130), 0
    for sparsity, tokens, bad in itertools.product((0.3, 0.75), (1, 40), (float("inf"), float("nan"))):
        weight, mask = random_weight(shape, sparsity)
        packed = pack(weight, mask)
        x = torch.randn(tokens, 130, generator=torch.Generator().manual_seed(3)).bfloat16()
        clean = native.linear(FORM, x, *packed, None, shape)
        for column in range(0, 130, 7):
            dirty = x.clone()
            dirty[-1, column] = bad
            y = native.linear(FORM, dirty, *packed, None, shape)
            assert torch.equal(y[:-1], clean[:-1]), "another token changed"
            assert not bool(y[-1, mask[:, column]].isfinite().any())
            assert torch.equal(y[-1, ~mask[:, column]], clean[-1, ~mask[:, column]])
            n_masked += int((~mask[:, column]).sum())
    assert n_masked > 0


def test_nothing_past_the_end_is_read(kernel):
    for shape, sparsity in itertools.product(((1, 1), (5, 37), (70, 96), (33, 1003)), (0.0, 0.4, 1.0)):
        index, values = (before_a_guard_page(part) for part in pack(*random_weight(shape, sparsity)))
        for tokens in (1, 16, 35):
            x = before_a_guard_page(torch.randn(tokens, shape[1]).bfloat16())
            y = before_a_guard_page(torch.full((tokens, shape[0]), float("nan"), dtype=torch.bfloat16))
            native.linear(FORM, x, index, values, None, shape, out=y)
            assert bool(y.isfinite().all())


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.85, 1.0])
def test_unpack_is_the_inverse_and_damage_is_noticed(kernel, sparsity):
    shape = (20, 45)
    weight, mask = random_weight(shape, sparsity)
    index, values = pack(weight, mask)
    expected = (*to_csr(mask), weight[mask].bfloat16())
    for a, b in zip(native.unpack(FORM, index, values, shape), expected, strict=True):
        assert torch.equal(a, b)
    values, x = before_a_guard_page(values), before_a_guard_page(torch.randn(2, 45).bfloat16())
    for position in range(index.numel()):
        hostile = index.clone()
        hostile[position] ^= 1 << position % 8
        with pytest.raises(ValueError, match="damaged"):  # a bit more or less is another number of weights
            native.check(FORM, hostile, values.numel(), shape)
    with pytest.raises(ValueError, match="damaged"):
        native.check(FORM, index, values.numel() + 1, shape)
    with pytest.raises(ValueError, match="damaged"):
        native.check(FORM, index, values.numel(), (20, 47))
    assert native.linear(FORM, x, index, values, None, shape).isfinite().all()


def test_it_runs_where_there_is_amx_for_bfloat16_alone(kernel):
    cpu = torch.device("cpu")
    assert forms.supports(FORM, cpu, torch.bfloat16) is (kernel == "avx512amx")
    assert not forms.supports(FORM, cpu, torch.float32)
    assert not forms.supports(FORM, cpu, torch.bfloat16, quantized=True)


def test_float32_values_are_refused():
    with pytest.raises(ValueError, match="bfloat16"):
        native.pack(FORM, torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 4))
