"""The whole flow on torchvision's models: convert, prune, export, save, load."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsify
from sparsify import SparseLinear

models = pytest.importorskip(
    "torchvision.models", reason="torchvision is missing: pip install 'sparsify-torch[vision]'"
)

#: The smallest input that each takes, and how many Linears convert swaps.
MODELS = {
    "vit_b_16": (32, 49),
    "swin_t": (64, 52),
    "convnext_tiny": (32, 37),
    "mobilenet_v3_large": (32, 2),
    "resnet50": (32, 1),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take no gradients, and draw weights in a fraction of the time that torchvision takes."""
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, *_, **__: nn.init.normal_(tensor, std=0.02))
    with torch.no_grad():
        yield


def build(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    size = {"image_size": MODELS[name][0]} if name == "vit_b_16" else {}
    model = models.get_model(name, weights=None, **size).eval()
    if name == "vit_b_16":  # whose head is all zeros: every output would be zero, pruned or not
        nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_convert_prune_export_save_load(name: str, tmp_path: Path) -> None:
    size, n_layers = MODELS[name]
    model = build(name, seed=0)
    x = torch.randn(1, 3, size, size)
    dense, exact = model(x), copy.deepcopy(model).double()(x.double())
    assert sparsify.convert(model) is model
    assert sum(isinstance(module, SparseLinear) for module in model.modules()) == n_layers
    if name == "vit_b_16":  # attention adds up in another order
        assert (model(x) - exact).abs().max() <= 2 * (dense - exact).abs().max()
    else:
        assert torch.equal(model(x), dense)

    sparsify.prune(model, 0.8)
    masked = model(x)
    assert not torch.equal(masked, dense)
    fast = sparsify.export(model, format="csr")
    assert torch.equal(fast(x), masked)  # the reference kernel multiplies the very same weights

    path = tmp_path / "model.safetensors"
    sparsify.save(fast, path)
    stored = sparsify.inspect(path)
    assert len(stored) == n_layers
    assert stored.total.n_bytes < 0.35 * stored.total.dense_bytes
    loaded = sparsify.load(path, build(name, seed=1))
    assert torch.equal(loaded(x), masked)
