"""transformers' Conv1D, whose weight is stored (in, out), goes the whole way like a Linear."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsify
from sparsify import CSRLinear, convert, export, load, prune, save, to_dense
from sparsify.masking.patterns import nm_mask

Conv1D = pytest.importorskip(
    "transformers.pytorch_utils", reason="transformers is missing: pip install 'sparsify-torch[text]'"
).Conv1D
from sparsify.layers.sparse_conv1d import SparseConv1D  # noqa: E402 - it imports transformers

X = torch.linspace(-1, 1, 2 * 3 * 8).reshape(2, 3, 8)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(Conv1D(12, 8), nn.ReLU(), Conv1D(4, 12))
    nn.init.normal_(model[0].bias)
    return model


def test_it_converts_in_place_and_computes_the_same_bits() -> None:
    model = net()
    expected, parameters, first = model(X), list(model.parameters()), model[0]
    assert convert(model)[0] is first
    assert isinstance(first, SparseConv1D)
    assert isinstance(first, Conv1D)
    assert torch.equal(model(X), expected)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert (first.shape, first.mask.shape, first.weight.shape) == ((12, 8), (8, 12), (8, 12))
    assert repr(first) == "SparseConv1D(nf=12, nx=8, sparsity=0)"
    convert(model)
    assert torch.equal(model(X), expected)


def test_patterns_run_along_the_inputs() -> None:
    model = prune(convert(net()), pattern="2:4", exclude="2")
    layer = model[0]
    assert (layer.mask.t().reshape(12, 2, 4).sum(-1) == 2).all()  # along in_features, the first axis as stored
    assert torch.equal(layer.matrix(layer.mask), nm_mask(net()[0].weight.t().abs(), 2, 4))
    assert not layer.weight[~layer.mask].any()
    prune(model, 0.5, pattern="4x1", include="2")  # 4 outputs x 1 input
    blocks = model[2].mask.t().reshape(1, 4, 12)
    assert (blocks.all(1) | ~blocks.any(1)).all()


def test_masked_weights_stay_zero_and_kept_ones_learn() -> None:
    layer = prune(convert(net()), 0.5)[0]
    before = layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    layer(X).square().sum().backward()
    assert not layer.weight.grad[~layer.mask].any()
    optimizer.step()
    assert not layer.weight[~layer.mask].any()
    assert (layer.weight != before)[layer.mask].any()


@pytest.mark.parametrize("format", ["auto", "csr", "dense"])
def test_export_save_load_and_back(tmp_path: Path, format: str) -> None:
    model = prune(convert(net()), 0.75).eval()
    fast = export(model, format=format)
    torch.testing.assert_close(fast(X), model(X))
    assert type(fast[0]) is (Conv1D if format == "dense" else type(fast[0]))
    if format == "csr":
        assert isinstance(fast[0], CSRLinear)
        assert fast[0].shape == (12, 8)
    save(fast, tmp_path / "fast.safetensors")
    loaded = load(tmp_path / "fast.safetensors", net(1))
    assert torch.equal(loaded(X), fast(X))
    dense = to_dense(loaded)
    assert [type(layer) for layer in (dense[0], dense[2])] == [Conv1D, Conv1D]
    assert torch.equal(dense[0].weight, model[0].weight)
    assert torch.equal(dense(X), model(X))


def test_a_masked_model_loads_masked(tmp_path: Path) -> None:
    model = prune(convert(net()), 0.75)
    save(model, tmp_path / "masked.safetensors")
    loaded = load(tmp_path / "masked.safetensors", net(1))
    assert isinstance(loaded[0], SparseConv1D)
    assert torch.equal(loaded[0].mask, model[0].mask)
    assert torch.equal(loaded(X), model(X))
    assert type(to_dense(loaded)[0]) is Conv1D


def test_state_dict_pickle_and_deepcopy() -> None:
    model = prune(convert(net()), 0.75)
    fresh = convert(net(1))
    fresh.load_state_dict(net().state_dict())
    assert torch.equal(fresh(X), net()(X))
    fresh.load_state_dict(model.state_dict())
    for twin in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), model(X))
        assert twin[0].sparsity == 0.75


def test_a_subclass_stays_dense() -> None:
    class Doubled(Conv1D):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="a Doubled, a subclass of Conv1D that may compute something else"):
        convert(nn.Sequential(Doubled(4, 8)))


def test_gpt2_goes_the_whole_way(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=16)
        return transformers.GPT2LMHeadModel(config).eval()

    model, ids = build(0), torch.arange(8).reshape(1, 8)
    expected = model(ids).logits
    with pytest.raises(ValueError, match=r"lm_head.*transformer\.wte\.weight"):
        convert(model)
    convert(model, exclude="lm_head")
    assert torch.equal(model(ids).logits, expected)
    prune(model, 0.8)
    fast = export(model, format="csr")
    assert len(sparsify.report(fast)) == 8 + 1
    torch.testing.assert_close(fast(ids).logits, model(ids).logits)
    save(fast, tmp_path / "gpt2.safetensors")
    loaded = load(tmp_path / "gpt2.safetensors", build(1))
    assert torch.equal(loaded(ids).logits, fast(ids).logits)


def test_transformers_is_not_imported_for_a_model_without_it() -> None:
    program = (
        "import sys, sparsify; from torch import nn;"
        "sparsify.prune(sparsify.convert(nn.Sequential(nn.Linear(4, 4))), 0.5);"
        "assert not any(name.startswith('transformers') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
