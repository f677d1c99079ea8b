"""Weights in a ParameterDict or ParameterList, multiplied by the code of the module around: layers of the container."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsify
from sparsify import convert, export, load, prune, save, to_dense
from sparsify.conversion.convert import sparse_layers

X = torch.linspace(-1, 1, 2 * 3 * 8).reshape(2, 3, 8)


class Experts(nn.Module):
    """Experts as stacks in a dict, a list of projections, a dict that nothing multiplies, and a weight of its own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.own = nn.Parameter(torch.randn(8, 8) / 3)
        self.experts = nn.ParameterDict(
            {"up": torch.randn(3, 12, 8) / 3, "down": torch.randn(3, 8, 12) / 3, "scale": torch.randn(8)}
        )
        self.turns = nn.ParameterList([torch.randn(8, 8) / 3, torch.randn(8, 6) / 3])
        self.shifts = nn.ParameterDict({"in": torch.randn(3, 8), "out": torch.randn(3, 6)})

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x + self.shifts["in"], self.own)
        hidden = torch.relu(torch.einsum("bti,eoi->beto", x, self.experts["up"]))
        x = torch.einsum("beti,eoi->bto", hidden, self.experts["down"]) * self.experts.scale
        return F.linear(x, self.turns[0]) @ self.turns[1] + self.shifts.out


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Experts(seed), Experts(seed + 1)])
        self.head = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + self.head(block(x))
        return x


NAMES = ["own_layer", "experts.up_layer", "experts.down_layer", "turns.0_layer", "turns.1_layer"]


def masked(sparsity: float = 0.75) -> Net:
    return prune(convert(Net(), functional=True), sparsity).eval()


def test_all_that_is_multiplied_becomes_a_layer_and_outputs_stay() -> None:
    model, twin = convert(Net(), functional=True), Net()
    wanted = {"head"} | {f"blocks.{number}.{name}" for number in (0, 1) for name in NAMES}
    assert set(sparse_layers(model)) == wanted
    assert torch.equal(model(X), twin(X))
    experts, plain = model.get_submodule("blocks.0.experts"), twin.get_submodule("blocks.0.experts")
    assert isinstance(experts, nn.ParameterDict)
    assert list(experts) == list(plain)  # type: ignore[call-overload]
    assert torch.equal(experts["up"], plain["up"])  # type: ignore[index]
    assert len(model.get_submodule("blocks.0.turns")) == 2  # type: ignore[arg-type]
    assert type(model.get_submodule("blocks.0.shifts")) is nn.ParameterDict
    convert(model, functional=True)
    assert torch.equal(model(X), twin(X))


def test_pruned_outputs_are_those_of_dense_weights_with_zeros() -> None:
    model, twin = masked(), Net()
    with torch.no_grad():
        for number in (0, 1):
            for name in NAMES:
                layer = model.get_submodule(f"blocks.{number}.{name}")
                weight = twin.get_parameter(f"blocks.{number}.{name.removesuffix('_layer')}")
                weight.copy_(layer.masked_weight())
        twin.head.weight.copy_(model.head.masked_weight())
    torch.testing.assert_close(model(X), twin(X))
    assert all(layer.sparsity == 0.75 for layer in sparse_layers(model).values())
    model.train()(X).square().sum().backward()
    for layer in sparse_layers(model).values():
        assert bool((layer.weight.grad[~layer.mask] == 0).all())  # type: ignore[index]
        assert bool(layer.weight.grad.any())  # type: ignore[union-attr]


@pytest.mark.parametrize("data", [False, True])
def test_it_is_exported_saved_and_loaded(tmp_path: Path, data: bool) -> None:
    model = convert(Net(), functional=True).eval()
    if data:  # an einsum over experts has no rows to calibrate on
        prune(model, 0.75, exclude="*.experts.*", method="wanda", data=[X])
    else:
        prune(model, 0.75)
    wanted = model(X)
    exported = export(model, format="csr")
    torch.testing.assert_close(exported(X), wanted)
    for twin in (copy.deepcopy(exported), pickle.loads(pickle.dumps(exported))):
        assert torch.equal(twin(X), exported(X))
    for number, saved in enumerate((model, exported)):
        save(saved, tmp_path / f"{number}.safetensors")
        loaded = load(tmp_path / f"{number}.safetensors", Net(5).eval())
        torch.testing.assert_close(loaded(X), wanted)


def test_it_becomes_dense_again_and_loads_a_dense_state_dict() -> None:
    model = masked()
    wanted = model(X)
    dense = to_dense(copy.deepcopy(model))
    assert type(dense.get_submodule("blocks.1.experts")) is nn.ParameterDict
    assert list(dense.state_dict()) == list(Net().state_dict())
    torch.testing.assert_close(dense(X), wanted)
    model.load_state_dict(Net(3).state_dict())
    full = convert(Net(3), functional=True)
    full.load_state_dict(model.state_dict())
    torch.testing.assert_close(full.eval()(X), model(X))


class Untraceable(nn.Module):
    """Reads a container in code that torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({"a": torch.randn(8, 8)})
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x @ self.weights["a"]
        return self.head(x)


def test_a_container_read_by_untraceable_code_stays_dense_and_is_named() -> None:
    with pytest.warns(sparsify.LeftDenseWarning, match=r"weights.*cannot be traced"):
        model = convert(Untraceable(), functional=True)
    assert list(sparse_layers(model)) == ["head"]


class Loops(nn.Module):
    """Reads all Parameters of its containers in loops, of one in a list too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dict = nn.ParameterDict({"a": torch.randn(8, 8), "b": torch.randn(8, 8)})
        self.list = nn.ParameterList([torch.randn(8, 8), torch.randn(8, 8)])
        self.nested = nn.ModuleList([nn.ParameterDict({"a": torch.randn(8, 8)})])

    def forward(self, x: Tensor) -> Tensor:
        for _, weight in self.dict.items():
            x = F.linear(x, weight)
        for weight in self.list:
            x = x @ weight
        for weights in self.nested:
            x = F.linear(x, weights["a"])
        return x


def test_loops_over_containers() -> None:
    model, twin = convert(Loops(), functional=True), Loops()
    assert sorted(sparse_layers(model)) == [
        *("dict.a_layer", "dict.b_layer", "list.0_layer", "list.1_layer", "nested.0.a_layer")
    ]
    assert "(1_layer): SparseTransposed(in_features=8, out_features=8, sparsity=0)" in repr(model)
    assert torch.equal(model(X), twin(X))
