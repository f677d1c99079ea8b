"""to_dense gives plain torch with zeros, and masks_from_zeros reads masks from zeros."""

import pytest
import torch
from converted_models import X, mlp
from torch import nn

import sparsify
from sparsify import SparseLinear, convert, masks_from_zeros, prune, to_dense


def test_to_dense_is_plain_torch_with_zeros() -> None:
    model = prune(convert(mlp()), 0.75)
    parameters = dict(model.named_parameters())
    expected = model(X)
    assert to_dense(model) is model
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert torch.equal(model(X), expected)
    assert int((model[0].weight == 0).sum()) == 72
    assert list(model.state_dict()) == list(mlp().state_dict())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_to_dense_unpacks_an_exported_model() -> None:
    model = prune(convert(mlp()), 0.75)
    fast = sparsify.export(model, format="csr")
    expected = model(X)
    to_dense(fast)
    assert [type(layer) for layer in fast] == [nn.Linear, nn.ReLU, nn.Linear]
    assert torch.equal(fast(X), expected)
    assert isinstance(model[0], SparseLinear)


def test_masks_from_zeros() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[3] = 0
        model[0].weight[5, 2] = -0.0
    expected = model(X)
    masks_from_zeros(convert(model))
    assert model[0].sparsity == 9 / 96
    assert not model[0].mask[3].any()
    assert model[2].sparsity == 0
    assert torch.equal(model(X), expected)
    with pytest.raises(ValueError, match=r"the model has no SparseLinear; call sparsify\.convert"):
        masks_from_zeros(mlp())


def test_masks_from_zeros_of_chosen_layers() -> None:
    model = convert(mlp())
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight[0] = 0
    masks_from_zeros(model, exclude="0")
    assert [model[0].sparsity, model[2].sparsity] == [0, 0.25]
    with pytest.raises(ValueError, match="matches no layer"):
        masks_from_zeros(model, include="1")
