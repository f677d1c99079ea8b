"""Tied weights: an error by default, dense on request, or one mask that all places see, through every step."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sparsify
from sparsify import CSRLinear, LeftDenseWarning, SparseLinear, convert, export, load, prune, save, to_dense
from sparsify.layers.tied import TiedEmbedding, TiedLinear

IDS = torch.arange(10)


class LM(nn.Module):
    """A head tied to its embedding."""

    def __init__(self, seed: int = 0, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.fc, self.head = nn.Embedding(10, 8, padding_idx=0), nn.Linear(8, 8), nn.Linear(8, 10)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.fc(self.embedding(ids))))


class Twins(nn.Module):
    """Two Linears over one Parameter, with biases of their own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


CASES = [(LM, IDS), (Twins, torch.linspace(-1, 1, 24).reshape(3, 8))]
both = pytest.mark.parametrize(("build", "x"), CASES, ids=["embedding", "linears"])


def weights(model: nn.Module) -> set[int]:
    return {id(p) for name, p in model.named_parameters(remove_duplicate=False) if not name.startswith("fc")}


def owner_of(model: nn.Module) -> SparseLinear:
    layer = model.head if isinstance(model, LM) else model.a
    assert isinstance(layer, SparseLinear)
    return layer


def test_an_error_names_both_places_and_three_ways_out() -> None:
    with pytest.raises(ValueError, match=r"head: .*embedding\.weight and head\.weight.*exclude=.*skip.*share"):
        convert(LM())
    with pytest.raises(ValueError, match=r"a: .*a\.weight and b\.weight are one Parameter"):
        convert(Twins(), tied="error")
    with pytest.raises(ValueError, match="tied='both' is none of: error, skip, share"):
        convert(LM(), tied="both")


def test_skip_leaves_both_dense_with_a_notice() -> None:
    model = LM()
    with pytest.warns(LeftDenseWarning, match=r"head \(its weight is tied: embedding\.weight and head\.weight"):
        convert(model, tied="skip")
    assert (type(model.head), type(model.embedding), type(model.fc)) == (nn.Linear, nn.Embedding, SparseLinear)
    assert model.head.weight is model.embedding.weight
    recipe = sparsify.Recipe(groups=[{"sparsity": 0.5}])  # type: ignore[list-item]
    assert sparsify.apply(model, recipe).fc.sparsity == 0.5
    with pytest.raises(ValueError, match="no layer that can be converted"):
        convert(Twins(), tied="skip")


@both
def test_share_is_one_mask_that_both_places_see(build: type[nn.Module], x: Tensor) -> None:
    model, dense = build(), build()
    expected = model(x)
    convert(model, tied="share")
    assert torch.equal(model(x), expected)
    assert sum(isinstance(m, sparsify.layers.MaskedLayer) for m in model.modules()) == (2 if build is LM else 1)
    prune(model, 0.75)
    owner = owner_of(model)
    assert owner.sparsity == 0.75
    with torch.no_grad():
        (dense.head if build is LM else dense.a).weight.copy_(owner.masked_weight())
        if build is LM:
            dense.fc.weight.copy_(model.fc.masked_weight())
    assert torch.equal(model(x), dense(x))
    with torch.no_grad():
        owner.weight.add_(1.0)  # whatever happens to masked weights, no place shows it
        (dense.head if build is LM else dense.a).weight.add_(owner.mask)
    assert torch.equal(model(x), dense(x))
    convert(model)  # again: nothing
    convert(model, tied="share")
    assert torch.equal(model(x), dense(x))


@both
def test_training_holds_the_mask_in_every_place(build: type[nn.Module], x: Tensor) -> None:
    model = prune(convert(build(), tied="share"), 0.5)
    owner = owner_of(model)
    before = owner.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        assert not owner.weight.grad[~owner.mask].any()
        optimizer.step()
    assert not owner.weight[~owner.mask].any()
    assert (owner.weight != before)[owner.mask].any()
    owner.sparse_update(0.75)
    assert model.get_submodule("embedding" if build is LM else "b").mask is owner.mask


def test_gradients_are_those_of_the_masked_weight() -> None:
    model = prune(convert(LM(), tied="share"), 0.5)
    weight = model.head.masked_weight().detach().requires_grad_()
    hidden = torch.relu(model.fc(nn.functional.embedding(IDS, weight, padding_idx=0)))
    nn.functional.linear(hidden, weight, model.head.bias).square().sum().backward()
    model(IDS).square().sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(model.head.weight.grad, weight.grad * model.head.mask)


