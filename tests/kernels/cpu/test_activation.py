"""The fused activations against float64: through a layer whose product is exact, so that only they can be wrong."""

import pytest
import torch
from table import ACTIVATIONS, FORMS, pack

from sparsify.kernels.cpu import library as native

FORM = "panel"
N = 64
ULPS = {
    "relu": 0,
    "gelu": 1,
    "silu": 4,
    "hardswish": 2,
    "relu6": 0,
}  # of the result; for GELU, whose lower tail is small, of the input


def activate(form: str, a: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(a) by an identity layer, 64 values to a token."""
    packed = pack(form, torch.eye(N), torch.eye(N, dtype=torch.bool))
    return native.linear(form, a.view(-1, N), *packed, None, (N, N), native.ACTIVATIONS[activation]).flatten()


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name])
def test_error_in_units_of_the_last_place(kernel, activation):
    most = 1.9 if activation in ("silu", "hardswish", "relu", "relu6") else 1.1  # e^-79 is not yet subnormal
    size = torch.cat(
        [torch.logspace(-30, most, 64 * 256, dtype=torch.float64), torch.linspace(0, 12, 64 * 256)]
    ).float()
    a = torch.cat([size, -size])
    y = activate(FORM, a, activation).double()
    exact = ACTIVATIONS[activation](a.double())
    scale = exact
    if activation == "gelu":  # torch's own formula cancels in the lower tail, in float64 too
        exact, scale = a.double() * torch.special.erfc(-a.double() / 2**0.5) / 2, a.double()
    if activation in ULPS:
        unit = torch.finfo(torch.float32).eps * scale.abs().clamp(min=torch.finfo(torch.float32).tiny)
        assert float(((y - exact).abs() / unit).max()) <= ULPS[activation]
    else:  # e^u of a rounded u: a relative error of u units in the lower tail, where the result is below 1e-3
        error, torch_error = (y - exact).abs(), (ACTIVATIONS[activation](a).double() - exact).abs()
        assert float((error - 2 * torch.finfo(torch.float32).eps * exact.abs()).max()) <= float(torch_error.max())


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name])
@pytest.mark.parametrize("form", FORMS)
def test_special_values_as_in_torch(kernel, form, activation):
    index, values = pack(form, torch.zeros(N, 1), torch.zeros(N, 1, dtype=torch.bool))  # y is the bias, activated
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e38, -1e38, 1e-45, 100.0, -100.0])
    for value in special:
        a = torch.full((N,), float(value))
        y = native.linear(form, torch.zeros(1, 1), index, values, a, (N, 1), native.ACTIVATIONS[activation])
        # torch one value at a time: its vectorised GELU turns infinity into NaN.
        expected = ACTIVATIONS[activation](a[:1]).expand(N)
        torch.testing.assert_close(y[0], expected, rtol=1e-6, atol=1e-37, equal_nan=True)
