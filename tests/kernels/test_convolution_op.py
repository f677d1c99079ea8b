"""The operator of convolutions: every form computes torch's answer, with gradients, and keeps torch's rules."""

import pytest
import torch
from tested_kernels import needs_native
from torch import library
from torch.nn import functional as F

from sparsify.kernels import ACTIVATIONS, FORMS, PATTERNED, Geometry, convolution, pack, supports
from sparsify.kernels.csr import dense_to_csr

pytestmark = pytest.mark.usefixtures("one_thread")

RUNNING = [form for form in FORMS if form not in PATTERNED and supports(form, torch.device("cpu"), torch.float32)]
GEOMETRY = Geometry((3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def weight_and_parts(form, channels=5, out=7):
    torch.manual_seed(0)
    weight = torch.randn(out, channels, *GEOMETRY.kernel)
    mask = torch.rand_like(weight) < 0.4
    csr = dense_to_csr((weight * mask).flatten(1), mask.flatten(1))
    return weight * mask, pack(form, csr, (out, weight[0].numel())), (out, weight[0].numel())


@pytest.mark.parametrize("form", RUNNING)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_gradients_are_those_of_torch(form, layout):
    weight, parts, shape = weight_and_parts(form)
    for activation in ("none", "silu"):
        x = torch.randn(2, 5, 9, 8).to(memory_format=layout).requires_grad_()
        bias, scale = torch.randn(7, requires_grad=True), torch.rand(7) + 0.5
        for factor in (None, scale):
            y = convolution(x, parts, form, shape, GEOMETRY, bias, activation, factor)
            scaled = weight if factor is None else weight * factor[:, None, None, None]
            right = ACTIVATIONS[activation](F.conv2d(x, scaled, bias, *GEOMETRY[1:]))
            torch.testing.assert_close(y, right)
            assert y.is_contiguous(memory_format=layout)
            found, wanted = (torch.autograd.grad(z.square().sum(), (x, bias)) for z in (y, right))
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@needs_native
@pytest.mark.filterwarnings("ignore:.torch.jit")  # which forward-mode differentiation uses
def test_second_derivatives_reach_the_gradient():
    weight, parts, shape = weight_and_parts("panel")
    x = torch.randn(1, 5, 5, 4, requires_grad=True)
    results = []
    for y in (
        convolution(x, parts, "panel", shape, GEOMETRY, None, "gelu"),
        F.gelu(F.conv2d(x, weight, None, *GEOMETRY[1:])),
    ):
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    tangent = torch.randn_like(x)
    _, found = torch.func.jvp(lambda x: convolution(x, parts, "panel", shape, GEOMETRY), (x,), (tangent,))
    torch.testing.assert_close(found, F.conv2d(tangent, weight, None, *GEOMETRY[1:]))


@needs_native
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
def test_the_operators_keep_torchs_rules():
    _, parts, shape = weight_and_parts("panel")
    sizes = (3, 2, 2, 1, 1, 2, 1, 2)
    for layout in LAYOUTS:
        x, bias = torch.randn(2, 5, 9, 8).to(memory_format=layout), torch.randn(7)
        for image in (x, x.clone().requires_grad_()):
            arguments = (image, *parts, None, bias, *shape, *sizes, 1)
            library.opcheck(torch.ops.sparsify.convolution_packed.default, arguments)
    grad = torch.randn(2, 7, *GEOMETRY.output_size(9, 8), requires_grad=True)
    library.opcheck(torch.ops.sparsify.grad_input_convolution.default, (grad, *parts, *shape, *sizes, 9, 8))


@pytest.mark.parametrize("form", RUNNING)
def test_an_input_that_does_not_fit_is_an_error(form):
    _, parts, shape = weight_and_parts(form)
    for bad, message in (
        (torch.randn(2, 4, 9, 8), r"images of shape \(n, 5, height, width\), got \(2, 4, 9, 8\)"),
        (torch.randn(5, 9, 8), "images of shape"),
        (torch.randn(2, 5, 0, 8), "smaller than the layer's kernel"),
        (torch.randn(2, 5, 9, 8, dtype=torch.float64), "float32, but the input is torch.float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            convolution(bad, parts, form, shape, GEOMETRY)
    with pytest.raises(RuntimeError, match="the bias must be"):
        convolution(torch.randn(2, 5, 9, 8), parts, form, shape, GEOMETRY, torch.randn(6))
    with pytest.raises(RuntimeError, match="the scale must be"):
        convolution(torch.randn(2, 5, 9, 8), parts, form, shape, GEOMETRY, scale=torch.randn(7).double())
