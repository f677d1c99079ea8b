"""convert(functional=True): Parameters that a module's own code multiplies become layers; its code stays as it is."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsify
from sparsify import CSRLinear, LeftDenseWarning, SparseLinear, convert, export, load, prune, save, to_dense
from sparsify.conversion.converters.functional import multiplied
from sparsify.layers.transposed import SparseTransposed

X = torch.linspace(-1, 1, 2 * 3 * 8).reshape(2, 3, 8)


class Multiplies(nn.Module):
    """A Linear beside Parameters that are multiplied in several ways, and one that is not."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Parameter(torch.randn(12, 8) / 3)
        self.bias = nn.Parameter(torch.randn(12))
        self.right = nn.Parameter(torch.randn(12, 6) / 3)
        self.turned = nn.Parameter(torch.randn(8, 6) / 3)
        self.scale = nn.Parameter(torch.randn(3, 8))
        self.last = nn.Linear(8, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        x = torch.relu(F.linear(x, self.up, self.bias)) + shift
        x = self.dropout(torch.relu(x @ self.right))
        x = torch.matmul(x, self.turned.t())
        if self.training:
            x = 2 * x
        return self.last(x * self.scale)


LAYERS = ["last", "up_layer", "right_layer", "turned_layer"]


def masked(sparsity: float = 0.75) -> Multiplies:
    return prune(convert(Multiplies(), functional=True), sparsity).eval()


@pytest.mark.parametrize("training", [True, False])
def test_outputs_stay_bit_for_bit_and_the_code_stays_python(training: bool) -> None:
    model, twin = Multiplies().train(training), Multiplies().train(training)
    parameters = {id(p) for p in model.parameters()}
    assert convert(model, functional=True) is model
    assert isinstance(model, Multiplies)
    for shift in (0.0, 0.5):
        torch.manual_seed(1)
        found = model(X, shift=shift)
        torch.manual_seed(1)
        assert torch.equal(found, twin(X, shift=shift))
    assert {id(p) for p in model.parameters()} == parameters
    assert model.training == training
    names = [name for name, m in model.named_modules() if isinstance(m, sparsify.layers.MaskedLayer)]
    assert sorted(names) == sorted(LAYERS)
    assert isinstance(model.get_submodule("up_layer"), SparseLinear)
    assert isinstance(model.get_submodule("right_layer"), SparseTransposed)
    convert(model, functional=True)
    assert torch.equal(model.eval()(X), twin.eval()(X))


def test_without_functional_only_modules_convert() -> None:
    with pytest.warns(sparsify.LeftDenseWarning, match=r"\(root\) \(Multiplies\); functional=True takes Parameters"):
        model = convert(Multiplies())
    assert [n for n, m in model.named_modules() if isinstance(m, sparsify.layers.MaskedLayer)] == ["last"]


def test_pruned_it_computes_with_the_masked_weights_and_trains_the_rest() -> None:
    model, twin = masked(), Multiplies().eval()
    with torch.no_grad():
        for name in LAYERS:
            layer = model.get_submodule(name)
            (twin.last.weight if name == "last" else getattr(twin, name.removesuffix("_layer"))).copy_(
                layer.masked_weight()
            )
    assert torch.equal(model(X), twin(X))
    model(X).square().sum().backward()
    for name in LAYERS:
        layer = model.get_submodule(name)
        assert layer.sparsity == 0.75
        assert layer.weight.grad.any()
        assert not layer.weight.grad[~layer.mask].any()


@pytest.mark.parametrize("format", ["csr", "auto", "dense"])
def test_export_save_load_and_back(tmp_path: Path, format: str) -> None:
    model = masked()
    fast = export(model, format=format)
    torch.testing.assert_close(fast(X), model(X))
    if format == "csr":
        assert all(isinstance(fast.get_submodule(name), CSRLinear) for name in LAYERS)
        for name in LAYERS:  # and it is the sparse kernel that runs, not an unpacked weight
            fast.get_submodule(name)._unpack = None
        torch.testing.assert_close(fast(X), model(X))
        for name in LAYERS:
            del fast.get_submodule(name).__dict__["_unpack"]
    save(fast, tmp_path / "fast.safetensors")
    loaded = load(tmp_path / "fast.safetensors", Multiplies(1).eval())
    assert torch.equal(loaded(X), fast(X))
    dense = to_dense(loaded)
    assert type(dense) is Multiplies
    assert list(dense.state_dict()) == list(Multiplies().state_dict())
    assert torch.equal(dense.right, model.right)
    torch.testing.assert_close(dense(X), model(X))


def test_a_masked_model_comes_back(tmp_path: Path) -> None:
    model = masked()
    save(model, tmp_path / "masked.safetensors")
    loaded = load(tmp_path / "masked.safetensors", Multiplies(1).eval())
    assert torch.equal(loaded(X), model(X))
    assert loaded.get_submodule("right_layer").sparsity == 0.75


def test_a_dense_state_dict_loads() -> None:
    outer = nn.ModuleList([convert(Multiplies(1), functional=True)])
    outer.load_state_dict(nn.ModuleList([Multiplies(0)]).state_dict())
    assert torch.equal(outer[0].eval()(X), Multiplies(0).eval()(X))
    outer.load_state_dict(outer.state_dict())
    for twin in (copy.deepcopy(outer), pickle.loads(pickle.dumps(outer))):
        assert torch.equal(twin[0](X), outer[0](X))


def test_layers_are_chosen_by_name() -> None:
    model = convert(Multiplies(), functional=True, include=["up_layer", "right_layer"])
    assert [n for n, m in model.named_modules() if isinstance(m, sparsify.layers.MaskedLayer)] == [
        "up_layer",
        "right_layer",
    ]
    prune(model, 0.5, pattern="1x4", include="right_layer")  # along its 12 inputs
    rows = model.get_submodule("right_layer").mask.t().reshape(6, 3, 4)
    assert (rows.all(-1) | ~rows.any(-1)).all()
    with pytest.raises(ValueError, match="'scale_layer' matches no layer"):
        convert(Multiplies(), functional=True, include="scale_layer")


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(8, 8)), Multiplies()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inner(x), self.inner.up[:4, :4]) if x.sum() > 0 else self.inner(x @ self.weight)


