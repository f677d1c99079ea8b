"""Convolutions measured with the BatchNorm and activation after them, which a packed layer runs in the same call."""

import pytest
import torch
from tested_kernels import needs_native
from torch import nn

import sparsify
from sparsify.conversion.module_surgery import layers_of_type
from sparsify.inference.followers import Followed, steps_after
from sparsify.inference.form_selection import FormSelector
from sparsify.layers import MaskedLayer

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.SiLU(inplace=True)
        self.wide, self.last = nn.Conv2d(6, 5, 1, bias=False), nn.Conv2d(5, 5, 3)

    def forward(self, x):
        y = torch.relu(self.wide(self.act(self.norm(self.conv(x)))))
        return y + y.mean() + self.last(nn.functional.pad(y, (1, 1, 1, 1)))


def pruned_block(sparsity=0.5):
    torch.manual_seed(0)
    block = Block().eval()
    block.norm.running_mean.normal_()
    block.norm.running_var.uniform_(0.5, 2)
    return sparsify.prune(sparsify.convert(block, types=(nn.Conv2d,)), sparsity)


def steps_of(model):
    layers = layers_of_type(model, MaskedLayer)
    after = steps_after(model, layers.values())
    return {name: after[layer] for name, layer in layers.items() if layer in after}


def test_the_steps_are_those_of_the_code():
    steps = steps_of(pruned_block())
    assert {name: (step.norm is not None, step.activation) for name, step in steps.items()} == {
        "conv": (True, "silu"),
        "wide": (False, "relu"),
    }


def test_the_masked_model_stays_as_it_was():
    model = pruned_block()
    kinds, x = {name: type(m) for name, m in model.named_modules()}, torch.randn(2, 4, 9, 8)
    before = model(x)
    steps_of(model)
    assert {name: type(m) for name, m in model.named_modules()} == kinds
    assert torch.equal(model(x), before)


def test_a_model_without_convolutions_has_none():
    model = sparsify.prune(sparsify.convert(nn.Sequential(nn.Linear(8, 4), nn.ReLU())), 0.5)
    assert steps_of(model) == {}


@pytest.mark.parametrize("form", ["dense", "panel", "csr", "bitmask"])
@pytest.mark.parametrize("name", ["conv", "wide"])
def test_a_followed_layer_runs_the_steps(name, form):
    model = pruned_block()
    layer, steps = getattr(model, name), steps_of(model)[name]
    x = torch.randn(2, layer.in_channels, 9, 8)
    wanted = torch.relu(layer(x)) if name == "wide" else nn.functional.silu(model.norm(layer(x)))
    packed = sparsify.export(nn.Sequential(layer), format=form, fuse=False)[0]
    with torch.inference_mode():
        torch.testing.assert_close(Followed(packed, steps)(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fuse", [True, False])
def test_export_measures_layers_with_their_steps(monkeypatch, fuse):
    seen = []

    def measured(self, candidates, x):
        seen.append({form: type(module) is Followed for form, module in candidates.items()})
        return dict.fromkeys(candidates, 2.0) | {"panel": 1.0}, 0.0

    monkeypatch.setattr(FormSelector, "_measure_quietly", measured)
    fast = sparsify.export(pruned_block(), example=torch.randn(1, 4, 9, 8), fuse=fuse)
    assert [set(kinds.values()) for kinds in seen] == [{fuse}, {fuse}, {False}]
    assert [fast.conv.form, fast.wide.form, fast.last.form] == ["panel"] * 3


def test_alike_layers_with_other_steps_are_measured_apart(monkeypatch):
    seen = []
    quietly = lambda self, candidates, x: (seen.append(1) or {"dense": 1.0}, 0.0)  # noqa: E731
    monkeypatch.setattr(FormSelector, "_measure_quietly", quietly)
    torch.manual_seed(0)
    parts = [nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.SiLU()]
    model = sparsify.convert(nn.Sequential(*parts).eval(), types=(nn.Conv2d,))
    sparsify.export(sparsify.prune(model, 0.5), fuse=True)
    assert len(seen) == 2
