"""to_dense gives plain torch with zeros, and masks_from_zeros reads masks from zeros."""

import pytest
import torch
from converted_models import X, mlp
from torch import nn

import sparsify
from sparsify import SparseLinear, convert, masks_from_zeros, prune, to_dense
from sparsify.layers.records import FormChoice, form_choice, pruning_result, set_form_choice


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


def test_records_of_pruning_stay_and_those_of_the_form_go() -> None:
    model = prune(convert(mlp()), 0.75, method="wanda", data=[X])
    model[1].choice = "a user's own"
    result = model[0].pruning_result
    fast = sparsify.export(model, format="csr")
    set_form_choice(fast[1], None)
    assert result is not None
    assert (fast[0].pruning_result, fast[0].choice.form, fast[1].choice) == (result, "csr", "a user's own")
    set_form_choice(fast[2], FormChoice("dense", 1, {}, ""))  # as of a layer kept dense
    to_dense(fast)
    assert [form_choice(module) for module in fast] == [None] * 3
    assert [hasattr(module, "choice") for module in fast] == [False, True, False]
    assert pruning_result(fast[0]) == result


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
