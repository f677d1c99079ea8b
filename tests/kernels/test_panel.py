import pytest
import torch

from sparsify.kernels import native


def dense_to_csr(weight):
    csr = weight.to_sparse_csr()
    return csr.crow_indices(), csr.col_indices(), csr.values()


@pytest.mark.parametrize("kernel", native.known_kernels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 16, 33, 64, 130])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (17, 300), (64, 768), (130, 257)])
def test_linear_equals_dense(kernel, dtype, tokens, shape):
    native.set_kernel(kernel)
    torch.manual_seed(0)
    weight = torch.randn(shape) * (torch.rand(shape) < 0.4)
    crow, col, values = dense_to_csr(weight.to(dtype))
    index, packed = native.pack("panel", crow, col, values, shape)
    native.check("panel", index, packed.numel(), shape)
    x, bias = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    y = native.linear(
        "panel", x, index, packed, bias, shape, out=torch.full((tokens, shape[0]), float("nan"), dtype=dtype)
    )
    expected = torch.nn.functional.linear(x.double(), weight.to(dtype).double(), bias.double())
    torch.testing.assert_close(
        y.double(),
        expected,
        rtol=1e-2 if dtype == torch.bfloat16 else 1e-4,
        atol=1e-2 if dtype == torch.bfloat16 else 1e-4,
    )
    for a, b in zip(native.unpack("panel", index, packed, shape), (crow.int(), col.int(), values)):
        assert torch.equal(a, b)
