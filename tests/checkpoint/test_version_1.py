"""A file of version 1, written once, loads forever."""

from pathlib import Path

import torch
from torch import Tensor, nn

import sparsify
from sparsify import CSRLinear, SparseLinear

DATA = Path(__file__).parents[1] / "data"


def v1_model() -> nn.Module:
    """Build the model whose weights tests/data/v1.safetensors holds; every value is a formula."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(6, 4)
            self.csr, self.bitmask, self.dense = nn.Linear(64, 3), nn.Linear(4, 9), nn.Linear(3, 2)
            self.masked, self.head = nn.Linear(5, 4, bias=False), nn.Linear(4, 6, bias=False)
            self.head.weight = self.embedding.weight
            self.register_buffer("count", torch.tensor(7))

    return Model()


def v1_weight(shape: tuple[int, int], every: int) -> tuple[Tensor, Tensor]:
    """Return weight and mask: weight k is k / 8 - 1, and every so many-th is kept."""
    k = torch.arange(shape[0] * shape[1]).reshape(shape)
    mask = k % every == 0
    return (k / 8 - 1) * mask, mask


V1_LAYERS = {"csr": ((3, 64), 50), "bitmask": ((9, 4), 2), "dense": ((2, 3), 1), "masked": ((4, 5), 3)}


def write_v1(path: Path) -> None:
    """Write the file anew; only for a new format version, beside the old file."""
    model = v1_model()
    with torch.no_grad():
        model.embedding.weight.copy_(torch.arange(24.0).reshape(6, 4))
        for name, (shape, every) in V1_LAYERS.items():
            model.get_submodule(name).weight.copy_(v1_weight(shape, every)[0])
            if model.get_submodule(name).bias is not None:
                model.get_submodule(name).bias.copy_(torch.arange(float(shape[0])))
    sparsify.convert(model, include=[*V1_LAYERS])
    for name, (shape, every) in V1_LAYERS.items():
        model.get_submodule(name).set_mask(v1_weight(shape, every)[1])
    for name in ("csr", "bitmask", "dense"):
        setattr(model, name, CSRLinear.from_sparse(model.get_submodule(name)))
    sparsify.save(model, path)


def test_the_file_of_version_1_loads() -> None:
    path = DATA / "v1.safetensors"
    assert path.stat().st_size < 4096
    assert {row.name: row.format for row in sparsify.inspect(path)} == {
        "csr": "csr",
        "bitmask": "bitmask",
        "dense": "dense",
        "masked": "bitmask",
    }
    model = sparsify.load(path, v1_model())
    for name, (shape, every) in V1_LAYERS.items():
        wanted, mask = v1_weight(shape, every)
        layer = model.get_submodule(name)
        assert isinstance(layer, SparseLinear if name == "masked" else CSRLinear)
        sparse = layer.to_sparse() if isinstance(layer, CSRLinear) else layer
        assert torch.equal(sparse.weight, wanted), name
        assert torch.equal(sparse.mask, mask), name
        if name != "masked":
            assert torch.equal(layer.bias, torch.arange(float(shape[0])))
    assert torch.equal(model.embedding.weight, torch.arange(24.0).reshape(6, 4))
    assert model.head.weight is model.embedding.weight
    assert int(model.count) == 7
