"""Weights of einsum, bmm and fused experts under masks, with functional=True."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.conversion.converters.functional import multiplied
from sparsify.layers.held_weight import SparseHeldWeight

pytestmark = pytest.mark.usefixtures("one_thread")


class Use(nn.Module):
    def __init__(self, shape: tuple[int, ...], use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.randn(shape)), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


@pytest.mark.parametrize(
    ("shape", "x", "use", "transposed"),
    [
        ((5, 3), (2, 3), lambda x, w: torch.einsum("bi,oi->bo", x, w), False),
        ((3, 5), (2, 3), lambda x, w: torch.einsum("io, bi -> bo", w, x), True),
        ((4, 5, 3), (2, 3), lambda x, w: torch.einsum("bi,eoi->beo", x, w), False),
        ((4, 3, 5), (4, 2, 3), lambda x, w: torch.einsum("eni,eio->eno", x, w), True),
        ((4, 3, 5), (4, 2, 3), torch.bmm, True),
        ((4, 3, 5), (4, 2, 3), lambda x, w: x @ w, True),
        ((4, 5, 3), (4, 2, 3), lambda x, w: torch.matmul(x, w.transpose(1, 2)), False),
        ((4, 5, 3), (4, 2, 3), lambda x, w: x.matmul(w.mT), False),
    ],
)
def test_products_of_many_kinds(
    shape: tuple[int, ...], x: tuple[int, ...], use: Callable[..., Tensor], transposed: bool
) -> None:
    torch.manual_seed(0)
    model, given = Use(shape, use), torch.randn(x)
    assert multiplied(model) == ({}, {"weight": transposed})
    sparsify.prune(sparsify.convert(model, functional=True), 0.5)
    layer = model.weight_layer
    assert isinstance(layer, SparseHeldWeight)
    assert layer.shape == ((5 * (4 if len(shape) == 3 else 1)), 3)
    assert torch.equal(layer.as_weight(layer.weight_matrix), layer.weight)
    expected = use(given, layer.masked_weight())
    fast = sparsify.export(model)
    for one in (model, model.eval(), fast, sparsify.to_dense(copy.deepcopy(fast)), sparsify.to_dense(model)):
        assert torch.equal(one(given), expected)
    assert type(one) is Use
    assert int((one.weight == 0).sum()) == round(0.5 * one.weight.numel())


@pytest.mark.parametrize("equation", ["bi,eoi->bo", "bi,oj->bio", "b...,o...->bo"])
def test_an_einsum_that_is_no_product_of_matrices_stays_as_it_is(equation: str) -> None:
    assert multiplied(Use((5, 3), lambda x, w: torch.einsum(equation, x, w))) == ({}, {})


def experts(name: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "head_dim": 8}
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_the_experts_of_transformers(name: str, tmp_path: Path) -> None:
    dense, ids = experts(name), torch.arange(12).reshape(2, 6)
    expected = dense(ids).logits
    with pytest.warns(sparsify.LeftDenseWarning, match="functional=True takes Parameters"):
        sparsify.convert(copy.deepcopy(dense))
    model = sparsify.convert(copy.deepcopy(dense), functional=True)
    assert torch.equal(model(ids).logits, expected)
    sparsify.prune(model, 0.7)
    held = [layer for layer in model.modules() if isinstance(layer, SparseHeldWeight)]
    assert sorted(layer.shape for layer in held) == [(4 * 32, 48), (4 * 96, 32)]
    assert all(layer.sparsity == pytest.approx(0.7, abs=1e-3) for layer in held)
    model.train()(ids, labels=ids).loss.backward()
    assert all(not layer.weight.grad[~layer.mask].any() and layer.weight.grad.any() for layer in held)
    model.eval()
    expected = model(ids).logits
    dense_bytes = sum(p.nbytes for p in dense.parameters())
    for one in (model, sparsify.export(model, format="csr"), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(one(ids).logits, expected)
        sparsify.save(one, tmp_path / "model.safetensors")
        assert (tmp_path / "model.safetensors").stat().st_size < 0.7 * dense_bytes
        loaded = sparsify.load(tmp_path / "model.safetensors", experts(name))
        torch.testing.assert_close(loaded(ids).logits, expected)
    assert sparsify.to_dense(loaded).state_dict().keys() == dense.state_dict().keys()
    torch.testing.assert_close(loaded(ids).logits, expected)
