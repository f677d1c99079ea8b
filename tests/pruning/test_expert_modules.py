"""Experts that are modules of their own, in a ModuleDict or ModuleList: each sees few tokens of a batch, or none."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsify

NAMES = ("code", "french", "mathematics", "other")
X = [torch.randn(6, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]


class Routed(nn.Module):
    """Experts by name or by number; a router sends each row to one of them, and the rest are not called."""

    def __init__(self, *, named: bool) -> None:
        super().__init__()
        made = [nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in NAMES]
        self.router = nn.Linear(16, len(NAMES))
        self.experts = nn.ModuleDict(dict(zip(NAMES, made, strict=True))) if named else nn.ModuleList(made)

    def chosen(self, x: Tensor) -> list[Tensor]:
        """Return the numbers of the rows of each expert."""
        best = self.router(x).argmax(-1)
        return [(best == number).nonzero().flatten() for number in range(len(NAMES))]

    def forward(self, x: Tensor) -> Tensor:
        """Add to each row the output of its expert."""
        output = x
        experts = self.experts.values() if isinstance(self.experts, nn.ModuleDict) else self.experts
        for expert, rows in zip(experts, self.chosen(x), strict=True):
            if len(rows):
                output = output.index_add(0, rows, expert(x[rows]))
        return output


def routed(*, named: bool) -> Routed:
    torch.manual_seed(0)
    return Routed(named=named).eval()


@pytest.mark.parametrize("named", [True, False], ids=["ModuleDict", "ModuleList"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
def test_each_is_pruned_on_its_own_tokens(method: str, named: bool) -> None:
    model = routed(named=named)
    counts = torch.tensor([[len(rows) for rows in model.chosen(x)] for x in X])
    assert 0 in counts
    assert counts.sum(0).all()
    dense = copy.deepcopy(model)
    sparsify.prune(sparsify.convert(model, exclude="router"), 0.5, method=method, data=X)
    for number, name in enumerate(NAMES if named else "0123"):
        rows = [x[dense.chosen(x)[number]] for x in X if len(dense.chosen(x)[number])]
        alone = sparsify.convert(copy.deepcopy(dense.experts.get_submodule(name)))
        sparsify.prune(alone, 0.5, method=method, data=rows)
        for layer in ("0", "2"):
            ours, theirs = (m.get_submodule(layer) for m in (model.experts.get_submodule(name), alone))
            assert isinstance(ours, sparsify.SparseLinear)
            assert isinstance(theirs, sparsify.SparseLinear)
            assert torch.equal(ours.mask, theirs.mask)
            torch.testing.assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("named", [True, False], ids=["ModuleDict", "ModuleList"])
@pytest.mark.parametrize("form", ["csr", "auto"])
def test_exported_ones_run_on_any_number_of_tokens(form: str, named: bool, tmp_path: Path) -> None:
    model = sparsify.prune(sparsify.convert(routed(named=named)), 0.8)
    fast = sparsify.export(model, format=form)
    for x in (*X, X[0][:1], X[0][:0]):
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    sparsify.save(fast, tmp_path / "model.safetensors")
    loaded = sparsify.load(tmp_path / "model.safetensors", routed(named=named))
    torch.testing.assert_close(loaded(X[0]), model(X[0]), rtol=1e-4, atol=1e-5)
