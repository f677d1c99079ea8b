"""Norms of untrained models: statistics of the inputs for them, and trained ones stay as they are."""

import copy

import pytest
import torch
from torch import nn

import sparsify
from sparsify.reporting.fresh_norms import with_settled_norms
from sparsify.reporting.model_bench import bench, sparse_copy


def vanishing(n=8):
    """Each convolution makes its inputs a hundredth as large."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(n)]
    for layer in layers:
        nn.init.normal_(layer[0].weight, std=0.01)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)).eval()


X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def features(model):
    with torch.no_grad():
        return model[:-3](X)


def test_values_of_an_untrained_model_keep_their_size():
    model = vanishing()
    before = copy.deepcopy(model.state_dict())
    settled = with_settled_norms(model, (X,))
    assert features(model).abs().max() < 1e-10
    assert 0.1 < features(settled).std() < 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in settled.modules())
    norm, x = settled[0][1], settled[0][0](X)
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, x.var((0, 2, 3), correction=0))


@pytest.mark.parametrize("why", ["trained", "in training", "no statistics", "none"])
def test_other_models_are_left_as_they_are(why):
    model = vanishing() if why != "none" else nn.Sequential(nn.Linear(4, 4))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            if why == "trained":
                module.num_batches_tracked.fill_(1)
            elif why == "in training":
                module.train()
            else:
                module.running_mean = module.running_var = module.num_batches_tracked = None
    assert with_settled_norms(model, (X if why != "none" else X[..., 0, :4],)) is model


def test_a_bench_settles_the_pruned_copy_too():
    model = vanishing()
    fast = sparse_copy(with_settled_norms(model, (X,)), 0.5, 36, (X,), types=(nn.Conv2d, nn.Linear))
    assert 0.1 < features(fast).std() < 2
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(sparsify.DefaultTypesWarning):
        bench(model, (X,), 0.5, rounds=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
