"""Embedding, EmbeddingBag and Bilinear under masks: torch's results, compact files, and back."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsify

IDS = torch.tensor([[1, 4, 4], [0, 6, 2]])
TYPES = (nn.Embedding, nn.EmbeddingBag, nn.Bilinear)

#: Every constructor argument that converts, and the inputs.
TABLE: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "embedding": (lambda: nn.Embedding(7, 5), (IDS,)),
    "embedding padded": (lambda: nn.Embedding(7, 5, padding_idx=4, scale_grad_by_freq=True), (IDS,)),
    "embedding of sparse gradients": (lambda: nn.Embedding(7, 5, sparse=True), (IDS,)),
    "bag": (lambda: nn.EmbeddingBag(7, 5, mode="max", padding_idx=4), (IDS,)),
    "bag of means": (lambda: nn.EmbeddingBag(7, 5, dtype=torch.float32), (IDS.flatten(), torch.tensor([0, 0, 4]))),
    "bag of offsets": (
        lambda: nn.EmbeddingBag(7, 5, mode="sum", scale_grad_by_freq=True, include_last_offset=True),
        (IDS.flatten(), torch.tensor([0, 2, 6])),
    ),
    "bag of weights": (lambda: nn.EmbeddingBag(7, 5, mode="sum"), (IDS, None, torch.rand(2, 3))),
    "bilinear": (lambda: nn.Bilinear(3, 5, 4), (torch.randn(2, 3), torch.randn(2, 5))),
    "bilinear without bias": (lambda: nn.Bilinear(3, 1, 4, bias=False), (torch.randn(2, 2, 3), torch.randn(2, 2, 1))),
}


@pytest.mark.parametrize("sparsity", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", TABLE)
def test_outputs_gradients_and_files_are_those_of_torch_with_zeros(name: str, sparsity: float, tmp_path: Path) -> None:
    build, inputs = TABLE[name]
    torch.manual_seed(0)
    model = sparsify.prune(sparsify.convert(nn.Sequential(build()), types=TYPES), sparsity)
    layer = model[0]
    dense = sparsify.to_dense(copy.deepcopy(model))[0]
    assert type(dense) is layer.dense_type
    assert str(dense) == str(build())
    assert vars(dense).keys() == vars(build()).keys()
    with torch.no_grad():
        layer.weight.masked_fill_(~layer.mask, 3.0)  # as an optimizer might
    for training in (True, False):
        results = []
        for module in (layer.train(training), dense.train(training)):
            module.zero_grad()
            y = module(*inputs)
            y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape))
            results.append((y, module.weight.grad.to_dense()))
        assert torch.equal(results[0][0], results[1][0])
        torch.testing.assert_close(results[0][1], results[1][1] * layer.mask)
    expected = dense(*inputs)
    exported = sparsify.export(model)
    y = exported.eval()[0](*inputs)
    assert torch.equal(y, expected)
    y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape))
    torch.testing.assert_close(exported[0].weight.grad.to_dense(), results[1][1])
    for one in (model, exported):
        sparsify.save(one, tmp_path / "model.safetensors")
        loaded = sparsify.load(tmp_path / "model.safetensors", nn.Sequential(build()))
        assert type(loaded[0]) is type(one[0])
        assert torch.equal(loaded.eval()[0](*inputs), expected)
    assert type(one[0]) is layer.dense_type


def test_a_pruned_table_is_small_in_the_file_and_a_step_leaves_its_zeros(tmp_path: Path) -> None:
    model = sparsify.prune(sparsify.convert(nn.Sequential(nn.Embedding(400, 16)), types=nn.Embedding), 0.9)
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    model(torch.arange(400)).square().sum().backward()
    optimizer.step()
    assert int((model[0].weight == 0).sum()) == 5760
    for one in (model, sparsify.export(model)):
        sparsify.save(one, tmp_path / "model.safetensors")
        assert (tmp_path / "model.safetensors").stat().st_size < 0.2 * 400 * 16 * 4
    assert sparsify.report(one)[0].reason.startswith("no sparse kernel")


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: nn.Embedding(7, 5, max_norm=1.0), "its max_norm changes"),
        (lambda: nn.EmbeddingBag(7, 5, mode="sum", sparse=True), "its gradients are sparse"),
    ],
)
def test_some_settings_stay_dense(build: Callable[[], nn.Module], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        sparsify.convert(nn.Sequential(build()), types=TYPES)


def test_calibration_data_says_nothing_about_a_table() -> None:
    model = sparsify.convert(nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 2)), types=[nn.Embedding, nn.Linear])
    with pytest.raises(ValueError, match=r"0: a SparseEmbedding does not multiply .* exclude=\['0'\]"):
        sparsify.prune(model, 0.5, method="wanda", data=[IDS])
    assert not sparsify.report(model).layers.sparsity
