"""Tied weights, shared modules and overlapping memory: stored once, and shared again after load."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from saved_models import assert_refused, saved
from torch import Tensor, nn

import sparsify
from sparsify import CSRLinear
from sparsify.kernels.csr import CSR, csr_to_dense


class Tied(nn.Module):
    def __init__(self, seed: int = 0, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.fc, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(self.embedding(x)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path, device: str) -> None:
    fast = sparsify.export(sparsify.prune(sparsify.convert(Tied(), exclude="head"), 0.5), format="csr")
    path = saved(tmp_path, fast)
    assert set(safetensors.torch.load_file(path)) == {
        "fc.weight.bits",
        "fc.weight.values",
        "fc.bias",
        "embedding.weight",
    }
    with torch.device(device):
        fresh = Tied(seed=9)
    loaded = sparsify.load(path, fresh)
    assert loaded.head.weight is loaded.embedding.weight
    assert not loaded.head.weight.is_meta
    x = torch.arange(10)
    assert torch.equal(loaded(x), fast(x))


def test_tied_weights_fill_an_untied_model(tmp_path: Path) -> None:
    fast = sparsify.export(sparsify.prune(sparsify.convert(Tied(), exclude="head"), 0.5), format="csr")
    loaded = sparsify.load(saved(tmp_path, fast), Tied(seed=9, tied=False))
    assert loaded.head.weight is not loaded.embedding.weight
    assert torch.equal(loaded.head.weight, fast.embedding.weight)
    assert torch.equal(loaded(torch.arange(10)), fast(torch.arange(10)))


def test_untied_weights_do_not_fit_a_tied_model(tmp_path: Path) -> None:
    model = sparsify.prune(sparsify.convert(Tied(tied=False), exclude="head"), 0.5)
    path = saved(tmp_path, model)
    assert_refused(path, Tied(seed=9), "embedding.weight and head.weight are one tensor in the model")
    with torch.no_grad():
        model.head.weight.copy_(model.embedding.weight)  # equal values are no contradiction
    loaded = sparsify.load(saved(tmp_path, model), Tied(seed=9))
    assert torch.equal(loaded(torch.arange(10)), model(torch.arange(10)))


def test_shared_modules_stay_shared(tmp_path: Path) -> None:
    def build(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        layer = nn.Linear(8, 8)
        return nn.Sequential(layer, nn.ReLU(), layer)

    fast = sparsify.export(sparsify.prune(sparsify.convert(build(0)), 0.5), format="csr")
    loaded = sparsify.load(saved(tmp_path, fast), build(9))
    assert loaded[0] is loaded[2]
    assert isinstance(loaded[0], CSRLinear)
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), fast(x))


def test_tensors_that_overlap_in_memory_are_saved(tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.fc, table = nn.Linear(8, 8), torch.randn(10)
            self.register_buffer("low", table[:6])
            self.register_buffer("high", table[4:])
            self.copy = nn.Parameter(self.fc.bias.data)  # another Parameter over the same memory

    model = sparsify.prune(sparsify.convert(Views(0)), 0.5)
    loaded = sparsify.load(saved(tmp_path, model), Views(9))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_each_exported_layer_is_unpacked_once_whatever_the_number_of_embeddings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = sparsify.convert(nn.Sequential(*[nn.Linear(8, 10, bias=False) for _ in range(4)]))
    fast = sparsify.export(sparsify.prune(layers, 0.5), format="csr")
    model = nn.Sequential(fast, *[nn.Embedding(10, 8) for _ in range(5)])
    with torch.no_grad():
        model[3].weight.copy_(csr_to_dense(fast[2].csr, fast[2].shape)[0])
    unpacked: list[tuple[int, int]] = []

    def counted(csr: CSR, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        unpacked.append(shape)
        return csr_to_dense(csr, shape)

    monkeypatch.setattr("sparsify.checkpoint.shared_tensors.csr_to_dense", counted)
    stored = safetensors.torch.load_file(saved(tmp_path, model))
    assert unpacked == [(10, 8)] * 4
    assert [name for name in stored if name.endswith(".weight")] == [f"{n}.weight" for n in (1, 2, 4, 5)]
