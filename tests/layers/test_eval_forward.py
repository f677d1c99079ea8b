"""A masked layer in eval mode multiplies with the weight itself, and with nothing that its mask removes."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

import sparsify
from sparsify import SparseLinear
from sparsify.kernels.cpu import library as native
from sparsify.layers import MaskedLayer

X = torch.linspace(-1, 1, 5 * 16).reshape(5, 16)


def layers() -> dict[str, MaskedLayer]:
    torch.manual_seed(0)
    conv = sparsify.convert(nn.Sequential(nn.Conv2d(16, 8, 1)), types=nn.Conv2d)
    models = {"linear": sparsify.convert(nn.Sequential(nn.Linear(16, 8))), "conv2d": conv}
    models["conv1d"] = sparsify.convert(nn.Sequential(Conv1D(8, 16)))
    return {name: sparsify.prune(model, 0.6)[0].eval() for name, model in models.items()}


def given(name: str) -> Tensor:
    return X.t().reshape(1, 16, 5, 1) if name == "conv2d" else X


def reference(layer: MaskedLayer, x: Tensor) -> Tensor:
    """The answer, by a layer of the dense class with weight * mask."""
    plain = copy.deepcopy(layer).train()  # in training mode the product is made
    return plain(x)


WRITES: dict[str, Callable[[nn.Parameter], object]] = {
    "nothing": lambda w: None,
    "no_grad": lambda w: w.detach().add_(1.0),
    "data": lambda w: w.data.add_(1.0),
    "data assigned": lambda w: setattr(w, "data", w.data + 1.0),
    "numpy": lambda w: w.detach().numpy().__iadd__(1.0),
    "nan": lambda w: w.data.fill_(float("nan")),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", layers())
def test_no_masked_value_counts_whatever_wrote_it(name: str, write: str) -> None:
    layer, x = layers()[name], given(name)
    with torch.no_grad():
        layer(x)
        WRITES[write](layer.weight)
        torch.testing.assert_close(layer(x), reference(layer, x), rtol=0, atol=0, equal_nan=True)
        layer.zero_masked()
        layer.mask.data[:2] = False  # and whatever writes the mask
        torch.testing.assert_close(layer(x), reference(layer, x), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not native.available(), reason="without native kernels nothing looks at the weight")
def test_the_weight_itself_is_used_where_its_masked_values_are_zero() -> None:
    layer = layers()["linear"]
    with torch.no_grad():
        assert layer.forward_weight() is layer.weight
        layer.weight.data.add_(1.0)
        assert layer.forward_weight() is not layer.weight
        layer.zero_masked()
        assert layer.forward_weight() is layer.weight
        assert layer.train().forward_weight() is not layer.weight
    for copied in (copy.deepcopy(layer).eval(), layer.eval().half(), layer.float().bfloat16()):
        with torch.inference_mode():
            assert copied.forward_weight() is copied.weight


@pytest.mark.parametrize("name", layers())
def test_gradients_are_those_of_the_product(name: str) -> None:
    layer, x = layers()[name], given(name).clone().requires_grad_()
    found = torch.autograd.grad(layer(x).square().sum(), (layer.weight, x), create_graph=True)
    expected = torch.autograd.grad(layer.train()(x).square().sum(), (layer.weight, x), create_graph=True)
    assert not found[0][~layer.mask].any()
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    twice = [torch.autograd.grad(g[0].square().sum(), layer.weight)[0] for g in (found, expected)]
    torch.testing.assert_close(*twice)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # forward_ad's own, at its first use
def test_tangents_of_masked_weights_do_not_count() -> None:
    layer = layers()["linear"]
    tangent = torch.ones_like(layer.weight)
    with forward_ad.dual_level():
        weight = forward_ad.make_dual(layer.weight.detach(), tangent)
        outputs = torch.func.functional_call(layer, {"weight": weight}, (X,))
        found = forward_ad.unpack_dual(outputs).tangent
    torch.testing.assert_close(found, X @ layer.mask.float().t())


def test_an_export_shares_no_memory_with_a_model_in_eval_mode() -> None:
    model = nn.Sequential(layers()["linear"])
    dense = sparsify.export(model, format="dense")
    with torch.no_grad():
        before = dense(X)
        model[0].weight.data.mul_(2.0)
        assert torch.equal(dense(X), before)


def test_a_compiled_layer_masks_by_itself() -> None:
    layer = SparseLinear(16, 8, 0.5, seed=0).eval()
    with torch.no_grad():
        fast = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(fast(X), layer(X))
        layer.weight.data.add_(1.0)
        torch.testing.assert_close(fast(X), reference(layer, X))
