"""Additions of a user to a layer, beside weight and bias, stay with it in every form; else the layer is left, named."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn

import sparsify
from sparsify import LeftDenseWarning, SparseLinear, convert, export, load, prune, save, to_dense
from sparsify.conversion.module_surgery import replace_in_place
from sparsify.layers.masked import MaskedLayer


class Scaled(nn.Linear):
    """Adds data of every sort, and no method."""

    factor = 2.0

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.register_buffer("scale", torch.tensor(3.0))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.gain = nn.Parameter(torch.full((8,), 0.5))
        self.probe = nn.Linear(8, 2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.attention = Scaled(), nn.MultiheadAttention(8, 2, batch_first=True)
        self.attention.register_buffer("calls", torch.zeros(3))
        self.attention.probe = nn.ReLU()
        self.attention.out_proj.register_buffer("seen", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x) * self.fc.scale * self.fc.gain * self.fc.factor * self.fc.scratch.sum()
        x = self.attention(x, x, x, need_weights=False)[0] + self.attention.calls.sum()
        return self.attention.probe(x + self.attention.out_proj.seen.sum()) + self.fc.probe(x).sum()


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


X = torch.linspace(-1, 1, 48).reshape(2, 3, 8)
OWN = ("fc.scale", "fc.gain", "attention.calls", "attention.out_proj.seen")


@pytest.mark.parametrize("exported", [False, True], ids=["masked", "exported"])
def test_data_on_a_layer_goes_the_whole_way(exported: bool, tmp_path: Path) -> None:
    dense = net()
    model = convert(net())
    torch.testing.assert_close(model(X), dense(X))
    assert {*OWN} <= set(model.state_dict())
    prune(model, 0.5)
    with torch.no_grad():
        model.fc.scale.fill_(7.0)
    model = export(model, format="csr") if exported else model
    expected = model(X)
    assert {*OWN} <= set(model.state_dict())
    assert "fc.scratch" not in model.state_dict()
    copied = copy.deepcopy(model)
    copied.load_state_dict(model.state_dict())
    assert torch.equal(copied(X), expected)

    save(model, tmp_path / "net.safetensors")
    loaded = load(tmp_path / "net.safetensors", net())
    assert torch.equal(loaded(X), expected)
    assert loaded.fc.scale == 7.0

    to_dense(model)
    assert set(model.state_dict()) == set(dense.state_dict())
    torch.testing.assert_close(model(X), expected)
    assert [type(model.fc), type(model.fc.probe), type(model.attention)] == [nn.Linear] * 2 + [nn.MultiheadAttention]
    assert isinstance(convert(model).fc, SparseLinear)  # nothing of ours is taken for the user's


def test_an_export_shares_no_child_and_no_attribute_slot_with_its_source() -> None:
    model = prune(convert(net()), 0.5)
    fast = export(model, format="csr")
    assert fast.fc.probe is not model.fc.probe
    assert fast.fc._buffers is not model.fc._buffers
    assert fast.fc.gain.data_ptr() != model.fc.gain.data_ptr()


def with_own(name: str, value: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = nn.Linear(8, 4)
        layer.register_buffer(name, value) if type(value) is Tensor else setattr(layer, name, value)
        return layer

    return make


def with_bias_as(kind: str) -> nn.Linear:
    layer = nn.Linear(8, 4)
    bias = layer.bias.detach()
    if kind == "pruned":
        return torch_prune.l1_unstructured(layer, "bias", 0.5)
    if kind == "row":
        layer.bias = nn.Parameter(bias[None])
        return layer
    del layer.bias
    layer.register_buffer("bias", bias)
    return layer


def stacked() -> nn.Linear:
    layer = nn.Linear(8, 4)
    layer.weight = nn.Parameter(layer.weight.detach()[None])
    return layer


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (with_own("mask", torch.ones(3)), "it has a buffer 'mask', a name that SparseLinear needs; rename that"),
        (with_own("mask", torch.zeros(4, 8)), "it has a buffer 'mask' that its weight does not follow"),
        (with_own("mask", torch.full((4, 8), 0.5)), "its mask holds other values than 0 and 1"),
        (with_own("values", torch.ones(3)), "it has a buffer 'values', a name that"),
        (with_own("training_kernels", 10), "it has an attribute 'training_kernels', a name that"),
        (with_own("activation", nn.ReLU()), "it has a child 'activation', a name that"),
        (with_own("form", nn.Parameter(torch.ones(1))), "it has a Parameter 'form', a name that"),
        (lambda: with_bias_as("buffer"), "its bias is a buffer, not a Parameter"),
        (lambda: with_bias_as("row"), r"its bias has the shape \(1, 4\)"),
        (stacked, r"its weight has the shape \(1, 4, 8\), where 2 dimensions are needed"),
    ],
)
def test_what_a_masked_layer_could_not_hold_leaves_the_layer_dense_and_named(
    make: Callable[[], nn.Module], why: str
) -> None:
    odd = make()
    state = {name: value.clone() for name, value in odd.state_dict().items()}
    model = nn.ModuleDict({"odd": odd, "fc": nn.Linear(8, 4)})
    with pytest.warns(LeftDenseWarning, match=rf"odd \({why}"):
        convert(model)
    assert type(odd) is nn.Linear
    torch.testing.assert_close(dict(odd.state_dict()), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_a_mask_kept_by_hand_is_taken_over(dtype: torch.dtype, tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 4))
        model[0].register_buffer("mask", (torch.rand(4, 8) > 0.5).to(dtype))
        with torch.no_grad():
            model[0].weight *= model[0].mask
        return model

    dense, model = build(), convert(build())
    assert torch.equal(model(X), dense(X))
    assert torch.equal(model[0].mask, dense[0].mask.bool())
    for one in (model, export(model, format="csr")):
        save(one, tmp_path / "one.safetensors")
        assert torch.equal(load(tmp_path / "one.safetensors", build())(X), one(X))


class Stop(BaseException):
    """No Exception, as an interruption is none."""


def stopping_at(n: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the n-th of all the steps raise; returns the steps that were taken, as they are taken."""
    taken: list[str] = []

    def counted(name: str, step: Callable) -> Callable:  # type: ignore[type-arg]
        def run(*args: object, **options: object) -> object:
            taken.append(name)
            if len(taken) == n:
                raise Stop
            return step(*args, **options)

        return run

    module = sys.modules["sparsify.conversion.convert"]  # the name in the package is the function
    for owner, name in (
        (module, "replace_in_place"),
        (module, "tie"),
        (module, "untie"),
        (MaskedLayer, "set_mask"),
        (MaskedLayer, "clear_masked"),
        (nn.Module, "register_parameter"),
        (nn.Module, "register_buffer"),
    ):
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    return taken


