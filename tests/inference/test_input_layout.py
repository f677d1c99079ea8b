"""export with an example: dense convolutions get weights in the layout of their images."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.layers.weight_layout import lay_out


class Net(nn.Module):
    """Convolutions that get channels first, channels last, both, and channels last with a weight of two modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 2, 2)
        self.both, self.one, self.other = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.other.weight = self.one.weight
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.last(x)
        return self.other(self.one(self.both(x) + self.both(x.contiguous())))


def exported(**options: object) -> tuple[Net, nn.Module, Tensor]:
    model = sparsify.prune(sparsify.convert(Net().eval(), include="linear"), 0.5)
    x = torch.randn(2, 3, 16, 16)
    return model, sparsify.export(model, example=x, **options), x  # type: ignore[arg-type]


def changed(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not parameter.is_contiguous()]


@pytest.fixture(autouse=True)
def _quiet(one_thread, recwarn):
    """Export warns that most of this model is dense."""


def test_only_weights_of_one_convolution_with_channels_last_alone_change():
    model, fast, x = exported()
    assert changed(fast) == ["last.weight"]
    assert changed(model) == []
    assert fast.last.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(fast.last.weight, model.last.weight)
    torch.testing.assert_close(fast(x), model(x))


def test_copies_keep_the_layout_and_dense_models_have_the_old_one():
    _, fast, x = exported()
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert changed(other) == ["last.weight"]
        assert torch.equal(other(x), fast(x))
    assert changed(sparsify.to_dense(fast)) == []


def test_exporting_anew_leaves_the_first_export_as_it_is():
    model, _, _ = exported()
    packed = sparsify.export(model, format="csr")  # "auto" leaves a Linear as small as this dense
    lay_out(packed.last)
    again = sparsify.export(packed, format="csr")
    assert changed(packed) == ["last.weight"]
    assert changed(again) == []


def test_a_file_has_the_usual_layout(tmp_path):
    _, fast, x = exported()
    sparsify.save(fast, tmp_path / "model.safetensors")
    loaded = sparsify.load(tmp_path / "model.safetensors", Net().eval())
    assert changed(loaded) == []
    assert torch.equal(loaded.last.weight, fast.last.weight)
    torch.testing.assert_close(loaded(x), fast(x))


def test_a_model_that_shares_its_memory_is_left_alone():
    model, fast, _ = exported(copy=False)
    assert changed(fast) == changed(model) == []
