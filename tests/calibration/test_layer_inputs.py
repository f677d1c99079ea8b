"""export(model, example=...): every layer is measured with the input that it gets in use."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsify
from sparsify.calibration.layer_inputs import layer_inputs
from sparsify.inference.form_selection import FormSelector
from sparsify.layers.records import form_choice

pytestmark = pytest.mark.usefixtures("one_thread")


class Reader(nn.Module):
    """Calls one layer twice, reads the weight of another, leaves a third alone."""

    def __init__(self):
        super().__init__()
        self.twice, self.read, self.unused = (nn.Linear(8, 8) for _ in range(3))
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        x = self.twice(self.twice(x[:1]).expand(6, 8))
        return scale * F.linear(self.drop(self.norm(x)), self.read.weight, self.read.bias)


def test_each_layer_has_its_largest_input():
    model = sparsify.convert(Reader())
    found = layer_inputs(model, torch.randn(3, 8))
    assert {name: tuple(found[m].shape) for name, m in model.named_children() if m in found} == {
        "twice": (6, 8),
        "read": (6, 8),
    }
    assert found[model.twice].stride() == (0, 1)
    assert all(x.is_meta for x in found.values())


def test_nothing_of_the_model_changes_and_no_random_number_is_drawn():
    model = sparsify.convert(Reader()).train()
    model.drop.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    layer_inputs(model, {"x": torch.ones(3, 8), "scale": 2.0})
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert not model.drop.training
    assert not model.twice._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_images_keep_their_layout(memory_format):
    model = sparsify.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), types=nn.Conv2d)
    found = layer_inputs(model, torch.randn(2, 3, 5, 7).to(memory_format=memory_format))
    assert [tuple(x.shape) for x in found.values()] == [(2, 3, 5, 7), (2, 4, 5, 7)]
    assert all(x.is_contiguous(memory_format=memory_format) for x in found.values())


def test_an_example_that_does_not_run_is_an_error():
    with pytest.raises(ValueError, match=r"the model does not run on the example: RuntimeError: .*mat1"):
        layer_inputs(sparsify.convert(Reader()), torch.randn(3, 9))


def test_export_measures_each_layer_with_its_own_input(monkeypatch):
    measured = []

    def measure(_, candidates, x):
        measured.append((tuple(x.shape), x.stride()))
        return {"dense": 1.0}

    monkeypatch.setattr(FormSelector, "_measure", measure)
    model = sparsify.convert(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(1), nn.Linear(140, 6), nn.Linear(6, 6)),
        types=[nn.Linear, nn.Conv2d],
    )
    x = torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last)
    fast = sparsify.export(model, example=(x,))
    assert measured == [((2, 3, 5, 7), x.stride()), ((2, 140), (140, 1)), ((2, 6), (6, 1))]
    assert [fast[i].choice.tokens for i in (0, 2, 3)] == [70, 2, 2]

    measured.clear()
    sparsify.export(model, tokens=11)
    assert [shape for shape, _ in measured] == [(1, 3, 4, 4), (11, 140), (11, 6)]  # 4 x 4 has 11 positions


def test_what_the_example_does_not_reach_is_measured_with_tokens(monkeypatch):
    monkeypatch.setattr(FormSelector, "_measure", lambda *_: {"dense": 1.0})
    fast = sparsify.export(sparsify.convert(Reader()), example=torch.randn(3, 8), tokens=17)
    assert {name: choice.tokens for name, m in fast.named_children() if (choice := form_choice(m))} == {
        "twice": 6,
        "read": 6,
        "unused": 17,
    }


def test_an_example_without_measurement_is_an_error():
    with pytest.raises(ValueError, match="example has no effect with format 'csr'"):
        sparsify.export(sparsify.convert(nn.Linear(4, 4)), format="csr", example=torch.ones(1, 4))


def test_a_real_measurement_on_images():
    model = sparsify.convert(nn.Sequential(nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 1)), types=nn.Conv2d)
    fast = sparsify.export(sparsify.prune(model, 0.95), example=torch.randn(1, 64, 14, 14))
    for row in sparsify.report(fast):
        assert row.format == "dense" or row.times_us[row.format] == min(row.times_us.values())
        assert "196 tokens" in row.reason or "no sparse kernel" in row.reason