class Parts(nn.Module):
    """A layer with a mask of torch's, an attention, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.attention = Scaled(), nn.MultiheadAttention(8, 2)
        self.embedding, self.head = nn.Embedding(5, 8), nn.Linear(8, 5, bias=False)
        self.head.weight = self.embedding.weight
        torch_prune.l1_unstructured(self.fc, "weight", 0.5)


def everything(model: nn.Module) -> dict[str, object]:
    return {
        "types": [(name, type(module)) for name, module in model.named_modules()],
        "names": [sorted(module.__dict__) for module in model.modules()],
        "objects": [id(value) for value in (*model.parameters(), *model.buffers(), *model.modules())],
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "hooks": [list(module._forward_pre_hooks.values()) for module in model.modules()],
    }


@pytest.mark.parametrize("verb", ["convert", "to_dense", "to_dense of an export"])
def test_a_step_that_raises_leaves_the_model_as_it_was(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n_failures = 0
    for n in range(1, 100):
        torch.manual_seed(0)
        model = Parts()
        if verb != "convert":
            prune(convert(model, tied="share"), 0.5)
            model.fc.masked_mode = "frozen"  # as in the middle of a schedule
            with torch.no_grad():
                model.fc.weight.fill_(1.0)
        if "export" in verb:
            model = export(model, format="csr")
        before = everything(model)
        with monkeypatch.context() as patched:
            taken = stopping_at(n, patched)
            try:
                convert(model, tied="share") if verb == "convert" else to_dense(model)
            except Stop:
                n_failures += 1
            else:
                assert len(taken) < n  # no step swallowed the error
                break
        after = everything(model)
        torch.testing.assert_close(after.pop("state"), before.pop("state"), rtol=0, atol=0)
        assert after == before, f"step {n}, {taken[-1]}"
    assert n_failures > 5


def test_become_keeps_what_is_beside_a_layer_and_takes_what_is_new() -> None:
    layer = Scaled()
    replace_in_place(layer, SparseLinear(8, 8, 0.5, seed=1))
    assert {name for name, _ in layer.named_buffers()} == {"mask", "scale", "scratch"}
    assert layer.factor == 2.0
    assert layer._non_persistent_buffers_set == {"scratch"}
    assert sparsify.report(layer)[0].sparsity == 0.5
