"""export(quantize_rest=True): Linears without a mask and Embeddings as int8 too, in memory and in files."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify import CheckpointError, CSRLinear
from sparsify.checkpoint import container
from sparsify.errors import LeftFloatWarning
from sparsify.inference.form_selection import FormSelector
from sparsify.layers import Int8Embedding

IDS = torch.tensor([[0, 6, 2], [5, 5, 1]])

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """An embedding, one that is tied to a head, one that rescales its rows, a pruned Linear and one that is not."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words, self.tied, self.bounded = nn.Embedding(7, 8), nn.Embedding(7, 8), nn.Embedding(7, 8, max_norm=1.0)
        self.pruned, self.plain, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 7, bias=False)
        self.head.weight = self.tied.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.tied(ids) + self.bounded(ids)
        return self.head(self.plain(torch.relu(self.pruned(x))))


def masked() -> Net:
    return sparsify.prune(sparsify.convert(Net(), include="pruned"), 0.5).eval()


def exported(**options: object) -> Net:
    return sparsify.export(masked(), format="csr", quantize="int8", quantize_rest=True, **options)


def test_the_rest_is_int8_too() -> None:
    model = masked()
    model(IDS)  # which rescales rows
    before = copy.deepcopy(model.state_dict())
    fast = sparsify.export(model, format="csr", quantize="int8", quantize_rest=True, example=IDS)
    assert isinstance(fast.words, Int8Embedding)
    assert type(fast.tied) is type(fast.bounded) is nn.Embedding
    assert fast.head.weight is fast.tied.weight
    assert all(isinstance(layer, CSRLinear) and layer.own_dtype for layer in (fast.pruned, fast.plain))
    assert fast.plain.sparsity == 0.0
    wanted, found = model(IDS).detach(), fast(IDS).detach()
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.05
    assert {row.name: row.numbers for row in sparsify.report(fast)} == {
        "words": "int8 weights",
        "pruned": "int8 weights",
        "plain": "int8 weights",
        "head": "",
    }
    assert type(model.plain) is nn.Linear
    assert type(model.words) is nn.Embedding
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_way_back() -> None:
    fast = exported()
    back = sparsify.to_dense(copy.deepcopy(fast))
    assert {type(module) for module in back.children()} == {nn.Embedding, nn.Linear}
    assert torch.equal(back(IDS), fast(IDS))


def test_a_file_holds_int8_rows(tmp_path: Path) -> None:
    fast = exported()
    sparsify.save(fast, tmp_path / "model.safetensors")
    header, tensors = container.read(tmp_path / "model.safetensors")
    assert header.layers["words"].module == "Embedding"
    assert tensors["words.weight"].dtype == torch.int8
    row = next(row for row in sparsify.inspect(tmp_path / "model.safetensors") if row.name == "words")
    assert (row.shape, row.sparsity, row.n_bytes, row.dense_bytes) == ((7, 8), 0.0, 7 * 8 + 4 * 7, 4 * 7 * 8)
    back = sparsify.load(tmp_path / "model.safetensors", Net(seed=1))
    assert isinstance(back.words, Int8Embedding)
    assert torch.equal(back(IDS), fast(IDS))
    on_meta = sparsify.load(tmp_path / "model.safetensors", Net(seed=1).to("meta"))
    assert torch.equal(on_meta(IDS), fast(IDS))


def test_a_file_for_another_embedding_is_refused(tmp_path: Path) -> None:
    sparsify.save(exported(), tmp_path / "model.safetensors")
    other = Net(seed=1)
    other.words = nn.Embedding(9, 8)
    with pytest.raises(CheckpointError, match=r"words is \(7, 8\) in the file, \(9, 8\) in the model"):
        sparsify.load(tmp_path / "model.safetensors", other)
    other.words = nn.Linear(8, 7, bias=False)
    with pytest.raises(CheckpointError, match="the model has a Linear there"):
        sparsify.load(tmp_path / "model.safetensors", other)
    assert type(other.pruned) is nn.Linear
    with pytest.raises(CheckpointError, match=r"words is torch\.float32 in the file, torch\.bfloat16"):
        sparsify.load(tmp_path / "model.safetensors", Net(seed=1).bfloat16())


def test_an_embedding_without_an_int8_form_stays() -> None:
    model = masked()
    with torch.no_grad():
        model.words.weight[0, 0] = torch.nan
    with pytest.warns(LeftFloatWarning, match="^words: left as they are"):
        fast = sparsify.export(model, format="csr", quantize="int8", quantize_rest=True)
    assert type(fast.words) is nn.Embedding
    with pytest.warns(LeftFloatWarning, match="^words, pruned, plain: left as they are"):
        assert type(exported(max_error=1e-9).words) is nn.Embedding


def test_auto_keeps_no_layer_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {"dense": 1.0, "panel": 5.0, "bitmask": 4.0}
    monkeypatch.setattr(FormSelector, "_measure", lambda self, candidates, x: slow)
    monkeypatch.setattr("sparsify.inference.form_selection._forms_here", lambda weight, rounded: ["panel", "bitmask"])
    monkeypatch.setattr("sparsify.inference.form_selection._candidates", lambda *args, **options: {})
    layer = masked().pruned
    assert FormSelector(4).choose(layer, None, "int8").form == "dense"
    assert FormSelector(4, may_be_dense=False).choose(layer, None, "int8").form == "bitmask"
    assert FormSelector(4, may_be_dense=False).choose(layer).form == "dense"


def test_without_quantize_it_is_an_error() -> None:
    with pytest.raises(ValueError, match="no effect without quantize"):
        sparsify.export(masked(), quantize_rest=True)
