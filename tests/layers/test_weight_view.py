"""CSRLinear.weight: cheap questions unpack nothing, F.linear runs sparse, all else is the dense weight."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from sparsify import CSRLinear, SparseLinear
from sparsify.kernels.cpu import library as native

AVAILABLE = ["csr", *(native.FORMS if native.available() else ())]


def layers(form="csr", dtype=torch.float32):
    torch.manual_seed(0)
    masked = SparseLinear(24, 10, 0.75, seed=0, dtype=dtype)
    return masked, CSRLinear.from_sparse(masked, form=form)


def forbid(name):
    def fail(*_):
        raise AssertionError(f"{name} was called")

    return fail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_questions_about_it_unpack_nothing(dtype):
    weight = layers(dtype=dtype)[1].weight
    weight.unpack = weight.run_sparse = forbid("unpack")
    assert isinstance(weight, torch.Tensor)
    assert weight.shape == (10, 24)
    assert weight.size() == (10, 24)
    assert weight.size(1) == 24
    assert (weight.dtype, weight.device.type, weight.ndim, weight.dim()) == (dtype, "cpu", 2, 2)
    assert (weight.numel(), len(weight), weight.element_size()) == (240, 10, dtype.itemsize)
    assert weight.is_floating_point()
    assert not weight.requires_grad
    assert not weight.is_cuda
    assert not weight.is_meta
    with pytest.raises(AssertionError, match="unpack was called"):
        weight.sum()


@pytest.mark.parametrize("form", AVAILABLE)
def test_f_linear_runs_on_the_layers_kernel(form):
    masked, packed = layers(form)
    x = torch.randn(3, 5, 24, requires_grad=True)
    weight = packed.weight
    weight.unpack = forbid("unpack")
    for result in (
        F.linear(x, weight, packed.bias),
        F.linear(input=x, weight=weight, bias=packed.bias),
        F.linear(x, weight=weight, bias=packed.bias),
    ):
        torch.testing.assert_close(result, masked(x))
    torch.testing.assert_close(F.linear(x, weight), F.linear(x, masked.masked_weight()))
    F.linear(x, weight, packed.bias).sum().backward()
    torch.testing.assert_close(x.grad, masked.masked_weight().sum(0).expand_as(x))


def test_everything_else_is_done_on_the_dense_weight():
    masked, packed = layers()
    dense = masked.masked_weight().detach()
    weight = packed.weight
    x = torch.randn(3, 24)
    assert torch.equal(weight, dense)
    for made, expected in (
        (x @ weight.T, x @ dense.T),
        (weight * 2, dense * 2),
        (weight[3], dense[3]),
        (weight.detach(), dense),
        (weight.data, dense),
        (weight.to(torch.bfloat16), dense.to(torch.bfloat16)),
        (F.embedding(torch.tensor([1, 2]), weight), dense[[1, 2]]),
        (torch.cat([weight, weight]), torch.cat([dense, dense])),
        (copy.deepcopy(weight), dense),
        (pickle.loads(pickle.dumps(weight)), dense),
        (F.linear(weight, dense), F.linear(dense, dense)),
    ):
        assert type(made) is torch.Tensor
        assert torch.equal(made, expected)
    assert repr(weight) == repr(dense)


def test_a_bias_that_does_not_fit_is_an_error():
    packed = layers()[1]
    with pytest.raises(RuntimeError, match="the bias must be"):
        F.linear(torch.randn(2, 24), packed.weight, torch.zeros(10, dtype=torch.bfloat16))


def test_in_a_compiled_graph_it_is_the_dense_weight():
    masked, packed = layers()
    x = torch.randn(3, 24)
    compiled = torch.compile(lambda x: F.linear(x, packed.weight, packed.bias), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), masked(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.add_(1),
        lambda weight: weight.__setitem__(0, 1.0),
        lambda weight: setattr(weight, "data", torch.zeros(10, 24)),
        lambda weight: weight.__iadd__(1),
        lambda weight: torch.nn.init.zeros_(weight),
    ],
    ids=["add_", "setitem", "data", "iadd", "init"],
)
def test_a_change_in_place_is_refused_and_not_lost(change):
    _, exported = layers()
    before = exported.weight.clone()
    with pytest.raises(RuntimeError, match="packed and cannot be changed in place"):
        change(exported.weight)
    assert torch.equal(exported.weight, before)