@both
@pytest.mark.parametrize("format", ["csr", "auto", "dense"])
def test_export_save_and_load(tmp_path: Path, build: type[nn.Module], x: Tensor, format: str) -> None:
    model = prune(convert(build(), tied="share"), 0.75).eval()
    fast = export(model, format=format)
    torch.testing.assert_close(fast(x), model(x))
    if format == "dense":
        assert len(weights(fast)) == len(weights(build()))
    elif format == "csr":
        assert not any(isinstance(m, sparsify.layers.Tied) for m in fast.modules())
    if format == "csr" and build is Twins:
        assert isinstance(fast.b, CSRLinear)
        assert fast.b.values is fast.a.values
    assert isinstance(owner_of(model), SparseLinear)  # the model stays as it was
    save(fast, tmp_path / "fast.safetensors")
    if format == "csr":  # stored once
        stored = load_file(tmp_path / "fast.safetensors")
        assert sum(name.endswith("values") for name in stored) == (2 if build is LM else 1)
        assert not any("embedding" in name for name in stored)
    loaded = load(tmp_path / "fast.safetensors", build(9)).eval()
    assert torch.equal(loaded(x), fast(x))
    if format == "csr" and build is Twins:
        assert loaded.b.values is loaded.a.values
        assert sparsify.inspect(tmp_path / "fast.safetensors").total.n_bytes < 2 * 8 * 8
    torch.testing.assert_close(to_dense(loaded)(x), model(x))


@both
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_masked_model_comes_back_tied(tmp_path: Path, build: type[nn.Module], x: Tensor, device: str) -> None:
    model = prune(convert(build(), tied="share"), 0.75)
    save(model, tmp_path / "masked.safetensors")
    with torch.device(device):
        fresh = build(9)
    loaded = load(tmp_path / "masked.safetensors", fresh)
    assert torch.equal(loaded(x), model(x))
    assert len(weights(loaded)) == len(weights(build()))
    kinds = (TiedEmbedding, SparseLinear) if build is LM else (SparseLinear, TiedLinear)
    assert (type(loaded.embedding), type(loaded.head)) == kinds if build is LM else (type(loaded.a), type(loaded.b))
    prune(loaded, 0.9)
    assert torch.equal(loaded(x), prune(model, 0.9)(x))


def test_an_untied_model_is_tied_by_the_file(tmp_path: Path) -> None:
    model = prune(convert(LM(), tied="share"), 0.75)
    save(model, tmp_path / "masked.safetensors")
    loaded = load(tmp_path / "masked.safetensors", LM(9, tied=False))
    assert loaded.head.weight is loaded.embedding.weight
    assert torch.equal(loaded(IDS), model(IDS))


@both
def test_copies_pickles_and_state_dicts_stay_tied(build: type[nn.Module], x: Tensor) -> None:
    model = prune(convert(build(), tied="share"), 0.75)
    expected = model(x)
    fresh = convert(build(9), tied="share")
    fresh.load_state_dict(model.state_dict())
    dense = convert(build(9), tied="share")
    dense.load_state_dict(build().state_dict())
    assert torch.equal(dense(x), build()(x))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert torch.equal(twin(x), expected)
        prune(twin, 1.0)
        assert len(weights(twin)) == len(weights(build()))
        assert torch.equal(model(x), expected)  # independent
    assert list(build().state_dict()) == [key for key in model.state_dict() if not key.endswith("mask")]


@both
def test_to_dense_leaves_them_tied(build: type[nn.Module], x: Tensor) -> None:
    model = prune(convert(build(), tied="share"), 0.75)
    expected = model(x)
    to_dense(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in build().modules()]
    assert len(weights(model)) == len(weights(build()))
    assert torch.equal(model(x), expected)


def test_what_cannot_share_says_so() -> None:
    odd = LM()
    odd.embedding = nn.Embedding(10, 8, max_norm=1.0)
    odd.head.weight = odd.embedding.weight
    with pytest.raises(ValueError, match=r"head: .*tied to embedding\.weight, which cannot .*: its max_norm"):
        convert(odd, tied="share")
    overlapping = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    overlapping[1].weight = nn.Parameter(overlapping[0].weight.detach())
    with pytest.raises(ValueError, match="not the same Parameter"):
        convert(overlapping, tied="share")
    bilinear = nn.ModuleList([nn.Linear(4, 4), nn.EmbeddingBag(4, 4)])
    bilinear[1].weight = bilinear[0].weight
    with pytest.raises(ValueError, match=r"it is a EmbeddingBag; only nn\.Linear and nn\.Embedding"):
        convert(bilinear, tied="share")


def test_only_a_foreign_forward_on_the_instance_is_refused() -> None:
    model = LM()
    model.embedding.forward = model.embedding.forward  # the class's own, as accelerate leaves it there
    prune(convert(model, tied="share"), 0.75)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    assert torch.equal(model.embedding(IDS), torch.where(model.head.mask, model.head.weight, 0.0))
    odd = LM()
    odd.embedding.forward = lambda ids: odd.embedding.weight[ids] + 1
    with pytest.raises(ValueError, match="which cannot share its mask: its forward was replaced on the instance"):
        convert(odd, tied="share")
