"""The share of a model in pruned layers, its work, and the rest by type, in every report."""

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify import report


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm, self.out = nn.Embedding(20, 8), nn.LSTM(8, 16), nn.Linear(16, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.lstm(self.words(ids))[0])


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(),
        nn.Linear(8 * 16, 4),
    ).eval()  # fmt: skip


@pytest.mark.filterwarnings("ignore::sparsify.LeftDenseWarning")
def test_the_total_is_of_the_model_and_the_rest_is_named() -> None:
    model = sparsify.prune(sparsify.convert(Tagger(), types=nn.Linear), 0.5)
    n = sum(p.numel() for p in model.parameters())
    for one in (model, sparsify.export(model, format="csr")):
        found = report(one)
        assert found.layers.shape == (1, 160)
        assert found.layers.sparsity == 0.5
        assert found.total.shape == (1, n)
        assert found.total.sparsity == pytest.approx(80 / n)
        assert found.rest is not None
        assert found.rest.n_bytes == 4 * (n - 160)
        assert [(part.type, part.largest) for part in found.coverage.rest] == [
            *(("LSTM", "lstm"), ("Embedding", "words"), (type(one.out).__name__, "out"))
        ]
        said = str(found).splitlines()[2]
        assert said.startswith(f"Pruned layers hold {160 / n:.1%} of the model's {n:,} parameters. Dense: ")
        assert f"{1664 / n:.1%} in LSTM lstm; " in said


@pytest.mark.filterwarnings("ignore::sparsify.LeftDenseWarning")
def test_the_share_of_the_work_is_that_of_the_dense_model() -> None:
    x = torch.randn(2, 3, 4, 4)
    dense = cnn()
    adds = {"conv": 2 * 16 * 8 * 27, "pointwise": 2 * 16 * 64, "linear": 2 * 512}
    for types, names in ((nn.Conv2d, ("conv", "pointwise")), (nn.Linear, ("linear",))):
        model = sparsify.prune(sparsify.convert(cnn(), types=types), 0.5)
        for one in (model, model.train(), sparsify.export(model, format="csr"), sparsify.export(model, format="dense")):
            found = report(one, x).coverage
            assert found.n_multiply_adds == sum(adds.values())
            assert found.n_covered_multiply_adds == sum(adds[name] for name in names)
            assert found.n_parameters == sum(p.numel() for p in dense.parameters())
    assert " of its multiply-adds. Dense: " in str(report(one, x))
    with pytest.raises(ValueError, match="does not run on the example"):
        report(one, torch.randn(1))


def test_export_tells_the_share_if_most_of_the_model_is_dense() -> None:
    model = sparsify.convert(Tagger(), types=nn.Linear)
    said = (
        r"Pruned layers hold 8\.0% of the model's 1,994 parameters\. Dense: 83\.5% in LSTM lstm; .*; types=\[torch.nn.L"
    )
    with pytest.warns(sparsify.LeftDenseWarning, match=said):
        sparsify.export(model, format="csr")
    with pytest.warns(sparsify.LeftDenseWarning, match=r"parameters and 9\.4% of its multiply-adds\. Dense: 83\.5%"):
        sparsify.export(model, example=torch.zeros(2, 3, dtype=torch.int64))
    sparsify.export(sparsify.convert(Tagger(), types=[nn.Linear, nn.LSTM]), format="csr")
    model = sparsify.convert(cnn(), types=nn.Linear)  # most weights, and little of the work
    sparsify.export(model, format="csr")
    with pytest.warns(sparsify.LeftDenseWarning, match=r"62\.4% of .* and 10\.3% of its multiply-adds"):
        sparsify.export(model, example=torch.randn(2, 3, 4, 4))


def test_a_model_of_convolutions_is_converted_with_them_and_says_so() -> None:
    with pytest.warns(
        sparsify.DefaultTypesWarning, match=r"2 of them convert, 34\.1% .*types=\[torch.nn.Linear, torch.nn.Conv2d\]"
    ):
        model = sparsify.convert(cnn())
    assert [row.format for row in report(model)] == ["masked"] * 3
    assert type(sparsify.convert(nn.Sequential(nn.Conv2d(1, 1, 3), nn.Linear(8, 8)))[0]) is nn.Conv2d


def test_a_depthwise_convolution_converts_only_if_asked_for() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    with (
        pytest.warns(sparsify.DefaultTypesWarning),
        pytest.warns(sparsify.LeftDenseWarning, match=r"1 \(it is depthwise"),
    ):
        sparsify.convert(model)
    assert type(model[1]) is nn.Conv2d
    sparsify.convert(model, types=nn.Conv2d)
    assert isinstance(model[1], sparsify.SparseConv2d)
