"""The operator linear_csr: right answers against float64, its registration with torch, gradients, refusals."""

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, SHAPES, masks, weight
from torch import Tensor

from sparsify.kernels import linear
from sparsify.kernels.csr import dense_to_csr

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]


def linear_csr(x: Tensor, crow: Tensor, col: Tensor, values: Tensor, in_features: int, bias: Tensor | None) -> Tensor:
    """Multiply by a weight in the form "csr"."""
    return linear(x, (crow, col, values), "csr", (len(crow) - 1, in_features), bias)


BATCHES = ((), (1,), (0,), (5,), (2, 3), (2, 0, 3))


def case(shape: tuple[int, int], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weight, mask (half), bias and input (4 tokens), scaled so that outputs are about 1."""
    dense = (weight(shape) / shape[1] ** 0.5).to(dtype).to(device)
    mask = masks(shape)["half"].to(device)
    bias = weight((1, shape[0]), dtype, seed=1)[0].to(device)
    return dense, mask, bias, weight((4, shape[1]), dtype, seed=2).to(device)


def assert_as_exact_as_dense(found: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None) -> None:
    """The error against float64 is at most twice that of dense torch in the same dtype, plus a few ulp."""
    exact = F.linear(x.double(), dense.double(), None if bias is None else bias.double())
    limit = 2 * (F.linear(x, dense, bias).double() - exact).abs().max() if exact.numel() else 0
    assert found.shape == exact.shape
    assert found.dtype == x.dtype
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=float(limit) + 4 * torch.finfo(x.dtype).eps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_exact_as_dense(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    dense, _, bias, x = case(shape, dtype, device)
    tried = 0
    for mask in masks(shape).values():
        masked = torch.where(mask.to(device), dense, 0)
        csr = dense_to_csr(dense, mask.to(device))
        for given in (bias, None):
            assert_as_exact_as_dense(linear_csr(x, *csr, shape[1], given), x, masked, given)
            tried += 1
    assert tried == 10


@pytest.mark.parametrize("batch", BATCHES)
def test_any_batch_shape(batch: tuple[int, ...]) -> None:
    dense, mask, bias, _ = case((5, 3), torch.float32)
    x = torch.randn(*batch, 3)
    found = linear_csr(x, *dense_to_csr(dense, mask), 3, bias)
    assert found.shape == (*batch, 5)
    assert_as_exact_as_dense(found, x, dense * mask, bias)


def test_input_need_not_be_contiguous() -> None:
    dense, mask, bias, _ = case((5, 3), torch.float32)
    x = torch.randn(3, 7, 2).permute(2, 1, 0)
    assert not x.is_contiguous()
    assert_as_exact_as_dense(linear_csr(x, *dense_to_csr(dense, mask), 3, bias), x, dense * mask, bias)


def test_layers_without_inputs_or_outputs() -> None:
    none = torch.zeros(0, dtype=torch.bool)
    no_input = dense_to_csr(torch.zeros(3, 0), none.reshape(3, 0))
    assert torch.equal(linear_csr(torch.zeros(2, 0), *no_input, 0, torch.ones(3)), torch.ones(2, 3))
    no_output = dense_to_csr(torch.zeros(0, 3), none.reshape(0, 3))
    assert linear_csr(torch.zeros(2, 3), *no_output, 3, None).shape == (2, 0)


def test_nan_in_the_input_reaches_every_output_as_in_a_dense_layer() -> None:
    csr = dense_to_csr(torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool))
    x = torch.tensor([[torch.nan, 0.0], [1.0, 1.0]])
    found = linear_csr(x, *csr, 2, None)
    assert found[0].isnan().all()
    assert torch.equal(found[1], torch.zeros(3))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype, bias: bool) -> None:
    dense, mask, b, x = case((12, 8), dtype)
    csr = dense_to_csr(dense, mask)
    given = b.requires_grad_() if bias else None
    torch.library.opcheck(torch.ops.sparsify.linear_csr.default, (x.requires_grad_(), *csr, given, 12, 8, 0))
    torch.library.opcheck(torch.ops.sparsify.grad_input_csr.default, (torch.randn(4, 12).to(dtype), *csr, 12, 8))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_input_and_bias(shape: tuple[int, int]) -> None:
    dense, mask, bias, x = case(shape, torch.float64)
    csr = dense_to_csr(dense, mask)
    x, bias = x.reshape(2, 2, -1).requires_grad_(), bias.requires_grad_()
    upstream = torch.randn(2, 2, shape[0], dtype=torch.float64)
    found = torch.autograd.grad(linear_csr(x, *csr, shape[1], bias), (x, bias), upstream)
    wanted = torch.autograd.grad(F.linear(x, dense * mask, bias), (x, bias), upstream)
    torch.testing.assert_close(found, wanted)
    assert torch.autograd.gradcheck(lambda x, bias: linear_csr(x, *csr, shape[1], bias), (x, bias), fast_mode=True)


def test_gradient_of_the_bias_alone_and_of_the_input_alone() -> None:
    dense, mask, bias, x = case((5, 3), torch.float32)
    csr = dense_to_csr(dense, mask)
    linear_csr(x, *csr, 3, bias.requires_grad_()).sum().backward()
    assert torch.equal(bias.grad, torch.full((5,), 4.0))  # type: ignore[arg-type]
    linear_csr(x.requires_grad_(), *csr, 3, None).sum().backward()
    torch.testing.assert_close(x.grad, (dense * mask).sum(0).expand(4, 3))


def test_wrong_sizes_and_dtypes_are_refused_in_eager_mode_and_when_traced() -> None:
    dense, mask, bias, x = case((5, 3), torch.float32)
    csr = dense_to_csr(dense, mask)
    fake = torch.compile(lambda x: linear_csr(x, *csr, 3, bias), fullgraph=True, backend="eager")
    for call in (lambda x: linear_csr(x, *csr, 3, bias), fake):
        for wrong, message in (
            (torch.ones(2, 4), r"takes inputs of shape \(..., 3\), got \(2, 4\)"),
            (torch.tensor(1.0), r"takes inputs of shape \(..., 3\), got \(\)"),
            (x.double(), "values are torch.float32, but the input is torch.float64"),
            (x.long(), "values are torch.float32, but the input is torch.int64"),
        ):
            with pytest.raises(RuntimeError, match=message):
                call(wrong)
    with pytest.raises(RuntimeError):
        linear_csr(x, *csr, 3, torch.ones(4))
    with pytest.raises(RuntimeError):
        linear_csr(x, *csr, 3, bias.double())
