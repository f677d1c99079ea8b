"""The operator of int8 weights: what torch asks of an operator, its gradient, and the form "csr" beside the others."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tested_kernels import needs_native
from torch import Tensor

from sparsify.kernels import linear, pack, quantizes_inputs, reference, supports, unpack_as
from sparsify.kernels.cpu import library as native
from sparsify.kernels.csr import csr_to_dense, dense_to_csr

OUT, IN = 21, 38


def parts_of(form: str) -> tuple[Tensor, ...]:
    """Return a weight in a form, and its scale."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(OUT, IN, generator=generator) < 0.4
    weight = torch.randint(-127, 128, (OUT, IN), generator=generator, dtype=torch.int8) * mask
    scale = torch.rand(OUT, generator=generator) * 0.01 + 1e-4
    return pack(form, dense_to_csr(weight, mask), (OUT, IN), scale)


FORMS = ("csr", *(native.INT8_FORMS if native.available() else ()))
every_form = pytest.mark.parametrize("form", FORMS)


def dense(form: str, parts: tuple[Tensor, ...]) -> Tensor:
    """Return the dequantised weight."""
    return csr_to_dense(unpack_as(torch.float32, form, parts, (OUT, IN)), (OUT, IN))[0]


@every_form
@pytest.mark.parametrize("dtype", native.DTYPES)
def test_the_result_is_near_the_dense_one_and_the_gradient_is_its(form, dtype):
    parts = parts_of(form)
    weight = dense(form, parts)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(OUT, generator=generator).to(dtype).requires_grad_()
    x = torch.randn(2, 5, IN, generator=generator).to(dtype).requires_grad_()
    y = linear(x, parts, form, (OUT, IN), bias, "gelu", (3, 20))
    expected = torch.nn.functional.gelu(x.double() @ weight[3:20].double().T + bias[3:20].double())
    rounding = 0.03 if quantizes_inputs(form) else 1e-6  # of inputs of about 4: half of 8 / 255 each
    tolerance = rounding + 2 * torch.finfo(dtype).eps * 4
    assert (y.double() - expected).abs().max() < tolerance
    grad_x, grad_bias = torch.autograd.grad(y.float().square().sum(), (x, bias))
    exact = torch.autograd.grad(expected.square().sum(), (x, bias))
    torch.testing.assert_close(grad_x, exact[0], rtol=0.05, atol=20 * tolerance)
    torch.testing.assert_close(grad_bias, exact[1], rtol=0.05, atol=40 * tolerance)


