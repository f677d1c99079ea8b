"""A small model of several layers, saved, and checks that a refused file changes nothing of a model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify import CheckpointError


class Net(nn.Module):
    """A bit of everything: two Linears, one without bias, a norm with buffers, a conv, an attention."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv1d(3, 8, 1)
        self.norm = nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc1 = nn.Linear(8, 20)
        self.fc2 = nn.Linear(20, 5, bias=False)
        self.register_buffer("scale", torch.tensor(0.5 + seed))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).transpose(1, 2)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.fc2(torch.relu(self.fc1(x))) * self.scale


def masked(seed: int = 0, sparsity: float = 0.7) -> nn.Module:
    model = sparsify.convert(Net(seed), include=["fc1", "fc2"])
    return sparsify.prune(model, sparsity).eval()


def saved(tmp_path: Path, model: nn.Module | None = None) -> Path:
    path = tmp_path / "model.safetensors"
    sparsify.save(sparsify.export(masked(), format="csr") if model is None else model, path)
    return path


def states(model: nn.Module) -> dict[str, tuple[type, object]]:
    """Return everything that a failed load could have changed: types, identities and a copy of the values."""
    values = {name: (id(t), t.detach().clone()) for name, t in model.state_dict(keep_vars=True).items()}
    modules = {name: type(module) for name, module in model.named_modules()}
    return {"modules": modules, "values": values, "training": {n: m.training for n, m in model.named_modules()}}


def assert_untouched(model: nn.Module, before: dict) -> None:
    now = states(model)
    assert now["modules"] == before["modules"]
    assert now["training"] == before["training"]
    assert now["values"].keys() == before["values"].keys()
    for name, (identity, value) in now["values"].items():
        assert identity == before["values"][name][0], name
        assert torch.equal(value, before["values"][name][1]), name


def assert_refused(path: Path, model: nn.Module, message: str) -> None:
    before = states(model)
    with pytest.raises(CheckpointError, match=message) as caught:
        sparsify.load(path, model)
    assert str(path) in str(caught.value)
    assert_untouched(model, before)