def test_what_cannot_be_traced_is_named_and_stands_in_no_others_way() -> None:
    model = nn.ModuleDict({"branches": Branches()})
    with pytest.warns(LeftDenseWarning, match=r"branches \(its code cannot be traced by torch\.fx \(symbolically"):
        convert(model, functional=True)
    names = [n for n, m in model.named_modules() if isinstance(m, sparsify.layers.MaskedLayer)]
    assert sorted(names) == sorted(f"branches.inner.{name}" for name in LAYERS)


class Use(nn.Module):
    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.randn(8, 8)), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


B = torch.linspace(-1, 1, 8)


@pytest.mark.parametrize(
    ("use", "transposed"),
    [
        (lambda x, w: F.linear(x, w), False),
        (lambda x, w: F.linear(input=x, weight=w, bias=B), False),
        (lambda x, w: x @ w.t(), False),
        (lambda x, w: x @ w.T, False),
        (lambda x, w: x @ w.mT, False),
        (lambda x, w: x.matmul(w.transpose(0, 1)), False),
        (lambda x, w: torch.matmul(x, w.permute(1, 0)), False),
        (lambda x, w: torch.matmul(x, torch.transpose(w, -1, -2)), False),
        (lambda x, w: torch.addmm(B, x, w.t()), False),
        (lambda x, w: torch.mm(x, w), True),
        (lambda x, w: x @ w, True),
        (lambda x, w: torch.addmm(B, x, w), True),
    ],
)
def test_every_way_to_multiply(use: Callable[[Tensor, Tensor], Tensor], transposed: bool) -> None:
    torch.manual_seed(0)
    model, x = Use(use), torch.randn(3, 8)
    assert multiplied(model) == ({"weight": transposed}, {})
    expected = model(x)
    convert(model, functional=True)
    assert torch.equal(model(x), expected)
    fast = export(prune(model, 0.75), format="csr")
    fast.get_submodule("weight_layer")._unpack = None
    torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize(
    "use",
    [lambda x, w: x * w, lambda x, w: w @ x, lambda x, w: F.linear(w, x), lambda x, w: torch.addmm(w, x, x)],
)
def test_other_uses_are_none(use: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert multiplied(Use(use)) == ({}, {})