@every_form
def test_the_gradient_of_x_without_activation_is_that_of_the_dequantised_weight(form):
    parts = parts_of(form)
    x = torch.randn(4, IN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    grad = torch.randn(4, OUT, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad(linear(x, parts, form, (OUT, IN)), x, grad)
    torch.testing.assert_close(found, grad @ dense(form, parts))


@every_form
def test_leading_dimensions_and_layout_of_the_input_do_not_matter(form):
    parts, x = parts_of(form), torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(1))
    flat = linear(x.reshape(6, IN), parts, form, (OUT, IN))
    # "csr" runs on torch's product, whose order of adding up is the layout's on some processors: two sums of IN
    # products are at most twice gamma(IN) of the absolute products apart (Higham 2002, section 3.1).
    unit = torch.finfo(torch.float32).eps / 2
    gamma = IN * unit / (1 - IN * unit)
    bound = 2 * gamma * (x.abs() @ dense(form, parts).abs().T) if form == "csr" else torch.zeros(2, 3, OUT)

    def same(found: Tensor, place: Any = ...) -> bool:
        return bool(((found - flat.view(2, 3, OUT)[place]).abs() <= bound[place]).all())

    wide = torch.randn(2, 3, IN + 5)
    wide[..., 2:-3] = x
    for other in (x, x.mT.contiguous().mT, x.transpose(0, 1).contiguous().transpose(0, 1), wide[..., 2:-3]):
        assert same(linear(other, parts, form, (OUT, IN)))
    assert same(linear(wide[0, :, 2:-3], parts, form, (OUT, IN)), 0)
    assert same(linear(x[1, 2], parts, form, (OUT, IN)), (1, 2))
    assert same(linear(x[1, 2:], parts, form, (OUT, IN)), (1, slice(2, None)))
    assert linear(x[:, :0], parts, form, (OUT, IN)).shape == (2, 0, OUT)


@needs_native
def test_without_gradients_torchs_python_code_for_them_does_not_run():
    parts, x = parts_of("quads"), torch.randn(2, IN)
    ran: dict[bool, list[str]] = {}
    for gradients in (True, False):
        files = ran[gradients] = []
        with torch.set_grad_enabled(gradients):
            sys.setprofile(lambda frame, event, arg, files=files: files.append(frame.f_code.co_filename))
            try:
                linear(x, parts, "quads", (OUT, IN))
            finally:
                sys.setprofile(None)
    found = {
        gradients: any(Path(file).parts[-2:] == ("_library", "autograd.py") for file in ran[gradients])
        for gradients in ran
    }
    assert found == {True: True, False: False}


@needs_native
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("form", native.INT8_FORMS)
def test_torch_accepts_the_operator(form):
    parts, number = parts_of(form), native.FORM_NUMBERS[form]
    x = torch.randn(3, IN, requires_grad=True)
    torch.library.opcheck(
        torch.ops.sparsify.linear_int8.default, (x, *parts, number, torch.randn(OUT), OUT, IN, 1, 2, 9)
    )
    torch.library.opcheck(torch.ops.sparsify.weight_int8.default, (*parts, number, OUT, IN))


@every_form
def test_transforms_compute_with_the_dequantised_weight(form):
    parts = parts_of(form)
    x = torch.randn(4, 3, IN)
    y = torch.vmap(lambda row: linear(row, parts, form, (OUT, IN)))(x)
    torch.testing.assert_close(y, x @ dense(form, parts).T)


@needs_native
@pytest.mark.parametrize("form", native.INT8_FORMS)
def test_what_does_not_fit_is_refused(form):
    *weight, scale = parts_of(form)
    x = torch.randn(2, IN)
    for bad_x, bad_scale, bias, message in (
        (x[:, 1:], scale, None, r"takes inputs of shape"),
        (x, scale[1:], None, r"the scale must be float32 of shape \(21,\)"),
        (x, scale.double(), None, r"the scale must be float32"),
        (x, scale, torch.zeros(OUT, dtype=torch.bfloat16), r"the bias must be torch.float32"),
        (x.int(), scale, None, r"floating-point"),
        (x.double(), scale, None, r"takes inputs of torch.float32, torch.bfloat16, torch.float16, got torch.float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            linear(bad_x, (*weight, bad_scale), form, (OUT, IN), bias)
    with pytest.raises(RuntimeError, match="rows 0 to 21"):
        linear(x, (*weight, scale), form, (OUT, IN), None, "none", (3, 22))
    with pytest.raises(RuntimeError, match="values must be int8"):
        linear(x, (*weight[:-1], weight[-1].float(), scale), form, (OUT, IN))


def test_a_form_of_quantised_inputs_takes_int8_alone():
    cpu = torch.device("cpu")
    for form in native.QUANTIZES_INPUTS:
        assert not supports(form, cpu, torch.float32)
        assert supports(form, cpu, torch.float32, quantized=True) == native.available()
        with pytest.raises(ValueError, match="it holds int8 values alone"):
            pack(form, dense_to_csr(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)), (2, 3))


def test_the_reference_rounds_half_to_even_and_keeps_zero_exact():
    q, step, zero_point = reference.quantize_rows(torch.tensor([[0.0, 0.5, 1.5, 255.0], [-1.0, 0.0, 1.0, 0.25]]))
    assert q.tolist() == [[0, 0, 2, 255], [0, 128, 255, 160]]
    assert zero_point.tolist() == [0, 128]
    torch.testing.assert_close(step, torch.tensor([1.0, 2 / 255]))
